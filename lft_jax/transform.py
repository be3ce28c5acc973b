"""A learned update rule as an optax gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import base
from lft_jax.features import Signal
from lft_jax.rules import Rule

PyTree = Any


class LearnedFineTunerState(NamedTuple):
    """State of `learned_fine_tuner`.

    Attributes:
      count: `[]` int32, updates done.
      leaves: the rule's state for each leaf of the parameters, in the order of `jax.tree.leaves`.
    """

    count: jax.Array
    leaves: list[PyTree]


def learned_fine_tuner(params: PyTree, rule: Rule, *, scale: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Fine-tunes with a (meta-learned) update rule; drop-in for `optax.adam(...)`.

    Change this:
      >>> tx = optax.adam(1e-2)
    to this:
      >>> tx = lft_jax.learned_fine_tuner(params, rule)

    Works on any pytree of floating-point arrays of any shapes; updates have the gradients' dtypes (the network runs
    in float32 for half precision) and optax's sign: `optax.apply_updates` adds them. Differentiable with respect to
    `params`. Extra arguments of `update` that are used, all optional (`lft_jax.base.Estimate`): `scale`,
    `progress`, `spread` and `context`; features of an absent one read as zero, all others are ignored.

    Args:
      params: the rule's weights, from `rule.init(key)`, meta-training or `load_pretrained`.
      rule: the update rule.
      scale: the size of a coordinate's feasible range, when `update` is not told; a rule with a hand-made start
        makes steps in its units.

    Returns:
      The transformation. Its state keeps structure, shapes and dtypes from one update to the next.

    Raises:
      ValueError: if `scale` is not above 0; in `init`, if a leaf is not floating-point; in `update`, if `spread` or
        `context` does not have the structure of the gradients.

    References:
      PAPER.md "The method"; Andrychowicz et al. 2016, arXiv 1606.04474.
    """
    base.check_positive("scale", scale)
    weights = params  # below, as everywhere in optax, `params` are what is fine-tuned: some wrappers pass it by name

    def init_fn(params):
        leaves = jax.tree.leaves(params)
        for leaf in leaves:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise ValueError(f"learned_fine_tuner: parameters must be floating-point, got {jnp.result_type(leaf)}.")
        states = [rule.init_state(jnp.zeros(jnp.shape(leaf), _compute_dtype(leaf))) for leaf in leaves]
        return LearnedFineTunerState(jnp.zeros((), jnp.int32), states)

    def update_fn(updates, state, params=None, *, spread=None, context=None, progress=0.0, **extra_args):
        grads, structure = jax.tree.flatten(updates)
        columns = zip(
            grads,
            _like("params", params, structure),
            _like("spread", spread, structure),
            _like("context", context, structure),
            state.leaves,
            strict=True,
        )
        steps, leaves = [], []
        for grad, param, leaf_spread, leaf_context, leaf_state in columns:
            dtype = _compute_dtype(grad)

            def cast(x, dtype=dtype):
                return None if x is None else jnp.asarray(x).astype(dtype)

            signal = Signal(
                grad=cast(grad),
                param=cast(param),
                spread=cast(leaf_spread),
                context=cast(leaf_context),
                scale=cast(extra_args.get("scale", scale)),
                progress=cast(progress),
            )
            step, leaf_state = rule.apply(weights, signal, leaf_state)
            steps.append((-step).astype(jnp.result_type(grad)))
            leaves.append(leaf_state)
        return jax.tree.unflatten(structure, steps), LearnedFineTunerState(state.count + 1, leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _compute_dtype(leaf):
    return jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32


def _like(name, tree, structure):
    if tree is None:
        return [None] * structure.num_leaves
    if jax.tree.structure(tree) != structure:
        raise ValueError(
            f"{name} must have the structure of the gradients, {structure}, got {jax.tree.structure(tree)}. "
            "(Under optax.masked, pass mask_compatible_extra_args=True.)"
        )
    return jax.tree.leaves(tree)
