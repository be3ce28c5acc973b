"""Estimates of the memory that a function needs, without compiling it, and of what fits into a budget."""

from collections.abc import Callable
from typing import Any

import jax

from lft_jax.base import check_positive

#: Default budget in MiB of what one device stores for the backward pass of the tasks of one family.
DEFAULT_MIB = 512


def stored_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that reverse-mode differentiation of `function` stores in the forward pass.

    Args:
      function: a differentiable JAX function; it is traced, not run.
      *args: its arguments: arrays, or anything with shapes and dtypes.
    """
    residuals = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


def working_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that the largest operation of `function` reads and writes: about its memory without a backward pass.

    Args:
      function: a JAX function; it is traced, not run.
      *args: its arguments: arrays, or anything with shapes and dtypes.
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
    """Number of items of `each` bytes that fit into `mib` MiB, clipped to 1 ... `most`.

    Raises:
      ValueError: for a budget that is not finite and above 0.
    """
    check_positive("memory_mib", mib)
    return max(1, min(most, int(mib * 2**20) // max(each, 1)))
