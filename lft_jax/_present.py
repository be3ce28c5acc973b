"""Compiled programs and functions whose weights change.

JAX compiles a function once and keeps the program for as long as it is the same object. What it reads besides its
arguments, such as a global, an attribute or a closure, stays in that program as it was. A classifier that is trained
further would so be attacked with its old weights.
"""

import collections
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

#: Functions that were compiled last. Each keeps its arguments and a few images.
_known: collections.deque["_Known"] = collections.deque(maxlen=16)


class _Program:
    """A function as a static argument: equal to itself alone, and hashable even where the function is not."""

    def __init__(self, structure):
        self.structure = structure

    def __call__(self, leaves, x):
        return jax.tree.unflatten(self.structure, leaves)(x)


class _Known(NamedTuple):
    structure: Any
    leaves: list[Any]
    x: Any
    values: np.ndarray
    program: _Program


def present(function: Partial, x: Any) -> Partial:
    """The function, as an object that JAX compiles again if what it computes has changed.

    The function is called eagerly on the arguments and the input that it was first seen with. If it returns the same
    numbers, programs that were compiled of it still hold.

    Args:
      function: `x -> array`; its arguments may change freely.
      x: an input. The first one of each function is kept.

    Returns:
      The same function. Equal ones share compiled programs.

    Examples:
      >>> weights = {"w": 1.0}
      >>> function = Partial(lambda x: x * weights["w"])
      >>> first, again = present(function, np.ones(2)), present(function, np.ones(2))
      >>> weights["w"] = 2.0
      >>> changed = present(function, np.ones(2))
      >>> first.func is again.func, first.func is changed.func
      (True, False)
    """
    leaves, structure = jax.tree.flatten(function)
    for known in list(_known):
        if _equal(known.structure, structure):
            values = np.asarray(jax.tree.unflatten(structure, known.leaves)(known.x))
            if np.array_equal(values, known.values, equal_nan=True):
                return Partial(known.program, leaves)
            _known.remove(known)
    values = np.asarray(function(x))
    _known.append(_Known(structure, leaves, x, values, _Program(structure)))
    return Partial(_known[-1].program, leaves)


def is_known(function: Partial) -> bool:
    """Whether `present` was called with this function lately, if perhaps with other arguments."""
    structure = jax.tree.structure(function)
    return any(_equal(known.structure, structure) for known in _known)


def _equal(one, other):
    try:
        return bool(one == other)
    except Exception:  # of a model that compares its arrays
        return False
