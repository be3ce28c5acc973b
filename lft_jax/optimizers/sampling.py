"""Optimizers that set the covariance of the random directions of a zeroth-order oracle.

Both functions wrap an optimizer and add a field `sampling` to its state, which `lft_jax.fine_tune` passes to the
oracle::

    estimate, update --learned_sampler--> standard deviation of each coordinate --+
    last estimates --guided-------------> subspace -------------------------------+--> the oracle's next directions

`lft_jax.oracles._covariance` makes directions from either. The wrapper must be the outermost transformation. Inside
`optax.chain`, for example, `fine_tune` does not find its state, and directions stay isotropic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax.base import PyTree, check_at_least
from lft_jax.optimizers.rules import Rule, coordinate_lstm
from lft_jax.optimizers.transform import check_weights, initial_states, leaf_signals

#: The sampler of ZO-L2L (Ruan et al. 2020, arXiv 1910.09464, section 4.1).
QUERY_RNN = coordinate_lstm(10, 1, features=("raw", "update"), output_scale=1.0)


class LearnedSamplerState(NamedTuple):
    """State of `learned_sampler`.

    Attributes:
      optimizer: the wrapped optimizer's state.
      leaves: the rule's state for each leaf, in the order of `jax.tree.leaves`.
      sampling: `{"deviation": like theta}`, standard deviations of the next directions, up to a common factor.
    """

    optimizer: PyTree
    leaves: list[PyTree]
    sampling: dict[str, PyTree]


def learned_sampler(
    params: PyTree, rule: Rule, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a meta-learned rule sets the standard deviation of the next directions.

    This is the QueryRNN of ZO-L2L. After each update, the rule sees the estimate and the update that followed from it.
    With its output `o`, the next directions have standard deviations `|1 + o|` per coordinate, rescaled to keep their
    mean squared length. The first directions are isotropic.

    Estimates along these directions carry a meta-gradient to `params`. The inputs of the rule are constants in it.
    Unlike ZO-L2L, isotropic directions are never drawn at random in between, in training or in testing.

    Args:
      params: the rule's weights, from `rule.init(key)` or meta-training.
      rule: the rule of the sampler, without a base update. That of ZO-L2L is
        `coordinate_lstm(10, 1, features=("raw", "update"), output_scale=1.0)`.
      optimizer: the optimizer to wrap: a learned fine-tuner or any optax transformation.

    Returns:
      The transformation, to be used with a zeroth-order oracle.

    Raises:
      ValueError: if the rule has a base update, or a weight is NaN, infinite or above 1e4 (not checked where it is
        traced); in `init`, if a leaf is not floating-point.

    Examples:
      >>> rule = coordinate_lstm(2, 1, features=("raw", "update"), output_scale=1.0)
      >>> params = rule.init(jax.random.key(0))
      >>> optimizer = learned_sampler(params, rule, optax.sgd(0.5))
      >>> state = optimizer.init(jnp.zeros(2))
      >>> state.sampling["deviation"].tolist()
      [1.0, 1.0]

    References:
      Ruan et al. 2020, Learning to learn by zeroth-order oracle, arXiv 1910.09464.
    """
    if rule.base_update is not None:
        raise ValueError(f"rule: the rule of a sampler must not have a base update, got {rule.base_update!r}.")
    check_weights(params)
    weights = params
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        leaves = initial_states(rule, params)
        return LearnedSamplerState(optimizer.init(params), leaves, {"deviation": jax.tree.map(jnp.ones_like, params)})

    def update_fn(updates, state, params=None, **extra_args):
        grads = updates
        updates, inner = optimizer.update(grads, state.optimizer, params, **extra_args)
        arguments: dict[str, Any] = {**extra_args, "update": updates}
        signals = jax.lax.stop_gradient(leaf_signals(grads, params, **arguments))
        deviations, leaves = [], []
        last, structure = jax.tree.flatten(state.sampling["deviation"])
        for deviation, signal, leaf_state in zip(last, signals, state.leaves, strict=True):
            output, leaf_state = rule.apply(weights, signal, leaf_state)
            deviations.append(jnp.abs(1 + output).astype(deviation.dtype))
            leaves.append(leaf_state)
        return updates, LearnedSamplerState(inner, leaves, {"deviation": jax.tree.unflatten(structure, deviations)})

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class GuidedState(NamedTuple):
    """State of `guided`.

    Attributes:
      optimizer: the wrapped optimizer's state.
      sampling: `{"subspace": like theta with a leading axis [k]}`, the last `k` estimates, the latest first.
    """

    optimizer: PyTree
    sampling: dict[str, PyTree]


def guided(optimizer: optax.GradientTransformation, size: int = 2) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that half of the variance of the next directions is in the span of the last estimates.

    These are the directions of guided evolution strategies. With `U` an orthonormal basis of the span of the last `k`
    estimates, the directions are drawn from

        N(0, I / 2 + d / (2 k) U U^T)

    which has the same trace as the isotropic N(0, I). The first directions are isotropic.

    Args:
      optimizer: the optimizer to wrap.
      size: `k`, at least 1.

    Returns:
      The transformation, to be used with a zeroth-order oracle.

    Raises:
      ValueError: if `size` is below 1.

    Examples:
      >>> optimizer = guided(optax.sgd(0.5), size=2)
      >>> state = optimizer.init(jnp.zeros(3))
      >>> updates, state = optimizer.update(jnp.array([1.0, 2.0, 3.0]), state)
      >>> state.sampling["subspace"].tolist()
      [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]

    References:
      Maheswaranathan et al. 2019, Guided evolutionary strategies: augmenting random search with surrogate gradients,
      arXiv 1806.10230.
    """
    check_at_least("size", size, 1)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        subspace = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), params)
        return GuidedState(optimizer.init(params), {"subspace": subspace})

    def update_fn(updates, state, params=None, **extra_args):
        last = jax.lax.stop_gradient(updates)
        updates, inner = optimizer.update(updates, state.optimizer, params, **extra_args)
        subspace = jax.tree.map(lambda g, s: jnp.concatenate([g[None], s[:-1]]), last, state.sampling["subspace"])
        return updates, GuidedState(inner, {"subspace": subspace})

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
