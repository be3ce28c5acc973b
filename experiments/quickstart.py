r"""A whole study on packaged data: trains victims, meta-trains, compares, draws figures.

One learned fine-tuner (LFT) is meta-trained on 8x8 digits and 28x28 MNIST together. It then attacks an unseen victim of
each source, from one image per class.

  python -m experiments.quickstart                  5 to 8 minutes on 2 cores
  python -m experiments.quickstart --preset=short   smoke test

All files are kept in --workdir; run it again to resume.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from experiments import config, evaluate, meta_train, train_victim


@dataclasses.dataclass(frozen=True)
class Preset:
    """Size of the study.

    Attributes:
      architectures: architectures of the meta-training victims per source; a repeated one has another seed.
      unseen: architectures of the attacked victims per source, which are not in meta-training.
      meta_steps: meta-steps of LFT and L2O.
      meta: other flags of experiments.meta_train.
      protocol: flags of experiments.evaluate.
    """

    architectures: dict[str, tuple[str, ...]]
    unseen: dict[str, tuple[str, ...]]
    meta_steps: int
    meta: dict[str, Any]
    protocol: dict[str, Any]


PRESETS = {
    "short": Preset(
        architectures={"digits": ("small_cnn",), "mnist_5k": ("small_cnn",)},
        unseen={"digits": ("small_cnn",), "mnist_5k": ("small_cnn",)},
        meta_steps=10,
        meta={"num_steps": 5, "checkpoint_every": 5, "validation_tasks": 4},
        protocol={
            "at": (1, 2, 5),
            "num_tasks": 10,
            "num_validation": 4,
            "methods": ("pgd", "adam"),
            "oracle_steps": 20,
        },
    ),
    "quickstart": Preset(
        architectures={"digits": ("small_cnn",) * 6, "mnist_5k": ("small_cnn",) * 3},
        unseen={"digits": ("small_cnn",), "mnist_5k": ("small_cnn",)},
        meta_steps=100,
        meta={"validation_tasks": 0},
        protocol={
            "num_tasks": 100,
            "num_validation": 8,
            "methods": ("pgd", "adam"),
            "transfer": False,
            "oracle_steps": 60,
        },
    ),
}
_FIRST_UNSEEN_SEED = 1000  # seeds from 100 on are those of victims that the method was chosen on


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    preset: str = config.option("quickstart", "Size of the study.", tuple(PRESETS))
    workdir: str = config.option("runs", "Folder for victims, meta-training runs and results.")
    output: str | None = config.option(None, "Results file; WORKDIR/PRESET/results.json if not given.")


def quickstart(flags: Config) -> None:
    """Runs the study that the preset describes."""
    began = time.monotonic()
    preset, folder = PRESETS[flags.preset], Path(flags.workdir)
    seen = {
        source: [_victim(folder, source, name, seed) for seed, name in enumerate(names)]
        for source, names in preset.architectures.items()
    }
    unseen = [
        _victim(folder, source, name, _FIRST_UNSEEN_SEED + seed)
        for source, names in preset.unseen.items()
        for seed, name in enumerate(names)
    ]
    trained_on = tuple(path for paths in seen.values() for path in paths)
    learned = {learner: str(folder / flags.preset / learner) for learner in ("lft", "l2o")}
    for learner, workdir in learned.items():
        print(f"[{time.monotonic() - began:4.0f} s] meta-training {learner} on {len(trained_on)} victims")
        meta_train.meta_train(
            meta_train.Config(
                victims=trained_on, workdir=workdir, learner=learner, meta_steps=preset.meta_steps, **preset.meta
            )
        )
    print(f"[{time.monotonic() - began:4.0f} s] comparing on unseen images")
    output = flags.output or str(folder / flags.preset / "results.json")
    evaluate.evaluate(
        evaluate.Config(learned=tuple(learned.values()), victims=tuple(unseen), output=output, **preset.protocol)
    )
    print(f"[{time.monotonic() - began:4.0f} s] done")


def _victim(folder, source, architecture, seed):
    path = folder / "victims" / f"{source}_{architecture}_{seed}"
    if not (path / "card.json").exists():
        train_victim.train(train_victim.Config(source=source, architecture=architecture, seed=seed, output=str(path)))
    return str(path)


if __name__ == "__main__":
    config.main(Config, quickstart)
