r"""Finds the best number of zeroth-order directions per step, for each method, at equal total queries.

  python -m experiments.studies.directions

More directions give a better estimate of each gradient and leave fewer steps: every method makes the same number of
evaluations of the support images. Hand-designed methods are tuned for each number of directions, on validation tasks of
the victim. They run as published, and again (", augmented") with everything that the learned rule has: augmented
images, a start from the search of plane waves (which takes part of the evaluations), and different directions for each
image, constant on tiles. The smoothing is that of the learned rule for all. Killed, it goes on after the last finished
victim.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, config, meta_train
from experiments.cells import Cells
from lft_jax import evaluation
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import provenance
from lft_jax.evaluation import baselines, comparison, metrics
from lft_jax.tasks import UapFamily


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    victims: tuple[str, ...] = config.option(
        ("victims/digits_small_cnn_1000", "victims/digits_lenet_1001"),
        "Folders of the victims to attack.",
    )
    learned: str = config.option(
        "uap-linf-query", "Rule for zeroth-order gradients: the folder of its run, or its name."
    )
    methods: tuple[str, ...] = config.option(("sgd", "pgd", "adam", "adamm"), "Hand-designed baselines to tune.")
    directions: tuple[int, ...] = config.option((1, 5, 20), "Numbers of directions per step.")
    evaluations: int = config.option(400, "Evaluations per support image in total.")
    epsilon: tuple[str, ...] = config.option(
        ("mnist=0.2",), "Radii that differ from the defaults, as source=radius,...."
    )
    num_tasks: int = config.option(50, "Meta-test tasks.")
    num_validation: int = config.option(5, "Meta-validation tasks on which the baselines are tuned.")
    output: str = config.option("results/directions.json", "Results file.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def measure(flags: Config) -> None:
    """Runs every method with every number of directions, and writes the results file after each victim."""
    table = baselines.make_baselines("linf")
    for name in flags.methods:
        check_name("methods", name, table)
    for name, least in {"num_tasks": 2, "num_validation": 1, "evaluations": 1}.items():
        check_at_least(name, getattr(flags, name), least)
    for count in flags.directions:
        check_at_least("directions", count, 1)
    of, learned = meta_train.load_learned(flags.learned)
    if not of.num_directions:
        raise ValueError(f"learned: {flags.learned} was meta-trained on exact gradients; expected zeroth-order ones.")
    tasks_config = meta_train.tasks_of(of)
    radii = {**tasks_config.epsilon, **config.pairs("epsilon", flags.epsilon)}
    tasks_config = dataclasses.replace(tasks_config, query_shots=5, epsilon=radii)
    seen = {Path(path).resolve() for path in of.victims}
    described = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("output", "data_dir")}
    described |= {"meta_trained_at": of.num_directions, "smoothing": of.smoothing}
    cells = Cells(flags.output, {**described, "params": jax.tree.leaves(learned.params[0])})
    results = {"provenance": cells.provenance([of.seed]), "flags": described, "rows": []}
    for path in flags.victims:
        target = common.make_target(path, Path(path).resolve() in seen, tasks_config, flags.data_dir)
        victim = {"victim": target.victim, "seen_victim": target.seen, "epsilon": float(target.test.constraint.epsilon)}
        rows = [{**victim, **row} for row in cells.get(path, _all_rows, target, learned, table, flags)]
        if len(made := {row["queries"] for row in rows}) > 1:
            raise ValueError(f"evaluations: expected equal numbers of queries, got {sorted(made)}.")
        results["rows"] += rows
        provenance.write_json(flags.output, results)
    cells.finish()
    print(f"wrote {flags.output}")


def _all_rows(*arguments):
    return list(_rows(*arguments))


def num_steps(family: UapFamily, evaluations: int) -> int:
    """Number of steps that a number of evaluations allows; raises a ValueError if it leaves a remainder."""
    waves, each = family.recipe.search, family.estimator.evaluations
    searched = waves.evaluations if waves else 0
    steps, left = divmod(evaluations - searched, each)
    if steps < 1 or left:
        raise ValueError(
            f"evaluations: {evaluations} minus {searched} for the start is not a positive multiple of {each}, those of "
            "a step."
        )
    return steps


def _rows(
    target: comparison.Target, learned: comparison.Learned, table: dict[str, baselines.Baseline], flags: Config
) -> Iterator[dict[str, Any]]:
    """Yields a row for each method and number of directions, after checking all these numbers."""
    keys, keys_validation = (
        jax.random.split(key, count)
        for key, count in zip(jax.random.split(jax.random.key(0)), (flags.num_tasks, flags.num_validation), strict=True)
    )
    views = [(count, view) for count in flags.directions for view in _views(target, count)]
    steps_of = {(count, name): num_steps(test, flags.evaluations) for count, (name, _, test) in views}

    def row(method, count, steps, learner, params, family, **notes):
        found = evaluation.evaluate(learner, params, family, keys, num_steps=steps, at=(steps,))
        asr = np.asarray(found["asr"][:, -1], np.float64)
        mean, width = evaluation.mean_interval(asr)
        print(f"{target.victim}: {method}, {count} directions: {100 * mean:.1f} ± {100 * width:.1f}", flush=True)
        counted = {name: float(np.mean(found[name][:, -1])) for name in ("queries", "clean_accuracy")}
        measured = {"asr": mean, "interval": width, "task_asr": np.round(asr, 4).tolist()}
        return {"method": method, "directions": count, "steps": steps, **measured, **counted, **notes}

    for count, (suffix, validation, test) in views:
        steps = steps_of[count, suffix]
        for name in flags.methods:
            baseline = table[name]
            setting = evaluation.tune(baseline, validation, keys_validation, num_steps=steps).setting
            family = metrics.minimising(test, setting.support_loss)
            chosen = {**setting.params, **dataclasses.asdict(setting.support_loss)}
            notes = {"setting": chosen, "settings_tried": len(baseline.grid)}
            yield row(name + suffix, count, steps, baseline.learner, setting.params, family, **notes)
        if suffix:
            yield row("lft", count, steps, learned.learner, learned.params[0], test)
        # No other number of steps uses these programs, and XLA crashes with too many in one process.
        jax.clear_caches()


def _views(target, count):
    """Yields suffix, validation tasks and test tasks: as published, then with what the learned rule has."""

    def ours(family):
        return dataclasses.replace(family, estimator=dataclasses.replace(family.estimator, num_directions=count))

    families = target.validation, target.test
    yield "", *(comparison.as_published(family, count) for family in families)
    yield comparison.AUGMENTED, *(ours(family) for family in families)


if __name__ == "__main__":
    config.main(Config, measure)
