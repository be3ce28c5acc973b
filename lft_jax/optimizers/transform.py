"""A learned update rule as an optax gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import base
from lft_jax.optimizers.features import Signal
from lft_jax.optimizers.rules import Rule

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
    `progress`, `spread`, `second` and `context`; features of an absent one read as zero (those of `second` as the
    gradient), all others are ignored.

    Args:
      params: the rule's weights, from `rule.init(key)`, meta-training or `load_pretrained`.
      rule: the update rule.
      scale: the size of a coordinate's feasible range, when `update` is not told; a rule with a hand-made start
        makes steps in its units, of which one along the gradient has the first step's root mean square.

    Returns:
      The transformation. Its state keeps structure, shapes and dtypes from one update to the next.

    Raises:
      ValueError: if `scale` is not above 0; in `init`, if a leaf is not floating-point; in `update`, if `spread`,
        `second` or `context` does not have the structure of the gradients.

    References:
      PAPER.md "The method"; Andrychowicz et al. 2016, arXiv 1606.04474.
    """
    base.check_positive("scale", scale)
    weights = params  # below, as everywhere in optax, `params` are what is fine-tuned: some wrappers pass it by name

    def init_fn(params):
        states = initial_states(rule, params)
        return LearnedFineTunerState(jnp.zeros((), jnp.int32), states)

    def update_fn(updates, state, params=None, **extra_args):
        grads, structure = jax.tree.flatten(updates)
        steps, leaves = [], []
        signals = leaf_signals(updates, params, **{"scale": scale, **extra_args})
        for signal, leaf_state in zip(signals, state.leaves, strict=True):
            step, leaf_state = rule.apply(weights, signal, leaf_state)
            steps.append(-step)
            leaves.append(leaf_state)
        steps = [step.astype(jnp.result_type(grad)) for step, grad in zip(steps, grads, strict=True)]
        return jax.tree.unflatten(structure, steps), LearnedFineTunerState(state.count + 1, leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def initial_states(rule: Rule, params: PyTree) -> list[PyTree]:
    """The rule's state for each leaf; raises a ValueError if one is not floating-point."""
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"learned_fine_tuner: parameters must be floating-point, got {jnp.result_type(leaf)}.")
    return [rule.init_state(jnp.zeros(jnp.shape(leaf), _compute_dtype(leaf))) for leaf in leaves]


def leaf_signals(
    grads: PyTree,
    params: PyTree,
    *,
    scale: float | jax.Array = 1.0,
    spread: PyTree = None,
    context: PyTree = None,
    second: PyTree = None,
    progress: float | jax.Array = 0.0,
    update: PyTree = None,
    **ignored: Any,
) -> list[Signal]:
    """What a rule sees of each leaf, from the arguments of an optax update; `update` as of `Signal`."""
    leaves, structure = jax.tree.flatten(grads)
    trees = {"params": params, "spread": spread, "context": context, "second": second, "update": update}
    columns = {name: _like(name, tree, structure) for name, tree in trees.items()}
    signals = []
    for number, grad in enumerate(leaves):
        dtype = _compute_dtype(grad)

        def cast(x, dtype=dtype):
            return None if x is None else jnp.asarray(x).astype(dtype)

        signals.append(
            Signal(
                grad=cast(grad),
                param=cast(columns["params"][number]),
                spread=cast(columns["spread"][number]),
                context=cast(columns["context"][number]),
                scale=cast(scale),
                progress=cast(progress),
                second=cast(columns["second"][number]),
                update=cast(columns["update"][number]),
            )
        )
    return signals


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
