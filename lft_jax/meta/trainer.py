"""Meta-training: `meta_trainer` returns a pure, jitted function that makes one meta-step.

A meta-step, with the functions that make it::

    episode = family.sample(key)                          for each task           `outer_loss.run_task`
    thetas  = fine_tune(learner, episode.support)         K steps                 `outer_loss.run_task`
    loss    = sum_k w_k f(theta_k; episode.query)         mean over tasks         `outer_loss.outer_losses`
    grads   = d loss / d params                           mean over families      `_gradients.family_gradient`
    params  = params + meta_optimizer.update(grads)                               `meta_trainer`

Each family contributes `tasks_per_family` tasks, which are vmapped. Families that share a pytree structure and shapes
(victims of one architecture on one source) are stacked and computed one after the other by one program, which needs
the memory of one family.

On several devices, of one or more hosts, each device computes its share of every family's tasks: the keys of the tasks
are split over the mesh axis `task`, everything else is replicated, and the meta-gradients are averaged.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from lft_jax import base
from lft_jax._bounded import BoundedJit
from lft_jax._deprecation import old_keywords
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.meta._gradients import family_gradient, first_particles, mean_gradient
from lft_jax.meta._groups import group_families
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import imitating
from lft_jax.meta.mesh import share_tasks
from lft_jax.meta.outer_loss import UNROLL, Unroll, step_weights
from lft_jax.meta.stages import Stages, stages_of


class MetaState(NamedTuple):
    """The complete state of a run, except its configuration: resuming from it continues with the same numbers.

    Attributes:
      params: the meta-parameters.
      optimizer_state: state of the meta-optimizer.
      key: PRNG key of the run, constant; every meta-step derives its keys from this one and its index.
      step: `[]` int32, number of meta-steps done.
      particles: what persistent evolution strategies carry from one meta-step to the next, one entry per group of
        stacked families. Empty otherwise.
    """

    params: PyTree
    optimizer_state: PyTree
    key: jax.Array
    step: jax.Array
    particles: tuple[PyTree, ...] = ()


class MetaTrainer(NamedTuple):
    """A pair of pure functions, made by `meta_trainer`.

    The metrics of a meta-step are

    - `loss` `[]`: the outer loss, and `family_loss` `[families]`: its value for each family;
    - `final_loss` `[families]`: the loss after the last fine-tuning step alone;
    - `grad_norm` `[]`: l2 norm of the meta-gradient;
    - `skipped` and `skipped_in_a_row` `[]` int32: meta-steps so far whose meta-gradient was not finite. They leave the
      meta-parameters unchanged.

    Losses are those of the current stage: of the shorter unroll of a curriculum, of one window, or the distance from an
    imitated teacher.

    Attributes:
      init: `key -> MetaState`, the state at the beginning of a run.
      step: `MetaState -> (MetaState, metrics)`, one meta-step, jitted.
    """

    init: Callable[[jax.Array], MetaState]
    step: Callable[[MetaState], tuple[MetaState, dict[str, jax.Array]]]


def init_state(
    learner: Learner, families: Sequence[TaskFamily], meta_optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> MetaState:
    """Returns the state at the beginning of a run, without the particles of persistent evolution strategies.

    Args:
      learner: from `lft_jax.learners`.
      families: task families. They may be empty for learners of update rules alone (`lft`, `l2o`).
      meta_optimizer: the one of the run.
      key: PRNG key of the run.

    Raises:
      ValueError: for families that the learner cannot serve together.

    Examples:
      >>> from lft_jax.meta import learners
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> learner, families = learners.maml(optax.sgd(0.1)), (QuadraticFamily(jnp.ones(3)),)
      >>> state = init_state(learner, families, optax.sgd(0.1), jax.random.key(0))
      >>> state.params.shape, int(state.step)
      ((3,), 0)
    """
    key_init, key_run = jax.random.split(key)
    params = learner.init(key_init, tuple(families))
    return MetaState(params, _skipping(meta_optimizer).init(params), key_run, jnp.zeros((), jnp.int32))


_NO_STAGES = Stages()


def _present_keywords(old, kwargs):
    if "estimator" in old:
        kwargs["meta_gradient"] = old.pop("estimator")
    scheduled = {name: old.pop(name) for name in ("curriculum", "imitation") if name in old}
    if scheduled:
        kwargs["stages"] = Stages(**scheduled)
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
    curriculum="stages=Stages(curriculum=...)",
    imitation="stages=Stages(imitation=...)",
)
def meta_trainer(
    learner: Learner,
    families: Sequence[TaskFamily],
    *,
    num_steps: int = 20,
    tasks_per_family: int = 8,
    families_per_step: int | None = None,
    max_family_norm: float | None = None,
    meta_optimizer: optax.GradientTransformation,
    unroll: Unroll = UNROLL,
    meta_gradient: EvolutionStrategies | PersistentEvolutionStrategies | None = None,
    stages: Stages = _NO_STAGES,
    mesh: jax.sharding.Mesh | None = None,
) -> MetaTrainer:
    """Meta-trains a learner on tasks of all families, which may have different shapes (incongruous tasks).

    Meta-training minimizes over the meta-parameters::

        mean over families and tasks of  sum_k w_k f(theta_k; query set),      k = 1 ... K

    for LFT; other learners may have another outer loss (`lft_jax.learners`).

    Args:
      learner: what is meta-learned, from `lft_jax.learners`.
      families: one or more task families, as they are now. Make another trainer after a change of weights that are no
        arrays of the family.
      num_steps: fine-tuning steps K per task, at least 1.
      tasks_per_family: tasks of each family per meta-step, at least 1. They are sampled again in every meta-step.
      families_per_step: families of a meta-step, which take turns in their order; None for all of them. Few of them
        make more meta-steps in the same time. The losses of the others are NaN in the metrics.
      max_family_norm: l2 norm that the meta-gradient of each family is clipped to, so that no family outweighs the
        others; None for no limit.
      meta_optimizer: optax transformation that updates the meta-parameters; see `clipped_adam`.
      unroll: weights w_k of the steps, and how the steps are differentiated.
      meta_gradient: evolution strategies, or None for backpropagation through the steps. With
        `PersistentEvolutionStrategies` a meta-step is one window of an episode, which the next meta-step continues.
      stages: a curriculum and imitation for the first meta-steps.
      mesh: devices that share the tasks, see `task_mesh`. None for the default device. The results are those of one
        device up to the order of summation.

    Returns:
      A `MetaTrainer`, with functions `init` and `step`.

    Raises:
      ValueError: for

        - no families, numbers below 1, a norm that is not above 0 or with several devices, or more families in a
          meta-step than there are;
        - tasks that cannot be divided evenly among the devices of the mesh;
        - evolution strategies together with a truncation window, a second-order learner, Reptile or several devices;
        - Reptile together with a truncation window or imitation;
        - a curriculum that does not ascend to K;
        - persistent evolution strategies together with a curriculum, or whose window does not divide K or has step
          weights of 0 only.

        `init` raises it for families that the learner cannot serve together.
      TypeError: for a family that is not a registered pytree.

    References:
      Zhao et al., Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.

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
    families = tuple(family.refreshed() for family in families)
    base.check_at_least("tasks_per_family", tasks_per_family, 1)
    if max_family_norm is not None:
        base.check_positive("max_family_norm", max_family_norm)
        if mesh is not None and mesh.size > 1:
            raise ValueError(f"max_family_norm: gradients of a family on {mesh.size} devices are not clipped together.")
    if families_per_step is not None:
        base.check_at_least("families_per_step", families_per_step, 1)
        if families_per_step > len(families):
            raise ValueError(
                f"families_per_step must be at most {len(families)}, the families, got {families_per_step}."
            )
    _check_meta_gradient(meta_gradient, learner, unroll, mesh)
    if isinstance(meta_gradient, PersistentEvolutionStrategies):
        _check_windows(meta_gradient.window, num_steps, unroll, stages)
    groups, order = group_families(families)
    every_stage = stages_of(num_steps, stages, meta_gradient)
    options = {"max_norm": max_family_norm, "tasks_per_family": tasks_per_family, "mesh": mesh}
    gradients = [_stage_gradient(s, learner, unroll, meta_gradient, **options) for s in every_stage]
    optimizer = _skipping(meta_optimizer)

    @BoundedJit
    def step(state, groups):
        """One meta-step: sample tasks, fine-tune, outer loss, its gradient, update."""
        sizes = [group.size for group in groups]
        stage, keys, window, episode = _task_keys(state, every_stage, sizes, tasks_per_family)
        turns = _turns(episode, order, sizes, families_per_step)
        carried = state.particles or ((),) * len(groups)
        # For each family: a task per key, fine-tuned; the outer loss and its gradient (`_gradients.family_gradient`).
        inputs = state.params, groups, turns, keys, carried, window
        (losses, last), grads, carried = jax.lax.switch(stage, gradients, *inputs)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        particles = carried if state.particles else ()
        after = MetaState(params, optimizer_state, state.key, state.step + 1, particles)
        took = None if turns[0] is None else jnp.concatenate(turns)[order]
        return after, _metrics(losses[order], last[order], took, grads, after.optimizer_state)

    def init(key):
        state = init_state(learner, families, meta_optimizer, key)
        return state._replace(particles=_particles(learner, state.params, groups, tasks_per_family, meta_gradient))

    if mesh is None:
        return MetaTrainer(init, lambda state: step(state, groups))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = jax.jit(lambda leaves: leaves, out_shardings=everywhere)

    def replicate(tree):  # by its leaves, since JAX keeps the structures of arguments, and with them the victims
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, place(leaves))

    groups = replicate(groups)
    return MetaTrainer(lambda key: replicate(init(key)), lambda state: step(replicate(state), groups))


def _task_keys(state, stages, group_sizes, tasks_per_family):
    """Of a meta-step: its stage, the keys `[families, tasks]` of each group's tasks, their window and their episode."""
    firsts, windows = (jnp.asarray([getattr(s, name) for s in stages], jnp.int32) for name in ("first", "windows"))
    stage = jnp.sum(state.step >= firsts[1:])
    episode, window = jnp.divmod(state.step - firsts[stage], windows[stage])
    # All windows of an episode have the same tasks.
    key = jax.random.fold_in(state.key, firsts[stage] + episode)
    keys = [
        jax.random.split(jax.random.fold_in(key, number), (size, tasks_per_family))
        for number, size in enumerate(group_sizes)
    ]
    return stage, keys, window, firsts[stage] + episode


def _turns(episode, order, sizes, families_per_step):
    """Whether it is a family's turn, `[families]` bool for each group; None if all take part.

    Episode i has the families i * m, ..., i * m + m - 1, modulo their number, with m = `families_per_step`.
    """
    count = len(order)
    if families_per_step is None or families_per_step == count:
        return (None,) * len(sizes)
    first = episode * families_per_step % count
    turn = (jnp.arange(count, dtype=jnp.int32) - first) % count < families_per_step
    # `order[i]` is the place of family i in the groups.
    turn = turn[np.argsort(order)]
    return tuple(jnp.split(turn, np.cumsum(sizes)[:-1]))


def _metrics(family_loss, final_loss, turns, grads, optimizer_state):
    """The metrics that `MetaTrainer` describes."""
    return {
        "loss": jnp.mean(family_loss, where=turns),
        "family_loss": family_loss,
        "final_loss": final_loss,
        "grad_norm": optax.tree.norm(grads),
        "skipped": optimizer_state.total_notfinite,
        "skipped_in_a_row": optimizer_state.notfinite_count,
    }


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
        raise ValueError(f"window: {learner.name} differentiates nothing through its steps; use window=None.")
    if meta_gradient is None:
        return
    if unroll.window is not None or learner.second_order:
        raise ValueError(
            "meta_gradient: evolution strategies differentiate nothing; use window=None, and a first-order learner."
        )
    if mesh is not None and mesh.size > 1:
        raise ValueError(f"meta_gradient: evolution strategies run on one device, got a mesh of {mesh.size}.")
    if learner.objective == "end":
        raise ValueError(
            f"meta_gradient: {learner.name} has no outer loss for evolution strategies; use meta_gradient=None."
        )


def _check_windows(window, num_steps, unroll, stages):
    if num_steps % window or stages.curriculum:
        raise ValueError(
            f"meta_gradient: its window of {window} must divide num_steps = {num_steps}, without a curriculum."
        )
    if not np.all(step_weights(unroll.step_weights, num_steps).reshape(-1, window).any(axis=1)):
        raise ValueError("step_weights: they are 0 in some windows of the meta-gradient, which would have no loss.")


def _particles(learner, params, groups, tasks_per_family, meta_gradient):
    if not isinstance(meta_gradient, PersistentEvolutionStrategies):
        return ()
    return tuple(
        first_particles(learner, params, group.first(), (group.size, tasks_per_family), meta_gradient)
        for group in groups
    )


def _stage_gradient(stage, learner, unroll, meta_gradient, *, max_norm, tasks_per_family, mesh):
    """The meta-gradient of one stage, with the signature of `mean_gradient` without `of_family`."""
    if stage.imitation is not None:
        # Backpropagation differentiates the rule alone here, not the model, so evolution strategies are not needed.
        learner = imitating(learner, stage.imitation.teacher)
        unroll = dataclasses.replace(unroll, step_weights="uniform")
        meta_gradient = None
    of_family = family_gradient(learner, num_steps=stage.num_steps, unroll=unroll, meta_gradient=meta_gradient)
    gradient = functools.partial(mean_gradient, of_family, max_norm)
    return gradient if mesh is None else share_tasks(gradient, mesh, tasks_per_family)


def clipped_adam(learning_rate: float, num_meta_steps: int, *, max_norm: float = 1.0) -> optax.GradientTransformation:
    """Returns the default meta-optimizer: Adam with clipped gradients and a cosine learning rate schedule.

    Args:
      learning_rate: of the first meta-step. It decays to a tenth of that, and then stays constant.
      num_meta_steps: meta-steps of the decay.
      max_norm: l2 norm that gradients are clipped to.

    Examples:
      >>> tx = clipped_adam(0.01, num_meta_steps=100)
      >>> updates, _ = jax.jit(tx.update)(jnp.ones(2), tx.init(jnp.ones(2)))
      >>> round(float(updates[0]), 4)
      -0.01
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_meta_steps, alpha=0.1)
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(schedule))


def _skipping(optimizer):
    # With the largest max_consecutive_errors no update that is not finite is ever applied; callers decide when to stop.
    return optax.apply_if_finite(optimizer, max_consecutive_errors=np.iinfo(np.int32).max)
