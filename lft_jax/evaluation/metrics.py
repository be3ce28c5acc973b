"""Comparing fine-tuners as PROTOCOL.md says: same tasks, tuned baselines, intervals over tasks, a ceiling."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import oracles
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.evaluation import baselines
from lft_jax.evaluation.baselines import Baseline, Setting
from lft_jax.meta.outer_loss import run_task
from lft_jax.optimizers.fine_tuning import fine_tune
from lft_jax.tasks.perturbation import AttackLoss, perturb
from lft_jax.tasks.uap import UapFamily


def evaluate(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: jax.Array,
    *,
    num_steps: int,
    at: tuple[int, ...],
    batch_size: int = 10,
) -> dict[str, jax.Array]:
    """Fine-tunes on each task's support set and judges on its query set.

    Args:
      learner: what fine-tunes; only its `optimizer` and `start` matter here.
      params: its meta-parameters.
      family: the tasks.
      keys: `[T]`, one a task: methods given the same keys get the same tasks.
      num_steps: K.
      at: the steps, 1 to K, after which to judge.
      batch_size: tasks run side by side.

    Returns:
      `{metric: [T, len(at)]}`, the family's metrics, and `queries`, example evaluations used.

    Raises:
      ValueError: for a step outside 1 to K.
    """
    if not at or not 1 <= min(at) <= max(at) <= num_steps:
        raise ValueError(f"at must hold steps from 1 to num_steps = {num_steps}, got {at}.")
    return _evaluate(_only_fine_tuning(learner), params, family, keys, num_steps, tuple(at), min(batch_size, len(keys)))


def _only_fine_tuning(learner):
    # All but how it fine-tunes is dropped, so that LFT and L2O of one rule share a compilation.
    return dataclasses.replace(learner, name="", init=_nothing_to_learn, objective="query", second_order=False)


def _nothing_to_learn(key, families):
    raise ValueError("this learner is only evaluated.")


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _evaluate(learner, params, family, keys, num_steps, at, batch_size):
    rows = np.asarray(at) - 1

    def task(key):
        episode, trajectory = run_task(learner, params, family, key, num_steps=num_steps)
        thetas = jax.tree.map(lambda x: x[rows], trajectory.thetas)
        # Step by step: as fast as all at once or faster, and in a K-th of the memory.
        metrics = jax.lax.map(lambda theta: family.metrics(theta, episode.query), thetas)
        return {**metrics, "queries": trajectory.queries[rows]}

    return jax.lax.map(task, keys, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def evaluate_fixed(theta: PyTree, family: TaskFamily, keys: jax.Array, *, batch_size: int = 10) -> dict[str, jax.Array]:
    """`{metric: [T, 1]}`: one `theta` judged, as it is, on the query sets of the tasks that `evaluate` would draw."""

    def task(key):
        episode = family.sample(jax.random.split(key, 3)[0])
        return {name: value[None] for name, value in family.metrics(theta, episode.query).items()}

    return jax.lax.map(task, keys, batch_size=min(batch_size, len(keys)))


def first_perturbation(learner: Learner, params: PyTree, family: TaskFamily, key: jax.Array, num_steps: int) -> PyTree:
    """The final `theta` of the task that `evaluate` would draw from `key`."""
    return _first_perturbation(_only_fine_tuning(learner), params, family, key, num_steps)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _first_perturbation(learner, params, family, key, num_steps):
    _, trajectory = run_task(learner, params, family, key, num_steps=num_steps)
    return jax.tree.map(lambda x: x[-1], trajectory.thetas)


class Tuned(NamedTuple):
    """The outcome of a grid: the chosen setting and every setting's mean merit on the tasks it was chosen on."""

    setting: Setting
    scores: list[tuple[Setting, float]]


def merit(family: UapFamily, metrics: dict[str, jax.Array]) -> jax.Array:
    """What settings are chosen by: success, or, since it is no end in itself under a penalty, minus the loss there."""
    return metrics["asr"] if family.constraint.penalty is None else -metrics["loss"]


def minimising(family: UapFamily, loss: AttackLoss) -> UapFamily:
    """The family with another loss of the support images, which keeps to the objective's target, if it has one."""
    return family.with_recipe(loss=dataclasses.replace(loss, target=family.objective.target))


def tune(baseline: Baseline, family: UapFamily, keys: jax.Array, *, num_steps: int, batch_size: int = 10) -> Tuned:
    """Runs the whole grid on (meta-validation) tasks and picks the setting of the best mean `merit` at step K."""
    scores = []
    for setting in baseline.grid:
        metrics = evaluate(
            baseline.learner,
            setting.params,
            minimising(family, setting.support_loss),
            keys,
            num_steps=num_steps,
            at=(num_steps,),
            batch_size=batch_size,
        )
        scores.append((setting, float(jnp.nan_to_num(jnp.mean(merit(family, metrics)), nan=-jnp.inf))))
    return Tuned(max(scores, key=lambda score: score[1])[0], scores)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over tasks and the half-width of its 95% confidence interval (normal approximation), of `[T]` values."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.inf
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def steps_to_reach(curve: Sequence[float], target: float) -> int | None:
    """The first step (from 1) at which a mean-ASR curve `[K]` is at least `target`, or None."""
    reached = np.flatnonzero(np.asarray(curve) >= target)
    return int(reached[0]) + 1 if len(reached) else None


@functools.partial(jax.jit, static_argnames=("num_steps", "batch_size"))
def _full_data_run(families, theta, key, step, loss, *, num_steps, batch_size):
    def minibatch_oracle(theta, key):
        def attack(family, key):
            batch = family.batch(jax.random.randint(key, (batch_size,), 0, len(family.labels)))

            def image_losses(thetas):
                return loss(family.logits_fn(perturb(batch.images, thetas)), batch.labels)

            return oracles.per_example_gradient(image_losses, num_examples=batch_size)(theta, key)

        keys = jax.random.split(key, len(families))
        estimates = [attack(family, k) for family, k in zip(families, keys, strict=True)]
        constraint = families[0].constraint
        mean = sum(e.grads for e in estimates) / len(families) + jax.grad(constraint.cost)(theta)
        return estimates[0]._replace(grads=mean, extras={"scale": constraint.scale(theta)})

    optimizer = baselines.make_baselines(families[0].constraint.norm)["pgd"].learner.optimizer(
        {"step": step, "decay": 0.5, "final": 0.0}
    )
    project = families[0].project
    return fine_tune(optimizer, minibatch_oracle, theta, key, num_steps=num_steps, project=project).thetas[-1]


def full_data_uap(
    families: Sequence[UapFamily],
    judge: UapFamily,
    key: jax.Array,
    *,
    num_steps: int = 300,
    batch_size: int = 100,
    steps: tuple[float, ...] = (0.1, 0.4),
    targeted: bool = False,
    num_judged: int = 1000,
) -> tuple[jax.Array, list[dict]]:
    """A UAP optimised on all images of the given families at once: the ceiling, or the transfer start.

    With one family this is the *oracle* of PROTOCOL 5: the best of several losses and step sizes (and targeted at
    each class too), chosen on `judge`'s images. With the families of several meta-training victims it is the
    *transfer* start of PROTOCOL 2.

    Args:
      families: one or more, of the same image shape and constraint.
      judge: whose images and victim choose among the runs, and whose hinge's confidence they have.
      key: for minibatches.
      num_steps: of each run.
      batch_size: images of each family in a step.
      steps: first step sizes, in units of the constraint's scale; they fall linearly to 0.
      targeted: also run once for each target class (all runs keep to the judge's target, if it has one).
      num_judged: at most so many of the judge's images are used.

    Returns:
      The perturbation `[H, W, C]` of the best `merit`, and a record of all runs: loss, target, step, ASR on the
      judge's images.
    """
    families = tuple(families)
    goal = judge.objective.target
    classes = range(len(families[0].counts)) if targeted and goal is None else ()
    runs = [(kind, goal, step) for kind in ("cross_entropy", "hinge") for step in steps]
    runs += [("cross_entropy", target, steps[0]) for target in classes]
    # Evenly spread, since images may be sorted by class.
    batch = judge.batch(np.linspace(0, len(judge.labels) - 1, min(num_judged, len(judge.labels))).astype(int))
    theta0 = jnp.zeros_like(families[0].init(key))
    best, records = (-math.inf, theta0), []
    for kind, target, step in runs:
        loss = AttackLoss(kind, kappa=judge.objective.kappa, target=target)
        theta = _full_data_run(families, theta0, key, step, loss, num_steps=num_steps, batch_size=batch_size)
        metrics = _judged(judge, theta, batch)
        records.append({"loss": kind, "target": target, "step": step, "asr": float(metrics["asr"])})
        best = max(best, (float(merit(judge, metrics)), theta), key=lambda pair: pair[0])
    return best[1], records


@jax.jit
def _judged(family, theta, batch):
    return family.metrics(theta, batch)


def gap_closed(asr: float, baseline: float, ceiling: float) -> float | None:
    """The part of the few-shot gap that is closed (PROTOCOL 5), or None where there is no gap."""
    return (asr - baseline) / (ceiling - baseline) if ceiling > baseline else None
