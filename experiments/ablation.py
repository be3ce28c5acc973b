r"""What each part of the fine-tuner is worth: leaves it out or adds it, one at a time, and attacks validation victims.

  python -m experiments.ablation --variants=base,positions --meta_steps=150

Choices are made here, on victims and images of meta-validation, so that the studies' unseen victims decide nothing.
Variants are meta-trained on the small CNNs of the studies, with one seed; the first one given is what the others are
compared with, task by task. Runs are kept in --workdir: a variant is trained once.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, config, meta_train, victims
from lft_jax import evaluation
from lft_jax.base import check_name
from lft_jax.victims import load_victim

_SEEN = ("momentum", "spread", "constraint", "progress", "context")

#: Changes to the flags of experiments.meta_train, by the name of the variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "positions": {"features": (*_SEEN, "position")},
    "no spread": {"features": tuple(f for f in _SEEN if f != "spread")},
    "no context": {"features": tuple(f for f in _SEEN if f != "context")},
    "no progress": {"features": tuple(f for f in _SEEN if f != "progress")},
    "no constraint": {"features": tuple(f for f in _SEEN if f != "constraint")},
    "no augmentation": {"augment": False},
    "coordinatewise": {"rule": "coordinate_lstm", "features": _SEEN, "output_scale": 1.0},
    "no start": {"start": "none"},
    "the paper's rule": {
        "rule": "coordinate_lstm",
        "layers": 2,
        "start": "none",
        "augment": False,
        "loss": "hinge",
        "support_loss": "hinge",
    },
    "learned on support images": {"learner": "l2o"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    variants: tuple[str, ...] = config.option(tuple(VARIANTS), "What to compare, the first with all others.")
    sources: tuple[str, ...] = config.option(("mnist", "cifar10"), "Image sources.")
    meta_steps: int = config.option(150, "Meta-steps of each variant.")
    num_tasks: int = config.option(50, "Validation tasks of each victim.")
    at: tuple[int, ...] = config.option((1, 2, 5, 10, 20), "Fine-tuning steps to judge; the last one is K.")
    victims: str = config.option("victims", "Folder of the victims, made by experiments.victims.")
    workdir: str = config.option("runs/ablation", "Folder for the meta-training runs.")
    output: str = config.option("results/ablation.json", "Results file.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def ablate(flags: Config) -> None:
    """Meta-trains the variants that are missing and compares them all."""
    for name in flags.variants:
        check_name("variants", name, VARIANTS)
    origin, rows, reference = common.provenance([0]), [], {}
    for name in flags.variants:
        print(f"{name}", flush=True)
        learner, params, families = _variant(name, flags)
        for victim, family in families.items():
            asr = _success(learner, params, family, flags)
            rows.append(_row(name, victim, asr, reference.setdefault(victim, asr), flags))
            print(f"  {victim}: " + ", ".join(f"{mean:.3f}" for mean in rows[-1]["asr"]), flush=True)
        settings = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("data_dir", "workdir")}
        common.write_json(flags.output, {"provenance": origin, "flags": settings, "rows": rows})
    print(f"wrote {flags.output}")


def _variant(name, flags):
    """The meta-trained learner, its meta-parameters, and the validation victims' tasks as it sees them."""
    trained = [p for s in flags.sources for p in victims.paths(s, "train", flags.victims) if "small_cnn" in p]
    settings = meta_train.Config(
        victims=tuple(trained),
        workdir=str(Path(flags.workdir, name.replace(" ", "_").replace("'", ""))),
        meta_steps=flags.meta_steps,
        num_steps=flags.at[-1],
        validation_tasks=0,
        data_dir=flags.data_dir,
        **VARIANTS[name],
    )
    state = meta_train.meta_train(settings)
    tasks = dataclasses.replace(meta_train.tasks_of(settings), queries=5)
    paths = [path for s in flags.sources for path in victims.paths(s, "validation", flags.victims)]
    families = {Path(p).name: common.make_family(load_victim(p), "validation", tasks, flags.data_dir) for p in paths}
    return meta_train.learner_of(settings), state.params, families


def _success(learner, params, family, flags):
    keys = jax.random.split(jax.random.key(0), flags.num_tasks)
    metrics = evaluation.evaluate(learner, params, family, keys, num_steps=flags.at[-1], at=flags.at)
    return np.asarray(metrics["asr"], np.float64)


def _row(name, victim, asr, reference, flags):
    means, widths = zip(*(evaluation.mean_interval(column) for column in asr.T), strict=True)
    difference = [evaluation.mean_interval(column) for column in (asr - reference).T]
    return {
        "variant": name,
        "victim": victim,
        "at": list(flags.at),
        "asr": list(means),
        "asr_interval": list(widths),
        "difference": [list(pair) for pair in difference],
    }


if __name__ == "__main__":
    config.main(Config, ablate)
