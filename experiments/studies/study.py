r"""Runs a study on real images: meta-trains learners, then compares them on unseen victims.

  python -m experiments.studies.victims
  python -m experiments.studies.study --study=hard --attacked=mnist --output=results/hard/mnist.json

Runs are kept in --workdir, so that a study can be resumed and studies can share runs. --only=lft/mnist+cifar10 limits
the study to some of its runs. The results file has the settings of the comparison under `protocol`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import config, evaluate, meta_train
from experiments.studies import victims
from lft_jax.base import check_at_least, check_name

_BOTH = ("mnist", "cifar10")
_ATTACKED = (*_BOTH, "digits")


@dataclasses.dataclass(frozen=True)
class Run:
    """A learner to meta-train.

    Attributes:
      learner: the flag of experiments.meta_train.
      sources: sources of the meta-training victims.
      settings: other flags of experiments.meta_train, in addition to those of the study.
    """

    learner: str
    sources: tuple[str, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name for --only, such as "lft/mnist+cifar10"."""
        return f"{self.learner}/{'+'.join(self.sources)}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of meta-trained learners.

    Attributes:
      runs: the learners.
      meta: flags of experiments.meta_train for all runs.
      protocol: flags of experiments.evaluate.
      rule: flags of experiments.meta_train for runs that learn an update rule.
      of: name of the study that these runs belong to; None if they belong to this one.
    """

    runs: tuple[Run, ...]
    meta: dict[str, Any]
    protocol: dict[str, Any]
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)
    of: str | None = None

    def settings(self, run: Run) -> dict[str, Any]:
        """All settings of a run. Its own override those of the study."""
        return {**self.meta, **(self.rule if run.learner in meta_train.RULE_LEARNERS else {}), **run.settings}


_LFT, _L2O = Run("lft", _BOTH), Run("l2o", _BOTH)


def _alone(learner, **settings):
    """One run per source. Initializations need this, since they have the shape of the images."""
    return tuple(Run(learner, (source,), settings) for source in _BOTH)


def _maml(*inner_steps, **settings):
    """MAML on each source, with inner steps that were chosen on meta-validation victims of that source.

    The candidates were 0.2, 0.5 and 0.8 in a ball; 0.02, 0.05, 0.2 and 0.5 with a penalty; 0.1, 0.3 and 0.8 with
    zeroth-order gradients.
    """
    return tuple(
        Run("maml", (source,), {"inner_step": step, **settings})
        for source, step in zip(_BOTH, inner_steps, strict=True)
    )


_DEFAULTS = evaluate.PRESETS["study"]
# The unseen MNIST victims are weaker than the others: at 0.2 a full-data UAP has an ASR of about 80%.
_BALL = {**_DEFAULTS, "epsilon": ("mnist=0.2",)}


def _preset(name, *others):
    """Settings of a preset, except its victims and `others`."""
    return {k: v for k, v in config.PRESETS[name].items() if k not in ("victims", *others)}


_META = _preset("spatial_linf")
# A learned initialization replaces the search for a start. Its evaluations go to directions: 400 in total, as
# for the other methods.
_NO_SEARCH = {"waves": 0, "num_directions": 10}
_HARD = Study((_LFT, _L2O, *_alone("lft"), *_maml(0.5, 0.5), *_alone("joint")), _META, _BALL)
STUDIES = {
    # Ten classes, one image per class, exact gradients, linf ball.
    "hard": _HARD,
    # The same runs on five images per class, which they were not meta-trained for.
    "five_images": dataclasses.replace(_HARD, protocol={**_BALL, "shots": 5, "num_validation": 5}, of="hard"),
    # As "hard", query-only: 400 evaluations of the support images, 160 of them to search for a start.
    "query": Study(
        (_LFT, _L2O, *_alone("lft"), *_maml(0.1, 0.8, **_NO_SEARCH), *_alone("joint", **_NO_SEARCH)),
        _preset("uap_linf_query", "base_step", "base_decay"),
        {**_BALL, "num_validation": 5, "methods": ("momentum_pgd", "sgd", "adam", "uap_sgd", "adamm")},
        {"base_step": 0.1, "base_decay": 0.9},
    ),
    # Exact gradients in an l2 ball: the meta-test of the shipped rule.
    "l2": Study(
        (_LFT,),
        _preset("uap_l2"),
        {**_DEFAULTS, "methods": ("momentum_pgd",), "transfer": False},
    ),
    # The tasks of arXiv 2009.13714, with the rule of this library.
    "paper": Study(
        (_LFT, _L2O, *_alone("lft"), *_maml(0.05, 0.2), *_alone("joint")),
        _preset("uap_l1", "base_step"),
        {**_DEFAULTS, "query_shots": 10},
        {"base_step": 0.3},
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    study: str = config.option("hard", "Name of the study.", tuple(STUDIES))
    seeds: int = config.option(3, "Meta-training seeds per run, from 0.")
    only: tuple[str, ...] = config.option((), "Names of the runs to meta-train and compare; all if empty.")
    attacked: tuple[str, ...] = config.option(
        _ATTACKED, "Sources whose unseen victims are attacked, or names of such victims; empty to only meta-train."
    )
    victims: str = config.option("victims", "Folder of the victims that experiments.studies.victims trains.")
    workdir: str = config.option("runs/studies", "Folder for the meta-training runs.")
    output: str | None = config.option(None, "Results file; results/STUDY/results.json if not given.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def study(flags: Config) -> None:
    """Meta-trains the runs that are missing and compares all."""
    check_at_least("seeds", flags.seeds, 1)
    chosen = STUDIES[flags.study]
    folder = Path(flags.workdir, chosen.of or flags.study)
    known = {run.name: run for run in chosen.runs}
    if unknown := sorted(set(flags.only) - known.keys()):
        raise ValueError(f"only: {flags.study} has no run {', '.join(unknown)}; its runs are {', '.join(known)}.")
    learned = []
    for seed in range(flags.seeds):  # the first seed of every run before the second of any
        for name in flags.only or known:
            run, workdir = known[name], folder / f"{name.replace('/', '_')}_{seed}"
            print(f"meta-training {name}, seed {seed}")
            meta_train.meta_train(
                meta_train.Config(
                    victims=tuple(p for source in run.sources for p in victims.paths(source, "train", flags.victims)),
                    workdir=str(workdir),
                    learner=run.learner,
                    seed=seed,
                    data_dir=flags.data_dir,
                    **chosen.settings(run),
                )
            )
            learned.append(str(workdir))
    attacked = [path for name in flags.attacked for path in _unseen(name, flags.victims)]
    if not attacked:
        return
    evaluate.evaluate(
        evaluate.Config(
            learned=tuple(learned),
            victims=tuple(attacked),
            output=flags.output or f"results/{flags.study}/results.json",
            data_dir=flags.data_dir,
            **chosen.protocol,
        )
    )


def _unseen(name, folder):
    """Folders of the unseen victims of a source, or of the unseen victim with this name."""
    unseen = {source: victims.paths(source, "unseen", folder) for source in victims.RECIPES}
    single = {Path(path).name: (path,) for paths in unseen.values() for path in paths}
    return {**single, **unseen}[check_name("attacked", name, [*unseen, *single])]


if __name__ == "__main__":
    config.main(Config, study)
