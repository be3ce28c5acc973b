"""Victims on disk: their weights as safetensors, and a JSON card that describes them."""

import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lft_jax import base
from lft_jax._files import load_arrays, replace_directory, save_arrays
from lft_jax._reading import PIXELS, read_object
from lft_jax.data.checks import MOST_CLASSES
from lft_jax.victims.models import build_model
from lft_jax.victims.training import apply_function

_WEIGHTS = "variables.safetensors"
_NEEDED = ("architecture", "num_classes", "image_shape")


@dataclasses.dataclass(frozen=True)
class Victim:
    """A trained classifier.

    Attributes:
      variables: variables of its flax module.
      card: a dict that JSON can store. It must have "architecture", "num_classes" and "image_shape" ([H, W, C]); the
        rest is provenance, such as source, test accuracy, seed, epochs, command and versions.
    """

    variables: base.PyTree
    card: dict[str, Any]

    @property
    def logits_fn(self) -> jax.tree_util.Partial:
        """The classifier: images `[n, H, W, C]`, floating-point in [0, 1], to logits `[n, num_classes]`.

        It is a pytree whose leaves are the weights, so victims of one architecture share a compilation.
        """
        apply = apply_function(self.card["architecture"], self.card["num_classes"])
        return jax.tree_util.Partial(apply, self.variables)


def save_victim(path: str | os.PathLike, victim: Victim) -> None:
    """Writes a victim to a directory, atomically.

    Args:
      path: the directory; one that exists is replaced.
      victim: the victim to write.

    Raises:
      ValueError: if the card lacks an entry that `load_victim` needs.

    Examples:
      >>> import tempfile
      >>> model = build_model("small_cnn", num_classes=3)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      >>> card = {"architecture": "small_cnn", "num_classes": 3, "image_shape": [8, 8, 1]}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_victim(folder + "/victim", Victim(variables, card))
      ...     load_victim(folder + "/victim").card["architecture"]
      'small_cnn'
    """
    if missing := [name for name in _NEEDED if name not in victim.card]:
        raise ValueError(f"victim: its card must have {', '.join(_NEEDED)}; {', '.join(missing)} missing.")
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / "victim"
        whole.mkdir()
        save_arrays(whole / _WEIGHTS, victim.variables)
        (whole / "card.json").write_text(json.dumps(victim.card, indent=2) + "\n")
        replace_directory(whole, path)


def _check_card(card):
    """Raises a ValueError unless the sizes in a card are those of a classifier of images."""
    if missing := [name for name in _NEEDED if name not in card]:
        raise ValueError(f"its card lacks {', '.join(missing)}")
    classes, shape = card["num_classes"], card["image_shape"]
    if type(classes) is not int or not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"num_classes must be an integer from 1 to {MOST_CLASSES}, got {str(classes)[:80]}")
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    if not whole or math.prod(shape) > 4 * PIXELS:
        raise ValueError(f"image_shape must be [H, W, C] of at most {4 * PIXELS} numbers, got {str(shape)[:80]}")


def load_victim(path: str | os.PathLike) -> Victim:
    """Reads a victim that `save_victim` wrote.

    Args:
      path: directory of the victim.

    Returns:
      The victim.

    Raises:
      ValueError: if there is no victim at `path`, or it is damaged.
    """
    hint = f"Train it again: python -m experiments.train_victim --output={path}"
    card_path = Path(path) / "card.json"
    if not card_path.is_file():
        raise ValueError(f"path: there is no victim at {path}. {hint}")
    try:
        card = read_object(card_path)
        _check_card(card)
        model = build_model(card["architecture"], card["num_classes"])
        image = jax.ShapeDtypeStruct((1, *card["image_shape"]), jnp.float32)
        like = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), image)
        variables = load_arrays(Path(path) / _WEIGHTS, dict(like))
    except Exception as error:  # flax and JAX raise many kinds of exceptions for a wrong card
        raise ValueError(f"path: the victim at {path} is damaged ({error}). {hint}") from error
    return Victim(variables, card)
