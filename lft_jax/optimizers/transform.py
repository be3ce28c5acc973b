"""A learned update rule as an optax gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lft_jax import base
from lft_jax.base import PyTree
from lft_jax.optimizers.features import Signal
from lft_jax.optimizers.rules import Rule


class LearnedFineTunerState(NamedTuple):
    """State of `learned_fine_tuner`.

    Attributes:
      count: `[]` int32, number of updates done.
      leaves: the rule's state for each leaf of the parameters, in the order of `jax.tree.leaves`.
    """

    count: jax.Array
    leaves: list[PyTree]


def learned_fine_tuner(params: PyTree, rule: Rule, *, scale: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Turns a meta-learned update rule into an optax transformation, in place of `optax.adam(...)` for example.

    With a rule `m` of weights `phi`, applied to each leaf of the gradients `g_k` with a recurrent state `h_k`:

        update, h_k = -m(g_k, h_(k-1); phi)

    It accepts any pytree of floating-point arrays of any shapes. Updates have the dtypes of the gradients; with half
    precision the network computes in float32. The updates are differentiable with respect to `params`.

    `update` takes these extra arguments, all optional (see `lft_jax.base.Estimate`): `scale`, `progress`, `spread`,
    `second` and `context`. Features of an absent one are 0, except that `second` then takes the gradient. Others are
    ignored.

    Args:
      params: the rule's weights, from `rule.init(key)`, meta-training or `load_pretrained`.
      rule: the update rule.
      scale: size of a coordinate in the feasible set, for calls of `update` without `scale`. The updates of a rule
        with a base update are in units of it.

    Returns:
      The transformation. Its state keeps its structure, shapes and dtypes.

    Raises:
      ValueError: if `scale` is not above 0; in `init`, if a leaf is not floating-point; in `update`, if the parameters,
        `spread`, `second` or `context` do not have the structure of the gradients.

    Examples:
      >>> import lft_jax
      >>> rule = lft_jax.coordinate_lstm(hidden=2, layers=1)
      >>> params = rule.init(jax.random.key(0))
      >>> tx = learned_fine_tuner(params, rule)  # in place of tx = optax.adam(1e-2)
      >>> theta = {"x": jnp.ones((2, 3)), "y": jnp.ones(4)}
      >>> updates, state = jax.eval_shape(tx.update, theta, tx.init(theta), theta)
      >>> updates["x"].shape, updates["y"].shape
      ((2, 3), (4,))

    References:
      Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv 1606.04474.
      Zhao et al. 2020, Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.
    """
    base.check_positive("scale", scale)
    weights = params  # in `init` and `update`, optax requires the name `params` for what is fine-tuned

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
    """The rule's state for each leaf of `params`. Raises a ValueError if a leaf is not floating-point."""
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"learned_fine_tuner: parameters must be floating-point, got {jnp.result_type(leaf)}.")
    return [rule.init_state(jnp.zeros(jnp.shape(leaf), _compute_dtype(leaf))) for leaf in leaves]


def leaf_signals(
    grads: PyTree,
    params: PyTree,
    *,
    scale: float | Float[Array, ""] = 1.0,
    spread: PyTree = None,
    context: PyTree = None,
    second: PyTree = None,
    progress: float | Float[Array, ""] = 0.0,
    update: PyTree = None,
    **ignored: Any,
) -> list[Signal]:
    """The `Signal` of each leaf, from the arguments of an optax `update`. Unknown arguments are ignored."""
    leaves, structure = jax.tree.flatten(grads)
    trees = {"params": params, "spread": spread, "context": context, "second": second, "update": update}
    columns = {name: _leaves_like(name, tree, structure) for name, tree in trees.items()}
    signals = []
    for number, grad in enumerate(leaves):
        dtype = _compute_dtype(grad)

        def cast(x, dtype=dtype):
            return jnp.asarray(x).astype(dtype)

        def column(name, number=number, cast=cast):
            leaf = columns[name][number]
            return None if leaf is None else cast(leaf)

        signals.append(
            Signal(
                grad=cast(grad),
                param=column("params"),
                spread=column("spread"),
                context=column("context"),
                scale=cast(scale),
                progress=cast(progress),
                second=column("second"),
                update=column("update"),
            )
        )
    return signals


def _compute_dtype(leaf):
    return jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32


def _leaves_like(name, tree, structure):
    if tree is None:
        return [None] * structure.num_leaves
    if jax.tree.structure(tree) != structure:
        raise ValueError(
            f"{name} must have the structure of the gradients, {structure}, got {jax.tree.structure(tree)}. "
            "(Under optax.masked, pass mask_compatible_extra_args=True.)"
        )
    return jax.tree.leaves(tree)
