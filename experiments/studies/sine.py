r"""Few-shot sine regression, MAML's first experiment, and an incongruous form that MAML cannot play.

  python -m experiments.studies.sine

MAML, Meta-SGD and Reptile learn an initialization of one network; one learned fine-tuner (LFT) is meta-trained on
networks of several widths together, and starts from random ones. SGD and Adam are tuned for each network. All see ten
points of a curve and are judged, after each of ten steps, on a hundred others. MAML and Meta-SGD are also meta-trained
on the curves of the latter's paper, whose frequency varies too, for which it has errors of both.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lft_jax
from experiments import common, config
from experiments.report import figures
from lft_jax.base import Learner
from lft_jax.cli import provenance
from lft_jax.meta import learners
from lft_jax.tasks.regression import SineFamily, sine_family

NUM_STEPS = 10
#: The grids of the baselines, learning rates with and without momentum.
_RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
GRIDS = {
    "sgd": [{"learning_rate": rate, "momentum": decay} for decay in (0.0, 0.9) for rate in _RATES],
    "adam": [{"learning_rate": rate, "b1": decay} for decay in (0.5, 0.9) for rate in _RATES],
}
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
#: Errors after one step and their 95% intervals, as published for ten points of curves of `PUBLISHED_FREQUENCY`: Li et
#: al. 2017, Meta-SGD: Learning to learn quickly for few-shot learning, table 1 (recalled, not read again).
PUBLISHED = {"maml": (0.77, 0.11), "meta_sgd": (0.53, 0.09)}
PUBLISHED_FREQUENCY = (0.8, 1.2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/sine.json", "Results file; the figure is put beside it.")
    widths: tuple[int, ...] = config.option((40, 20, 80), "Of networks of two layers; the first one is MAML's.")
    seeds: tuple[int, ...] = config.option((0, 1, 2), "Meta-training seeds.")
    maml_steps: int = config.option(70_000, "Meta-steps of MAML and Meta-SGD, each of 25 tasks; a fifth for Reptile.")
    lft_steps: int = config.option(2_000, "Meta-steps of the LFT, each of 2 tasks of every width.")
    published_steps: int = config.option(60_000, "Meta-steps, each of 4 tasks, where errors are published.")
    num_tasks: int = config.option(  # a few curves have errors a hundred times the mean
        3000, "Tasks that all methods are judged on, and as many to tune on."
    )
    workdir: str = config.option("runs/sine", "Folder for what is meta-trained, which is not meta-trained again.")


def sine(flags: Config) -> dict[str, Any]:
    """Runs the experiment and writes its files; returns the results."""
    described = {name: value for name, value in dataclasses.asdict(flags).items() if name not in ("output", "workdir")}
    results = {"provenance": provenance.describe(flags.seeds), "flags": described, "rows": [], "published": []}
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
        errors = {"lft": _errors(lft, rule, test, flags)}
        settings = {}
        for name, grid in GRIDS.items():
            learner = learners.fixed(name, OPTIMIZERS[name])
            tried = [{key: np.float32(value) for key, value in setting.items()} for setting in grid]
            options = {"num_steps": NUM_STEPS, "num_tasks": flags.num_tasks, "largest": False}
            best = common.best_of(learner, tried, test, "error", **options)
            settings[name] = {"setting": grid[best], "settings_tried": len(grid)}
            errors[name] = _errors(learner, [tried[best]], test, flags)
        if width == flags.widths[0]:  # a learned initialization serves one network alone
            for learner, params in _initializations(family, 25, flags.maml_steps, flags, "maml"):
                errors[learner.name] = _errors(learner, params(), test, flags)
        for name, values in errors.items():
            row = common.curve_row("error", values, {rival: errors[rival] for rival in OPTIMIZERS})
            results["rows"].append({"width": width, "method": name, **row, **settings.get(name, {})})
            print(
                f"width {width}: {name}: {values[:, 0].mean():.3f} after a step, {values[:, -1].mean():.3f} after ten"
            )
        provenance.write_json(flags.output, results)
    published = sine_family(widths=(flags.widths[0],) * 2, frequency=PUBLISHED_FREQUENCY)
    test = dataclasses.replace(published, query_shots=100)
    for learner, params in _initializations(published, 4, flags.published_steps, flags, "published"):
        if learner.name not in PUBLISHED:
            continue
        values = _errors(learner, params(), test, flags)
        row = {"width": flags.widths[0], "method": learner.name, **common.curve_row("error", values, {})}
        results["published"].append({**row, "published_error": PUBLISHED[learner.name]})
        print(f"frequencies vary: {learner.name}: {values[:, 0].mean():.3f} after a step", flush=True)
    provenance.write_json(flags.output, results)
    figures.sine(results["rows"], Path(flags.output).with_suffix(".png"))
    return results


def _initializations(
    family: SineFamily, tasks: int, meta_steps: int, flags: Config, name: str
) -> Iterator[tuple[Learner, Callable[[], list[Any]]]]:
    """What learns an initialization, and what meta-trains it with each seed."""
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
    """`[T, K]`, means over the seeds' parameters."""
    return common.judged(learner, params, family, "error", num_steps=NUM_STEPS, num_tasks=flags.num_tasks).mean(0)


if __name__ == "__main__":
    config.main(Config, sine)
