"""Optimizers that say along which directions their zeroth-order oracle should look next.

Both wrap an optimizer and add a field `sampling` to its state, which `lft_jax.fine_tune` hands to the oracle::

    estimate, update --learned_sampler--> deviation of each coordinate  --+
    estimates of late --guided----------> subspace -----------------------+--> the oracle's next directions

How the directions follow from either is `lft_jax.oracles.covariance`'s. The wrapper must be the outermost
transformation: within `optax.chain`, say, its state is not where `fine_tune` looks, and directions stay isotropic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax.base import PyTree, check_at_least
from lft_jax.optimizers.rules import Rule, coordinate_lstm
from lft_jax.optimizers.transform import initial_states, leaf_signals

#: ZO-L2L's sampler (PAPER "Constants of the precursors").
QUERY_RNN = coordinate_lstm(10, 1, features=("raw", "update"), output_scale=1.0)


class LearnedSamplerState(NamedTuple):
    """State of `learned_sampler`.

    Attributes:
      optimizer: the wrapped optimizer's state.
      leaves: the sampler's state for each leaf, in the order of `jax.tree.leaves`.
      sampling: `{"deviation": like theta}`, for the next estimate.
    """

    optimizer: PyTree
    leaves: list[PyTree]
    sampling: dict[str, PyTree]


def learned_sampler(
    params: PyTree, rule: Rule, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Lets a (meta-learned) rule set the deviation of the next directions: the QueryRNN of ZO-L2L.

    After each update the rule sees the last estimate and the update that the optimizer made of it, and with its output
    `o` the next directions have deviations `|1 + o|`, rescaled to keep their length. The first ones are isotropic.
    Only an estimate along these directions carries a meta-gradient to `params`; what the rule sees are constants.

    Args:
      params: the sampler's weights, from `rule.init(key)` or meta-training.
      rule: the sampler; ZO-L2L's is `coordinate_lstm(10, 1, features=("raw", "update"), output_scale=1.0)`.
      optimizer: what makes updates of the estimates: a learned fine-tuner or any optax transformation.

    Returns:
      The transformation, whose oracle must be a zeroth-order one. Unlike ZO-L2L's it never goes back to isotropic
      directions at random, in testing as in training.

    Raises:
      ValueError: for a rule with a hand-made start; in `init`, if a leaf is not floating-point.

    References:
      Ruan et al. 2020, Learning to learn by zeroth-order oracle, arXiv 1910.09464.
    """
    if rule.base_update is not None:
        raise ValueError(
            f"rule: a sampler's output is no step, it has no start to be added to; got {rule.base_update!r}."
        )
    weights = params
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        leaves = initial_states(rule, params)
        return LearnedSamplerState(optimizer.init(params), leaves, {"deviation": jax.tree.map(jnp.ones_like, params)})

    def update_fn(updates, state, params=None, **extra_args):
        grads = updates
        updates, inner = optimizer.update(grads, state.optimizer, params, **extra_args)
        signals = jax.lax.stop_gradient(leaf_signals(grads, params, **{**extra_args, "update": updates}))
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
      sampling: `{"subspace": like theta with a leading axis [k]}`, the last estimates, the latest one first.
    """

    optimizer: PyTree
    sampling: dict[str, PyTree]


def guided(optimizer: optax.GradientTransformation, size: int = 2) -> optax.GradientTransformationExtraArgs:
    """Guided evolution strategies: half of the next directions' variance is in the span of the last estimates.

    With `U` an orthonormal basis of the span of the last `k` estimates, the directions are
    `N(0, I / 2 + d / (2 k) U U^T)`, as long as isotropic ones; those of the first estimate are isotropic.

    Args:
      optimizer: what makes updates of the estimates.
      size: `k`, at least 1.

    Raises:
      ValueError: for a size below 1.

    References:
      Maheswaranathan et al. 2019, Guided evolutionary strategies: augmenting random search with surrogate gradients.
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
