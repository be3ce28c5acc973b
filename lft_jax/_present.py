"""Compiled programs and functions whose weights change.

JAX compiles a function once and keeps the program for as long as it is the same object. What it reads besides its
arguments, such as a global, an attribute or a closure, stays in that program as it was. A classifier that is trained
further would so be attacked with its old weights.
"""

import collections
import contextlib
import dataclasses
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lft_jax._rewriting import fast, rewritten

_ADDRESS = re.compile(r"0x[0-9a-f]+")


class _Program:
    """A function as a static argument: equal to itself alone, and hashable even where the function is not.

    It keeps the shapes of the arguments and of the input that the function was seen with, and what JAX traced.
    """

    def __init__(self, structure, leaves, x, origin):
        self.structure, self.origin = structure, origin
        self.leaves, self.x = jax.eval_shape(lambda *args: args, leaves, x)
        self.text, self.constants = self._traced(structure)

    def __call__(self, leaves, x):
        return fast(jax.tree.unflatten(self.structure, leaves), x)

    def holds(self, structure):
        """Whether JAX would trace a function of this structure as it did."""
        try:
            text, constants = self._traced(structure)
        except Exception:  # it takes other shapes now
            return False
        same = text == self.text and len(constants) == len(self.constants)
        return same and all(map(_same, constants, self.constants))

    def _traced(self, structure):
        """The program in words, without addresses, and the arrays and functions in it."""

        def of_leaves(leaves, x):  # a new function, since JAX remembers what it traced
            return jax.tree.unflatten(structure, leaves)(x)

        closed = jax.make_jaxpr(of_leaves)(self.leaves, self.x)
        return _ADDRESS.sub("", str(closed.jaxpr)), list(_parts(closed))


def _parts(entry):
    """The arrays and callbacks of a jaxpr, also of those in it, which its text shortens or leaves out."""
    if hasattr(entry, "eqns"):
        yield from _parts(getattr(entry, "consts", ()))
        for equation in entry.eqns:
            yield from _parts([atom.val for atom in equation.invars if hasattr(atom, "val")])
            yield from _parts(list(equation.params.values()))
            if "callback" in equation.primitive.name:
                yield from (value for value in equation.params.values() if callable(value))
    elif isinstance(entry, list | tuple):
        for part in entry:
            yield from _parts(part)
    elif isinstance(entry, jax.Array):
        yield entry
    elif hasattr(entry, "__array__"):
        yield np.array(entry)  # may change in place


def _same(one, other):
    """Whether arrays are equal, or callbacks the same; what these read when they are called may differ."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, np.ndarray | jax.Array):
        if not (jnp.issubdtype(one.dtype, jnp.number) or one.dtype == bool):
            return False
        return np.array_equal(one, other, equal_nan=jnp.issubdtype(one.dtype, jnp.inexact))
    if isinstance(one, types.FunctionType):  # made again, of the same objects
        held = zip(*([cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other)), strict=False)
        return one.__code__ is other.__code__ and all(_same_object(mine, yours) for mine, yours in held)
    return dataclasses.is_dataclass(one) and all(
        _same_object(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)
    )


def _same_object(one, other):
    """Whether what a callback holds is the same; an equal array may change later, and only one of them."""
    if isinstance(one, types.FunctionType):
        return _same(one, other)
    return one is other or (not hasattr(one, "shape") and _equal(one, other))


#: Functions that were compiled last; few, since each keeps the arrays that it holds in memory.
_programs: collections.deque[_Program] = collections.deque(maxlen=4)


def present(function: Partial, x: Any, *, origin: Any = None) -> Partial:
    """The function, as an object that JAX compiles again if what it computes has changed.

    The function is traced with arguments and an input of the shapes that it was first seen with. If JAX finds the same
    operations, the same arrays and the same callbacks, programs that were compiled of it still hold. What a callback
    reads when it is called may change; a derivative rule of its own (`jax.custom_jvp`) that alone has changed is not
    seen.

    Args:
      function: `x -> array`; its arguments may change freely.
      x: an input, or its shape as a `jax.ShapeDtypeStruct`.
      origin: what the function was made of, if it has to be asked for it again: `origin.traced()`; or None.

    Returns:
      The same function, with fast layers where JAX traces it for a CPU (`lft_jax._rewriting`). Equal ones share
      compiled programs.

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
    for program in list(_programs):
        if program.origin is origin and _equal(program.structure, structure):
            if program.holds(structure):
                return Partial(program, leaves)
            with contextlib.suppress(ValueError):  # another thread was faster
                _programs.remove(program)
    program = _Program(structure, leaves, x, origin)
    _programs.append(program)
    return Partial(program, leaves)


def is_known(function: Partial) -> bool:
    """Whether `present` was called with this function lately, if perhaps with other arguments."""
    structure = jax.tree.structure(function)
    return any(_equal(program.structure, structure) for program in list(_programs))


def refreshed(function: Partial) -> Partial:
    """What `present` returned, again if the function has changed since; any other function as it is."""
    program = function.func
    if not isinstance(program, _Program):
        return function
    if program.origin is not None:
        return present(program.origin.traced(), program.x, origin=program.origin)
    if program.holds(program.structure):
        return function
    return present(jax.tree.unflatten(program.structure, *function.args), program.x)


def as_partial(logits_fn: Callable[[Any], Any], images: Any, *, exact: bool) -> Partial:
    """A victim as a field of a task family: its weights are arguments, or looked after by `present`.

    Args:
      logits_fn: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`. The arguments of a `jax.tree_util.Partial`
        are its weights. It may be a `lft_jax.models.Classifier`.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      exact: whether it will be differentiated.

    Returns:
      The same function, with fast layers where JAX traces it for a CPU (`lft_jax._rewriting`).

    Raises:
      ValueError: if JAX cannot trace it, it returns no logits, or it has no gradients and needs them.
    """
    if exact and not getattr(logits_fn, "differentiable", True):
        raise ValueError("logits_fn has no gradients; pass estimator=lft_jax.ZerothOrder() to evaluate it only.")
    origin = None
    if hasattr(logits_fn, "traced"):
        function, origin = logits_fn.traced(), logits_fn if getattr(logits_fn, "refresh", None) else None
    else:
        function = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    kind = images.dtype if jnp.issubdtype(images.dtype, jnp.floating) else jnp.float32
    x = jax.ShapeDtypeStruct((1, *images.shape[1:]), kind)
    try:
        found = jax.eval_shape(function, x)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ValueError(
            f"logits_fn cannot be traced by JAX ({type(error).__name__}). Write it with jax.numpy, pass the adapter of "
            "its framework (lft_jax.models.from_torch, ...), or call NumPy code back and pass an estimator:\n"
            "  logits_fn = lambda x: jax.pure_callback(\n"
            "      lambda x: np.asarray(model(np.asarray(x)), np.float32),\n"
            "      jax.ShapeDtypeStruct((len(x), num_classes), np.float32), x, vmap_method='sequential')\n"
            "  uap_family(images, labels, logits_fn, estimator=lft_jax.ZerothOrder(), ...)"
        ) from error
    if not hasattr(found, "shape") or len(found.shape) != 2 or len(found) != 1:
        what = f"shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise ValueError(
            f"logits_fn must return logits [n, classes], got {what} for one image; an adapter, such as "
            "lft_jax.models.from_function, has output= for other answers."
        )
    return rewritten(function) if isinstance(logits_fn, Partial) else present(function, x, origin=origin)


def _equal(one, other):
    try:
        return bool(one == other)
    except Exception:  # of a model that compares its arrays
        return False
