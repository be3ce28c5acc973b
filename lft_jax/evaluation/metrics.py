"""Metrics over tasks, the tuning of baselines, the full-data oracle, and intervals (docs/protocol.md)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from lft_jax import oracles
from lft_jax._bounded import BoundedJit
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
    keys: Key[Array, " T"],
    *,
    num_steps: int,
    at: tuple[int, ...],
    batch_size: int = 10,
) -> dict[str, Shaped[Array, "T steps"]]:
    """Fine-tunes on the support set of each task and measures on its query set.

    Args:
      learner: the learner, of which only how it fine-tunes is used.
      params: its meta-parameters.
      family: the task family.
      keys: `[T]` PRNG keys, one per task. Methods that are given the same keys get the same tasks.
      num_steps: K, number of fine-tuning steps.
      at: the steps, from 1 to K, after which to measure.
      batch_size: number of tasks that run together.

    Returns:
      `{name: [T, len(at)]}`: the metrics of the family on the query set, and `queries`, the queries spent up to that
      step.

    Raises:
      ValueError: for a step outside 1 to K.

    Examples:
      >>> import optax
      >>> from lft_jax import learners
      >>> from lft_jax.tasks import QuadraticFamily
      >>> family = QuadraticFamily(jnp.asarray([1.0, 2.0]), support=5, query=8)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> sgd = learners.fixed("sgd", optax.sgd)
      >>> found = evaluate(sgd, {"learning_rate": 0.3}, family, keys, num_steps=4, at=(1, 4))
      >>> found["loss"].shape, found["queries"][0].tolist()
      ((3, 2), [5, 20])
    """
    if not at or not 1 <= min(at) <= max(at) <= num_steps:
        raise ValueError(f"at must hold steps from 1 to num_steps = {num_steps}, got {at}.")
    learner, family = _only_fine_tuning(learner), family.refreshed()
    return _evaluate(learner, params, family, keys, num_steps, tuple(at), min(batch_size, len(keys)))


def _only_fine_tuning(learner):
    # Drop everything except how it fine-tunes, so that LFT and L2O of one rule share a compilation.
    return dataclasses.replace(learner, name="", init=_nothing_to_learn, objective="query", second_order=False)


def _nothing_to_learn(key, families):
    raise ValueError("this learner is only evaluated.")


@functools.partial(BoundedJit, static=(0, 4, 5, 6), kept=64)  # comparisons go over many methods
def _evaluate(learner, params, family, keys, num_steps, at, batch_size):
    rows = np.asarray(at) - 1

    def task(key):
        episode, trajectory = run_task(learner, params, family, key, num_steps=num_steps)
        thetas = jax.tree.map(lambda x: x[rows], trajectory.thetas)
        # One step at a time: no slower than all at once, and with a K-th of the memory.
        metrics = jax.lax.map(lambda theta: family.metrics(theta, episode.query), thetas)
        return {**metrics, "queries": trajectory.queries[rows]}

    return jax.lax.map(task, keys, batch_size=batch_size)


def evaluate_fixed(
    theta: PyTree, family: TaskFamily, keys: Key[Array, " T"], *, batch_size: int = 10
) -> dict[str, Shaped[Array, "T 1"]]:
    """Measures one `theta`, without fine-tuning, on the query sets of the tasks that `evaluate` would draw.

    Args:
      theta: the optimizee.
      family: the task family.
      keys: `[T]` PRNG keys, one per task.
      batch_size: number of tasks that run together.

    Returns:
      `{name: [T, 1]}`, the metrics of the family.

    Examples:
      >>> from lft_jax.tasks import QuadraticFamily
      >>> family = QuadraticFamily(jnp.ones(2), noise=0.0)
      >>> found = evaluate_fixed(jnp.zeros(2), family, jax.random.split(jax.random.key(0), 3))
      >>> found["loss"].shape
      (3, 1)
    """
    return _evaluate_fixed(theta, family.refreshed(), keys, min(batch_size, len(keys)))


@functools.partial(BoundedJit, static=(3,))
def _evaluate_fixed(theta, family, keys, batch_size):
    def task(key):
        episode = family.sample(jax.random.split(key, 3)[0])
        return {name: value[None] for name, value in family.metrics(theta, episode.query).items()}

    return jax.lax.map(task, keys, batch_size=batch_size)


def first_perturbation(
    learner: Learner, params: PyTree, family: TaskFamily, key: PRNGKeyArray, num_steps: int
) -> PyTree:
    """The `theta` that fine-tuning ends with, on the task that `evaluate` would draw from `key`.

    Args:
      learner: the learner, of which only how it fine-tunes is used.
      params: its meta-parameters.
      family: the task family.
      key: PRNG key of the task.
      num_steps: K, number of fine-tuning steps.

    Examples:
      >>> import optax
      >>> from lft_jax import learners
      >>> from lft_jax.tasks import QuadraticFamily
      >>> family, sgd = QuadraticFamily(jnp.ones(2)), learners.fixed("sgd", optax.sgd)
      >>> first_perturbation(sgd, {"learning_rate": 0.5}, family, jax.random.key(0), num_steps=3).shape
      (2,)
    """
    return _first_perturbation(_only_fine_tuning(learner), params, family.refreshed(), key, num_steps)


@functools.partial(BoundedJit, static=(0, 4))
def _first_perturbation(learner, params, family, key, num_steps):
    _, trajectory = run_task(learner, params, family, key, num_steps=num_steps)
    return jax.tree.map(lambda x: x[-1], trajectory.thetas)


class Tuned(NamedTuple):
    """The outcome of a grid.

    Attributes:
      setting: the chosen setting.
      scores: each setting of the grid and its mean `merit` over the validation tasks.
    """

    setting: Setting
    scores: list[tuple[Setting, float]]


def merit(family: UapFamily, metrics: dict[str, Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """What settings are chosen by: the success rate under a ball, and minus the loss under a penalty.

    Under a penalty, the success rate alone would favour large perturbations.
    """
    return metrics["asr"] if family.constraint.penalty is None else -metrics["loss"]


def minimising(family: UapFamily, loss: AttackLoss) -> UapFamily:
    """The family with another loss on the support images, which takes the target of the objective."""
    return family.with_recipe(loss=dataclasses.replace(loss, target=family.objective.target))


def tune(
    baseline: Baseline, family: UapFamily, keys: Key[Array, " T"], *, num_steps: int, batch_size: int = 10
) -> Tuned:
    """Runs the whole grid of a baseline on validation tasks and picks the best setting.

    Settings are compared after the last step: by the mean success rate under a ball, by the mean loss under a penalty.

    Args:
      baseline: the baseline and its grid.
      family: the validation tasks.
      keys: `[T]` PRNG keys, one per task.
      num_steps: K, number of fine-tuning steps.
      batch_size: number of tasks that run together.

    Returns:
      The chosen setting, and all settings with their scores; a higher score is better.
    """
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


def mean_interval(values: Shaped[Array | np.ndarray, " T"]) -> tuple[float, float]:
    """Mean and half-width of its 95% confidence interval, by the normal approximation `1.96 * s / sqrt(T)`.

    Args:
      values: `[T]`, one value per task.

    Returns:
      The mean and the half-width, which is infinite for one value.

    Examples:
      >>> mean, width = mean_interval(np.asarray([0.4, 0.5, 0.6]))
      >>> round(mean, 3), round(width, 3)
      (0.5, 0.113)
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.inf
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def steps_to_reach(curve: Sequence[float], target: float) -> int | None:
    """The first step at which a curve reaches a target.

    Args:
      curve: `[K]` values after steps 1 to K, such as mean success rates.
      target: the value to reach.

    Returns:
      The number of the first step with a value of at least `target`, from 1, or None.

    Examples:
      >>> steps_to_reach([0.1, 0.3, 0.5], 0.3)
      2
    """
    reached = np.flatnonzero(np.asarray(curve) >= target)
    return int(reached[0]) + 1 if len(reached) else None


@functools.partial(BoundedJit, static=(5, 6))
def _full_data_run(families, theta, key, step, loss, num_steps, batch_size):
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
    key: PRNGKeyArray,
    *,
    num_steps: int = 300,
    batch_size: int = 100,
    steps: tuple[float, ...] = (0.1, 0.4),
    targeted: bool = False,
    num_judged: int = 1000,
) -> tuple[Float[Array, "H W C"], list[dict[str, Any]]]:
    """A UAP that is optimized on all images of one or more families.

    With one family this is the *full-data oracle* of docs/protocol.md, the ceiling. With the families of several
    meta-training victims it is the *transfer* start. There is one run of momentum PGD for each loss, cross-entropy and
    hinge, and each step size. The best run is chosen on the images of `judge`: by the success rate under a ball, by the
    loss under a penalty.

    Args:
      families: one or more families of the same image shape and constraint.
      judge: the family whose images and victim choose among the runs. All runs use the target of its objective, if it
        has one, and the `kappa` of its objective for their hinge.
      key: PRNG key of the minibatches.
      num_steps: number of steps of each run.
      batch_size: images of each family per step.
      steps: initial step sizes, in units of the constraint's scale; they fall linearly to 0.
      targeted: also make one run of the cross-entropy targeted at each class, unless the judge has a target.
      num_judged: largest number of the judge's images to use.

    Returns:
      The perturbation `[H, W, C]`, and one record per run, with keys `loss`, `target`, `step` and `asr` (on the judge's
      images).
    """
    families, judge = tuple(family.refreshed() for family in families), judge.refreshed()
    given = judge.objective.target
    classes = range(len(families[0].counts)) if targeted and given is None else ()
    runs = [(kind, given, step) for kind in ("cross_entropy", "hinge") for step in steps]
    runs += [("cross_entropy", target, steps[0]) for target in classes]
    # Spread evenly, since images may be sorted by class.
    batch = judge.batch(np.linspace(0, len(judge.labels) - 1, min(num_judged, len(judge.labels))).astype(int))
    theta0 = jnp.zeros_like(families[0].init(key))
    best, records = (-math.inf, theta0), []
    for kind, target, step in runs:
        loss = AttackLoss(kind, kappa=judge.objective.kappa, target=target)
        theta = _full_data_run(families, theta0, key, step, loss, num_steps, batch_size)
        metrics = _judged(judge, theta, batch)
        records.append({"loss": kind, "target": target, "step": step, "asr": float(metrics["asr"])})
        best = max(best, (float(merit(judge, metrics)), theta), key=lambda pair: pair[0])
    return best[1], records


@BoundedJit
def _judged(family, theta, batch):
    return family.metrics(theta, batch)


def gap_closed(asr: float, baseline: float, ceiling: float) -> float | None:
    """The share of the gap between a baseline and the ceiling that a method closes.

    It is `(asr - baseline) / (ceiling - baseline)`: below 0 for a method worse than the baseline, above 1 for one
    better than the ceiling.

    Args:
      asr: success rate of the method.
      baseline: success rate of the baseline.
      ceiling: success rate of the full-data oracle.

    Returns:
      The share, or None if the ceiling is not above the baseline.

    Examples:
      >>> gap_closed(0.75, baseline=0.5, ceiling=1.0)
      0.5
    """
    return (asr - baseline) / (ceiling - baseline) if ceiling > baseline else None
