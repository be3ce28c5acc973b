"""Stored update rules: weights as safetensors, and beside them a JSON card that says where they came from."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import safetensors
import safetensors.numpy

from lft_jax import base
from lft_jax.rules import Rule, rule_from_dict, rule_to_dict
from lft_jax.transform import learned_fine_tuner

PyTree = Any
_FOLDER = Path(__file__).parent


def list_pretrained() -> list[str]:
    """The names of the rules that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def load_pretrained(name: str) -> tuple[PyTree, Rule]:
    """A stored rule: `(params, rule)`, ready for `lft_jax.learned_fine_tuner`.

    Args:
      name: of a rule that ships with the package, or the path of a `.safetensors` file made by `save_rule`.

    Raises:
      ValueError: for an unknown name, a file that is missing, truncated or lacks its card, or weights that do not
        fit the rule that the card describes.
    """
    params, rule, _ = _load(*_contents(name))
    return jax.tree.map(lambda leaf: leaf, params), rule


def load_fine_tuner(name: str) -> optax.GradientTransformationExtraArgs:
    """`learned_fine_tuner(*load_pretrained(name))`, the same object as long as the files are the same."""
    return _load(*_contents(name))[2]


def pretrained_card(name: str) -> dict[str, Any]:
    """The card of a stored rule: its description under "rule", and how it was made."""
    path = _locate(name).with_suffix(".json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError(f"it holds no object but {type(card).__name__}")
        return card
    except (OSError, ValueError) as error:
        raise ValueError(f"name: the card {path} of {name!r} cannot be read ({error}).") from error


def save_rule(path: str | os.PathLike[str], params: PyTree, rule: Rule, card: Mapping[str, Any]) -> None:
    """Stores a rule as `path` (`.safetensors`) and its card as the `.json` beside it.

    Raises:
      ValueError: for another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in _named(params)}, path)
    text = json.dumps({**card, "rule": rule_to_dict(rule)}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _locate(name):
    if str(name).endswith(".safetensors"):
        return Path(name)
    return _FOLDER / f"{base.check_name('name', name, list_pretrained())}.safetensors"


def _contents(name):
    path = _locate(name)
    description = json.dumps(pretrained_card(name).get("rule"))
    try:
        return path, path.read_bytes(), description
    except OSError as error:
        raise ValueError(f"name: {path} cannot be read ({error}).") from error


@functools.lru_cache(maxsize=16)
def _load(path, weights, description):
    try:
        rule = rule_from_dict(json.loads(description))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"name: the card of {path} does not describe a rule ({error}).") from error
    try:
        stored = safetensors.numpy.load(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"name: {path} cannot be read ({error}); is it truncated?") from error
    like = jax.eval_shape(rule.init, jax.random.key(0))
    wanted = {name: leaf.shape for name, leaf in _named(like)}
    found = {name: value.shape for name, value in stored.items()}
    if wanted != found:
        raise ValueError(f"name: the weights in {path} are not those of the rule on its card: {found}, not {wanted}.")
    leaves = [jax.numpy.asarray(stored[name]) for name, _ in _named(like)]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return params, rule, learned_fine_tuner(params, rule)


def _named(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]
