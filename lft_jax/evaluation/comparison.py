"""One table of PROTOCOL.md: methods side by side on the same unseen tasks against one victim."""

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

#: What the paired differences and the steps-to-reach are measured against.
REFERENCE = "pgd"
TRANSFER = "transfer, fine-tuned"
#: Ends the names of baselines that were given what the learned methods were: the augmentation of the support images
#: and, under zeroth-order gradients, the search of waves and the estimator with all its settings.
AUGMENTED = ", augmented"


class Target(NamedTuple):
    """Who is attacked.

    Attributes:
      source: image source.
      victim: name of the victim.
      seen: whether the victim was in meta-training.
      train: its tasks on the images that the full-data oracle may use.
      validation: its tasks on meta-validation images, which choose hyperparameters.
      test: its tasks on images that nothing was chosen on.
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
      params: its meta-parameters of each meta-training seed.
      tasks: a target's tasks -> those it is judged on, if it was meta-trained to spend the same queries otherwise.
    """

    learner: Learner
    params: Sequence[PyTree]
    tasks: Callable[[UapFamily], UapFamily] = lambda family: family


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How much is measured.

    Attributes:
      num_steps: K.
      at: the steps that are judged, ascending, the last one K.
      num_tasks: meta-test tasks.
      num_validation: meta-validation tasks that the grids are run on.
      methods: baselines to tune, of `lft_jax.evaluation.baselines.make_baselines`.
      oracle_steps: steps of each full-data run.
      oracle_targeted: whether the full-data UAP is also sought for each target class.
      batch_size: tasks run side by side.
      seed: of the tasks.
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
    """Tunes the baselines on the target's validation tasks and runs every method once on its test tasks.

    The baselines are run as published: from the family's own start, on the support images as they are, and with
    zeroth-order estimates along directions shared by all images, in all dimensions, as many a step as are needed to
    make at least the queries of the target's tasks. Where these tasks differ from that, as they then do for the
    learned methods, the best baseline and the fine-tuned transfer start are also tuned and run on them, with or without
    their second loss, as is better on validation tasks.

    Args:
      target: who is attacked.
      learned: the meta-learned methods.
      protocol: how much is measured.
      transfer_from: meta-training families of the same shape, for the transfer start (as it is, and fine-tuned by the
        best tuned baseline, itself tuned from that start); none for no such rows.
      report: called with a line of progress.

    Returns:
      The rows, JSON-serialisable, and each learned method's and the oracle's perturbation for the first task,
      `{method: [H, W, C]}`.
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

    def run_tuned(label, baseline, *targets, **notes):
        tried = [tune(baseline, of.validation, keys_validation, **options) for of in targets]
        scores = [max(score for _, score in tuned.scores) for tuned in tried]
        place = int(np.argmax(scores))
        setting, test = tried[place].setting, targets[place].test
        notes |= {"setting": _setting(setting, test), "settings_tried": len(targets) * len(baseline.grid)}
        run(label, baseline.learner, [setting.params], minimising(test, setting.support_loss), **notes)
        return scores[place]

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
            setting=_setting(baseline.default, plain.test),
        )
    best = max(scores, key=scores.get)
    strongest = {best: table[best]}
    if transfer_from:
        theta, _ = full_data_uap(transfer_from, transfer_from[0], key_transfer, num_steps=protocol.oracle_steps)
        runs["transfer"] = ([_repeat(theta, target, keys, protocol)], {"victims": len(transfer_from)})
        strongest[TRANSFER] = baselines.from_start(table[best], theta)
        run_tuned(TRANSFER, strongest[TRANSFER], plain, by=best)
    if _ours(plain.test) != _ours(target.test):
        given = [target]
        if target.test.recipe.second_loss is not None:
            given.append(_changed(target, lambda family: family.with_recipe(second_loss=None)))
        for name, baseline in strongest.items():
            run_tuned(name + AUGMENTED, baseline, *given, by=best)

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


def _ours(family):
    recipe = family.recipe
    return recipe.augmentation, family.estimator, recipe.waves, recipe.second_loss


def as_published(family: UapFamily, num_directions: int) -> UapFamily:
    """The tasks as hand-designed attacks are published: from the family's own start, on the support images as they are.

    Args:
      family: the tasks.
      num_directions: of its zeroth-order estimates, which then are along directions in all dimensions that all images
        share; exact gradients stay exact.
    """
    estimator = family.estimator
    if isinstance(estimator, ZerothOrder):
        options = {"resolution": None, "basis": "tiles", "per_example": False}
        estimator = dataclasses.replace(estimator, num_directions=num_directions, **options)
    family = family.with_recipe(augmentation=None, waves=None, second_loss=None)
    return dataclasses.replace(family, estimator=estimator)


def _as_published(target, num_steps):
    def plain(family):
        if not isinstance(family.estimator, ZerothOrder):
            return as_published(family, 0)
        spared = family.recipe.waves.evaluations if family.recipe.waves else 0
        each = 2 if family.estimator.antithetic else 1  # evaluations that one more direction takes
        return as_published(family, family.estimator.num_directions + math.ceil(spared / (num_steps * each)))

    return _changed(target, plain)


def _changed(target, change):
    return target._replace(**{name: change(getattr(target, name)) for name in ("train", "validation", "test")})


def _setting(setting, family):
    second = {} if family.recipe.second_loss is None else {"second_loss": family.recipe.second_loss.kind}
    return {**setting.params, **dataclasses.asdict(setting.support_loss), **second}


def _repeat(theta, target, keys, protocol):
    metrics = evaluate_fixed(theta, target.test, keys, batch_size=protocol.batch_size)
    return {name: np.repeat(np.asarray(value), len(protocol.at), axis=1) for name, value in metrics.items()}


def _rows(target, runs, protocol):
    def per_task(name):
        seeds = [metrics["asr"] for metrics in runs[name][0]]
        return np.mean(seeds, axis=0, dtype=np.float64)  # [T, len(at)]

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
