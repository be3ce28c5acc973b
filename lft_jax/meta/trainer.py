"""Meta-training: the meta-gradient, and the step that updates the meta-parameters.

A meta-step is one pure, jitted function of the state. Each family contributes `tasks_per_family` tasks, vmapped;
families that share a pytree structure and shapes (victims of one architecture on one source) are stacked and mapped
over, so they share one compilation and one family's memory; the mean meta-gradients of all families are added.

On several devices, of one or of many hosts, each runs its share of every family's tasks: the keys, one a task, are
split over the mesh axis `task`, all else is replicated, and the meta-gradients are averaged.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import _memory, base
from lft_jax.base import Learner, TaskFamily
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.gradients import family_gradient, first_particles
from lft_jax.meta.imitation import Imitation, imitating
from lft_jax.meta.outer_loss import step_weights

PyTree = Any

#: The mesh axis that tasks are split over.
TASK_AXIS = "task"


class MetaState(NamedTuple):
    """All that a run is, besides its configuration: resuming from it continues with the same numbers.

    Attributes:
      params: the meta-parameters.
      optimizer_state: of the meta-optimizer.
      key: the run's key; each meta-step folds its number in.
      step: `[]` int32, meta-steps done.
      particles: what persistent evolution strategies carry from one meta-step to the next, for each group of families
        that share a compilation; empty for all else.
    """

    params: PyTree
    optimizer_state: PyTree
    key: jax.Array
    step: jax.Array
    particles: tuple[PyTree, ...] = ()


class MetaTrainer(NamedTuple):
    """`init(key) -> MetaState`; `step(state) -> (MetaState, metrics)`, jitted and pure.

    Metrics: `loss` `[]`, the outer loss; `family_loss` `[families]`; `final_loss` `[families]`, of the last
    fine-tuning step alone; `grad_norm` `[]`, of the meta-gradient; `skipped` and `skipped_in_a_row` `[]` int32,
    meta-steps whose meta-gradient was not finite, which leave the parameters as they were. Losses are those of the
    meta-step's stage: of a curriculum's shorter unroll, of one window, or the distance from an imitated teacher.
    """

    init: Callable[[jax.Array], MetaState]
    step: Callable[[MetaState], tuple[MetaState, dict[str, jax.Array]]]


def init_state(
    learner: Learner, families: Sequence[TaskFamily], meta_optimizer: optax.GradientTransformation, key: jax.Array
) -> MetaState:
    """The state that a run begins with, but for particles. Learners of update rules need no families for it."""
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
    estimator: EvolutionStrategies | PersistentEvolutionStrategies | None = None,
    curriculum: Sequence[tuple[int, int]] = (),
    imitation: Imitation | None = None,
    remat: bool | None = None,
    memory_mib: float = _memory.DEFAULT_MIB,
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
      estimator: of the meta-gradient; None for backpropagation through the steps. A meta-step of
        `PersistentEvolutionStrategies` is one window of an episode, whose particles wait in the state for the next.
      curriculum: `((steps, meta_steps), ...)`: the first meta-steps fine-tune for fewer steps, in ascending order; K of
        them follow. An update rule sees its progress through the shorter unroll. All lengths are compiled at first.
      imitation: the outer loss of the first meta-steps, always by backpropagation, for learners of update rules; the
        steps weigh alike in it. None for none.
      remat: trade time for memory, see `fine_tune`; None: only if one task does not fit into `memory_mib` without.
      memory_mib: MiB that a device may store for a backward pass, see `memory_plan`. Tasks and query passes are run in
        as few parts as it allows (at least one task, and one of its steps, at a time).
      mesh: devices that share the tasks, see `task_mesh`; None for the default device. The numbers are those of one
        device up to the order of summation.

    Raises:
      ValueError: for no families, numbers below 1, tasks that the mesh cannot share evenly, families that the
        learner cannot serve together, an estimator with a window, a second-order learner, Reptile or several devices,
        Reptile with a window or imitation, a curriculum that does not ascend to K, and an estimator's window that does
        not divide K, is one of a curriculum, or leaves no weight for some windows.
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
    persistent = isinstance(estimator, PersistentEvolutionStrategies)
    if persistent:
        _check_windows(estimator.window, num_steps, step_weights(weights, num_steps), curriculum)
    groups, order = _group(families)
    optimizer = _skipping(meta_optimizer)

    stages = _stages(num_steps, curriculum, imitation)
    gradients = [
        family_gradient(
            imitating(learner, imitation.teacher) if stage.imitates else learner,
            num_steps=stage.num_steps,
            weights=step_weights("uniform" if stage.imitates else weights, stage.num_steps),
            # Imitation differentiates no model, so there is no call for trying changes.
            estimator=None if stage.imitates else estimator,
            window=window,
            remat=remat,
            mib=memory_mib,
        )
        for stage in stages
    ]

    def mean_gradient(of_family, params, groups, keys, particles, window):
        """Losses `[families]` and last-step losses of the tasks that `keys` stand for, mean gradient, particles."""
        losses, finals, after, total = [], [], [], jax.tree.map(jnp.zeros_like, params)
        for group, *inputs in zip(groups, keys, particles, strict=True):

            def member_gradient(inputs, group=group):
                member, member_keys, member_particles = inputs
                return of_family(params, group.member(member), member_keys, member_particles, window)

            ((of_group, of_last), grads), carried = jax.lax.map(member_gradient, (group.stacked, *inputs))
            total = jax.tree.map(lambda t, g: t + jnp.sum(g, 0), total, grads)
            losses.append(of_group)
            finals.append(of_last)
            after.append(carried)
        mean = jax.tree.map(lambda t: t / len(families), total)
        return jnp.concatenate(losses)[order], jnp.concatenate(finals)[order], mean, tuple(after)

    def stage_gradient(stage, of_family):
        gradient = functools.partial(mean_gradient, of_family)
        if mesh is not None:
            gradient = _shared(gradient, mesh, tasks_per_family)
        windows = stage.num_steps // estimator.window if persistent and not stage.imitates else 1

        def of_state(state, groups):
            since = state.step - stage.first
            # The windows of an episode have its tasks.
            key = jax.random.fold_in(state.key, stage.first + since // windows)
            keys = [
                jax.random.split(jax.random.fold_in(key, number), (group.size, tasks_per_family))
                for number, group in enumerate(groups)
            ]
            return gradient(state.params, groups, keys, state.particles or ((),) * len(groups), since % windows)

        return of_state

    of_stages = [stage_gradient(stage, of_family) for stage, of_family in zip(stages, gradients, strict=True)]
    begun = jnp.asarray([stage.first for stage in stages[1:]], jnp.int32)

    @jax.jit
    def step(state, groups):
        losses, finals, mean, particles = jax.lax.switch(jnp.sum(state.step >= begun), of_stages, state, groups)
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
        after = MetaState(params, optimizer_state, state.key, state.step + 1, particles if state.particles else ())
        return after, metrics

    def init(key):
        state = init_state(learner, families, meta_optimizer, key)
        if not persistent:
            return state
        particles = [
            first_particles(learner, state.params, group.first(), (group.size, tasks_per_family), estimator)
            for group in groups
        ]
        return state._replace(particles=tuple(particles))

    if mesh is None:
        return MetaTrainer(init, lambda state: step(state, groups))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    replicate = jax.jit(lambda tree: tree, out_shardings=everywhere)
    groups = replicate(groups)
    return MetaTrainer(lambda key: replicate(init(key)), lambda state: step(replicate(state), groups))


class _Stage(NamedTuple):
    """Meta-steps that are alike, from the `first` on."""

    first: int
    num_steps: int
    imitates: bool


def _stages(num_steps, curriculum, imitation):
    """The stages of a run, in order."""
    lengths = [*(length for length, _ in curriculum), num_steps]
    for number, (length, meta_steps) in enumerate(curriculum):
        if not 1 <= length < lengths[number + 1] or not meta_steps >= 1:
            raise ValueError(
                f"curriculum must be pairs of steps that ascend from at least 1 to num_steps = {num_steps}, and "
                f"meta-steps, at least 1, got {tuple(curriculum)}."
            )
    begins = np.cumsum([0, *(meta_steps for _, meta_steps in curriculum)])
    imitated = imitation.meta_steps if imitation else 0
    firsts = sorted({*begins.tolist(), imitated})
    return [_Stage(f, lengths[np.searchsorted(begins, f, side="right") - 1], f < imitated) for f in firsts]


def _check_windows(window, num_steps, weights, curriculum):
    if num_steps % window or curriculum:
        raise ValueError(
            f"estimator: its window of {window} must divide num_steps = {num_steps}, and leaves a curriculum no use."
        )
    if not np.all(weights.reshape(-1, window).any(axis=1)):
        raise ValueError("weights: they leave some of the estimator's windows without a loss; choose others.")


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
    specs = (everywhere, everywhere, by_task, everywhere, everywhere)

    def on_each_device(*inputs):
        return jax.lax.pmean(meta_gradient(*inputs), TASK_AXIS)

    # Unchecked, since with the check `grad` itself would sum over devices what is averaged here.
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)


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

    def first(self):
        return self.member([None if column is None else column[0] for column in self.stacked])

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
