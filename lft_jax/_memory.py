"""How much memory a function takes, told before anything is compiled, and how much fits into a budget."""

from collections.abc import Callable
from typing import Any

import jax

from lft_jax.base import check_positive

#: MiB that one device may store for the backward pass of one family's tasks, unless told otherwise.
DEFAULT_MIB = 512


def stored_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that reverse-mode differentiation of `function` keeps from its forward pass.

    Args:
      function: a differentiable JAX function; it is traced, not run.
      *args: arrays, or anything with their shapes and dtypes.
    """
    residuals = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


def working_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that the largest operation of `function` reads and writes: about what it needs without a backward pass.

    Args:
      function: a JAX function; it is traced, not run.
      *args: arrays, or anything with their shapes and dtypes.
    """
    return _largest(jax.make_jaxpr(function)(*args).jaxpr)


def _largest(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        arrays = [var.aval for var in (*equation.invars, *equation.outvars)]
        sizes.append(sum(a.size * a.dtype.itemsize for a in arrays if hasattr(a, "dtype")))
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values()))]
        sizes += [_largest(value) for value in inner if hasattr(value, "eqns")]
    return max(sizes)


def fitting(most: int, each: int, mib: float) -> int:
    """How many things of `each` bytes go into `mib` MiB: from 1 to `most`.

    Raises:
      ValueError: for a budget that is not above 0.
    """
    check_positive("memory_mib", mib)
    return max(1, min(most, int(mib * 2**20) // max(each, 1)))
