"""A function that others wrote, with the convolutions and window maxima of `_layers` in place of XLA's.

The function is traced to a jaxpr, which is evaluated equation by equation. It is one for any framework: what Flax,
Equinox, Haiku and plain `jax.lax` write ends in the same primitives. Values are equal up to rounding, derivatives too,
also where maxima tie. What is not known here stays as it was: transposed, dilated and grouped convolutions, windows
that overlap, functions with derivatives of their own, `while` loops, and everything on other devices than CPUs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from lft_jax import _layers

#: Largest number of entries of a window whose maximum is written out.
_LARGEST_WINDOW = 16


def rewritten(function: Partial) -> Partial:
    """The function with fast layers, wherever JAX traces it.

    Args:
      function: `x -> pytree of arrays`. Its arguments, such as weights, are those of the result; equal functions have
        equal results, which share compiled programs.

    Returns:
      A function of the same values, up to rounding. Called eagerly, it is the function itself.

    Examples:
      >>> import numpy as np
      >>> def model(images):
      ...     return lax.conv(images, np.ones((1, 1, 5, 5), np.float32), (1, 1), "SAME").sum((2, 3))
      >>> images = np.ones((2, 1, 8, 8), np.float32)
      >>> jax.jit(rewritten(Partial(model)))(images).tolist() == model(images).tolist()
      True
    """
    return function if function.func is fast else Partial(fast, function)


def fast(function: Callable[[Any], Any], x: Any) -> Any:
    """`function(x)`, with fast layers if JAX is tracing for a CPU."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((function, x)))
    if not traced or jax.default_backend() != "cpu":
        return function(x)
    # A new function for each trace: JAX remembers what it traced, and a global may have changed since.
    closed, shapes = jax.make_jaxpr(lambda x: function(x), return_shape=True)(x)
    return jax.tree.unflatten(jax.tree.structure(shapes), _evaluated(closed, *jax.tree.leaves(x)))


def _evaluated(closed, *arguments) -> list[Any]:
    """The outputs of a closed jaxpr."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom):
        return atom.val if hasattr(atom, "val") else values[atom]  # the first is that of a literal

    for equation in jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        with equation.ctx.manager:
            found = _replaced(equation, operands)
            if found is None:
                parameters = equation.primitive.get_bind_params(equation.params)
                found = equation.primitive.bind(*operands, **parameters)
        found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _replaced(equation, operands):
    """What an equation computes in a faster way, or None if there is none."""
    rule = _RULES.get(equation.primitive.name)
    if rule is None:
        return None
    if rule in _LAYERS:
        return rule(equation.params, *operands)
    return rule(equation.params, *operands) if any(map(_has_layers, _bodies(equation.params))) else None


def _bodies(parameters) -> list[Any]:
    """The jaxprs in the parameters of an equation, closed ones without their constants."""
    found = []
    for entry in parameters.values():
        for part in entry if isinstance(entry, tuple | list) else (entry,):
            part = getattr(part, "jaxpr", part)
            found += [part] if hasattr(part, "eqns") else []
    return found


def _has_layers(jaxpr) -> bool:
    """Whether a jaxpr has an equation that may be replaced."""
    return any(
        _RULES[equation.primitive.name] in _LAYERS or any(map(_has_layers, _bodies(equation.params)))
        for equation in jaxpr.eqns
        if equation.primitive.name in _RULES
    )


def _convolution(parameters, images, kernel):
    """A convolution of images with two axes, without dilation, of one group or as many as channels."""
    dilations = (*parameters["lhs_dilation"], *parameters["rhs_dilation"], parameters["batch_group_count"])
    preferred, strides = parameters["preferred_element_type"], set(parameters["window_strides"])
    if set(dilations) != {1} or images.ndim != 4 or len(strides) > 1:
        return None
    if images.dtype != kernel.dtype or preferred not in (None, images.dtype) or not _is_floating(images):
        return None
    (from_images, from_kernel, from_outputs), padding = parameters["dimension_numbers"], parameters["padding"]
    groups, channels, features = parameters["feature_group_count"], images.shape[from_images[1]], from_kernel[0]
    sides, sizes = ([x.shape[axis] for axis in axes[2:]] for x, axes in ((images, from_images), (kernel, from_kernel)))
    depthwise = groups == channels == kernel.shape[features]
    if (groups > 1 and not depthwise) or not _is_full((*images.shape, *kernel.shape), sides, sizes, padding):
        return None
    images, (stride,) = images.transpose(_channels_last(from_images)), strides
    kernel = kernel.transpose((*from_kernel[2:], from_kernel[1], features))
    if groups > 1:
        outputs = _layers.padded_depthwise_conv(images, kernel[:, :, 0], stride, padding)
    else:
        outputs = _layers.padded_conv(images, kernel, stride, padding)
    order = _channels_last(from_outputs)
    return outputs.transpose([order.index(axis) for axis in range(4)])


def _channels_last(axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of batch, rows, columns and channels, of those of batch, channels, rows and columns."""
    return (axes[0], *axes[2:], axes[1])


def _window_maximum(parameters, x):
    """The maxima of small windows side by side."""
    size, strides, padding = (tuple(parameters[name]) for name in ("window_dimensions", "window_strides", "padding"))
    dilated = {*parameters["base_dilation"], *parameters["window_dilation"]} != {1}
    if dilated or not 1 < math.prod(size) <= _LARGEST_WINDOW or not _is_floating(x):
        return None
    if strides != size or not _is_full(x.shape, x.shape, size, padding):
        return None
    return _layers.window_max(x, size, tuple(map(tuple, padding)))


def _is_floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_full(lengths, sides, sizes, padding) -> bool:
    """Whether there are entries, and a window that fits."""
    fits = [length + sum(pads) >= size for length, size, pads in zip(sides, sizes, padding, strict=True)]
    return all(fits) and math.prod(lengths) > 0


def _jit(parameters, *operands):
    return _evaluated(parameters["jaxpr"], *operands)


def _remat(parameters, *operands):
    if parameters["differentiated"]:
        return None
    jaxpr = parameters["jaxpr"]

    def body(*operands):
        return _evaluated(_Closed(jaxpr), *operands)

    options = {name: parameters[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(body, **options)(*operands)


class _Closed:
    """A jaxpr without constants, closed."""

    def __init__(self, jaxpr):
        self.jaxpr, self.consts = jaxpr, ()


def _scan(parameters, *operands):
    if "ft_in" in parameters:  # from JAX 0.12 on
        consts, carried, _ = (len(part) for part in parameters["ft_in"].unpack())
    else:
        consts, carried = parameters["num_consts"], parameters["num_carry"]
    fixed, carry, rows = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def body(carry, row):
        found = _evaluated(parameters["jaxpr"], *fixed, *carry, *row)
        return tuple(found[:carried]), tuple(found[carried:])

    options = {name: parameters[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, tuple(carry), tuple(rows), **options)
    return [*carry, *stacked]


def _cond(parameters, index, *operands):
    branches = [functools.partial(_evaluated, branch) for branch in parameters["branches"]]
    return lax.switch(index, branches, *operands)


_LAYERS = (_convolution, _window_maximum)
#: `{name of a primitive: what computes it, or returns None}`.
_RULES: dict[str, Callable[..., Any]] = {
    "conv_general_dilated": _convolution,
    "reduce_window_max": _window_maximum,
    "jit": _jit,
    "checkpoint": _remat,
    "remat2": _remat,
    "scan": _scan,
    "cond": _cond,
}
