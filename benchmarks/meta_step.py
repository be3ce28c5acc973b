r"""Times a meta-step of the reference work W1 against PyTorch, plain JAX and the speed of matrix products.

python -m benchmarks.meta_step --output=results/bench_meta_step.json
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import plain_jax, timing, w1
from experiments import config
from lft_jax import learned_fine_tuner
from lft_jax.cli import provenance

try:
    from benchmarks import torch_w1
except ModuleNotFoundError:  # smoke tests run without it
    torch_w1 = None

PYTORCH = {"PyTorch": False, "PyTorch, two-phase": True}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_meta_step.json", "Results file.")
    repeats: int = config.option(7, "Runs of each program, in turn; the result is their median.")
    smoke: bool = config.option(False, "Smoke test: tiny sizes, without the check for other load.")


def largest_difference(work: w1.Work) -> dict[str, float]:
    """Largest relative difference of loss and meta-gradient between each other program and the library, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), w1.lenet_variables(work.side))
        family = w1.make_family(work, variables, np.float64)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), w1.make_rule(work).init(jax.random.key(1)))
        params = {"convolutions": [], "cells": params["cells"], "head": params["head"]}
        keys = jax.random.split(jax.random.key(2), work.tasks)
        value, grads = w1.our_gradient(work, family, params, keys)
        # Sampled as in `run_task`.
        episodes = jax.vmap(lambda key: family.sample(jax.random.split(key, 3)[0]))(keys)

        def plain(trained):
            return plain_jax.meta_loss(work, variables, trained, *episodes)

        found = {"plain JAX": jax.jit(jax.value_and_grad(plain))({k: params[k] for k in ("cells", "head")})}
        for name, two_phase in PYTORCH.items() if torch_w1 else ():
            loss, gradient = torch_w1.loss_and_head_gradient(work, variables, params, episodes, two_phase=two_phase)
            found[name] = loss, {"head": {"weight": gradient}}
        expected = np.asarray(grads["head"]["weight"])
        size = np.abs(expected).max()
        return {
            name: float(
                max(abs(loss - value) / abs(value), np.abs(np.asarray(g["head"]["weight"]) - expected).max() / size)
            )
            for name, (loss, g) in found.items()
        }


def gflop(work: w1.Work) -> dict[str, float]:
    """GFLOP of the parts of a meta-step: two operations per multiply-add of the matrix products."""
    side, pooled = work.side**2, (work.side // 2) ** 2
    image = 25 * 16 * side + 25 * 16 * 32 * pooled + 32 * (work.side // 4) ** 2 * 64 + 64 * w1.CLASSES
    passes = 2 * 2 * work.tasks * w1.CLASSES * work.num_steps * image / 1e9  # forward, and backward to the images
    sizes = [2] + [work.hidden] * work.layers
    coordinate = sum(4 * work.hidden * (size + work.hidden) for size in sizes[:-1]) + work.hidden
    recurrence = (
        2 * 3 * work.tasks * side * work.num_steps * coordinate / 1e9
    )  # forward, backward to inputs, backward to weights
    return {"victim, support": passes, "victim, query": passes, "recurrence": recurrence}


def parts(work: w1.Work, family, variables):
    """The library's code for each part of a meta-step: `{name: function}`. The functions block until ready."""
    rule = w1.make_rule(work)
    params = rule.init(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), work.tasks)
    shape = (work.tasks, work.num_steps, work.side, work.side, 1)
    grads, pulls = jax.random.normal(jax.random.key(3), (2, *shape))
    thetas = jnp.clip(0.1 * grads, -w1.EPSILON, w1.EPSILON)

    def sample(key):
        return family.sample(jax.random.split(key, 3)[0])

    @jax.jit
    def support(keys):
        def task(key):
            oracle = family.oracle(sample(key).support)

            def step(theta, _):
                return family.project(theta - 0.01 * oracle(theta, key).grads), None

            return jax.lax.scan(step, jnp.zeros(shape[2:]), None, length=work.num_steps)[0]

        return jax.vmap(task)(keys)

    @jax.jit
    def query(keys, thetas):
        episodes = jax.vmap(sample)(keys)

        def total(thetas):
            return jnp.sum(jax.vmap(jax.vmap(family.loss, (0, None)))(thetas, episodes.query))

        return jax.grad(total)(thetas)

    @jax.jit
    def recurrence(params, grads, pulls):
        def total(params):
            def task(grads):
                optimizer = learned_fine_tuner(params, rule)

                def step(carry, grad):
                    theta, state = carry
                    updates, state = optimizer.update(grad, state, theta)
                    theta = family.project(optax.apply_updates(theta, updates))
                    return (theta, state), theta

                theta = jnp.zeros(shape[2:])
                return jax.lax.scan(step, (theta, optimizer.init(theta)), grads)[1]

            return jnp.sum(jax.vmap(task)(grads) * pulls)

        return jax.grad(total)(params)

    return {
        "victim, support": lambda: jax.block_until_ready(support(keys)),
        "victim, query": lambda: jax.block_until_ready(query(keys, thetas)),
        "recurrence": lambda: jax.block_until_ready(recurrence(params, grads, pulls)),
    }


def matmul():
    """A function that multiplies two 1024 x 1024 matrices (2 GFLOP) ten times. It blocks until ready."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)), jnp.float32)
    product = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: a @ b / 32, a))
    return lambda: product(a).block_until_ready()


def bench(flags: Config) -> dict:
    """Runs the benchmark and writes its results."""
    if not (flags.smoke or torch_w1):
        raise ModuleNotFoundError("PyTorch is missing: pip install -r benchmarks/requirements.txt, or use make bench.")
    load = None if flags.smoke else timing.require_quiet()
    results = {"provenance": provenance.describe([0]), "load_of_others": load, "works": {}}
    if torch_w1:
        results["torch"] = torch_w1.versions()
    small = w1.Work(tasks=2, num_steps=3, side=8, hidden=4)
    size = {"tasks": 1, "num_steps": 2, "side": 8} if flags.smoke else {}
    for name, clip in (("clip", True), ("no clip", False)):
        work, variables = w1.Work(clip=clip, **size), w1.lenet_variables(size.get("side", 28))
        family = w1.make_family(work, variables)
        differences = largest_difference(dataclasses.replace(small, clip=clip))
        if not max(differences.values()) < 1e-4:
            raise RuntimeError(f"the programs compute different numbers; relative differences: {differences}.")
        params = w1.make_rule(work).init(jax.random.key(0))
        episodes = jax.vmap(family.sample)(jax.random.split(jax.random.key(2), work.tasks))
        contestants = {"lft_jax": w1.ours(work, family), "plain JAX": plain_jax.meta_step(work, variables, family)}
        for contestant, two_phase in PYTORCH.items() if torch_w1 else ():
            contestants[contestant] = torch_w1.meta_step(work, variables, params, episodes, two_phase=two_phase)
        times = timing.alternate(contestants, flags.repeats)
        alone = timing.alternate({**parts(work, family, variables), "matmul": matmul()}, flags.repeats)
        rate = 10 * 2 * 1024**3 / alone.pop("matmul")["seconds"] / 1e9
        counts = gflop(work)
        own = times["lft_jax"]["seconds"]
        floor = sum(counts.values()) / rate
        results["works"][name] = {
            "work": dataclasses.asdict(work),
            "largest_difference": differences,
            "seconds": times,
            "ratio": {contestant: t["seconds"] / own for contestant, t in times.items()},
            "matmul_gflop_per_second": rate,
            "gflop": counts,
            "floor_seconds": floor,
            "measured_over_floor": own / floor,
            "parts_seconds": {part: t["seconds"] for part, t in alone.items()},
            "rest_seconds": own - sum(t["seconds"] for t in alone.values()),
        }
        for contestant, t in times.items():
            print(f"{name}: {contestant}: {t['seconds']:.3f} s per meta-step, {t['seconds'] / own:.2f} x lft_jax")
        print(f"{name}: {own / floor:.1f} times the floor of {floor:.3f} s at {rate:.0f} GFLOP/s")
        for part, t in alone.items():
            print(f"{name}: {part}: {t['seconds']:.3f} s, {counts[part] / t['seconds']:.0f} GFLOP/s")
        provenance.write_json(Path(flags.output), results)
    return results


if __name__ == "__main__":
    config.main(Config, bench)
