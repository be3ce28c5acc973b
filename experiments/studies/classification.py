r"""Few-shot classification of unseen classes, by congruous and by incongruous meta-training.

  python -m experiments.studies.classification

Congruous: all learners, on one network and one image source. Incongruous: one learned fine-tuner (LFT), meta-trained on
several sources, image sizes and architectures together, which learners of an initialization cannot be. The LFT, SGD and
Adam start from random weights. SGD, Adam and the inner learning rates of the other learners are tuned on validation
tasks, which have the classes of meta-training and other images. Test tasks have other classes and other images.
`experiments.studies.omniglot` is the same experiment on handwritten characters.

A run that was interrupted goes on: rows that the results file has, with equal flags, are kept.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from experiments import common, config
from experiments.report import figures
from experiments.studies import _omniglot_small
from lft_jax import evaluation
from lft_jax.base import Learner, PyTree, check_name
from lft_jax.cli import provenance
from lft_jax.data import SPLITS, load_source
from lft_jax.data._tfds import SPLIT_BY_CLASS
from lft_jax.meta import learners
from lft_jax.optimizers import rules
from lft_jax.tasks.classification import ClassificationFamily, classification_family

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
#: Learners of an initialization that fine-tune by gradient steps, whose meta-training may have fewer of them.
_BY_GRADIENT = ("maml", "first_order_maml", "sign_maml", "anil", "meta_sgd")


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/classification.json", "Results file. The figure is put beside it.")
    congruous: str = config.option("mnist:14:conv4:8", "Tasks of all learners, as source:size:architecture[:width].")
    incongruous: tuple[str, ...] = config.option(
        ("digits:8:mlp:32", "mnist:14:conv4:8", "mnist:28:linear", "cifar10:16:conv4:8"),
        "Tasks that one LFT is meta-trained on together, in the same form.",
    )
    initializations: tuple[str, ...] = config.option(tuple(INITIALIZATIONS), "Learners of an initialization.")
    ways: int = config.option(4, "Classes of a task.")
    shots: tuple[int, ...] = config.option((5,), "Support images per class; all is done for each number.")
    seeds: tuple[int, ...] = config.option(
        (0, 1, 2), "Meta-training seeds; inner learning rates are tuned with the first."
    )
    num_steps: int = config.option(5, "Fine-tuning steps (K).")
    maml_steps: int = config.option(5, "Fine-tuning steps of MAML, its variants, ANIL and Meta-SGD in meta-training.")
    meta_steps: int = config.option(400, "Meta-steps per learner.")
    rule_meta_steps: int = config.option(400, "Meta-steps of learners with an update rule (lft, joint).")
    tasks: int = config.option(4, "Tasks per family and meta-step.")
    num_tasks: int = config.option(100, "Test tasks per family.")
    validation_tasks: int = config.option(25, "Validation tasks per family, for tuning.")
    familiar_tasks: int = config.option(
        0, "Tasks of meta-training classes, and validation tasks, that congruous learners are judged on too; 0: none."
    )
    workdir: str | None = config.option(
        None, "Folder for meta-trained parameters. Those that it has are not trained again."
    )
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


class Families(NamedTuple):
    """The tasks of a case. `familiar` draws from some classes of meta-training, as many as `validation` has."""

    train: ClassificationFamily
    validation: ClassificationFamily
    test: ClassificationFamily
    familiar: ClassificationFamily


def classify(flags: Config) -> dict[str, Any]:
    """Runs the experiment, writes its files and returns the results."""
    results = measured(flags)
    figures.classification(results["rows"], Path(flags.output).with_suffix(".png"))
    return results


def measured(flags: Config) -> dict[str, Any]:
    """Runs the experiment, writes the results file after each row, and returns the results."""
    for name in flags.initializations:
        check_name("initializations", name, INITIALIZATIONS)
    results, baselines = begun(flags), {}
    for shots in flags.shots:
        for part, cases in (("congruous", (flags.congruous,)), ("incongruous", flags.incongruous)):
            for row in _rows(part, cases, shots, flags, results["rows"], baselines):
                results["rows"].append(row)
                provenance.write_json(flags.output, results)
                name, accuracy = f"{part}, {row['case']}, {shots}-shot: {row['method']}", row["accuracy"][-1]
                print(f"{name}: {100 * accuracy:.1f}% after {flags.num_steps} steps", flush=True)
    return results


def begun(flags: Config) -> dict[str, Any]:
    """The results of an interrupted run with equal flags, or results without rows."""
    described = {name: x for name, x in dataclasses.asdict(flags).items() if name not in ("data_dir", "workdir")}
    results = {"provenance": provenance.describe(flags.seeds), "flags": described, "rows": []}
    if Path(flags.output).is_file():
        found = json.loads(Path(flags.output).read_text(encoding="utf-8"))
        if found.get("flags") == json.loads(json.dumps(described)):
            made, commit = found["provenance"], results["provenance"]["commit"]
            if commit not in (made["commit"], *made.get("resumed_at_commits", ())):
                made["resumed_at_commits"] = [*made.get("resumed_at_commits", ()), commit]
            return found
    return results


def _rows(part, cases, shots, flags, kept, baselines) -> Iterator[dict[str, Any]]:
    """Yields the rows of a part that are not among those kept, each as soon as it is measured."""
    known = {(row["case"], row["method"]) for row in kept if (row["shots"], row["part"]) == (shots, part)}
    initializations = flags.initializations if part == "congruous" else ()  # an initialization fits one network only
    methods = (*GRIDS, "lft", *initializations)
    if all((case, name) in known for case in cases for name in methods):
        return
    families = {case: make_families(case, shots, flags) for case in cases}
    together = {case: of_case.train for case, of_case in families.items()}
    train_lft = functools.cache(trainer("lft", lambda: learners.lft(RULE), together, flags))
    for case, of_case in families.items():
        if (shots, case) not in baselines:
            rows = [row for row in kept if (row["shots"], row["case"]) == (shots, case)]
            settings = {row["method"]: row.get("setting") for row in rows}
            baselines[shots, case] = {name: _baseline(name, settings, of_case, flags) for name in GRIDS}
        rivals = {name: values.mean(0) for name, (_, _, values) in baselines[shots, case].items()}
        for name in methods:
            if (case, name) in known:
                continue
            learner, notes, values = _FIXED.get(name, learners.lft(RULE)), {}, None
            if name in GRIDS:
                params, notes, values = baselines[shots, case][name]
            elif name == "lft":
                params = [train_lft(seed) for seed in flags.seeds]
            else:
                learner = evaluator(_FINE_TUNES_AS.get(name, name))
                params, notes = _tuned_seeds(name, learner, case, of_case, flags)
            if values is None:
                values = accuracy(learner, params, of_case.test, flags.num_tasks, flags)
            row = {"shots": shots, "part": part, "case": case, "method": name}
            row |= {"seed_accuracy": values[:, :, -1].mean(1).tolist(), **notes}
            row |= common.curve_row("accuracy", values.mean(0), rivals)
            if flags.familiar_tasks and part == "congruous":
                for kind in ("familiar", "validation"):
                    found = accuracy(learner, params, getattr(of_case, kind), flags.familiar_tasks, flags)
                    row[f"{kind}_accuracy"] = evaluation.mean_interval(found[:, :, -1].mean(0))
            yield row


def _baseline(name, settings, families, flags):
    """Setting of an optimizer that is not meta-learned, as a list, notes on it, and accuracies on the test tasks."""
    grid = GRIDS[name]
    tried = [_settings(setting) for setting in grid]
    setting = settings.get(name) or grid[_best(_FIXED[name], tried, families.validation, flags)]
    values = accuracy(_FIXED[name], [_settings(setting)], families.test, flags.num_tasks, flags)
    return [_settings(setting)], {"setting": setting, "settings_tried": len(grid)}, values


def make_families(case: str, shots: int, flags: Config) -> Families:
    """The tasks of a case source:size:architecture[:width].

    If the splits of a source share their classes, the first half of the classes is for meta-training and validation,
    the second half for test.
    """
    described = re.fullmatch(r"(.+):(\d+):([a-z]\w*)(?::(\d+))?", case)
    if described is None:
        raise ValueError(f"congruous, incongruous: expected source:size:architecture[:width], got {case!r}.")
    name, size, architecture, width = described.groups()
    options = {"ways": flags.ways, "shots": shots, "size": int(size), "architecture": architecture}
    options |= {"width": width and int(width)}
    images, labels, families = {}, {}, {}
    for split in SPLITS:
        if name == _omniglot_small.NAME:
            source = _omniglot_small.load(split)
        else:
            source = load_source(name, split, data_dir=flags.data_dir)
        classes = np.unique(source.labels)
        if name not in (*SPLIT_BY_CLASS, _omniglot_small.NAME):
            seen = source.num_classes // 2
            classes = classes[classes >= seen] if split == "test" else classes[classes < seen]
        # The same number of images per class, so that validation and test share a program if there are enough images.
        rows = [np.flatnonzero(source.labels == label)[:_MOST_IMAGES] for label in classes]
        rows = np.concatenate([of_class[: min(map(len, rows))] for of_class in rows])
        images[split], labels[split] = source.images[rows], source.labels[rows]
        count = _TRAIN_QUERY_SHOTS if split == "train" else _TEST_QUERY_SHOTS
        families[split] = classification_family(images[split], labels[split], query_shots=count, **options)
    # Spread over the classes of meta-training. As many as for validation, which can then share a program.
    classes, count = np.unique(labels["train"]), len(families["validation"].counts)
    some = classes[:: max(1, len(classes) // count)][:count]
    rows = np.flatnonzero(np.isin(labels["train"], some))
    familiar = classification_family(
        images["train"][rows], labels["train"][rows], query_shots=_TEST_QUERY_SHOTS, **options
    )
    return Families(familiar=familiar, **families)


def _tuned_seeds(name, learner, case, families, flags):
    """Meta-parameters of each seed with the best setting, as `learner` takes them, and notes on the setting."""
    make, grid = INITIALIZATIONS[name]
    train = trainer(name, make, {case: families.train}, flags)

    def trained(seed, setting):
        return {"settings": _settings(setting), "learned": train(seed, **_settings(setting))}

    first = [trained(flags.seeds[0], setting) for setting in grid]
    best = _best(learner, first, families.validation, flags) if len(grid) > 1 else 0
    params = [first[best], *(trained(seed, grid[best]) for seed in flags.seeds[1:])]
    return params, {"setting": grid[best], "settings_tried": len(grid)}


def trainer(
    name: str, make_learner: Callable[..., Learner], families: Mapping[str, ClassificationFamily], flags: Config
) -> Callable[..., PyTree]:
    """Meta-trains a learner on the families, `{case: family}`: `(seed, **settings) -> meta-parameters`."""
    size = next(iter(families.values())).size
    described = f"{size.ways}_ways_{size.shots}_shots"
    train = common.meta_training(
        make_learner,
        list(families.values()),
        num_steps=flags.maml_steps if name in _BY_GRADIENT else flags.num_steps,
        tasks_per_family=flags.tasks,
        rate=1e-2 if name == "lft" else 3e-3,
        scanned=_SCANNED,
        workdir=flags.workdir and Path(flags.workdir, name, described, *families),
    )
    meta_steps = flags.rule_meta_steps if name in ("lft", "joint") else flags.meta_steps
    return lambda seed, **settings: train(seed, meta_steps, **settings)


@functools.cache
def evaluator(name: str) -> Learner:
    """A learner of an initialization whose setting is among its parameters, to be judged."""
    return common.with_settings(INITIALIZATIONS[name][0])


def _settings(setting):
    return {name: np.float32(value) for name, value in setting.items()}


def _best(learner, params, family, flags):
    """Index of the best meta-parameters, or settings of an optimizer that is not meta-learned, on validation tasks."""
    options = {"num_steps": flags.num_steps, "num_tasks": flags.validation_tasks, "at_once": _AT_ONCE}
    return common.best_of(learner, params, family, "accuracy", largest=True, **options)


def accuracy(
    learner: Learner, params: Sequence[PyTree], family: ClassificationFamily, num_tasks: int, flags: Config
) -> np.ndarray:
    """Accuracy `[P, T, K]`: sets of meta-parameters, tasks, steps."""
    options = {"num_steps": flags.num_steps, "num_tasks": num_tasks, "at_once": _AT_ONCE}
    return common.judged(learner, params, family, "accuracy", **options)


if __name__ == "__main__":
    config.main(Config, classify)
