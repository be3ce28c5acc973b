r"""Few-shot classification of unseen classes, by congruous and by incongruous meta-training.

  python -m experiments.studies.classification

Congruous: all learners, on one network and one image source. Incongruous: one learned fine-tuner (LFT), meta-trained on
several sources, image sizes and architectures together, which learners of an initialization cannot be. The LFT, SGD and
Adam start from random weights. SGD, Adam and the inner learning rates of the other learners are tuned on validation
tasks, which have the classes of meta-training and other images. Test tasks have other classes and other images.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from experiments import common, config
from experiments.report import figures
from lft_jax.base import Learner
from lft_jax.cli import provenance
from lft_jax.data import load_source
from lft_jax.data._tfds import SPLIT_BY_CLASS
from lft_jax.meta import learners
from lft_jax.optimizers import rules
from lft_jax.tasks.classification import ClassificationFamily, classification_family

NUM_STEPS = 5
_MOST_IMAGES = 400  # per class; sampling a task takes time in proportion
_TRAIN_QUERY_SHOTS, _TEST_QUERY_SHOTS = 5, 15
_SCANNED = 50  # meta-steps per call
_AT_ONCE = 25  # tasks evaluated at a time
_FIXED = {name: learners.fixed(name, getattr(optax, name)) for name in ("sgd", "adam")}
_RATES = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.06, 0.1, 0.3, 1.0)
#: Grids of the optimizers that are not meta-learned.
GRIDS = {
    "sgd": [{"learning_rate": rate, "momentum": m} for rate in _RATES for m in (0.0, 0.9)],
    "adam": [{"learning_rate": rate, "b1": b1} for rate in _RATES for b1 in (0.5, 0.9)],
}
RULE = rules.coordinate_lstm(8, 1, features=("adam", "progress"))


def _first_order_maml(rate):
    return dataclasses.replace(learners.maml(optax.sgd(rate), second_order=False), name="first_order_maml")


#: Learners of an initialization: `{method: (settings -> learner, settings tried)}`.
INITIALIZATIONS: dict[str, tuple[Callable[..., Learner], tuple[dict[str, float], ...]]] = {
    "maml": (lambda rate: learners.maml(optax.sgd(rate)), ({"rate": 0.1}, {"rate": 0.4})),
    "first_order_maml": (_first_order_maml, ({"rate": 0.1}, {"rate": 0.4})),
    "sign_maml": (learners.sign_maml, ({"learning_rate": 0.003}, {"learning_rate": 0.01})),
    "anil": (lambda rate: learners.anil(optax.sgd(rate)), ({"rate": 0.1}, {"rate": 0.4})),
    "meta_sgd": (learners.meta_sgd, ({"learning_rate": 0.1}, {"learning_rate": 0.4})),
    "reptile": (lambda rate: learners.reptile(optax.sgd(rate)), ({"rate": 0.1}, {"rate": 0.4})),
    "joint": (lambda: learners.joint(RULE), ({},)),
}
#: Learners that fine-tune alike share one compiled program.
_FINE_TUNES_AS = {"first_order_maml": "maml", "reptile": "maml"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/classification.json", "Results file. The figure is put beside it.")
    congruous: str = config.option("mnist:14:conv4:8", "Tasks of all learners, as source:size:architecture[:width].")
    incongruous: tuple[str, ...] = config.option(
        ("digits:8:mlp:32", "mnist:14:conv4:8", "mnist:28:linear", "cifar10:16:conv4:8"),
        "Tasks that one LFT is meta-trained on together, in the same form.",
    )
    ways: int = config.option(4, "Classes of a task.")
    shots: int = config.option(5, "Support images per class.")
    seeds: tuple[int, ...] = config.option(
        (0, 1, 2), "Meta-training seeds; inner learning rates are tuned with the first."
    )
    meta_steps: int = config.option(400, "Meta-steps per learner.")
    tasks: int = config.option(4, "Tasks per family and meta-step.")
    num_tasks: int = config.option(100, "Test tasks per family.")
    validation_tasks: int = config.option(25, "Validation tasks per family, for tuning.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def classify(flags: Config) -> dict[str, Any]:
    """Runs the experiment, writes its files and returns the results."""
    described = {name: value for name, value in dataclasses.asdict(flags).items() if name != "data_dir"}
    results = {"provenance": provenance.describe(flags.seeds), "flags": described, "rows": []}
    for part, cases in (("congruous", (flags.congruous,)), ("incongruous", flags.incongruous)):
        families = [make_families(case, flags) for case in cases]
        together = [train for train, _, _ in families]
        train_lft = _trainer(lambda: learners.lft(RULE), together, flags, rate=1e-2)
        rule = [train_lft(seed, flags.meta_steps) for seed in flags.seeds]
        for case, (train, validation, test) in zip(cases, families, strict=True):
            accuracy, settings = {}, {}
            for name, grid in GRIDS.items():
                learner, tried = _FIXED[name], [_settings(setting) for setting in grid]
                best = common.best_of(learner, tried, validation, "accuracy", largest=True, **_tuning(flags))
                accuracy[name] = _accuracy(learner, [tried[best]], test, flags)
                settings[name] = {"setting": grid[best], "settings_tried": len(grid)}
            accuracy["lft"] = _accuracy(learners.lft(RULE), rule, test, flags)
            if part == "congruous":  # an initialization fits one network only
                evaluators = {name: common.with_settings(make) for name, (make, _) in INITIALIZATIONS.items()}
                for name, (make, grid) in INITIALIZATIONS.items():
                    learner = evaluators[_FINE_TUNES_AS.get(name, name)]
                    params, best = _tuned_seeds(make, grid, learner, train, validation, flags)
                    accuracy[name] = _accuracy(learner, params, test, flags)
                    settings[name] = {"setting": grid[best], "settings_tried": len(grid)}
            rivals = {name: accuracy[name].mean(0) for name in GRIDS}
            for name, values in accuracy.items():
                row = common.curve_row("accuracy", values.mean(0), rivals)
                seeds = values[:, :, -1].mean(1).tolist()
                case_row = {"part": part, "case": case, "method": name, "seed_accuracy": seeds}
                results["rows"].append({**case_row, **row, **settings.get(name, {})})
                print(f"{part}, {case}: {name}: {100 * row['accuracy'][-1]:.1f}% after {NUM_STEPS} steps", flush=True)
            provenance.write_json(flags.output, results)
    figures.classification(results["rows"], Path(flags.output).with_suffix(".png"))
    return results


def make_families(case: str, flags: Config) -> tuple[ClassificationFamily, ...]:
    """The meta-training, validation and test tasks of a case source:size:architecture[:width].

    If the splits of a source share their classes, the first half of the classes is for meta-training and validation,
    the second half for test.
    """
    described = re.fullmatch(r"(.+):(\d+):([a-z]\w*)(?::(\d+))?", case)
    if described is None:
        raise ValueError(f"congruous, incongruous: expected source:size:architecture[:width], got {case!r}.")
    source_name, size, architecture, width = described.groups()
    families = []
    query_shots = {"train": _TRAIN_QUERY_SHOTS, "validation": _TEST_QUERY_SHOTS, "test": _TEST_QUERY_SHOTS}
    for split, count in query_shots.items():
        source = load_source(source_name, split, data_dir=flags.data_dir)
        classes = np.unique(source.labels)
        if source_name not in SPLIT_BY_CLASS:
            seen = source.num_classes // 2
            classes = classes[classes >= seen] if split == "test" else classes[classes < seen]
        # The same number of images per class, so that validation and test share a program if there are enough images.
        rows = [np.flatnonzero(source.labels == label)[:_MOST_IMAGES] for label in classes]
        rows = np.concatenate([of_class[: min(map(len, rows))] for of_class in rows])
        options = {"ways": flags.ways, "shots": flags.shots, "query_shots": count, "size": int(size)}
        options |= {"architecture": architecture, "width": width and int(width)}
        families.append(classification_family(source.images[rows], source.labels[rows], **options))
    return tuple(families)


def _tuned_seeds(make_learner, grid, learner, family, validation, flags):
    """Meta-parameters of each seed with the best setting, as `learner` takes them, and the index of that setting."""
    train = _trainer(make_learner, (family,), flags)
    tried = [_settings(setting) for setting in grid]
    first = [{"settings": s, "learned": train(flags.seeds[0], flags.meta_steps, **s)} for s in tried]
    best = 0
    if len(grid) > 1:
        best = common.best_of(learner, first, validation, "accuracy", largest=True, **_tuning(flags))
    others = [train(seed, flags.meta_steps, **tried[best]) for seed in flags.seeds[1:]]
    return [first[best], *({"settings": tried[best], "learned": params} for params in others)], best


def _trainer(make_learner, families, flags, rate=3e-3):
    options = {"num_steps": NUM_STEPS, "tasks_per_family": flags.tasks, "rate": rate, "scanned": _SCANNED}
    return common.meta_training(make_learner, families, **options)


def _settings(setting):
    return {name: np.float32(value) for name, value in setting.items()}


def _tuning(flags):
    return {"num_steps": NUM_STEPS, "num_tasks": flags.validation_tasks, "at_once": _AT_ONCE}


def _accuracy(learner, params, family, flags):
    """Accuracy `[P, T, K]`: sets of meta-parameters, tasks, steps."""
    options = {"num_steps": NUM_STEPS, "num_tasks": flags.num_tasks, "at_once": _AT_ONCE}
    return common.judged(learner, params, family, "accuracy", **options)


if __name__ == "__main__":
    config.main(Config, classify)
