r"""How many zeroth-order directions a step are best, for each method, at equal total queries.

  python -m experiments.directions

More directions make a better estimate of each gradient and leave fewer steps. Every method is given as many
evaluations of the support images in all, so its number of steps follows from its directions; the hand-designed ones
are tuned anew for each number, on validation tasks of the victim. They run as published; the learned rule searches
plane waves for a start first, and then asks as it was meta-trained to, which leaves it fewer steps.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, config, meta_train
from lft_jax import baselines, comparison, evaluation
from lft_jax.base import check_name
from lft_jax.tasks import UapFamily


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    victims: tuple[str, ...] = config.option(
        ("victims/digits_small_cnn_1000", "victims/digits_lenet_1001", "victims/mnist_small_cnn_1000"),
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
    of, learned = meta_train.load_learned(flags.learned)
    if not of.num_directions:
        raise ValueError(f"learned: {flags.learned} was meta-trained on exact gradients, not on estimates.")
    tasks_config = dataclasses.replace(
        meta_train.tasks_of(of), queries=5, epsilon=config.pairs("epsilon", flags.epsilon)
    )
    described = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("output", "data_dir")}
    results = {"provenance": common.provenance([of.seed]), "flags": described, "rows": []}
    for path in flags.victims:
        target = common.make_target(path, path in of.victims, tasks_config, flags.data_dir)
        for name, count, asr, notes in _attacks(target, learned, table, flags):
            mean, width = evaluation.mean_interval(asr)
            row = {"victim": Path(path).name, "method": name, "directions": count, "asr": mean, "interval": width}
            results["rows"].append({**row, **notes})
            print(f"{row['victim']}: {name}, {count} directions: {100 * mean:.1f} ± {100 * width:.1f}", flush=True)
        common.write_json(flags.output, results)
    print(f"wrote {flags.output}")


def as_published(family: UapFamily, count: int) -> UapFamily:
    """The tasks as zeroth-order baselines have them: as they are, along so many directions that all images share."""
    options = {"num_directions": count, "resolution": None, "basis": "tiles", "per_example": False}
    estimator = dataclasses.replace(family.estimator, **options)
    return dataclasses.replace(family, estimator=estimator, augmentation=None, waves=None)


def num_steps(family: UapFamily, evaluations: int) -> int:
    """The steps that so many evaluations are enough for; raises a ValueError if some would be left over."""
    spared = family.waves.evaluations if family.waves else 0
    each = family.estimator.num_directions * (1 + family.estimator.antithetic)
    steps, left = divmod(evaluations - spared, each)
    if steps < 1 or left:
        raise ValueError(
            f"evaluations: {evaluations}, {spared} of them for a start, are no whole number of steps of {each}."
        )
    return steps


def _attacks(
    target: comparison.Target, learned: comparison.Learned, table: dict[str, baselines.Baseline], flags: Config
) -> Iterator[tuple[str, int, np.ndarray, dict[str, Any]]]:
    """The final success on each task, by method and number of directions."""
    keys, keys_validation = (
        jax.random.split(key, count)
        for key, count in zip(jax.random.split(jax.random.key(0)), (flags.num_tasks, flags.num_validation), strict=True)
    )

    def success(learner, params, family):
        steps = num_steps(family, flags.evaluations)
        found = evaluation.evaluate(learner, params, family, keys, num_steps=steps, at=(steps,))
        notes = {"steps": steps, "queries": float(np.mean(found["queries"][:, -1]))}
        return np.asarray(found["asr"][:, -1], np.float64), notes

    for count in flags.directions:
        validation, test = (as_published(family, count) for family in (target.validation, target.test))
        for name in flags.methods:
            steps = num_steps(test, flags.evaluations)
            setting = evaluation.tune(table[name], validation, keys_validation, num_steps=steps).setting
            family = evaluation.minimising(test, setting.support_loss)
            asr, notes = success(table[name].learner, setting.params, family)
            chosen = {**setting.params, **dataclasses.asdict(setting.support_loss)}
            yield name, count, asr, {**notes, "setting": chosen, "settings_tried": len(table[name].grid)}
    for count in flags.directions:
        estimator = dataclasses.replace(target.test.estimator, num_directions=count)
        asr, notes = success(learned.learner, learned.params[0], dataclasses.replace(target.test, estimator=estimator))
        yield "lft", count, asr, notes


if __name__ == "__main__":
    config.main(Config, measure)
