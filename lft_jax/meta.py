"""Meta-training: the meta-gradient, and the step that updates the meta-parameters.

A meta-step is one pure, jitted function of the state. Each family contributes `tasks_per_family` tasks, vmapped;
families that share a pytree structure and shapes (victims of one architecture on one source) are stacked and mapped
over, so they share one compilation and one family's memory; the mean meta-gradients of all families are added.

On several devices, of one or of many hosts, each runs its share of every family's tasks: the keys, one a task, are
split over the mesh axis `task`, all else is replicated, and the meta-gradients are averaged.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base, memory
from lft_jax.base import Learner, TaskFamily
from lft_jax.estimators import EvolutionStrategies
from lft_jax.fine_tune import block_length
from lft_jax.outer_loss import outer_losses, run_task, step_weights

PyTree = Any

#: The mesh axis that tasks are split over.
TASK_AXIS = "task"

_BESIDE_TASKS = 1000  # folded into a task's key it gives one that `run_task` does not split off


class MetaState(NamedTuple):
    """All that a run is, besides its configuration: resuming from it continues with the same numbers.

    Attributes:
      params: the meta-parameters.
      optimizer_state: of the meta-optimizer.
      key: the run's key; each meta-step folds its number in.
      step: `[]` int32, meta-steps done.
    """

    params: PyTree
    optimizer_state: PyTree
    key: jax.Array
    step: jax.Array


class MetaTrainer(NamedTuple):
    """`init(key) -> MetaState`; `step(state) -> (MetaState, metrics)`, jitted and pure.

    Metrics: `loss` `[]`, the outer loss; `family_loss` `[families]`; `final_loss` `[families]`, of the last
    fine-tuning step alone; `grad_norm` `[]`, of the meta-gradient; `skipped` and `skipped_in_a_row` `[]` int32,
    meta-steps whose meta-gradient was not finite, which leave the parameters as they were.
    """

    init: Callable[[jax.Array], MetaState]
    step: Callable[[MetaState], tuple[MetaState, dict[str, jax.Array]]]


class MemoryPlan(NamedTuple):
    """How a family's share of a meta-step is cut up.

    Attributes:
      remat: whether the recurrence is stored at every sqrt(K)-th step only (of a window at a time, if there is one).
      tasks: tasks at a time, a divisor of all.
      steps: fine-tuning steps of those tasks whose query losses are computed at a time.
    """

    remat: bool
    tasks: int
    steps: int


def memory_plan(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    num_tasks: int,
    *,
    num_steps: int,
    steps: int,
    window: int | None = None,
    remat: bool | None = None,
    mib: float = memory.DEFAULT_MIB,
) -> MemoryPlan:
    """The plan of fewest parts of which neither the recurrence nor the query losses store more than `mib` MiB.

    That is what can be told without compiling; a compiled meta-step has been seen to take up to twice as much.

    Args:
      learner, params, family: what is meta-trained, and on what.
      num_tasks: tasks of the family on one device.
      num_steps: K.
      steps: how many of the steps have a weight in the outer loss.
      window: of truncated backpropagation, or None.
      remat: None to choose it here: only if one task does not fit without.
      mib: the budget.
    """

    def one_step(params, key):
        return run_task(learner, params, family, key, num_steps=1)

    key = jax.eval_shape(lambda: jax.random.key(0))
    episode, trajectory = jax.eval_shape(one_step, params, key)
    data = episode.query if learner.objective == "query" else episode.support
    theta = jax.eval_shape(lambda thetas: jax.tree.map(lambda x: x[0], thetas), trajectory.thetas)
    step_bytes = memory.stored_bytes(lambda params: one_step(params, jax.random.key(0))[1].thetas, params)
    loss_bytes = memory.stored_bytes(family.loss, theta, data)
    if remat is None:  # not before one task alone is too much: to take fewer at a time costs no computing
        remat = num_steps * step_bytes > mib * 2**20
    span = min(window or num_steps, num_steps)  # cut up on its own
    block = block_length(span)
    stored_steps = block + math.ceil(num_steps / span) * math.ceil(span / block) if remat else num_steps
    tasks = memory.fitting(num_tasks, max(stored_steps * step_bytes, loss_bytes), mib)
    tasks = max(n for n in range(1, tasks + 1) if num_tasks % n == 0)
    return MemoryPlan(remat, tasks, memory.fitting(steps, tasks * loss_bytes, mib))


def init_state(
    learner: Learner, families: Sequence[TaskFamily], meta_optimizer: optax.GradientTransformation, key: jax.Array
) -> MetaState:
    """The state that a run begins with. Learners of update rules need no families for it."""
    key_init, key_run = jax.random.split(key)
    params = learner.init(key_init, tuple(families))
    return MetaState(params, _skipping(meta_optimizer).init(params), key_run, jnp.zeros((), jnp.int32))


def meta_trainer(
    learner: Learner,
    families: Sequence[TaskFamily],
    *,
    num_steps: int = 20,
    tasks_per_family: int = 8,
    meta_optimizer: optax.GradientTransformation,
    weights: str = "uniform",
    window: int | None = None,
    estimator: EvolutionStrategies | None = None,
    remat: bool | None = None,
    memory_mib: float = memory.DEFAULT_MIB,
    mesh: jax.sharding.Mesh | None = None,
) -> MetaTrainer:
    """Meta-trains a learner across families, which need not share shapes (incongruous tasks).

    Args:
      learner: from `lft_jax.learners`.
      families: one or more buckets of tasks.
      num_steps: K, fine-tuning steps of a task.
      tasks_per_family: tasks of each family in a meta-step.
      meta_optimizer: updates the meta-parameters; see `clipped_adam`.
      weights: of the fine-tuning steps in the outer loss, see `step_weights`.
      window: of truncated backpropagation, see `fine_tune`; None for none.
      estimator: of the meta-gradient; None for backpropagation through the steps.
      remat: trade time for memory, see `fine_tune`; None: only if one task does not fit into `memory_mib` without.
      memory_mib: MiB that a device may store for a backward pass, see `memory_plan`. Tasks and query passes are run in
        as few parts as it allows (at least one task, and one of its steps, at a time).
      mesh: devices that share the tasks, see `task_mesh`; None for the default device. The numbers are those of one
        device up to the order of summation.

    Raises:
      ValueError: for no families, numbers below 1, tasks that the mesh cannot share evenly, families that the
        learner cannot serve together, an estimator with a window, a second-order learner, Reptile or several devices,
        or Reptile with a window.
      TypeError: for a family that is not a registered pytree.
    """
    families = tuple(families)
    if not families:
        raise ValueError("families must hold at least one TaskFamily, got none.")
    for family in families:
        if not jax.tree.leaves(family) or jax.tree.structure(family).num_nodes == 1:
            raise TypeError(
                f"families: {type(family).__name__} is not a registered pytree with arrays; decorate it with "
                "jax.tree_util.register_dataclass."
            )
    base.check_at_least("tasks_per_family", tasks_per_family, 1)
    if window is not None:
        base.check_at_least("window", window, 1)
    base.check_positive("memory_mib", memory_mib)
    if estimator is not None and (window is not None or learner.second_order):
        raise ValueError("estimator: it differentiates nothing; leave window out, and take a first-order learner.")
    if estimator is not None and mesh is not None and mesh.size > 1:
        raise ValueError(f"estimator: it draws its changes for one device, got a mesh of {mesh.size}.")
    if learner.objective == "end" and window is not None:
        raise ValueError(f"window: {learner.name} differentiates nothing through its steps; leave it out.")
    if estimator is not None and learner.objective == "end":
        raise ValueError(f"estimator: {learner.name} has no outer loss to try changes at, only a meta-gradient.")
    all_weights = step_weights(weights, num_steps)
    steps = np.flatnonzero(all_weights)
    final_weights = all_weights[steps]
    groups, order = _group(families)
    optimizer = _skipping(meta_optimizer)

    def mean_losses(params, *, family, keys, **options):
        """The outer loss, and that of the last step alone."""
        losses = outer_losses(learner, params, family, keys, num_steps=num_steps, steps=steps, **options)
        return jnp.mean(losses @ final_weights.astype(losses.dtype)), jnp.mean(losses[:, -1])

    def family_gradient(params, family, keys):
        if estimator is not None:  # tries one step's query losses at a time, since nothing is stored
            loss = functools.partial(mean_losses, family=family, keys=keys, steps_at_once=1, differentiable=False)
            return estimator(loss, params, jax.random.fold_in(keys[0], _BESIDE_TASKS))
        options = {"num_steps": num_steps, "steps": len(steps), "window": window, "remat": remat, "mib": memory_mib}
        plan = memory_plan(learner, params, family, len(keys), **options)

        def gradient(keys):
            options = {"remat": plan.remat, "window": window, "steps_at_once": plan.steps}
            loss = functools.partial(mean_losses, family=family, keys=keys, **options)
            return jax.value_and_grad(loss, has_aux=True)(params)

        if plan.tasks == len(keys):
            return gradient(keys)
        parts = jax.lax.map(gradient, keys.reshape(-1, plan.tasks))
        return jax.tree.map(lambda x: jnp.mean(x, 0), parts)

    def meta_gradient(params, groups, keys):
        """Losses `[families]` and last-step losses of the tasks that `keys` stand for, and their mean gradient."""
        losses, finals, total = [], [], jax.tree.map(jnp.zeros_like, params)
        for group, group_keys in zip(groups, keys, strict=True):

            def member_gradient(inputs, group=group):
                member, member_keys = inputs
                return family_gradient(params, group.member(member), member_keys)

            (group_losses, group_finals), grads = jax.lax.map(member_gradient, (group.stacked, group_keys))
            total = jax.tree.map(lambda t, g: t + jnp.sum(g, 0), total, grads)
            losses.append(group_losses)
            finals.append(group_finals)
        mean = jax.tree.map(lambda t: t / len(families), total)
        return jnp.concatenate(losses)[order], jnp.concatenate(finals)[order], mean

    shared_gradient = meta_gradient if mesh is None else _shared(meta_gradient, mesh, tasks_per_family)

    @jax.jit
    def step(state, groups):
        key = jax.random.fold_in(state.key, state.step)
        keys = [
            jax.random.split(jax.random.fold_in(key, number), (group.size, tasks_per_family))
            for number, group in enumerate(groups)
        ]
        losses, finals, mean = shared_gradient(state.params, groups, keys)
        updates, optimizer_state = optimizer.update(mean, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": jnp.mean(losses),
            "family_loss": losses,
            "final_loss": finals,
            "grad_norm": optax.tree.norm(mean),
            "skipped": optimizer_state.total_notfinite,
            "skipped_in_a_row": optimizer_state.notfinite_count,
        }
        return MetaState(params, optimizer_state, state.key, state.step + 1), metrics

    def init(key):
        return init_state(learner, families, meta_optimizer, key)

    if mesh is None:
        return MetaTrainer(init, lambda state: step(state, groups))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    replicate = jax.jit(lambda tree: tree, out_shardings=everywhere)
    groups = replicate(groups)
    return MetaTrainer(lambda key: replicate(init(key)), lambda state: step(replicate(state), groups))


def task_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """The mesh of one axis, `task`, over the first `num_devices` devices of all hosts, or over all of them.

    Raises:
      ValueError: if there are not so many devices.
    """
    devices = jax.devices()
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices must be from 1 to the {len(devices)} there are, got {num_devices!r}.")
    return jax.sharding.Mesh(np.asarray(devices[:num_devices]), (TASK_AXIS,))


def _shared(meta_gradient, mesh, tasks_per_family):
    """`meta_gradient` with the tasks of each family, the last axis of its keys, split over the mesh."""
    if mesh.axis_names != (TASK_AXIS,) or tasks_per_family % mesh.size:
        raise ValueError(
            f"mesh must have the one axis {TASK_AXIS!r}, of a size that divides tasks_per_family = "
            f"{tasks_per_family}, got {dict(mesh.shape)}."
        )
    everywhere, by_task = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, TASK_AXIS)

    def on_each_device(params, groups, keys):
        return jax.lax.pmean(meta_gradient(params, groups, keys), TASK_AXIS)

    # Unchecked, since with the check `grad` itself would sum over devices what is averaged here.
    return jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(everywhere, everywhere, by_task), out_specs=everywhere, check_vma=False
    )


def clipped_adam(learning_rate: float, num_meta_steps: int, *, max_norm: float = 1.0) -> optax.GradientTransformation:
    """The default meta-optimizer: Adam under a cosine schedule that ends at a tenth, gradients clipped by norm."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_meta_steps, alpha=0.1)
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(schedule))


def _skipping(optimizer):
    # Skipping is optax's; it would give in after max_consecutive_errors, which is for the caller to decide.
    return optax.apply_if_finite(optimizer, max_consecutive_errors=np.iinfo(np.int32).max)


@jax.tree_util.register_pytree_node_class
class _Group:
    """Families of one structure: leaves that are the same array in all are kept once, the others are stacked."""

    def __init__(self, shared, stacked, structure, size):
        self.shared, self.stacked, self.structure, self.size = shared, stacked, structure, size

    def member(self, stacked):
        leaves = [s if s is not None else own for s, own in zip(self.shared, stacked, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def tree_flatten(self):
        return (self.shared, self.stacked), (self.structure, self.size)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        return cls(*arrays, *static)


def _group(families):
    """Groups families that can be stacked; `order[i]` is the place of family i among the groups' members."""
    members = {}
    for index, family in enumerate(families):
        leaves, structure = jax.tree.flatten(family)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        members.setdefault((structure, shapes), []).append((index, leaves))
    groups, places = [], []
    for (structure, _), group in members.items():
        columns = list(zip(*(leaves for _, leaves in group), strict=True))
        same = [all(leaf is column[0] for leaf in column) for column in columns]
        shared = [column[0] if s else None for column, s in zip(columns, same, strict=True)]
        stacked = [None if s else jnp.stack(column) for column, s in zip(columns, same, strict=True)]
        groups.append(_Group(shared, stacked, structure, len(group)))
        places += [index for index, _ in group]
    return groups, np.argsort(places)
