"""Update rules: small recurrent networks that turn a gradient into an update, for arrays of any shape.

A rule is a hashable description; its weights are the meta-parameters `params`. It is applied leaf by leaf with the
same weights at every coordinate, so one set of weights serves every shape (PAPER, "The method"). Internally a leaf's
coordinates trail and the network's channels lead, `[channels, *leaf.shape]`: matrix products with the long axis last.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lft_jax import base
from lft_jax.optimizers.features import FEATURES, Signal, root_mean_square

PyTree = Any

#: What the base update may go along.
ALONG = ("sign", "gradient")


@dataclasses.dataclass(frozen=True)
class MomentumUpdate:
    """A strong hand-designed update that the output of the network is added to: momentum PGD, or gradient descent.

    The rule's update of a leaf is `scale * (size * direction + b)`, where `size` is `step` and `b` is 0 before
    meta-training, up to a network's outputs `a` and `b` near 0. The direction is, along

    - "sign": the sign of the gradient's momentum, with `size = sigmoid(a + logit(step))`: at first, momentum PGD.
      Coordinates whose gradient is small on the support images still matter on others. The sigmoid keeps the first
      step from the border of an linf ball, where meta-gradients end.
    - "gradient": the momentum in units of the root mean square of the leaf's first gradient that is not 0, with
      `size = step * exp(a)`, `a` clipped to -5 and 5: at first, gradient descent with momentum whose learning rate the
      first gradient sets, so that a large model's steps are no larger than another's. They shrink with the gradient,
      that is as the support images are fooled. If the first gradient is far smaller than later ones, it is the feasible
      set alone that bounds the steps.

    Attributes:
      step: as a fraction of the feasible set's scale; in (0, 1) along the sign, else above 0, the root mean square of
        the first step.
      decay: of the momentum, in [0, 1).
      along: "sign" or "gradient".
    """

    step: float = 0.8
    decay: float = 0.5
    along: str = "sign"

    def __post_init__(self):
        base.check_name("MomentumUpdate.along", self.along, ALONG)
        if self.along == "gradient":
            base.check_positive("MomentumUpdate.step", self.step)
        elif not 0 < self.step < 1:
            raise ValueError(f"MomentumUpdate.step must be in (0, 1), got {self.step!r}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"MomentumUpdate.decay must be in [0, 1), got {self.decay!r}.")

    def init(self, leaf: jax.Array) -> PyTree:
        """The state for one leaf: the momentum, and the unit of the steps where there is one."""
        unit = {"unit": jnp.zeros((), leaf.dtype)} if self.along == "gradient" else {}
        return {"momentum": jnp.zeros_like(leaf), **unit}

    def apply(self, change: jax.Array, grad: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        """`(size * direction, state)`, with `change` for `a`."""
        momentum = self.decay * state["momentum"] + grad
        if self.along == "sign":
            size = jax.nn.sigmoid(change + math.log(self.step / (1 - self.step)))
            return size * jnp.sign(momentum), {"momentum": momentum}
        unit = jnp.where(state["unit"] > 0, state["unit"], root_mean_square(grad))
        divisor = jnp.where(unit > 0, unit, 1)
        near = jax.lax.stop_gradient(divisor)  # it cancels; a tiny unit's square, in the derivative, would be 0
        direction = (momentum / near) / (divisor / near)
        return self.step * jnp.exp(jnp.clip(change, -5, 5)) * direction, {"momentum": momentum, "unit": unit}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A recurrent update rule: features -> optional 3x3 convolutions -> LSTM layers -> linear head.

    Build one with `coordinate_lstm` or `spatial_lstm`.

    Attributes:
      hidden: units of each LSTM layer.
      layers: number of LSTM layers.
      features: names from `lft_jax.optimizers.features.FEATURES`.
      output_scale: factor on the network's output.
      base_update: the hand-designed update that the output is added to, or None: the output is the update.
      maps: feature maps of each convolution; empty for a coordinatewise rule.
    """

    hidden: int
    layers: int
    features: tuple[str, ...]
    output_scale: float
    base_update: MomentumUpdate | None = None
    maps: tuple[int, ...] = ()

    def __post_init__(self):
        base.check_at_least("hidden", self.hidden, 1)
        base.check_at_least("layers", self.layers, 1)
        base.check_positive("output_scale", self.output_scale)
        if not self.features:
            raise ValueError(f"features must name at least one of {', '.join(FEATURES)}, got none.")
        for name in self.features:
            base.check_name("features", name, FEATURES)
        for size in self.maps:
            base.check_at_least("maps", size, 1)

    @property
    def num_features(self) -> int:
        """Features of a coordinate."""
        return sum(FEATURES[name].size for name in self.features)

    def init(self, key: jax.Array) -> PyTree:
        """Draws the rule's weights, float32: LeCun-normal matrices, forget gates open, a head near 0."""
        keys = iter(jax.random.split(key, len(self.maps) + self.layers + 1))

        def dense(fan_out, fan_in, gain=1.0):
            weight = jax.random.normal(next(keys), (fan_out, fan_in), jnp.float32) * (gain / math.sqrt(fan_in))
            return {"weight": weight, "bias": jnp.zeros((fan_out,), jnp.float32)}

        params = {"convolutions": [], "cells": []}
        channels = self.num_features
        for size in self.maps:
            params["convolutions"].append(dense(size, 9 * channels))
            channels = size
        inputs = self.num_features + (channels if self.maps else 0)
        for _ in range(self.layers):
            cell = dense(4 * self.hidden, inputs + self.hidden)
            cell["bias"] = cell["bias"].at[self.hidden : 2 * self.hidden].set(1.0)
            params["cells"].append(cell)
            inputs = self.hidden
        params["head"] = dense(2 if self.base_update else 1, self.hidden, gain=0.1)
        return params

    def init_state(self, leaf: jax.Array) -> PyTree:
        """The rule's state for one leaf, in the leaf's dtype."""

        def hidden():  # a buffer of its own for each, so that the state can be donated to a jitted step
            return jnp.zeros((self.hidden, leaf.size), leaf.dtype)

        return {
            "features": tuple(FEATURES[name].init(leaf) for name in self.features),
            "cells": tuple((hidden(), hidden()) for _ in range(self.layers)),
            "base_update": self.base_update.init(leaf) if self.base_update else (),
        }

    def apply(self, params: PyTree, signal: Signal, state: PyTree) -> tuple[jax.Array, PyTree]:
        """`(step, state)`: the step to *subtract* from the leaf, PAPER "The method", and the next state."""
        columns, feature_states = [], []
        for name, feature_state in zip(self.features, state["features"], strict=True):
            column, feature_state = FEATURES[name].apply(signal, feature_state)
            columns.append(column)
            feature_states.append(feature_state)
        inputs = jnp.concatenate(columns)
        if self.maps:
            maps = inputs
            for convolution in params["convolutions"]:
                maps = jax.nn.relu(_convolution(convolution, maps))
            inputs = jnp.concatenate([inputs, maps])
        inputs = _flat(inputs)  # a product's gradient is twice as fast with one long axis
        cells = []
        for cell, carry in zip(params["cells"], state["cells"], strict=True):
            inputs, carry = _lstm(cell, inputs, carry)
            cells.append(carry)
        output = self.output_scale * _affine(params["head"], inputs)
        output = output.reshape(output.shape[0], *signal.grad.shape)
        state = {"features": tuple(feature_states), "cells": tuple(cells), "base_update": state["base_update"]}
        if self.base_update is None:
            return output[0], state
        step, base_state = self.base_update.apply(output[0], signal.grad, state["base_update"])
        return signal.scale * (step + output[1]), {**state, "base_update": base_state}


def coordinate_lstm(
    hidden: int = 20,
    layers: int = 2,
    *,
    features: str | tuple[str, ...] = "log_sign",
    output_scale: float = 0.1,
    base_update: MomentumUpdate | None = None,
) -> Rule:
    """The paper's coordinatewise recurrent rule (Andrychowicz et al. 2016: two LSTM layers of 20 units).

    Args:
      hidden: units of each layer.
      layers: number of layers.
      features: one name or several of `lft_jax.optimizers.features.FEATURES`; "log_sign" is the paper's, "raw" that of
        ZO-L2L, "adam" that of RNNProp.
      output_scale: factor on the network's output (0.1 in the paper's appendix).
      base_update: a hand-designed update to add the output to, which is then in units of the feasible set's scale.

    Raises:
      ValueError: for sizes below 1 or an unknown feature name.
    """
    names = (features,) if isinstance(features, str) else tuple(features)
    return Rule(hidden, layers, names, output_scale, base_update)


def spatial_lstm(
    hidden: int = 20,
    layers: int = 1,
    *,
    maps: tuple[int, ...] = (16, 16),
    features: str | tuple[str, ...] = ("momentum", "spread", "constraint", "progress", "context"),
    output_scale: float = 1.0,
    base_update: MomentumUpdate | None = MomentumUpdate(),
) -> Rule:
    """A rule for images that sees each coordinate's neighbourhood: 3x3 convolutions, then LSTM layers (ours).

    Leaves `[H, W]` and `[H, W, C]` are images, each channel convolved alike; any other leaf is taken as a line of
    its coordinates. Works at every image size. Arguments as for `coordinate_lstm`; `maps` are the feature maps of
    each convolution.
    """
    names = (features,) if isinstance(features, str) else tuple(features)
    return Rule(hidden, layers, names, output_scale, base_update, tuple(maps))


RULES = {"coordinate_lstm": coordinate_lstm, "spatial_lstm": spatial_lstm}


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """A JSON-serialisable description of the rule, for configurations and cards."""
    return dataclasses.asdict(rule)


def rule_from_dict(description: dict[str, Any]) -> Rule:
    """The rule that `rule_to_dict` described; rules that were stored before version 0.2 say "start" for "base_update".

    Raises:
      ValueError: for unknown or missing entries.
    """
    described = dict(description)
    if "start" in described:
        described["base_update"] = described.pop("start")
    known = {field.name for field in dataclasses.fields(Rule)}
    if described.keys() != known:
        raise ValueError(f"a rule is described by {sorted(known)}, got {sorted(description)}.")
    base_update = described["base_update"]
    if base_update:
        known = {field.name for field in dataclasses.fields(MomentumUpdate)}
        if not base_update.keys() <= known:
            raise ValueError(f"base_update: described by {sorted(known)}, got {sorted(base_update)}.")
        base_update = MomentumUpdate(**base_update)
    lists = {name: tuple(described[name]) for name in ("features", "maps")}
    return Rule(**{**described, **lists, "base_update": base_update})


def _affine(layer, x):
    """`[in, n] -> [out, n]` by one matrix product, in the dtype of `x`."""
    return layer["weight"].astype(x.dtype) @ x + layer["bias"].astype(x.dtype)[:, None]


def _lstm(cell, x, carry):
    hidden, memory = carry
    weight = jnp.concatenate([cell["weight"], cell["bias"][:, None]], axis=1).astype(x.dtype)
    # The bias is one more input, and the rows are joined under an axis of 1, or XLA makes two products of one and adds
    # them up: all that is as large as the gates is slow to write and read.
    rows = [part[:, None] for part in (x, hidden, jnp.ones((1, x.shape[1]), x.dtype))]
    hidden, memory = _gated(weight @ jnp.concatenate(rows).reshape(weight.shape[1], x.shape[1]), memory)
    return hidden, (hidden, memory)


@jax.custom_vjp
def _gated(gates, memory):
    """`[4 hidden, n]`, `[hidden, n]` -> the next hidden state and memory."""
    write, forget, read, candidate = _activations(gates)
    memory = forget * memory + write * candidate
    return read * jnp.tanh(memory), memory


def _activations(gates):
    *gates, candidate = jnp.split(gates, 4)
    return *map(jax.nn.sigmoid, gates), jnp.tanh(candidate)


def _gated_backward(saved, cotangents):
    # Autodiff would store each activation; recomputing them from the gates is twice as fast, since what a scan stores
    # costs more than arithmetic.
    gates, memory = saved
    of_hidden, of_memory = cotangents
    write, forget, read, candidate = _activations(gates)
    squashed = jnp.tanh(forget * memory + write * candidate)
    of_memory += of_hidden * read * (1 - squashed**2)
    of_gates = [
        of_memory * candidate * write * (1 - write),
        of_memory * memory * forget * (1 - forget),
        of_hidden * squashed * read * (1 - read),
        of_memory * write * (1 - candidate**2),
    ]
    return jnp.concatenate(of_gates), of_memory * forget


_gated.defvjp(lambda gates, memory: (_gated(gates, memory), (gates, memory)), _gated_backward)


def _convolution(layer, x):
    """`[in, *shape] -> [out, *shape]`: 3x3, zeros beyond the border; see `spatial_lstm` for what an image is."""
    weight, bias = layer["weight"].astype(x.dtype), layer["bias"].astype(x.dtype)
    return _weighted_neighbours(weight, x) + bias.reshape(-1, *[1] * (x.ndim - 1))


@jax.custom_vjp
def _weighted_neighbours(weight, x):
    """`weight [out, 9 in]` times the neighbourhoods of `x [in, *shape]`: `[out, *shape]`.

    A convolution is so a matrix product, whose gradients are fast inside `lax.scan` on every backend.
    """
    return (weight @ _flat(_neighbours(x))).reshape(weight.shape[0], *x.shape[1:])


def _weighted_neighbours_backward(saved, cotangent):
    # Only x is stored, not its nine-fold neighbourhoods; those of the cotangent serve both gradients.
    weight, x = saved
    around = _flat(_neighbours(cotangent))
    by_offset = weight.reshape(weight.shape[0], 9, -1)[:, ::-1]  # seen from the input, offsets are mirrored
    of_x = by_offset.transpose(2, 1, 0).reshape(x.shape[0], -1) @ around
    of_weight = (around @ _flat(x).T).reshape(9, weight.shape[0], -1)[::-1]
    return of_weight.swapaxes(0, 1).reshape(weight.shape), of_x.reshape(x.shape)


_weighted_neighbours.defvjp(
    lambda weight, x: (_weighted_neighbours(weight, x), (weight, x)), _weighted_neighbours_backward
)


def _flat(x):
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _neighbours(x):
    """`[channels, *shape] -> [9 channels, *shape]`: the 3x3 neighbourhood of each pixel, zeros beyond the border."""
    shape = x.shape[1:]
    height, width = shape[:2] if len(shape) in (2, 3) else (1, math.prod(shape))
    depth = shape[2] if len(shape) == 3 else 1
    image = x.reshape(x.shape[0], height, width, depth)
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted).reshape(9 * x.shape[0], *shape)
