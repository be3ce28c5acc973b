r"""How many zeroth-order directions a step are best, for each method, at equal total queries.

  python -m experiments.studies.directions

More directions make a better estimate of each gradient and leave fewer steps. Every method is given as many
evaluations of the support images in all, so its number of steps follows from its directions; the hand-designed ones
are tuned anew for each number, on validation tasks of the victim. They run as published, and once more
(", augmented") as the learned rule does: on augmented images, from a start that a search of plane waves spent part of
the evaluations on, along directions of each image's own on tiles. All estimates have the smoothing that was chosen for
the learned rule.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, config, meta_train
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
    learned: str = config.option("uap-linf-query", "A rule for zeroth-order gradients: its run's folder, or its name.")
    methods: tuple[str, ...] = config.option(("sgd", "pgd", "adam", "adamm"), "Hand-designed baselines to tune.")
    directions: tuple[int, ...] = config.option((1, 5, 20), "Directions a step.")
    evaluations: int = config.option(400, "Evaluations of every support image that a fine-tuning may make in all.")
    epsilon: tuple[str, ...] = config.option(("mnist=0.2",), "Radii that differ from the defaults: source=radius,...")
    num_tasks: int = config.option(50, "Meta-test tasks.")
    num_validation: int = config.option(5, "Meta-validation tasks, on which the baselines are tuned.")
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
        raise ValueError(f"learned: {flags.learned} was meta-trained on exact gradients, not on estimates.")
    tasks_config = meta_train.tasks_of(of)
    radii = {**tasks_config.epsilon, **config.pairs("epsilon", flags.epsilon)}
    tasks_config = dataclasses.replace(tasks_config, query_shots=5, epsilon=radii)
    seen = {Path(path).resolve() for path in of.victims}
    described = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("output", "data_dir")}
    described |= {"meta_trained_at": of.num_directions, "smoothing": of.smoothing}
    results = {"provenance": provenance.describe([of.seed]), "flags": described, "rows": []}
    for path in flags.victims:
        target = common.make_target(path, Path(path).resolve() in seen, tasks_config, flags.data_dir)
        victim = {"victim": target.victim, "seen_victim": target.seen, "epsilon": float(target.test.constraint.epsilon)}
        rows = [{**victim, **row} for row in _rows(target, learned, table, flags)]
        if len(made := {row["queries"] for row in rows}) > 1:
            raise ValueError(f"evaluations: the methods made {sorted(made)} queries, not as many.")
        results["rows"] += rows
        provenance.write_json(flags.output, results)
    print(f"wrote {flags.output}")


def num_steps(family: UapFamily, evaluations: int) -> int:
    """The steps that so many evaluations are enough for; raises a ValueError if some would be left over."""
    waves, each = family.recipe.waves, family.estimator.evaluations
    spared = waves.evaluations if waves else 0
    steps, left = divmod(evaluations - spared, each)
    if steps < 1 or left:
        raise ValueError(
            f"evaluations: {evaluations}, {spared} of them for a start, are no whole number of steps of {each}."
        )
    return steps


def _rows(
    target: comparison.Target, learned: comparison.Learned, table: dict[str, baselines.Baseline], flags: Config
) -> Iterator[dict[str, Any]]:
    """A row for each method and number of directions; refuses numbers that do not go into the evaluations first."""
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
        # Programs of one number of steps serve no other, and XLA does not survive all of them in one process.
        jax.clear_caches()


def _views(target, count):
    """The validation and test tasks as baselines are published, and as the learned rule has them; with a suffix."""

    def ours(family):
        return dataclasses.replace(family, estimator=dataclasses.replace(family.estimator, num_directions=count))

    families = target.validation, target.test
    yield "", *(comparison.as_published(family, count) for family in families)
    yield comparison.AUGMENTED, *(ours(family) for family in families)


if __name__ == "__main__":
    config.main(Config, measure)
