"""A learned update rule as an optax gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lft_jax import base
from lft_jax.base import PyTree
from lft_jax.optimizers.features import Signal
from lft_jax.optimizers.rules import UpdateRule

#: Largest absolute value of a weight. Those of the shipped rules are below 3; beyond it a network could overflow.
LARGEST_WEIGHT = 1e4
#: Dtypes of arrays that are no parameters: they have no gradient.
_WITHOUT_GRADIENT = (jnp.integer, jnp.bool_, jax.dtypes.prng_key)


class LearnedFineTunerState(NamedTuple):
    """State of `learned_fine_tuner`.

    Attributes:
      count: `[]` int32, number of updates done.
      leaves: the rule's state for each floating-point leaf of the parameters, in the order of `jax.tree.leaves`.
    """

    count: jax.Array
    leaves: list[PyTree]


def learned_fine_tuner(
    params: PyTree, rule: UpdateRule, *, scale: float | Float[Array, ""] | optax.Schedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Turns a meta-learned update rule into an optax transformation, in place of `optax.adam(...)` for example.

    With a rule `m` of weights `phi`, applied to each leaf of the gradients `g_k` with a recurrent state `h_k`:

        update, h_k = -m(g_k, h_(k-1); phi)

    It accepts any pytree of floating-point arrays of any shapes. Updates have the dtypes of the gradients; with half
    precision the network computes in float32. The updates are differentiable with respect to `params`.

    Integer and boolean arrays and PRNG keys among the parameters are left alone, as in `equinox.filter(model,
    equinox.is_array)`: they have no state, and their gradients must be None, which stands for any subtree.

    The state holds 44 numbers per coordinate for the shipped `spatial_lstm` rules (all but "uap-linf"): 44 times the
    bytes of float32 parameters, 88 times those of bfloat16 ones; and 1.2 to 1.6 for a `spectral_lstm` on images. Of a
    `Rule` these are `2 * hidden * layers`, one for a base update, and those of the features (3 for "momentum", 2 for
    "adam"), in float32, or float64 for float64 parameters.

    `update` takes these extra arguments, all optional (see `lft_jax.base.Estimate`): `scale`, `progress`, `spread`,
    `context` and `noise`. Features of an absent one are 0. Others are ignored.

    Args:
      params: the rule's weights, from `rule.init(key)`, meta-training or `load_pretrained`; at most 1e4 in absolute
        value.
      rule: the update rule.
      scale: size of a coordinate in the feasible set, for calls of `update` without `scale`. The updates of a rule
        with a base update are in units of it. A number above 0, which may be traced, or a schedule: a function of the
        number of updates done, with values of at least 0.

    Returns:
      The transformation. Its state keeps its structure, shapes and dtypes.

    Raises:
      ValueError: if a weight is NaN, infinite or above 1e4, or `scale` is not a scalar above 0 (not checked where they
        are traced, nor for a schedule); in `init`, if a leaf is of another kind, a function or a complex array for
        example; in `update`, if the parameters, `spread` or `context` do not have the structure of the gradients,
        or the state is of other parameters.

    Examples:
      >>> import lft_jax
      >>> rule = lft_jax.coordinate_lstm(hidden=2, layers=1, base_update=lft_jax.MomentumUpdate())
      >>> params = rule.init(jax.random.key(0))
      >>> tx = learned_fine_tuner(params, rule)  # in place of tx = optax.adam(1e-2)
      >>> theta = {"x": jnp.ones((2, 3)), "y": jnp.ones(4)}
      >>> updates, state = jax.eval_shape(tx.update, theta, tx.init(theta), theta)
      >>> updates["x"].shape, updates["y"].shape
      ((2, 3), (4,))

      A schedule, and a scale that can be changed between updates:

      >>> tx = learned_fine_tuner(params, rule, scale=optax.cosine_decay_schedule(0.1, decay_steps=100))
      >>> tx = optax.inject_hyperparams(learned_fine_tuner)(params, rule, scale=0.1)
      >>> state = tx.init(theta)
      >>> state.hyperparams["scale"] = jnp.float32(0.05)
      >>> updates, state = jax.jit(tx.update)(theta, state, theta)

    References:
      Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv 1606.04474.
      Zhao et al. 2020, Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.
    """
    if not callable(scale):
        _check_scale(scale)
    check_weights(params)
    weights = params  # in `init` and `update`, optax requires the name `params` for what is fine-tuned

    def init_fn(params):
        states = initial_states(rule, params, integers=True)
        return LearnedFineTunerState(jnp.zeros((), jnp.int32), states)

    def update_fn(updates, state, params=None, **extra_args):
        grads, structure = jax.tree.flatten(updates)
        if len(grads) != len(state.leaves):
            raise ValueError(
                f"updates: {len(grads)} gradients, but the state is of {len(state.leaves)} floating-point parameters. "
                "Pass init those that have a gradient; with equinox, equinox.filter(model, equinox.is_inexact_array)."
            )
        steps, leaves = [], []
        arguments: dict[str, Any] = {"scale": scale(state.count) if callable(scale) else scale, **extra_args}
        signals = leaf_signals(updates, params, **arguments)
        for signal, leaf_state in zip(signals, state.leaves, strict=True):
            step, leaf_state = rule.apply(weights, signal, leaf_state)
            steps.append(-step)
            leaves.append(leaf_state)
        steps = [step.astype(jnp.result_type(grad)) for step, grad in zip(steps, grads, strict=True)]
        return jax.tree.unflatten(structure, steps), LearnedFineTunerState(state.count + 1, leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_weights(params: PyTree) -> None:
    """Raises a ValueError for weights that are NaN, infinite or above `LARGEST_WEIGHT`, where they are not traced."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.core.Tracer) or not hasattr(leaf, "__array__"):
            continue
        if not getattr(leaf, "is_fully_addressable", True):
            continue
        sizes = np.abs(np.asarray(leaf))
        if not np.all(sizes <= LARGEST_WEIGHT):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must be weights of a rule, at most {LARGEST_WEIGHT:g} in absolute "
                f"value, got {np.max(sizes)}."
            )


def initial_states(rule: UpdateRule, params: PyTree, *, integers: bool = False) -> list[PyTree]:
    """The rule's state for each floating-point leaf of `params`. Raises a ValueError for other leaves.

    With `integers`, arrays that have no gradient (integers, booleans, PRNG keys) are left out.
    """
    states = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        if isinstance(leaf, float) or (is_array and jnp.issubdtype(leaf.dtype, jnp.floating)):
            states.append(rule.init_state(jnp.zeros(jnp.shape(leaf), _compute_dtype(leaf))))
        elif not (integers and is_array and any(jnp.issubdtype(leaf.dtype, kind) for kind in _WITHOUT_GRADIENT)):
            found = leaf.dtype if is_array else f"{leaf!r} of type {type(leaf).__name__}"
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must be floating-point, got {found}. Pass only what is optimized: "
                "equinox.filter(model, equinox.is_inexact_array), or None in place of this leaf; or wrap the optimizer "
                "in optax.masked or optax.partition."
            )
    return states


def leaf_signals(
    grads: PyTree,
    params: PyTree,
    *,
    scale: float | Float[Array, ""] = 1.0,
    spread: PyTree = None,
    context: PyTree = None,
    progress: float | Float[Array, ""] = 0.0,
    update: PyTree = None,
    noise: PyTree = None,
    **ignored: Any,
) -> list[Signal]:
    """The `Signal` of each leaf, from the arguments of an optax `update`. Unknown arguments are ignored."""
    leaves = jax.tree.leaves(grads)
    trees = {"params": params, "spread": spread, "context": context, "update": update, "noise": noise}
    columns = {name: _leaves_like(name, tree, grads) for name, tree in trees.items()}
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
                update=column("update"),
                noise=column("noise"),
            )
        )
    return signals


def _compute_dtype(leaf):
    return jnp.float64 if jnp.result_type(leaf) == jnp.float64 else jnp.float32


def _check_scale(scale):
    if jnp.ndim(scale):
        raise ValueError(f"scale must be a scalar, got shape {jnp.shape(scale)}; use jax.vmap for several.")
    if not isinstance(scale, jax.core.Tracer):
        base.check_positive("scale", scale)


def _leaves_like(name, tree, grads):
    """The leaves of `tree` that belong to the leaves of `grads`, where None stands for any subtree of `tree`."""
    structure = jax.tree.structure(grads)
    if tree is None:
        return [None] * structure.num_leaves
    try:
        same = jax.tree.map(lambda g, x: None if g is None else x, grads, tree, is_leaf=lambda g: g is None)
    except ValueError:
        same = tree
    if jax.tree.structure(same) != structure:
        raise ValueError(
            f"{name} must have the structure of the gradients, {structure}, got {jax.tree.structure(tree)}. "
            "(Under optax.masked, pass mask_compatible_extra_args=True.)"
        )
    return jax.tree.leaves(same)
