"""Inputs of an update rule at each coordinate: small feature sets, selected by name.

A feature set maps the `Signal` of one leaf to features `[size, *leaf.shape]`, and keeps a state of its own (moments,
for example). Features and their derivatives are finite even where gradients are 0. If an extra argument is absent, its
features are 0. docs/method.md lists all feature sets.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lft_jax.base import PyTree, safe_sqrt

LOG_SIGN_P = 10.0  # Andrychowicz et al. 2016, arXiv 1606.04474, appendix A
ADAM_DECAYS = (0.9, 0.999)
MOMENTUM_DECAYS = (0.0, 0.5, 0.9)


class Signal(NamedTuple):
    """What a rule sees of one leaf in an update, in the dtype that the rule computes in.

    Attributes:
      grad: the gradient of the leaf, any shape.
      param: like `grad`, the leaf itself, or None.
      spread: like `grad`, the standard deviation of the per-example gradients, or None.
      context: `[2, *grad.shape]`, mean and standard deviation of the support examples, or None.
      scale: `[]`, the size of a coordinate in the feasible set.
      progress: `[]`, the fraction of the fine-tuning steps that are done, in [0, 1).
      update: like `grad`, the update that followed from this gradient, or None; only for `learned_sampler`.
      noise: `[Y, X // 2 + 1]`, the variance of the mean gradient at each frequency (`lft_jax._spectrum`), or None.
    """

    grad: jax.Array
    param: jax.Array | None
    spread: jax.Array | None
    context: jax.Array | None
    scale: jax.Array
    progress: jax.Array
    update: jax.Array | None = None
    noise: jax.Array | None = None


class FeatureSet(NamedTuple):
    """A named set of features.

    Attributes:
      size: number of features per coordinate.
      init: `leaf -> state`, before the first update.
      apply: `(signal, state) -> (features [size, *leaf.shape], next state)`.
    """

    size: int
    init: Callable[[jax.Array], PyTree]
    apply: Callable[[Signal, PyTree], tuple[jax.Array, PyTree]]


def root_mean_square(x: jax.Array) -> jax.Array:
    """`[]`, the root mean square of all entries of `x`; 0 if it has none."""
    x, largest = _divided_by_largest(x)
    return largest * safe_sqrt(jnp.sum(x * x) / max(x.size, 1))


def unit_rms(x: jax.Array) -> jax.Array:
    """`x` divided by the root mean square of all its entries; 0 if all entries are 0."""
    x, _ = _divided_by_largest(x)
    rms = safe_sqrt(jnp.sum(x * x) / max(x.size, 1))
    return x / jnp.where(rms > 0, rms, 1)


def _divided_by_largest(x):
    # Squares of the quotient neither underflow nor overflow. The callers' results do not depend on the divisor, so it
    # can be a constant; its own derivative would be infinite for tiny entries.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    return x / jnp.where(largest > 0, largest, 1), largest


def _stateless(size, features):
    return FeatureSet(size, lambda leaf: (), lambda signal, state: (features(signal), state))


def _raw(signal):
    return signal.grad[None]


def _log_sign(signal):
    # [max(log|g| / p, -1), clip(g e^p, -1, 1)]. The maximum is taken before the log, which is then finite at 0.
    floor = math.exp(-LOG_SIGN_P)
    magnitude = jnp.log(jnp.maximum(jnp.abs(signal.grad), floor)) / LOG_SIGN_P
    return jnp.stack([magnitude, jnp.clip(signal.grad / floor, -1, 1)])


def _adam_init(leaf):
    return jnp.zeros((), jnp.int32), jnp.zeros_like(leaf), jnp.zeros_like(leaf)


def _adam(signal, state):
    # RNNProp (Lv et al. 2017, arXiv 1703.03633): [m_hat / sqrt(v_hat), g / sqrt(v_hat)].
    count, mean, square = state
    decay_mean, decay_square = ADAM_DECAYS
    count = count + 1
    mean = decay_mean * mean + (1 - decay_mean) * signal.grad
    square = decay_square * square + (1 - decay_square) * signal.grad**2
    exponent = count.astype(mean.dtype)
    root = safe_sqrt(square / (1 - decay_square**exponent)) + 1e-8
    features = jnp.stack([mean / (1 - decay_mean**exponent) / root, signal.grad / root])
    return features, (count, mean, square)


def _momentum(signal, state):
    state = tuple(decay * m + signal.grad for decay, m in zip(MOMENTUM_DECAYS, state, strict=True))
    return jnp.stack([jnp.tanh(unit_rms(m)) for m in state]), state


def _no_momenta(leaf):
    return tuple(jnp.zeros_like(leaf) for _ in MOMENTUM_DECAYS)


def _spread(signal):
    # mean / (|mean| + standard deviation) over the examples: +-1 where all examples agree, near 0 where the mean is
    # noise.
    if signal.spread is None:
        return jnp.zeros_like(signal.grad)[None]
    size = jax.lax.stop_gradient(jnp.abs(signal.grad) + signal.spread)  # as in `_divided_by_largest`
    size = jnp.where(size > 0, size, 1)
    grad, spread = signal.grad / size, signal.spread / size
    total = jnp.abs(grad) + spread
    return (grad / jnp.where(total > 0, total, 1))[None]


def _constraint(signal):
    if signal.param is None:
        return jnp.zeros_like(signal.grad)[None]
    scale = jnp.where(signal.scale > 0, signal.scale, 1)  # a schedule may end at 0
    return jnp.clip(signal.param / scale, -3, 3)[None]


def _progress(signal):
    return jnp.broadcast_to(signal.progress, (1, *signal.grad.shape))


def _context(signal):
    if signal.context is None:
        return jnp.zeros((2, *signal.grad.shape), signal.grad.dtype)
    return signal.context


def _update(signal):
    return (jnp.zeros_like(signal.grad) if signal.update is None else signal.update)[None]


#: All feature sets by name.
FEATURES: dict[str, FeatureSet] = {
    "raw": _stateless(1, _raw),
    "log_sign": _stateless(2, _log_sign),
    "adam": FeatureSet(2, _adam_init, _adam),
    "momentum": FeatureSet(len(MOMENTUM_DECAYS), _no_momenta, _momentum),
    "spread": _stateless(1, _spread),
    "constraint": _stateless(1, _constraint),
    "progress": _stateless(1, _progress),
    "context": _stateless(2, _context),
    "update": _stateless(1, _update),
}
