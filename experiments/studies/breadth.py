r"""Tests a pretrained rule outside its meta-training: other image sizes, radii, steps, class counts and shots.

  python -m experiments.studies.breadth --optimizer=spatial-linf

Attacks the unseen victims of the studies. For larger images, a stored victim sees them scaled down to its own size. For
fewer classes, its other logits are dropped. PGD is tuned for each case.

Killed, it goes on after the last finished case.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import config
from experiments.cells import Cells
from experiments.studies import victims
from lft_jax import evaluation, learners, tasks
from lft_jax.cli import provenance
from lft_jax.data import load_source, unit_range
from lft_jax.evaluation import baselines, metrics
from lft_jax.pretrained import load_pretrained
from lft_jax.victims import load_victim

#: Radii of the studies, by source.
RADII = {"digits": 0.25, "mnist": 0.2, "cifar10": 0.06}
_MOST_IMAGES = 400  # per case, to limit memory for scaled images


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting. The defaults are one image per class, ten classes, K = 20 and the usual radius.

    Attributes:
      source: image source.
      unseen: index of the victim among the unseen ones of the source.
      side: height and width that images are scaled to, or None.
      classes: classes of the victim.
      shots: support images per class.
      factor: factor on the usual radius.
      num_steps: fine-tuning steps (K).
    """

    source: str
    unseen: int = 0
    side: int | None = None
    classes: int = 10
    shots: int = 1
    factor: float = 1.0
    num_steps: int = 20


CASES = (
    Case("digits"),
    Case("digits", unseen=1),
    Case("mnist"),
    Case("cifar10"),
    Case("mnist", side=56),
    Case("cifar10", side=64),
    Case("cifar10", side=128),
    Case("cifar10", side=224),
    Case("mnist", classes=2),
    Case("cifar10", classes=2),
    Case("mnist", classes=5),
    Case("cifar10", classes=5),
    Case("mnist", shots=5),
    Case("cifar10", shots=5),
    Case("mnist", factor=1.5),
    Case("cifar10", factor=0.5),
    Case("cifar10", factor=1.5),
    Case("mnist", num_steps=5),
    Case("cifar10", num_steps=5),
    Case("mnist", num_steps=50),
    Case("cifar10", num_steps=50),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    optimizer: str = config.option("spatial-linf", "Rule for linf balls: a pretrained one or a .safetensors file.")
    num_tasks: int = config.option(30, "Test tasks per case.")
    num_validation: int = config.option(10, "Validation tasks per case, on which PGD is tuned.")
    victims: str = config.option("victims", "Folder of the victims that experiments.studies.victims trains.")
    output: str = config.option("results/breadth.json", "Results file.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def measure(flags: Config) -> None:
    """Runs every case and writes the results file after each."""
    params, rule = load_pretrained(flags.optimizer)
    settings = {k: v for k, v in dataclasses.asdict(flags).items() if k != "data_dir"}
    cells = Cells(flags.output, {**settings, "params": jax.tree.leaves(params)})
    origin, rows = cells.provenance([0]), []
    for case in CASES:
        rows.append(cells.get(str(case), _row, case, learners.lft(rule), params, flags))
        asr = ", ".join(f"{name} {100 * found['asr']:.1f}" for name, found in rows[-1]["methods"].items())
        print(f"{case}: {asr}", flush=True)
        provenance.write_json(flags.output, {"provenance": origin, "flags": settings, "rows": rows})
    cells.finish()
    print(f"wrote {flags.output}")


def _row(case, learner, params, flags):
    path = victims.paths(case.source, "unseen", flags.victims)[case.unseen]
    validation, test = (make_family(case, path, split, flags.data_dir) for split in ("validation", "test"))
    key_test, key_validation = jax.random.split(jax.random.key(0))
    keys = jax.random.split(key_test, flags.num_tasks)
    plain = test.with_recipe(augmentation=None)
    pgd = baselines.make_baselines("linf")["pgd"]
    tuned = evaluation.tune(
        pgd,
        validation.with_recipe(augmentation=None),
        jax.random.split(key_validation, flags.num_validation),
        num_steps=case.num_steps,
    ).setting

    def success(learner, params, family):
        options = {"num_steps": case.num_steps, "at": (case.num_steps,)}
        return np.asarray(evaluation.evaluate(learner, params, family, keys, **options)["asr"][:, -1], np.float64)

    without_output = {**params, "head": jax.tree.map(np.zeros_like, params["head"])}
    asr = {
        "pgd (untuned)": success(pgd.learner, pgd.default.params, metrics.minimising(plain, pgd.default.support_loss)),
        "pgd": success(pgd.learner, tuned.params, metrics.minimising(plain, tuned.support_loss)),
        "the rule's base update, augmented": success(learner, without_output, test),
        flags.optimizer: success(learner, params, test),
    }
    methods = {
        name: {
            **dict(zip(("asr", "interval"), evaluation.mean_interval(values), strict=True)),
            "difference_to_tuned_pgd": evaluation.mean_interval(values - asr["pgd"]),
        }
        for name, values in asr.items()
    }
    shape = list(test.images.shape[1:])
    return {**dataclasses.asdict(case), "victim": Path(path).name, "image_shape": shape, "methods": methods}


def make_family(case: Case, path: str, split: str, data_dir: str | None) -> tasks.UapFamily:
    """The tasks of a case on one split, against the victim stored at `path`."""
    victim, source = load_victim(path), load_source(case.source, split, data_dir=data_dir)
    rows = np.flatnonzero(source.labels < case.classes)
    images, labels = source.images[rows[:_MOST_IMAGES]], source.labels[rows[:_MOST_IMAGES]]
    side = images.shape[1]
    if case.side:
        shape = (len(images), case.side, case.side, images.shape[-1])
        images = np.clip(jax.image.resize(unit_range(jnp.asarray(images)), shape, "bilinear"), 0, 1)

    return tasks.uap_family(
        images,
        labels,
        jax.tree_util.Partial(_Shrunk(side, case.classes), victim.logits_fn),
        ways=case.classes,
        shots=case.shots,
        query_shots=5,
        epsilon=case.factor * RADII[case.source],
        loss="cross_entropy",
        recipe=tasks.AttackRecipe(),
    )


@dataclasses.dataclass(frozen=True)
class _Shrunk:
    """A victim that scales images to its own size and has only the logits of the first classes."""

    side: int
    classes: int

    def __call__(self, logits_fn, images):
        shape = (len(images), self.side, self.side, images.shape[-1])
        if images.shape != shape:
            images = jax.image.resize(images, shape, "bilinear")
        return logits_fn(images)[:, : self.classes]


if __name__ == "__main__":
    config.main(Config, measure)
