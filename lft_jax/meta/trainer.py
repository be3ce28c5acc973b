"""Meta-training: the meta-gradient, and the step that updates the meta-parameters.

A meta-step is one pure, jitted function of the state. Each family contributes `tasks_per_family` tasks, vmapped;
families that share a pytree structure and shapes (victims of one architecture on one source) are stacked and mapped
over, so they share one compilation and one family's memory; the mean meta-gradients of all families are added.

On several devices, of one or of many hosts, each runs its share of every family's tasks: the keys, one a task, are
split over the mesh axis `task`, all else is replicated, and the meta-gradients are averaged.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base
from lft_jax._deprecation import old_keywords
from lft_jax.base import Learner, TaskFamily
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.gradients import family_gradient, first_particles
from lft_jax.meta.imitation import Imitation, imitating
from lft_jax.meta.outer_loss import UNROLL, Unroll, step_weights

PyTree = Any

#: The mesh axis that tasks are split over.
TASK_AXIS = "task"


class MetaState(NamedTuple):
    """The complete state of a run, except its configuration: resuming from it continues with the same numbers.

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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the first meta-steps of a run do differently.

    Attributes:
      curriculum: `((steps, meta_steps), ...)`: the first meta-steps fine-tune for fewer steps, in ascending order; K of
        them follow. An update rule sees its progress through the shorter unroll. All lengths are compiled at first.
      imitation: the outer loss of the first meta-steps, always by backpropagation, for learners of update rules; the
        steps have equal weights in it. None for none.

    Examples:
      >>> Schedule(curriculum=((5, 100), (10, 100))).curriculum[0]
      (5, 100)
    """

    curriculum: Sequence[tuple[int, int]] = ()
    imitation: Imitation | None = None


_PLAIN = Schedule()


def _present_keywords(old, kwargs):
    if "estimator" in old:
        kwargs["meta_gradient"] = old.pop("estimator")
    scheduled = {name: old.pop(name) for name in ("curriculum", "imitation") if name in old}
    if scheduled:
        kwargs["schedule"] = Schedule(**scheduled)
    if old:
        old = {"step_weights" if name == "weights" else name: value for name, value in old.items()}
        kwargs["unroll"] = Unroll(**old)
    return kwargs


@old_keywords(
    _present_keywords,
    weights="unroll=Unroll(step_weights=...)",
    window="unroll=Unroll(window=...)",
    remat="unroll=Unroll(remat=...)",
    memory_mib="unroll=Unroll(memory_mib=...)",
    estimator="meta_gradient=",
    curriculum="schedule=Schedule(curriculum=...)",
    imitation="schedule=Schedule(imitation=...)",
)
def meta_trainer(
    learner: Learner,
    families: Sequence[TaskFamily],
    *,
    num_steps: int = 20,
    tasks_per_family: int = 8,
    meta_optimizer: optax.GradientTransformation,
    unroll: Unroll = UNROLL,
    meta_gradient: EvolutionStrategies | PersistentEvolutionStrategies | None = None,
    schedule: Schedule = _PLAIN,
    mesh: jax.sharding.Mesh | None = None,
) -> MetaTrainer:
    """Meta-trains a learner across families, which need not share shapes (incongruous tasks).

    Args:
      learner: from `lft_jax.learners`.
      families: one or more buckets of tasks.
      num_steps: K, fine-tuning steps of a task.
      tasks_per_family: tasks of each family in a meta-step.
      meta_optimizer: updates the meta-parameters; see `clipped_adam`.
      unroll: how the steps weigh in the outer loss, and how they are differentiated.
      meta_gradient: evolution strategies, or None for backpropagation through the steps. A meta-step of
        `PersistentEvolutionStrategies` is one window of an episode, whose particles wait in the state for the next.
      schedule: a curriculum, and imitation of another optimizer, for the first meta-steps.
      mesh: devices that share the tasks, see `task_mesh`; None for the default device. The numbers are those of one
        device up to the order of summation.

    Returns:
      The trainer: its `init` and its `step`.

    Raises:
      ValueError: for no families, numbers below 1, tasks that the mesh cannot share evenly, families that the
        learner cannot serve together, evolution strategies with a window, a second-order learner, Reptile or several
        devices, Reptile with a window or imitation, a curriculum that does not ascend to K, and persistent evolution
        strategies whose window does not divide K, is one of a curriculum, or leaves no weight for some windows.
      TypeError: for a family that is not a registered pytree.

    Examples:
      >>> from lft_jax.meta import learners
      >>> from lft_jax.optimizers import coordinate_lstm
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> family = QuadraticFamily(jnp.ones(3), support=2, query=2)
      >>> rule = coordinate_lstm(hidden=4)
      >>> trainer = meta_trainer(learners.lft(rule), [family], num_steps=3, meta_optimizer=clipped_adam(1e-2, 10))
      >>> state, metrics = trainer.step(trainer.init(jax.random.key(0)))
      >>> int(state.step), sorted(metrics)[:2]
      (1, ['family_loss', 'final_loss'])
    """
    families = tuple(families)
    _check_families(families)
    base.check_at_least("tasks_per_family", tasks_per_family, 1)
    _check_meta_gradient(meta_gradient, learner, unroll, mesh)
    if isinstance(meta_gradient, PersistentEvolutionStrategies):
        _check_windows(meta_gradient.window, num_steps, unroll, schedule)
    groups, order = _group(families)
    stages = _stages(num_steps, schedule)
    gradients = [_stage_gradient(s, learner, unroll, meta_gradient, tasks_per_family, mesh) for s in stages]
    begins = jnp.asarray([stage.first for stage in stages[1:]], jnp.int32)
    optimizer = _skipping(meta_optimizer)

    @jax.jit
    def step(state, groups):
        # Each of these samples tasks, fine-tunes, takes outer losses and their gradient (`family_gradient`).
        (losses, last), grads, particles = jax.lax.switch(jnp.sum(state.step >= begins), gradients, state, groups)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": jnp.mean(losses[order]),
            "family_loss": losses[order],
            "final_loss": last[order],
            "grad_norm": optax.tree.norm(grads),
            "skipped": optimizer_state.total_notfinite,
            "skipped_in_a_row": optimizer_state.notfinite_count,
        }
        particles = particles if state.particles else ()
        return MetaState(params, optimizer_state, state.key, state.step + 1, particles), metrics

    def init(key):
        state = init_state(learner, families, meta_optimizer, key)
        return state._replace(particles=_particles(learner, state.params, groups, tasks_per_family, meta_gradient))

    if mesh is None:
        return MetaTrainer(init, lambda state: step(state, groups))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    replicate = jax.jit(lambda tree: tree, out_shardings=everywhere)
    groups = replicate(groups)
    return MetaTrainer(lambda key: replicate(init(key)), lambda state: step(replicate(state), groups))


def _check_families(families):
    if not families:
        raise ValueError("families must hold at least one TaskFamily, got none.")
    for family in families:
        if not jax.tree.leaves(family) or jax.tree.structure(family).num_nodes == 1:
            raise TypeError(
                f"families: {type(family).__name__} is not a registered pytree with arrays; decorate it with "
                "jax.tree_util.register_dataclass."
            )


def _check_meta_gradient(meta_gradient, learner, unroll, mesh):
    if learner.objective == "end" and unroll.window is not None:
        raise ValueError(f"window: {learner.name} differentiates nothing through its steps; leave it out.")
    if meta_gradient is None:
        return
    if unroll.window is not None or learner.second_order:
        raise ValueError(
            "meta_gradient: evolution strategies differentiate nothing; leave window out, and take a first-order "
            "learner."
        )
    if mesh is not None and mesh.size > 1:
        raise ValueError(f"meta_gradient: evolution strategies run on one device, got a mesh of {mesh.size}.")
    if learner.objective == "end":
        raise ValueError(
            f"meta_gradient: {learner.name} has no outer loss for evolution strategies, only a meta-gradient."
        )


def _check_windows(window, num_steps, unroll, schedule):
    if num_steps % window or schedule.curriculum:
        raise ValueError(
            f"meta_gradient: its window of {window} must divide num_steps = {num_steps}, and a curriculum has no use."
        )
    if not np.all(step_weights(unroll.step_weights, num_steps).reshape(-1, window).any(axis=1)):
        raise ValueError("step_weights: they leave some windows of the meta-gradient without a loss; choose others.")


def _particles(learner, params, groups, tasks_per_family, meta_gradient):
    if not isinstance(meta_gradient, PersistentEvolutionStrategies):
        return ()
    return tuple(
        first_particles(learner, params, group.first(), (group.size, tasks_per_family), meta_gradient)
        for group in groups
    )


def _stage_gradient(stage, learner, unroll, meta_gradient, tasks_per_family, mesh):
    """`(state, groups) -> (losses [families], last step's losses), mean meta-gradient, particles` of one stage."""
    if stage.imitation is not None:
        # Imitation differentiates no model, so there is no call for evolution strategies.
        learner, unroll = (
            imitating(learner, stage.imitation.teacher),
            dataclasses.replace(unroll, step_weights="uniform"),
        )
        meta_gradient = None
    of_family = family_gradient(learner, num_steps=stage.num_steps, unroll=unroll, meta_gradient=meta_gradient)
    gradient = functools.partial(_mean_gradient, of_family)
    if mesh is not None:
        gradient = _shared(gradient, mesh, tasks_per_family)
    persistent = isinstance(meta_gradient, PersistentEvolutionStrategies)
    windows = stage.num_steps // meta_gradient.window if persistent else 1

    def of_state(state, groups):
        since = state.step - stage.first
        # All windows of an episode have the same tasks.
        key = jax.random.fold_in(state.key, stage.first + since // windows)
        keys = [
            jax.random.split(jax.random.fold_in(key, number), (group.size, tasks_per_family))
            for number, group in enumerate(groups)
        ]
        return gradient(state.params, groups, keys, state.particles or ((),) * len(groups), since % windows)

    return of_state


def _mean_gradient(of_family, params, groups, keys, particles, window):
    """The mean of all families' meta-gradients; losses are in the order of the groups' members."""
    losses, last, after, total = [], [], [], jax.tree.map(jnp.zeros_like, params)
    for group, *inputs in zip(groups, keys, particles, strict=True):

        def member_gradient(inputs, group=group):
            member, member_keys, member_particles = inputs
            return of_family(params, group.member(member), member_keys, member_particles, window)

        ((of_group, of_last), grads), carried = jax.lax.map(member_gradient, (group.stacked, *inputs))
        total = jax.tree.map(lambda t, g: t + jnp.sum(g, 0), total, grads)
        losses.append(of_group)
        last.append(of_last)
        after.append(carried)
    num_families = sum(group.size for group in groups)
    mean = jax.tree.map(lambda t: t / num_families, total)
    return (jnp.concatenate(losses), jnp.concatenate(last)), mean, tuple(after)


class _Stage(NamedTuple):
    """Meta-steps that are alike, from the `first` on: their K, and what they imitate, if anything."""

    first: int
    num_steps: int
    imitation: Imitation | None


def _stages(num_steps, schedule):
    """The stages of a run, in order."""
    curriculum, imitation = schedule.curriculum, schedule.imitation
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
    return [
        _Stage(
            first, lengths[np.searchsorted(begins, first, side="right") - 1], imitation if first < imitated else None
        )
        for first in firsts
    ]


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
