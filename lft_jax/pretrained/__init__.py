"""Stored update rules: weights as safetensors, and a JSON card with their description and provenance.

How the pieces compose::

    params, rule, card --save_rule--> name.safetensors, name.json
    name of a shipped rule, or path --load_pretrained--> params, rule --learned_fine_tuner--> optax transformation
    name of a shipped rule, or path --load_fine_tuner--> the same optax transformation, cached
    name of a shipped rule, or path --pretrained_card--> card

A rule ships with the package if its two files are in this folder; `list_pretrained` lists the names.
"""

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
from lft_jax._reading import read_object
from lft_jax.optimizers.rules import UpdateRule, rule_from_dict, rule_to_dict
from lft_jax.optimizers.transform import learned_fine_tuner

__all__ = ["list_pretrained", "load_fine_tuner", "load_pretrained", "pretrained_card", "save_rule"]

PyTree = base.PyTree
_FOLDER = Path(__file__).parent


def list_pretrained() -> list[str]:
    """The names of the rules that ship with the package, sorted.

    Examples:
      >>> "uap-linf" in list_pretrained()
      True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def load_pretrained(name: str) -> tuple[PyTree, UpdateRule]:
    """Loads the parameters of a stored rule, and the rule itself.

    Args:
      name: name of a rule that ships with the package, or path of a `.safetensors` file written by `save_rule`.

    Returns:
      `(params, rule)`, the arguments of `lft_jax.learned_fine_tuner`. `params` is a new tree at every call.

    Raises:
      ValueError: for an unknown name, a file that is missing or truncated, a missing or damaged card, weights that do
        not fit the rule that the card describes, or a rule of version 0.2 that was meta-trained with a second loss.

    Examples:
      >>> params, rule = load_pretrained("uap-linf")
      >>> sorted(params)
      ['all', 'cell', 'log_sharpness', 'logit_decay', 'periods']
      >>> tx = learned_fine_tuner(params, rule)
    """
    params, rule, _ = _load(*_contents(name))
    return jax.tree.map(lambda leaf: leaf, params), rule


def load_fine_tuner(name: str) -> optax.GradientTransformationExtraArgs:
    """Loads a stored rule as an optax transformation, `learned_fine_tuner(*load_pretrained(name))`.

    Calls return the same object as long as the files do not change, so that programs compiled for it are reused.

    Args:
      name: name of a rule that ships with the package, or path of a `.safetensors` file written by `save_rule`.

    Returns:
      The optax transformation.

    Raises:
      ValueError: as for `load_pretrained`.

    Examples:
      >>> load_fine_tuner("uap-linf") is load_fine_tuner("uap-linf")
      True
    """
    return _load(*_contents(name))[2]


def pretrained_card(name: str) -> dict[str, Any]:
    """The card of a stored rule.

    Args:
      name: name of a rule that ships with the package, or path of a `.safetensors` file written by `save_rule`.

    Returns:
      The JSON object: the description of the rule under "rule", the other entries as given to `save_rule`, such as the
      command and the seeds of the meta-training.

    Raises:
      ValueError: for an unknown name, or a card that is missing or damaged.

    Examples:
      >>> pretrained_card("uap-linf")["rule"]["spectral"]["hidden"]
      8
    """
    path = _locate(name).with_suffix(".json")
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"name: the card {path} of {name!r} cannot be read ({error}).") from error


def save_rule(path: str | os.PathLike[str], params: PyTree, rule: UpdateRule, card: Mapping[str, Any]) -> None:
    """Stores a rule: its parameters as a `.safetensors` file, and its card as a `.json` file of the same stem.

    Args:
      path: path of the `.safetensors` file; missing folders are created.
      params: parameters of the rule.
      rule: the rule; its description is stored in the card under "rule".
      card: further entries of the card, as JSON can store them: how the rule was made.

    Raises:
      ValueError: if `path` has another suffix.

    Examples:
      >>> import tempfile
      >>> params, rule = load_pretrained("uap-linf")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_rule(folder + "/mine.safetensors", params, rule, {"seeds": [0]})
      ...     pretrained_card(folder + "/mine.safetensors")["seeds"]
      [0]
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
    path, card = _locate(name), pretrained_card(name)
    flags = card.get("meta_training")
    second = flags.get("second_loss") if isinstance(flags, dict) else None
    if second not in (None, "none"):
        raise ValueError(f"name: {path} is a rule for two losses (second_loss={second!r}), which only lft_jax 0.2 has.")
    description = json.dumps(card.get("rule"))
    try:
        return path, path.read_bytes(), description
    except OSError as error:
        raise ValueError(f"name: {path} cannot be read ({error}).") from error


@functools.lru_cache(maxsize=16)
def _load(path, weights, description):
    try:
        rule = rule_from_dict(json.loads(description))
        _check_sizes(description, max(len(weights), _SMALL))
    except ValueError as error:
        raise ValueError(f"name: the card of {path} does not describe a rule ({error}).") from error
    try:
        params = read_arrays(weights, jax.eval_shape(rule.init, jax.random.key(0)))
    except ValueError as error:
        raise ValueError(f"name: {path} {error}.") from error
    try:
        return params, rule, learned_fine_tuner(params, rule)
    except ValueError as error:  # weights of no rule
        raise ValueError(f"name: {path}: {error}") from error


_SMALL = 1000  # bytes; a shorter file is truncated, which is said as such


def _check_sizes(description, size):
    """Raises a ValueError for more units, layers or maps than a file of `size` bytes can have weights of."""
    described = json.loads(description)
    described = described.get("spectral", described)
    for name in ("hidden", "layers", "maps"):
        value = described.get(name, 0)
        if max(value, default=0) > size if isinstance(value, list) else value > size:
            raise ValueError(f"{name}={str(value)[:80]} is too large for weights of {size} bytes")
