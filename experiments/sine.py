r"""Few-shot sine regression, MAML's first experiment, and an incongruous form that MAML cannot play.

  python -m experiments.sine

MAML, Meta-SGD and Reptile learn an initialization of one network; one learned fine-tuner (LFT) is meta-trained on
networks of several widths together, and starts from random ones. SGD and Adam are tuned for each network. All see ten
points of a curve and are judged, after each of ten steps, on a hundred others.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lft_jax
from experiments import common, config, figures
from lft_jax import learners
from lft_jax.base import Learner
from lft_jax.tasks.regression import SineFamily, sine_family

NUM_STEPS = 10
#: Grids of the baselines, learning rates.
RATES = {
    "sgd": (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2),
    "adam": (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2),
}
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    output: str = config.option("results/sine.json", "Results file; the figure is put beside it.")
    widths: tuple[int, ...] = config.option((40, 20, 80), "Of networks of two layers; the first one is MAML's.")
    seeds: tuple[int, ...] = config.option((0, 1, 2), "Meta-training seeds.")
    maml_steps: int = config.option(70_000, "Meta-steps of MAML and Meta-SGD, each of 25 tasks; a fifth for Reptile.")
    lft_steps: int = config.option(2_000, "Meta-steps of the LFT, each of 8 tasks of every width.")
    num_tasks: int = config.option(600, "Tasks that all methods are judged on, and as many to tune on.")


def sine(flags: Config) -> dict[str, Any]:
    """Runs the experiment and writes its files; returns the results."""
    results = {"provenance": common.provenance(flags.seeds), "flags": dataclasses.asdict(flags), "rows": []}
    families = {width: sine_family(widths=(width, width)) for width in flags.widths}
    lft = learners.lft(lft_jax.coordinate_lstm(features="adam"))
    options = {"num_steps": NUM_STEPS, "tasks_per_family": 8, "rate": 3e-3}
    train = common.meta_training(lambda: lft, families.values(), **options)
    rule = [train(seed, flags.lft_steps) for seed in flags.seeds]
    for width, family in families.items():
        test = dataclasses.replace(family, queries=100)
        errors = {"lft": _errors(lft, rule, test, flags)}
        settings = {}
        for name, rates in RATES.items():
            learner = learners.fixed(name, OPTIMIZERS[name])
            tried = [{"learning_rate": np.float32(rate)} for rate in rates]
            options = {"num_steps": NUM_STEPS, "num_tasks": flags.num_tasks, "largest": False}
            best = common.best_of(learner, tried, test, "error", **options)
            settings[name] = {"learning_rate": rates[best], "settings_tried": len(rates)}
            errors[name] = _errors(learner, [tried[best]], test, flags)
        if width == flags.widths[0]:  # a learned initialization serves one network alone
            for learner, steps, num_steps in _initializations(flags):
                options = {"num_steps": num_steps, "tasks_per_family": 25, "rate": 1e-3}
                train = common.meta_training(lambda learner=learner: learner, (family,), **options)
                params = [train(seed, steps) for seed in flags.seeds]
                errors[learner.name] = _errors(learner, params, test, flags)
        for name, values in errors.items():
            row = common.curve_row("error", values, {rival: errors[rival] for rival in RATES})
            results["rows"].append({"width": width, "method": name, **row, **settings.get(name, {})})
            print(
                f"width {width}: {name}: {values[:, 0].mean():.3f} after a step, {values[:, -1].mean():.3f} after ten"
            )
        common.write_json(flags.output, results)
    figures.sine(results["rows"], Path(flags.output).with_suffix(".png"))
    return results


def _initializations(flags) -> Sequence[tuple[Learner, int, int]]:
    """Each with its meta-steps and inner steps."""
    return (
        (learners.maml(optax.sgd(0.01)), flags.maml_steps, 1),
        (learners.meta_sgd(0.01), flags.maml_steps, 1),
        (learners.reptile(optax.sgd(0.01)), flags.maml_steps // 5, NUM_STEPS),
    )


def _errors(learner: Learner, params: Sequence[Any], family: SineFamily, flags: Config):
    """`[T, K]`, means over the seeds' parameters."""
    return common.judged(learner, params, family, "error", num_steps=NUM_STEPS, num_tasks=flags.num_tasks).mean(0)


if __name__ == "__main__":
    config.main(Config, sine)
