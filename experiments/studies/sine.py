r"""Few-shot sine regression (the first experiment of MAML), and an incongruous form of it.

  python -m experiments.studies.sine

MAML, Meta-SGD and Reptile learn an initialization of one network. One learned fine-tuner (LFT) is meta-trained on
networks of several widths together and starts from random weights. SGD and Adam are tuned for each network. All are
fine-tuned on 10 points of a curve and judged on 100 others, after each of 10 steps. MAML and Meta-SGD are also
meta-trained on the curves of arXiv 1707.09835, whose frequency varies too, to compare with its published errors.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lft_jax
from experiments import common, config
from experiments.cells import Cells
from experiments.report import figures
from lft_jax.base import Learner
from lft_jax.cli import provenance
from lft_jax.meta import learners
from lft_jax.tasks.regression import SineFamily, sine_family

NUM_STEPS = 10
#: Grids of the baselines: learning rates, each with two values of the momentum.
_RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
GRIDS = {
    "sgd": [{"learning_rate": rate, "momentum": decay} for decay in (0.0, 0.9) for rate in _RATES],
    "adam": [{"learning_rate": rate, "b1": decay} for decay in (0.5, 0.9) for rate in _RATES],
}
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
#: Published errors after one step and their 95% intervals, for ten points of curves with `PUBLISHED_FREQUENCY`: Li et
#: al. 2017, arXiv 1707.09835, table 1 (quoted from memory).
PUBLISHED = {"maml": (0.77, 0.11), "meta_sgd": (0.53, 0.09)}
PUBLISHED_FREQUENCY = (0.8, 1.2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/sine.json", "Results file. The figure is put beside it.")
    widths: tuple[int, ...] = config.option(
        (40, 20, 80), "Widths of the networks of two layers; initializations are learned for the first."
    )
    seeds: tuple[int, ...] = config.option((0, 1, 2), "Meta-training seeds.")
    maml_steps: int = config.option(70_000, "Meta-steps of MAML and Meta-SGD, with 25 tasks each; a fifth for Reptile.")
    lft_steps: int = config.option(2_000, "Meta-steps of the LFT, with 2 tasks per width each.")
    published_steps: int = config.option(
        60_000, "Meta-steps, with 4 tasks each, in the comparison with published errors."
    )
    # Many, since a few curves have errors of a hundred times the mean.
    num_tasks: int = config.option(3000, "Test tasks; as many others for tuning.")
    workdir: str = config.option(
        "runs/sine", "Folder for meta-trained parameters. Those that it has are not trained again."
    )


def sine(flags: Config) -> dict[str, Any]:
    """Runs the experiment, writes its files and returns the results."""
    described = {name: value for name, value in dataclasses.asdict(flags).items() if name not in ("output", "workdir")}
    cells = Cells(flags.output, described)
    results = {"provenance": cells.provenance(flags.seeds), "flags": described, "rows": [], "published": []}
    families = {width: sine_family(widths=(width, width)) for width in flags.widths}
    lft = learners.lft(lft_jax.coordinate_lstm(features="adam"))
    options = {
        "num_steps": NUM_STEPS,
        "tasks_per_family": 2,
        "rate": 3e-3,
        "workdir": Path(flags.workdir, "lft", "_".join(map(str, flags.widths))),
    }
    train = common.meta_training(lambda: lft, families.values(), **options)
    rule = [train(seed, flags.lft_steps) for seed in flags.seeds]
    for width, family in families.items():
        test = dataclasses.replace(family, query_shots=100)
        errors = {"lft": cells.get(f"width {width}: lft", _errors, lft, rule, test, flags)}
        settings = {}
        for name, grid in GRIDS.items():
            best, errors[name] = cells.get(f"width {width}: {name}", _tuned, name, grid, test, flags)
            settings[name] = {"setting": grid[best], "settings_tried": len(grid)}
        if width == flags.widths[0]:  # an initialization fits one network only
            for learner, params in _initializations(family, 25, flags.maml_steps, flags, "maml"):
                cell = f"width {width}: {learner.name}"
                errors[learner.name] = cells.get(cell, _initialized, learner, params, test, flags)
        for name, values in errors.items():
            row = common.curve_row("error", values, {rival: errors[rival] for rival in OPTIMIZERS})
            results["rows"].append({"width": width, "method": name, **row, **settings.get(name, {})})
            print(
                f"width {width}: {name}: error {values[:, 0].mean():.3f} after 1 step, "
                f"{values[:, -1].mean():.3f} after {NUM_STEPS}"
            )
        provenance.write_json(flags.output, results)
    results["published"] += _compared_with_published(flags, cells)
    provenance.write_json(flags.output, results)
    figures.sine(results["rows"], Path(flags.output).with_suffix(".png"))
    cells.finish()
    return results


def _tuned(name: str, grid: Sequence[dict[str, float]], test: SineFamily, flags: Config) -> tuple[int, np.ndarray]:
    """Number of the best setting of an optimizer, and its errors."""
    learner = learners.fixed(name, OPTIMIZERS[name])
    tried = [{key: np.float32(value) for key, value in setting.items()} for setting in grid]
    options = {"num_steps": NUM_STEPS, "num_tasks": flags.num_tasks, "largest": False}
    best = common.best_of(learner, tried, test, "error", **options)
    return best, _errors(learner, [tried[best]], test, flags)


def _initialized(learner: Learner, params: Callable[[], list[Any]], test: SineFamily, flags: Config) -> np.ndarray:
    """Errors of meta-trained initializations."""
    return _errors(learner, params(), test, flags)


def _compared_with_published(flags: Config, cells: Cells) -> Iterator[dict[str, Any]]:
    """Yields a row for each learner with a published error, on curves whose frequency varies too."""
    family = sine_family(widths=(flags.widths[0],) * 2, frequency=PUBLISHED_FREQUENCY)
    test = dataclasses.replace(family, query_shots=100)
    for learner, params in _initializations(family, 4, flags.published_steps, flags, "published"):
        if learner.name not in PUBLISHED:
            continue
        values = cells.get(f"published: {learner.name}", _initialized, learner, params, test, flags)
        print(f"varying frequency: {learner.name}: error {values[:, 0].mean():.3f} after 1 step", flush=True)
        row = {"width": flags.widths[0], "method": learner.name, **common.curve_row("error", values, {})}
        yield {**row, "published_error": PUBLISHED[learner.name]}


def _initializations(
    family: SineFamily, tasks: int, meta_steps: int, flags: Config, name: str
) -> Iterator[tuple[Learner, Callable[[], list[Any]]]]:
    """Yields learners of an initialization, each with a function that meta-trains it with each seed."""
    for learner, steps, num_steps in (
        (learners.maml(optax.sgd(0.01)), meta_steps, 1),
        (learners.meta_sgd(0.01), meta_steps, 1),
        (learners.reptile(optax.sgd(0.01)), meta_steps // 5, NUM_STEPS),
    ):
        options = {
            "num_steps": num_steps,
            "tasks_per_family": tasks,
            "rate": 1e-3,
            "workdir": Path(flags.workdir, name, learner.name),
        }
        train = common.meta_training(lambda learner=learner: learner, (family,), **options)
        yield learner, lambda train=train, steps=steps: [train(seed, steps) for seed in flags.seeds]


def _errors(learner: Learner, params: Sequence[Any], family: SineFamily, flags: Config):
    """Errors `[T, K]` (tasks, steps), means over the sets of meta-parameters."""
    return common.judged(learner, params, family, "error", num_steps=NUM_STEPS, num_tasks=flags.num_tasks).mean(0)


if __name__ == "__main__":
    config.main(Config, sine)
