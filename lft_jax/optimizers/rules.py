"""Update rules: small recurrent networks that turn a gradient into an update, for arrays of any shape.

A `Rule` is a hashable description of the network; its weights are the meta-parameters `params`. It is applied leaf by
leaf, with the same weights at every coordinate, so that one set of weights serves all shapes (docs/method.md, "Update
rule"). Inside the network, channels lead and coordinates trail, `[channels, *leaf.shape]`: the long axis of matrix
products is the last one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import base
from lft_jax._deprecation import renamed
from lft_jax.base import PyTree
from lft_jax.optimizers._network import affine, convolution, flat, lstm
from lft_jax.optimizers.features import FEATURES, Signal
from lft_jax.optimizers.spectral import SpectralRule, spectral_lstm


@dataclasses.dataclass(frozen=True)
class MomentumUpdate:
    """The base update of a rule: a hand-designed update that the network's output is added to.

    With outputs `a` and `b` of the network, both near 0 before meta-training, a rule subtracts from a leaf

        scale * (size * sign(m) + b),    m = decay * m + gradient,    size = sigmoid(a + logit(step))

    It begins as PGD with momentum. It moves all coordinates alike, since those with small gradients on the support
    images can matter on others. The sigmoid keeps the first step inside an linf ball; at its border meta-gradients
    vanish.

    Attributes:
      step: step size as a fraction of the feasible set's scale, in (0, 1).
      decay: decay of the momentum, in [0, 1).

    Raises:
      ValueError: for values outside these ranges.

    Examples:
      >>> rule = coordinate_lstm(base_update=MomentumUpdate(step=0.4, decay=0.9))
      >>> rule.base_update.step
      0.4
    """

    step: float = 0.8
    decay: float = 0.5

    def __post_init__(self):
        if not 0 < self.step < 1:
            raise ValueError(f"MomentumUpdate.step must be in (0, 1), got {self.step!r}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"MomentumUpdate.decay must be in [0, 1), got {self.decay!r}.")

    def init(self, leaf: Float[Array, "..."]) -> PyTree:
        """Returns the state for one leaf: the momentum."""
        return {"momentum": jnp.zeros_like(leaf)}

    def apply(
        self, change: Float[Array, "*shape"], grad: Float[Array, "*shape"], state: PyTree
    ) -> tuple[Float[Array, "*shape"], PyTree]:
        """Returns `size * sign(m)` and the next state.

        Args:
          change: the network's output `a`.
          grad: the gradient of the leaf.
          state: from `init` or the previous call.
        """
        momentum = self.decay * state["momentum"] + grad
        size = jax.nn.sigmoid(change + math.log(self.step / (1 - self.step)))
        return size * jnp.sign(momentum), {"momentum": momentum}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A recurrent update rule: features -> optional 3x3 convolutions -> LSTM layers -> linear head.

    Build one with `coordinate_lstm` or `spatial_lstm`.

    Attributes:
      hidden: units of each LSTM layer.
      layers: number of LSTM layers.
      features: names of feature sets, from `lft_jax.optimizers.features.FEATURES`.
      output_scale: factor on the network's output.
      base_update: the hand-designed update that the output is added to. None: the output is the update.
      maps: feature maps of each convolution; empty for a coordinatewise rule.

    Raises:
      ValueError: for sizes below 1, an `output_scale` that is not above 0, or unknown feature names.

    Examples:
      >>> rule = Rule(hidden=2, layers=1, features=("raw",), output_scale=0.1)
      >>> params = jax.eval_shape(rule.init, jax.random.key(0))
      >>> params["cells"][0]["weight"].shape  # 4 gates of 2 units; inputs: 1 feature and 2 units
      (8, 3)
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
        """Number of features per coordinate."""
        return sum(FEATURES[name].size for name in self.features)

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Draws initial weights.

        Matrices are LeCun normal, and those of the head a tenth of that. Biases are 0, and those of forget gates 1.

        Args:
          key: PRNG key of the weights.

        Returns:
          A dict of float32 arrays.
        """
        keys = iter(jax.random.split(key, len(self.maps) + self.layers + 1))

        def dense(fan_out, fan_in, gain=1.0):
            weight = jax.random.normal(next(keys), (fan_out, fan_in), jnp.float32) * (gain / math.sqrt(fan_in))
            return {"weight": weight, "bias": jnp.zeros((fan_out,), jnp.float32)}

        params: dict[str, Any] = {"convolutions": [], "cells": []}
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

    def init_state(self, leaf: Float[Array, "..."]) -> PyTree:
        """Returns the rule's initial state for one leaf, in the leaf's dtype."""

        def hidden():  # separate buffers, so that the state can be donated to a jitted step
            return jnp.zeros((self.hidden, leaf.size), leaf.dtype)

        return {
            "features": tuple(FEATURES[name].init(leaf) for name in self.features),
            "cells": tuple((hidden(), hidden()) for _ in range(self.layers)),
            "start": self.base_update.init(leaf) if self.base_update else (),  # the name in checkpoints,
        }

    def apply(self, params: PyTree, signal: Signal, state: PyTree) -> tuple[Float[Array, "..."], PyTree]:
        """Applies the rule to one leaf.

        Args:
          params: the rule's weights, from `init` or meta-training.
          signal: gradient of the leaf, and what else the features need.
          state: from `init_state` or the previous call.

        Returns:
          The step to *subtract* from the leaf, like the gradient, and the next state.
        """
        columns, feature_states = [], []
        for name, feature_state in zip(self.features, state["features"], strict=True):
            column, feature_state = FEATURES[name].apply(signal, feature_state)
            columns.append(column)
            feature_states.append(feature_state)
        inputs = jnp.concatenate(columns)
        if self.maps:
            maps = inputs
            for layer in params["convolutions"]:
                maps = jax.nn.relu(convolution(layer, maps))
            inputs = jnp.concatenate([inputs, maps])
        inputs = flat(inputs)  # with one long axis, the gradient of a product is twice as fast
        cells = []
        for cell, carry in zip(params["cells"], state["cells"], strict=True):
            inputs, carry = lstm(cell, inputs, carry)
            cells.append(carry)
        output = self.output_scale * affine(params["head"], inputs)
        output = output.reshape(output.shape[0], *signal.grad.shape)
        state = {"features": tuple(feature_states), "cells": tuple(cells), "start": state["start"]}
        if self.base_update is None:
            return output[0], state
        step, base_state = self.base_update.apply(output[0], signal.grad, state["start"])
        return signal.scale * (step + output[1]), {**state, "start": base_state}


@renamed(start="base_update")
def coordinate_lstm(
    hidden: int = 20,
    layers: int = 2,
    *,
    features: str | Sequence[str] = "log_sign",
    output_scale: float = 0.1,
    base_update: MomentumUpdate | None = None,
) -> Rule:
    """A rule that treats each coordinate by itself: LSTM layers and a linear head, as in L2O.

    The defaults are those of L2O: two layers of 20 units on LogAndSign features, and an output scale of 0.1.

    Args:
      hidden: units of each LSTM layer.
      layers: number of LSTM layers.
      features: one or several names from `lft_jax.optimizers.features.FEATURES`. L2O has "log_sign", ZO-L2L "raw",
        RNNProp "adam".
      output_scale: factor on the network's output.
      base_update: the hand-designed update that the output is added to, in units of the feasible set's scale. None:
        the output is the update.

    Returns:
      The rule.

    Raises:
      ValueError: for sizes below 1, an `output_scale` that is not above 0, or unknown feature names.

    Examples:
      >>> rule = coordinate_lstm(features=("momentum", "progress"), base_update=MomentumUpdate())
      >>> rule.hidden, rule.layers, rule.num_features
      (20, 2, 4)

    References:
      Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv 1606.04474.
      Ruan et al. 2020, Learning to learn by zeroth-order oracle, arXiv 1910.09464.
      Lv et al. 2017, Learning gradient descent: better generalization and longer horizons, arXiv 1703.03633.
    """
    names = (features,) if isinstance(features, str) else tuple(features)
    return Rule(hidden, layers, names, output_scale, base_update)


@renamed(start="base_update")
def spatial_lstm(
    hidden: int = 20,
    layers: int = 1,
    *,
    maps: Sequence[int] = (16, 16),
    features: str | Sequence[str] = ("momentum", "spread", "constraint", "progress", "context"),
    output_scale: float = 1.0,
    base_update: MomentumUpdate | None = MomentumUpdate(),
) -> Rule:
    """A rule for images that also sees the neighbours of each pixel: 3x3 convolutions before the LSTM layers.

    Leaves `[H, W]` and `[H, W, C]` are images of any size; all channels share the convolutions. Other leaves are
    treated as one line of coordinates.

    Args:
      hidden: units of each LSTM layer.
      layers: number of LSTM layers.
      maps: number of feature maps of each convolution.
      features: one or several names from `lft_jax.optimizers.features.FEATURES`.
      output_scale: factor on the network's output.
      base_update: the hand-designed update that the output is added to, in units of the feasible set's scale. None:
        the output is the update.

    Returns:
      The rule.

    Raises:
      ValueError: for sizes below 1, an `output_scale` that is not above 0, or unknown feature names.

    Examples:
      >>> rule = spatial_lstm(hidden=8, maps=(4,))
      >>> leaf = jnp.zeros((28, 28, 1))
      >>> state = jax.eval_shape(rule.init_state, leaf)
      >>> [array.shape for array in state["cells"][0]]  # hidden state and memory of the LSTM
      [(8, 784), (8, 784)]
    """
    names = (features,) if isinstance(features, str) else tuple(features)
    return Rule(hidden, layers, names, output_scale, base_update, tuple(maps))


RULES = {"coordinate_lstm": coordinate_lstm, "spatial_lstm": spatial_lstm, "spectral_lstm": spectral_lstm}
#: What `lft_jax.learned_fine_tuner` takes.
UpdateRule = Rule | SpectralRule


def rule_to_dict(rule: UpdateRule) -> dict[str, Any]:
    """Describes a rule by values that JSON can hold, for configurations and model cards.

    Args:
      rule: the rule.

    Returns:
      The fields of the rule, with those of its base update. Those of a `SpectralRule` are under "spectral".

    Examples:
      >>> description = rule_to_dict(coordinate_lstm(hidden=4))
      >>> description["hidden"], description["features"]
      (4, ('log_sign',))
      >>> rule_from_dict(description) == coordinate_lstm(hidden=4)
      True
    """
    fields = dataclasses.asdict(rule)
    return {"spectral": fields} if isinstance(rule, SpectralRule) else fields


def rule_from_dict(description: dict[str, Any]) -> UpdateRule:
    """Builds the rule that `rule_to_dict` described.

    Args:
      description: what `rule_to_dict` returns. Files from before version 0.2 have "start" for "base_update", those of
        version 0.2 the direction of a base update, "along", which must be "sign".

    Returns:
      The rule.

    Raises:
      ValueError: for unknown or missing fields, or values that the rule does not accept.
    """
    try:
        return _rule(description)
    except (AttributeError, KeyError, OverflowError, TypeError) as error:  # values of other types
        raise ValueError(f"a rule is described by what rule_to_dict returns, got {str(description)[:200]}.") from error


def _rule(description):
    if description.keys() == {"spectral"}:
        return SpectralRule(**_known_fields(SpectralRule, description["spectral"]))
    described = dict(description)
    if "start" in described and "base_update" not in described:
        described["base_update"] = described.pop("start")
    base_update = _known_fields(Rule, described)["base_update"]
    if base_update:
        base_update = dict(base_update)
        if (along := base_update.pop("along", "sign")) != "sign":
            raise ValueError(f"base_update: along must be 'sign', got {along!r}, which only lft_jax 0.2 has.")
        known = {field.name for field in dataclasses.fields(MomentumUpdate)}
        if not base_update.keys() <= known:
            raise ValueError(f"the fields of a base_update are {sorted(known)}, got {sorted(base_update)}.")
        base_update = MomentumUpdate(**base_update)
    lists = {name: tuple(described[name]) for name in ("features", "maps")}  # JSON has no tuples
    fields: dict[str, Any] = {**described, **lists, "base_update": base_update}
    return Rule(**fields)


def _known_fields(kind, described):
    """`described`, if its names are those of the fields of a rule."""
    known = {field.name for field in dataclasses.fields(kind)}
    if described.keys() != known:
        raise ValueError(f"the fields of a {kind.__name__} are {sorted(known)}, got {sorted(described)}.")
    for name in ("hidden", "layers"):
        if name in described and type(described[name]) is not int:
            raise ValueError(f"{name} must be an integer, got {str(described[name])[:80]}.")
    for size in described.get("maps", ()):
        if type(size) is not int:
            raise ValueError(f"maps must be integers, got {str(size)[:80]}.")
    return described
