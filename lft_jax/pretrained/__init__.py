"""Stored update rules: weights as safetensors, and beside them a JSON card that says where they came from."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from lft_jax import base
from lft_jax._files import read_arrays, save_arrays
from lft_jax.optimizers.rules import Rule, rule_from_dict, rule_to_dict
from lft_jax.optimizers.transform import learned_fine_tuner

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
    save_arrays(path, params)
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
        params = read_arrays(weights, jax.eval_shape(rule.init, jax.random.key(0)))
    except ValueError as error:
        raise ValueError(f"name: {path} {error}.") from error
    return params, rule, learned_fine_tuner(params, rule)
