"""The comparison table: all methods on the same unseen tasks against one victim (docs/protocol.md)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lft_jax import base
from lft_jax.base import Learner, PyTree
from lft_jax.evaluation import baselines
from lft_jax.evaluation.metrics import (
    evaluate,
    evaluate_fixed,
    first_perturbation,
    full_data_uap,
    gap_closed,
    mean_interval,
    minimising,
    steps_to_reach,
    tune,
)
from lft_jax.oracles import ZerothOrder
from lft_jax.tasks.uap import UapFamily

#: The baseline that paired differences and steps to reach refer to.
REFERENCE = "pgd"
#: Name of the transfer start that is fine-tuned by the best baseline.
TRANSFER = "transfer, fine-tuned"
#: Suffix of baselines that are given what the learned methods are given: the augmentation of the support images and,
#: with zeroth-order gradients, the search for a start and the same estimator.
AUGMENTED = ", augmented"


class Target(NamedTuple):
    """A victim, and its tasks on the three splits of an image source.

    Attributes:
      source: name of the image source.
      victim: name of the victim.
      seen: whether the victim was in meta-training.
      train: its tasks on train images, which the full-data oracle uses.
      validation: its tasks on validation images, which hyperparameters are chosen on.
      test: its tasks on test images, which nothing is chosen on.
    """

    source: str
    victim: str
    seen: bool
    train: UapFamily
    validation: UapFamily
    test: UapFamily


class Learned(NamedTuple):
    """A meta-learned method.

    Attributes:
      learner: its learner.
      params: its meta-parameters, one entry per meta-training seed.
      tasks: changes the test tasks of a target for this method, for example to spend the same queries in another way;
        by default it does not.
    """

    learner: Learner
    params: Sequence[PyTree]
    tasks: Callable[[UapFamily], UapFamily] = lambda family: family


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The size of a comparison.

    Attributes:
      num_steps: K, number of fine-tuning steps.
      at: the steps after which to measure, ascending, the last one K.
      num_tasks: number of test tasks.
      num_validation: number of validation tasks that grids are run on.
      methods: names of the baselines to tune, see `make_baselines`.
      oracle_steps: number of steps of each full-data run.
      oracle_targeted: whether the full-data oracle also tries each target class.
      batch_size: number of tasks that run together.
      seed: seed of the tasks.

    Raises:
      ValueError: for a field out of range.

    Examples:
      >>> Protocol(num_steps=5, at=(1, 5), num_tasks=10).methods
      ('pgd', 'momentum_pgd', 'sgd', 'adam', 'uap_sgd')
    """

    num_steps: int = 20
    at: tuple[int, ...] = (1, 2, 5, 10, 20)
    num_tasks: int = 100
    num_validation: int = 50
    methods: tuple[str, ...] = ("pgd", "momentum_pgd", "sgd", "adam", "uap_sgd")
    oracle_steps: int = 300
    oracle_targeted: bool = False
    batch_size: int = 20
    seed: int = 0

    def __post_init__(self):
        for name in ("num_steps", "num_tasks", "num_validation", "oracle_steps", "batch_size"):
            base.check_at_least(name, getattr(self, name), 1)
        if not self.at or list(self.at) != sorted(set(self.at)) or self.at[0] < 1 or self.at[-1] != self.num_steps:
            raise ValueError(f"at must ascend from at least 1 to num_steps = {self.num_steps}, got {self.at}.")
        for name in (REFERENCE, *self.methods):
            base.check_name("methods", name, baselines.make_baselines("linf"))


def compare(
    target: Target,
    learned: Mapping[str, Learned],
    protocol: Protocol,
    *,
    transfer_from: Sequence[UapFamily] = (),
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Tunes the baselines on the validation tasks of a target and runs all methods on its test tasks.

    Baselines run as published: from the family's own start, without augmentation or search. Their
    zeroth-order estimates use directions in all dimensions that all images share, and as many of them per step as it
    takes to spend at least the queries of the target's tasks.

    If the target's tasks offer more than that, the best baseline and the fine-tuned transfer start are also tuned and
    run on these tasks themselves (the rows that end in ", augmented").

    Args:
      target: the victim and its tasks.
      learned: the meta-learned methods, by name.
      protocol: the size of the comparison.
      transfer_from: meta-training families of the same shape. One perturbation is optimized on all of them. It has two
        rows: as it is, and fine-tuned by the best baseline, which is tuned again from there. Empty for no such rows.
      report: called with one line of text after each method.

    Returns:
      The rows of the table, which can be stored as JSON, and `{method: [H, W, C]}`, the perturbations of the learned
      methods on the first task and that of the full-data oracle.
    """
    key_tasks, key_validation, key_oracle, key_transfer = jax.random.split(jax.random.key(protocol.seed), 4)
    keys = jax.random.split(key_tasks, protocol.num_tasks)
    keys_validation = jax.random.split(key_validation, protocol.num_validation)
    options = {"num_steps": protocol.num_steps, "batch_size": protocol.batch_size}
    runs: dict[str, tuple[list[dict[str, np.ndarray]], dict[str, Any]]] = {}

    def run(name, learner, params, family, **notes):
        metrics = [
            jax.tree.map(np.asarray, evaluate(learner, p, family, keys, at=protocol.at, **options)) for p in params
        ]
        runs[name] = (metrics, notes)
        report(f"{target.source}/{target.victim}: {name} {np.mean([m['asr'][:, -1] for m in metrics]):.3f}")

    def run_tuned(name, baseline, of, **notes):
        """Tunes on the validation tasks of a target, runs the best setting, and returns its score."""
        tuned = tune(baseline, of.validation, keys_validation, **options)
        notes |= {"setting": _setting(tuned.setting), "settings_tried": len(baseline.grid)}
        family = minimising(of.test, tuned.setting.support_loss)
        run(name, baseline.learner, [tuned.setting.params], family, **notes)
        return max(score for _, score in tuned.scores)

    table = baselines.make_baselines(target.test.constraint.norm)
    plain, scores = _as_published(target, protocol.num_steps), {}
    for name in dict.fromkeys((REFERENCE, *protocol.methods)):
        baseline = table[name]
        scores[name] = run_tuned(name, baseline, plain)
        family = minimising(plain.test, baseline.default.support_loss)
        run(
            f"{name} (untuned)",
            baseline.learner,
            [baseline.default.params],
            family,
            setting=_setting(baseline.default),
        )
    best = max(scores, key=lambda name: scores[name])
    strongest = {best: table[best]}
    if transfer_from:
        theta, _ = full_data_uap(transfer_from, transfer_from[0], key_transfer, num_steps=protocol.oracle_steps)
        runs["transfer"] = ([_repeat(theta, target, keys, protocol)], {"victims": len(transfer_from)})
        strongest[TRANSFER] = baselines.from_start(table[best], theta)
        run_tuned(TRANSFER, strongest[TRANSFER], plain, by=best)
    if _additions(plain.test) != _additions(target.test):
        for name, baseline in strongest.items():
            run_tuned(name + AUGMENTED, baseline, target, by=best)

    for name, method in learned.items():
        run(name, method.learner, method.params, method.tasks(target.test))

    theta, records = full_data_uap(
        [target.train],
        target.validation,
        key_oracle,
        num_steps=protocol.oracle_steps,
        targeted=protocol.oracle_targeted,
    )
    runs["oracle"] = ([_repeat(theta, target, keys, protocol)], {"runs": records})
    pictures = {
        name: np.asarray(first_perturbation(m.learner, m.params[0], m.tasks(target.test), keys[0], protocol.num_steps))
        for name, m in learned.items()
    }
    pictures["oracle"] = np.asarray(theta)
    return _rows(target, runs, protocol), pictures


def _additions(family):
    """The parts of the tasks that published attacks lack."""
    recipe = family.recipe
    return recipe.augmentation, family.estimator, recipe.search


def as_published(family: UapFamily, num_directions: int) -> UapFamily:
    """The tasks without augmentation and search, as for published hand-designed attacks.

    Args:
      family: the tasks.
      num_directions: number of random directions of the zeroth-order estimates, in all dimensions and shared by all
        images. Exact gradients stay exact.
    """
    estimator = family.estimator
    if isinstance(estimator, ZerothOrder):
        options = {"resolution": None, "basis": "tiles", "per_example": False}
        estimator = dataclasses.replace(estimator, num_directions=num_directions, **options)
    family = family.with_recipe(augmentation=None, search=None)
    return dataclasses.replace(family, estimator=estimator)


def _as_published(target, num_steps):
    def plain(family):
        if not isinstance(family.estimator, ZerothOrder):
            return as_published(family, 0)
        saved = family.recipe.search.evaluations if family.recipe.search else 0
        per_direction = 2 if family.estimator.antithetic else 1
        return as_published(family, family.estimator.num_directions + math.ceil(saved / (num_steps * per_direction)))

    return _changed(target, plain)


def _changed(target, change):
    return target._replace(**{name: change(getattr(target, name)) for name in ("train", "validation", "test")})


def _setting(setting):
    return {**setting.params, **dataclasses.asdict(setting.support_loss)}


def _repeat(theta, target, keys, protocol) -> dict[str, np.ndarray]:
    """The metrics of one perturbation, the same after each step."""
    metrics = evaluate_fixed(theta, target.test, keys, batch_size=protocol.batch_size)
    return {name: np.repeat(np.asarray(value), len(protocol.at), axis=1) for name, value in metrics.items()}


def _rows(target, runs, protocol):
    def per_task(name) -> np.ndarray:  # [T, len(at)]
        seeds = [metrics["asr"] for metrics in runs[name][0]]
        return np.asarray(np.mean(seeds, axis=0, dtype=np.float64))

    reference = per_task(REFERENCE)
    goal = reference[:, -1].mean()
    plain = {REFERENCE, *protocol.methods, "transfer", TRANSFER} & runs.keys()
    augmented = {name for name in runs if name.endswith(AUGMENTED)}
    rivals = {
        name: max(per_task(rival)[:, -1].mean() for rival in group)
        for name, group in (("gap_closed", plain), ("gap_closed_augmented", plain | augmented))
    }
    ceiling = per_task("oracle")[:, -1].mean()
    rows = []
    for name, (metrics, notes) in runs.items():
        asr = per_task(name)
        means, widths = zip(*(mean_interval(column) for column in asr.T), strict=True)
        difference = mean_interval(asr[:, -1] - reference[:, -1])
        reached = steps_to_reach(means, goal)
        rows.append(
            {
                "source": target.source,
                "victim": target.victim,
                "seen_victim": target.seen,
                "method": name,
                "at": list(protocol.at),
                "asr": list(means),
                "asr_interval": [_finite(width) for width in widths],
                "difference_to_tuned_pgd": [_finite(x) for x in difference],
                "steps_to_tuned_pgd": None if reached is None else protocol.at[reached - 1],
                **{name: gap_closed(means[-1], rival, ceiling) for name, rival in rivals.items()},
                "queries": [float(np.mean(q)) for q in metrics[0]["queries"].T] if "queries" in metrics[0] else None,
                "clean_accuracy": float(np.mean([m["clean_accuracy"][:, -1] for m in metrics])),
                **{n: float(np.mean([m[n][:, -1] for m in metrics])) for n in ("loss", "l1", "l2", "linf")},
                "seeds": len(metrics),
                "seed_asr": [float(m["asr"][:, -1].mean()) for m in metrics],
                "task_asr": np.round(asr[:, -1], 4).tolist(),
                **notes,
            }
        )
    return rows


def _finite(x):
    return x if math.isfinite(x) else None
