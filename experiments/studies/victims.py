r"""Trains the missing victims of the studies: ten per source of MNIST and CIFAR-10, two of digits.

  python -m experiments.studies.victims --sources=mnist,cifar10

Eight of MNIST and eight of CIFAR-10 are for meta-training and meta-validation. The other two per source are unseen; one
of them has an architecture outside meta-training. Digits victims are only attacked. Victims are stored one by one; run
it again to resume.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments import config, train_victim

ROLES = ("train", "validation", "unseen")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One victim of a study.

    Attributes:
      role: its use in the studies, one of `ROLES`.
      architecture: a name in `lft_jax.victims.MODELS`.
      seed: seed of its training.
      epochs: epochs of its training. They differ, so that victims differ in confidence.
      adversarial: whether it was trained on adversarial examples.
    """

    role: str
    architecture: str
    seed: int
    epochs: int
    adversarial: bool = False


RECIPES = {
    "mnist": (
        Recipe("train", "small_cnn", 0, 2),
        Recipe("train", "small_cnn", 1, 4),
        Recipe("train", "small_cnn", 2, 6),
        Recipe("train", "small_cnn", 3, 8),
        Recipe("train", "lenet", 4, 2),
        Recipe("train", "lenet", 5, 4),
        Recipe("validation", "small_cnn", 100, 5),
        Recipe("validation", "lenet", 101, 3),
        Recipe("unseen", "small_cnn", 1000, 5),
        Recipe("unseen", "vgg", 1001, 2),
    ),
    "cifar10": (
        Recipe("train", "small_cnn", 0, 5),
        Recipe("train", "small_cnn", 1, 8),
        Recipe("train", "small_cnn", 2, 10),
        Recipe("train", "small_cnn", 3, 12),
        Recipe("train", "lenet", 4, 4),
        Recipe("train", "lenet", 5, 6),
        Recipe("validation", "small_cnn", 100, 8),
        Recipe("validation", "lenet", 101, 4),
        Recipe("unseen", "small_cnn", 1000, 8),
        Recipe("unseen", "vgg", 1001, 7),
    ),
    "digits": (
        Recipe("unseen", "small_cnn", 1000, 30),
        Recipe("unseen", "lenet", 1001, 30),
    ),
}
#: More victims, of larger architectures, in the order in which `train_on_gpu` trains them. Neither `train_missing` nor
#: the studies use them.
MORE = {
    "cifar10": (
        Recipe("train", "resnet20", 0, 51),
        Recipe("train", "mobilenet", 0, 70),
        Recipe("train", "vit", 0, 180),
        Recipe("train", "resnet20", 0, 60, adversarial=True),
        Recipe("unseen", "resnet20", 1000, 70),
        Recipe("unseen", "mobilenet", 1000, 70),
        Recipe("train", "resnet20", 1, 70),
        Recipe("train", "resnet14", 0, 70),
        Recipe("unseen", "vit", 1000, 180),
        Recipe("train", "mobilenet", 1, 70),
    ),
    "mnist": (
        Recipe("train", "resnet20", 0, 12),
        Recipe("train", "mobilenet", 0, 12),
        Recipe("train", "vit", 0, 20),
        Recipe("unseen", "resnet20", 1000, 12),
        Recipe("unseen", "mobilenet", 1000, 12),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    sources: tuple[str, ...] = config.option(tuple(RECIPES), f"Image sources, of {', '.join(RECIPES)}.")
    folder: str = config.option("victims", "Folder for the victims.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def paths(
    source: str, role: str, folder: str = "victims", architectures: Sequence[str] = (), *, more: bool = False
) -> tuple[str, ...]:
    """Folders of the victims of one source and role, and of these architectures (all if empty).

    They are those of `RECIPES`; with `more`, those of `MORE` instead.
    """
    recipes = MORE.get(source, ()) if more else RECIPES[source]
    recipes = [r for r in recipes if r.role == role and (not architectures or r.architecture in architectures)]
    return tuple(path_of(folder, source, recipe) for recipe in recipes)


def path_of(folder: str, source: str, recipe: Recipe) -> str:
    """Folder of a victim."""
    kind = f"{recipe.architecture}_adversarial" if recipe.adversarial else recipe.architecture
    return f"{folder}/{source}_{kind}_{recipe.seed}"


def train_missing(flags: Config) -> None:
    """Trains the victims that are missing."""
    for source in flags.sources:
        if source not in RECIPES:
            raise ValueError(f"sources: there are no victims of {source!r}; choose from {', '.join(RECIPES)}.")
    for source in flags.sources:
        for recipe in RECIPES[source]:
            path = path_of(flags.folder, source, recipe)
            if not Path(path, "card.json").exists():
                given = {name: getattr(recipe, name) for name in ("architecture", "seed", "epochs")}
                train_victim.train(train_victim.Config(source=source, output=path, data_dir=flags.data_dir, **given))


if __name__ == "__main__":
    config.main(Config, train_missing)
