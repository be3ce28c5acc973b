r"""Times an update of a learned fine-tuner against one of Adam: alone, and in a whole fine-tuning step.

python -m benchmarks.overhead --output=results/bench_overhead.json
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lft_jax
from benchmarks import timing
from experiments import config
from lft_jax.cli import provenance
from lft_jax.optimizers.fine_tuning import fine_tune_step
from lft_jax.victims import apply_function, build_model

#: Perturbations of MNIST, CIFAR-10 and ImageNet size.
SHAPES = ((28, 28, 1), (32, 32, 3), (224, 224, 3))
#: Whole steps: architecture, image shape, support images.
STEPS = (("lenet", (28, 28, 1), 10), ("vgg", (32, 32, 3), 10))


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_overhead.json", "Results file.")
    repeats: int = config.option(21, "Runs of each program, in turn; the result is their median.")
    smoke: bool = config.option(False, "Smoke test: small shapes, without the check for other load.")


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Adam, the rule of arXiv 2009.13714, and the shipped spatial rule."""
    paper = lft_jax.coordinate_lstm()
    params, shipped = lft_jax.load_pretrained("uap-linf")
    return {
        "adam": optax.adam(1e-2),
        "lft, coordinate_lstm": lft_jax.learned_fine_tuner(paper.init(jax.random.key(0)), paper),
        "lft, uap-linf": lft_jax.learned_fine_tuner(params, shipped),
    }


def update(optimizer: optax.GradientTransformation, shape: tuple[int, ...]):
    """A function that makes 20 updates in a scan. It blocks until ready."""
    grads = jax.random.normal(jax.random.key(0), (20, *shape))
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def run(theta, state):
        def step(carry, grad):
            theta, state = carry
            updates, state = optimizer.update(grad, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        return jax.lax.scan(step, (theta, state), grads)[0]

    theta = jnp.zeros(shape)
    state = optimizer.init(theta)
    return lambda: jax.block_until_ready(run(theta, state))


def whole_step(optimizer: optax.GradientTransformation, architecture: str, shape: tuple[int, ...], count: int):
    """A function that makes 10 fine-tuning steps like `universal_perturbation`. It blocks until ready."""
    images = np.random.default_rng(0).uniform(size=(20 * count, *shape)).astype(np.float32)
    labels = np.arange(len(images)) % 10
    variables = build_model(architecture, 10).init(jax.random.key(0), jnp.zeros((1, *shape)))
    logits_fn = functools.partial(apply_function(architecture, 10), variables)
    family = lft_jax.uap_family(images, labels, logits_fn, ways=10, shots=count // 10, query_shots=1, epsilon=0.1)
    oracle = family.oracle(family.sample(jax.random.key(1)).support)

    @jax.jit
    def step(theta, state, key):
        return fine_tune_step(optimizer, oracle, theta, state, key, progress=0.0, project=family.project)[:2]

    start, key = jnp.zeros(shape), jax.random.key(0)
    fresh = optimizer.init(start)

    def run():
        theta, state = start, fresh
        for _ in range(10):
            theta, state = step(theta, state, key)
        jax.block_until_ready(theta)

    return run


def bench(flags: Config) -> dict:
    """Runs the benchmark and writes its results."""
    load = None if flags.smoke else timing.require_quiet()
    results = {"provenance": provenance.describe([0]), "load_of_others": load, "update": {}, "whole_step": {}}
    for shape in SHAPES[:1] if flags.smoke else SHAPES:
        contestants = {name: update(optimizer, shape) for name, optimizer in optimizers().items()}
        name = f"d = {np.prod(shape):,}"
        results["update"][name] = _compared(name, contestants, flags.repeats, 20)
    for architecture, shape, count in STEPS[:1] if flags.smoke else STEPS:
        contestants = {
            name: whole_step(optimizer, architecture, shape, count) for name, optimizer in optimizers().items()
        }
        name = f"{architecture}, {count} images of {'x'.join(map(str, shape))}"
        results["whole_step"][name] = _compared(name, contestants, flags.repeats, 10)
    provenance.write_json(Path(flags.output), results)
    return results


def _compared(title, contestants, repeats, per_run):
    times = timing.alternate(contestants, repeats)
    adam = times["adam"]["seconds"]
    for name, t in times.items():
        print(f"{title}: {name}: {1e3 * t['seconds'] / per_run:.3f} ms, {t['seconds'] / adam:.2f} x adam")
    return {
        name: {"milliseconds": 1e3 * t["seconds"] / per_run, "ratio_to_adam": t["seconds"] / adam, "runs": t["all"]}
        for name, t in times.items()
    }


if __name__ == "__main__":
    config.main(Config, bench)
