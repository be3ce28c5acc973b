"""Stored update rules: weights as safetensors, and beside them a JSON card that says where they came from."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lft_jax import base
from lft_jax.rules import Rule, rule_from_dict, rule_to_dict

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
    return _load(_locate(name))


def pretrained_card(name: str) -> dict[str, Any]:
    """The card of a stored rule: its description under "rule", and how it was made."""
    path = _locate(name).with_suffix(".json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
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
    text = json.dumps({"rule": rule_to_dict(rule), **card}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _locate(name):
    if str(name).endswith(".safetensors"):
        return Path(name)
    return _FOLDER / f"{base.check_name('name', name, list_pretrained())}.safetensors"


@functools.lru_cache(maxsize=16)
def _load(path):
    rule = rule_from_dict(pretrained_card(str(path))["rule"])
    try:
        stored = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"name: {path} cannot be read ({error}); is it truncated?") from error
    like = jax.eval_shape(rule.init, jax.random.key(0))
    wanted = {name: leaf.shape for name, leaf in _named(like)}
    found = {name: value.shape for name, value in stored.items()}
    if wanted != found:
        raise ValueError(f"name: the weights in {path} are not those of the rule on its card: {found}, not {wanted}.")
    leaves = [jax.numpy.asarray(stored[name]) for name, _ in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), rule


def _named(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]
