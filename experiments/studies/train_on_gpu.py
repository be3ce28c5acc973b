r"""Trains the residual networks, MobileNets and transformers of `MORE` in `experiments/studies/victims.py`, on a GPU.

  python -m experiments.studies.train_on_gpu --seconds=560
  python -m experiments.studies.train_on_gpu --only=cifar10_resnet20_0,mnist_vit_0

Activations are bfloat16, an epoch is one program, the images stay on the device. Victims are trained in the order of
the table and stored one by one; run it again to resume. Near the time limit a victim gets fewer epochs or is left out.

The 15 stored victims were trained by the code that this program is made of, on one H200 in 517 s, with compilation in
other threads. It also set the epochs of a victim by its share of the time; `MORE` has those of the stored victims.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import config
from experiments.studies import _gpu_training, victims
from lft_jax.base import check_name
from lft_jax.cli import provenance
from lft_jax.data import SPLITS, ImageSource, load_source
from lft_jax.victims import Victim, clean_accuracy, save_victim

#: How architectures are trained; those without an entry like "resnet20". Changes for MNIST are in `recipe_of`.
RECIPES = {
    "resnet20": _gpu_training.Recipe(),
    "vit": _gpu_training.Recipe(
        optimizer="adamw",
        learning_rate=1.5e-3,
        weight_decay=0.05,
        smoothing=0.1,
        warmup=8,
        augment="crop_flip_color_cutout",
    ),
}
ADVERSARIAL = _gpu_training.Recipe(weight_decay=2e-4, smoothing=0.0, epsilon=4 / 255)
#: `(source, architecture)` whose robust accuracy is measured, with its linf radius and number of test images.
ROBUST = {("cifar10", "resnet20"): (4 / 255, 2000)}
#: Seconds that a victim takes after its last epoch, and the share of its epochs that it gets at least.
_AFTER, _FEWEST = 4, 0.25


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    seconds: float | None = config.option(None, "Time limit, in seconds from the start; none if not given.")
    only: tuple[str, ...] = config.option((), "Names of victims, such as cifar10_vit_0; all if empty.")
    folder: str = config.option("victims", "Folder for the victims.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def train_missing(flags: Config) -> None:
    """Trains the victims that are missing."""
    deadline = None if flags.seconds is None else time.monotonic() + flags.seconds
    planned = {
        source: {Path(victims.path_of(flags.folder, source, victim)): victim for victim in of_source}
        for source, of_source in victims.MORE.items()
    }
    names = [path.name for of_source in planned.values() for path in of_source]
    for name in flags.only:
        check_name("only", name, names)
    for source, of_source in planned.items():
        chosen = {path: victim for path, victim in of_source.items() if path.name in (flags.only or names)}
        missing = {path: victim for path, victim in chosen.items() if not (path / "card.json").exists()}
        data = {split: load_source(source, split, data_dir=flags.data_dir) for split in SPLITS if missing}
        for path, victim in missing.items():
            trained = train(victim, source, data, deadline)
            if trained is None:
                print(f"{path.name}: left out, too little time is left")
                continue
            save_victim(path, trained)
            shown = f"test accuracy {trained.card['test_accuracy']:.4f}"
            if "robust_accuracy" in trained.card:
                shown += f", under PGD {trained.card['robust_accuracy']['accuracy']:.4f}"
            print(f"{path.name}: {shown}; {trained.card['epochs']} epochs in {trained.card['seconds']} s")


def recipe_of(source: str, victim: victims.Recipe) -> _gpu_training.Recipe:
    """How a victim is trained."""
    recipe = ADVERSARIAL if victim.adversarial else RECIPES.get(victim.architecture, RECIPES["resnet20"])
    if source == "cifar10":
        return recipe
    return dataclasses.replace(recipe, augment="crop", warmup=3 if victim.architecture == "vit" else 2)


def train(
    victim: victims.Recipe, source: str, data: dict[str, ImageSource], deadline: float | None = None
) -> Victim | None:
    """One victim with its card, or None if too few epochs end before the deadline (of `time.monotonic`)."""
    recipe, (images, labels, num_classes) = recipe_of(source, victim), _arrays(data["train"])
    batch_size = min(recipe.batch_size, len(images))
    steps, shape, epochs = len(images) // batch_size, images.shape[1:], victim.epochs
    program = _gpu_training.epoch_program(recipe, victim.architecture, num_classes)
    state = _gpu_training.initial_state(recipe, victim.architecture, num_classes, shape, victim.seed)
    key, number, begin = jax.random.key(victim.seed), 0, time.monotonic()
    while number < epochs:
        before = time.monotonic()
        rows = np.random.default_rng((victim.seed, number + 1)).permutation(len(images)).astype(np.int32)
        rows = rows[: steps * batch_size].reshape(steps, batch_size)
        rates = _gpu_training.learning_rates(recipe, number, epochs, steps)
        with _gpu_training.bfloat16():  # which matters in the first epoch, when the program is traced
            state, loss = program(state, images, labels, rows, rates, jax.random.fold_in(key, number))
        if not np.isfinite(float(loss)):
            raise ValueError(f"the loss of {source} {victim.architecture} is {loss} in epoch {number + 1}.")
        number += 1
        if deadline is not None and number > 1:  # the first epoch includes the compilation
            now = time.monotonic()
            fits = number + max(0, int((deadline - _AFTER - now) / (now - before)))
            if fits < _FEWEST * epochs:
                return None
            epochs = min(epochs, fits)
    seconds = time.monotonic() - begin
    params, statistics, _ = jax.device_get(state)
    variables = {"params": params} | ({"batch_stats": statistics} if statistics else {})
    card = _card(victim, source, recipe, data["train"]) | {"epochs": epochs, "batch_size": batch_size}
    card |= provenance.describe([victim.seed]) | {"seconds": round(seconds, 1)}
    trained = Victim(variables, card)
    for split in ("validation", "test"):
        found = clean_accuracy(trained.logits_fn, data[split].images, data[split].labels)
        card[f"{split}_accuracy"] = round(found, 4)
    if (source, victim.architecture) in ROBUST:
        epsilon, count = ROBUST[source, victim.architecture]
        tested, classes, _ = _arrays(data["test"])
        found = _gpu_training.robust_accuracy(trained, tested[:count], classes[:count], epsilon)
        card["robust_accuracy"] = {
            "accuracy": round(found, 4),
            "attack": "PGD, 20 steps of epsilon / 5, random start",
            "norm": "linf",
            "epsilon": round(epsilon, 6),
            "images": f"the first {min(count, len(tested))} of test",
        }
    return trained


def _arrays(source):
    return jnp.asarray(source.images), jnp.asarray(source.labels, jnp.int32), source.num_classes


def _card(victim, source, recipe, train) -> dict[str, Any]:
    """What is known before the training; the order is that of the card."""
    card = {
        "source": source,
        "architecture": victim.architecture,
        "seed": victim.seed,
        "epochs": victim.epochs,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "augment": recipe.augment,
        "num_classes": train.num_classes,
        "image_shape": list(train.images.shape[1:]),
        "validation_accuracy": None,
        "optimizer": recipe.optimizer,
        "weight_decay": recipe.weight_decay,
        "label_smoothing": recipe.smoothing,
        "warmup_epochs": recipe.warmup,
        "compute": "bfloat16 activations, float32 weights",
    }
    if recipe.epsilon:
        attack = {name: round(value, 6) for name, value in recipe.attack.items()}
        card["adversarial_training"] = {"norm": "linf", **attack, "share_of_images": 0.5}
    return card


if __name__ == "__main__":
    config.main(Config, train_missing)
