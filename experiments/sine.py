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

import jax
import numpy as np
import optax

import lft_jax
from experiments import common, config, figures
from lft_jax import evaluation, learners
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
    rule = _trained(lft, tuple(families.values()), flags.seeds, flags.lft_steps, 8, NUM_STEPS, 3e-3)
    for width, family in families.items():
        test = dataclasses.replace(family, queries=100)
        errors = {"lft": _errors(lft, rule, test, flags)}
        settings = {}
        for name, rates in RATES.items():
            learner = learners.fixed(name, OPTIMIZERS[name])
            tried = [{"learning_rate": np.float32(rate)} for rate in rates]
            scores = [_errors(learner, [rate], test, flags, tuning=True)[:, -1].mean() for rate in tried]
            scores = np.nan_to_num(scores, nan=np.inf)  # of rates that diverge
            settings[name] = {"learning_rate": rates[int(np.argmin(scores))], "settings_tried": len(rates)}
            errors[name] = _errors(learner, [tried[int(np.argmin(scores))]], test, flags)
        if width == flags.widths[0]:  # a learned initialization serves one network alone
            for learner, steps, num_steps, rate in _initializations(flags):
                params = _trained(learner, (family,), flags.seeds, steps, 25, num_steps, rate)
                errors[learner.name] = _errors(learner, params, test, flags)
        for name, values in errors.items():
            results["rows"].append(_row(width, name, values, errors["sgd"], errors["adam"], settings.get(name, {})))
            print(
                f"width {width}: {name}: {values[:, 0].mean():.3f} after a step, {values[:, -1].mean():.3f} after ten"
            )
        common.write_json(flags.output, results)
    figures.sine(results["rows"], Path(flags.output).with_suffix(".png"))
    return results


def _initializations(flags) -> Sequence[tuple[Learner, int, int, float]]:
    """Each with its meta-steps, inner steps, and the learning rate of its meta-optimizer, Adam."""
    return (
        (learners.maml(optax.sgd(0.01)), flags.maml_steps, 1, 1e-3),
        (learners.meta_sgd(0.01), flags.maml_steps, 1, 1e-3),
        (learners.reptile(optax.sgd(0.01)), flags.maml_steps // 5, NUM_STEPS, 1e-3),
    )


def _trained(learner, families, seeds, meta_steps, tasks, num_steps, rate):
    """The meta-parameters of each seed."""
    trainer = lft_jax.meta_trainer(
        learner, families, num_steps=num_steps, tasks_per_family=tasks, meta_optimizer=optax.adam(rate)
    )

    @jax.jit
    def many(state):  # a meta-step is so short that calling it would take longer
        return jax.lax.scan(lambda state, _: (trainer.step(state)[0], None), state, length=100)[0]

    params = []
    for seed in seeds:
        state = trainer.init(jax.random.key(seed))
        for _ in range(-(-meta_steps // 100)):
            state = many(state)
        print(f"meta-trained {learner.name}, seed {seed}: {int(state.step)} meta-steps")
        params.append(state.params)
    return params


def _errors(learner: Learner, params: Sequence[Any], family: SineFamily, flags: Config, tuning: bool = False):
    """`[T, K]`, means over the seeds' parameters."""
    # Far from the seeds of meta-training, and from what splitting makes of their keys.
    keys = jax.random.split(jax.random.key(2**31 - (1 if tuning else 2)), flags.num_tasks)
    options = {"num_steps": NUM_STEPS, "at": tuple(range(1, NUM_STEPS + 1)), "batch_size": 100}
    return np.mean([evaluation.evaluate(learner, p, family, keys, **options)["error"] for p in params], axis=0)


def _row(width, method, errors, sgd, adam, setting):
    means, widths = zip(*(evaluation.mean_interval(column) for column in errors.T), strict=True)
    return {
        "width": width,
        "method": method,
        "error": means,
        "error_interval": widths,
        **{
            f"difference_to_{name}": evaluation.mean_interval(errors[:, -1] - other[:, -1])
            for name, other in (("sgd", sgd), ("adam", adam))
        },
        **setting,
    }


if __name__ == "__main__":
    config.main(Config, sine)
