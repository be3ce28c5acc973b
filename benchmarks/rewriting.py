r"""Times models that a user wrote, with the layers that tracing replaces and without: W1, and gradients of networks.

python -m benchmarks.rewriting --output=results/bench_rewriting.json

W1 is that of `benchmarks.meta_step`, with perturbed images clipped. Gradients are those of the loss of a batch with
respect to the images. All programs of a table run in turn in one process, so only their ratios are results: other
processes may run, and the file says how many cores they used. Seconds of computation are those of all threads. On one
core (`taskset -c 0 python -m benchmarks.rewriting`) no thread waits for another, and other processes change little.
"""

import dataclasses
import functools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

import lft_jax
from benchmarks import plain_jax, timing, w1
from experiments import config
from lft_jax._rewriting import rewritten
from lft_jax.cli import provenance
from lft_jax.tasks.perturbation import AttackLoss

try:
    from benchmarks import torch_w1
except ModuleNotFoundError:  # smoke tests run without it
    torch_w1 = None

OWN, USER = "lft_jax, its own layers", "lft_jax, a user's Flax model"


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_rewriting.json", "Results file.")
    repeats: int = config.option(5, "Runs of each program, in turn; the result is their median.")
    smoke: bool = config.option(False, "Smoke test: tiny sizes.")


class MobileNet(nn.Module):
    """MobileNet v1 (arXiv 1704.04861) of a quarter of the width, as a user of Flax writes it."""

    width: int = 8
    strides: tuple[int, ...] = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    @nn.compact
    def __call__(self, x):
        features = self.width
        x = nn.relu6(nn.Conv(features, (3, 3), (2, 2))(x))
        for number, stride in enumerate(self.strides):
            x = nn.relu6(nn.Conv(features, (3, 3), (stride, stride), feature_group_count=features)(x))
            features *= 2 if stride == 2 or number == 0 else 1
            x = nn.relu6(nn.Conv(features, (1, 1))(x))
        return nn.Dense(1000)(jnp.mean(x, (1, 2)))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (arXiv 1905.11946, without squeeze and excitation), as a user of Flax writes it."""

    #: Of each stage: factor of the expansion, side of the kernel, stride, channels, blocks.
    stages: tuple[tuple[int, ...], ...] = (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(32, (3, 3), (2, 2))(x))
        for factor, side, first, features, blocks in self.stages:
            for stride in (first, *[1] * (blocks - 1)):
                inner, y = factor * x.shape[-1], x
                if factor > 1:
                    y = nn.relu6(nn.Conv(inner, (1, 1))(y))
                y = nn.relu6(nn.Conv(inner, (side, side), (stride, stride), feature_group_count=inner)(y))
                y = nn.Conv(features, (1, 1))(y)
                x = x + y if x.shape == y.shape else y
        x = nn.relu6(nn.Conv(1280, (1, 1))(x))
        return nn.Dense(1000)(jnp.mean(x, (1, 2)))


class ResNet18(nn.Module):
    """ResNet-18 (arXiv 1512.03385) without batch norm, as a user of Flax writes it: a stem of 7x7 and a pool of 3x3."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(64, (7, 7), (2, 2))(x)), (3, 3), (2, 2), "SAME")
        for features, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
            y = nn.relu(nn.Conv(features, (3, 3), (stride, stride))(x))
            y = nn.Conv(features, (3, 3))(y)
            x = nn.Conv(features, (1, 1), (stride, stride))(x) if x.shape != y.shape else x
            x = nn.relu(x + y)
        return nn.Dense(1000)(jnp.mean(x, (1, 2)))


class Vgg(nn.Module):
    """Three blocks of two 3x3 convolutions with a pooling behind each (arXiv 1409.1556)."""

    @nn.compact
    def __call__(self, x):
        for features in (24, 48, 96):
            for _ in range(2):
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(jnp.mean(x, (1, 2)))


#: Gradients of a program: one, and those of five steps in a loop.
ONE, LOOP = "one", "in a loop"
#: `{name: (module, images of a batch, side, channels, kinds of programs)}`.
NETWORKS = {
    "LeNet": (plain_jax.LeNet(), 10, 28, 1, (ONE, LOOP)),
    "VGG": (Vgg(), 10, 32, 3, (ONE, LOOP)),
    "MobileNet 0.25": (MobileNet(), 10, 224, 3, (ONE,)),
    "EfficientNet-Lite0": (EfficientNetLite0(), 10, 224, 3, (ONE,)),
    "ResNet-18": (ResNet18(), 10, 224, 3, (ONE,)),
}


def user_family(work: w1.Work, variables: dict):
    """The tasks of `w1.make_family`, of a LeNet of Flax that is given as a function."""
    family = w1.make_family(work, variables)

    def logits_fn(images):
        return plain_jax.LeNet().apply(variables, images)

    options = {"ways": w1.CLASSES, "query_shots": 1, "epsilon": w1.EPSILON, "loss": AttackLoss("hinge", w1.KAPPA)}
    return lft_jax.uap_family(np.asarray(family.images), np.asarray(family.labels), logits_fn, **options)


def w1_contestants(work: w1.Work) -> dict:
    """Programs of one meta-step of W1 each."""
    variables = w1.lenet_variables(work.side)
    own, user = w1.make_family(work, variables), user_family(work, variables)
    found = {OWN: w1.ours(work, own), USER: w1.ours(work, user)}
    found["plain JAX"] = plain_jax.meta_step(work, variables, own)
    params = w1.make_rule(work).init(jax.random.key(0))
    episodes = jax.vmap(own.sample)(jax.random.split(jax.random.key(2), work.tasks))
    for name, two_phase in {"PyTorch": False, "PyTorch, two-phase": True}.items() if torch_w1 else ():
        found[name] = torch_w1.meta_step(work, variables, params, episodes, two_phase=two_phase)
    return found


def gradient_contestants(module: nn.Module, shape: tuple[int, ...], kinds: tuple[str, ...]) -> tuple[dict, float]:
    """Programs of gradients with respect to images `shape`, and the largest difference relative to the largest one."""
    images = jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), images)
    plain = jax.tree_util.Partial(functools.partial(_applied, module), variables)
    found, gradients = {}, []
    for name, model in {"as written": plain, "rewritten": rewritten(plain)}.items():

        def gradient(model, x):
            return jax.grad(lambda x: jnp.sum(jnp.sin(model(x))))(x)

        def steps(model, x):
            return lax.scan(lambda x, _: (x - 1e-3 * gradient(model, x), None), x, None, length=5)[0]

        for kind in kinds:
            program = jax.jit({ONE: gradient, LOOP: steps}[kind])
            found[name, kind] = functools.partial(_run, program, model, images)
        gradients.append(found[name, ONE]())
    size = jnp.max(jnp.abs(gradients[0]))
    return found, float(jnp.max(jnp.abs(gradients[0] - gradients[1])) / size)


def _applied(module, variables, x):
    return module.apply(variables, x)


def _run(program, model, images):
    return jax.block_until_ready(program(model, images))


def alternate(contestants: dict, repeats: int) -> dict:
    """As `timing.alternate`, with the seconds of computation of all threads too."""
    for run in contestants.values():
        run()
    found = {name: {"all": [], "computed": []} for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            began, computed = time.perf_counter(), time.process_time()
            run()
            found[name]["all"].append(time.perf_counter() - began)
            found[name]["computed"].append(time.process_time() - computed)
    for times in found.values():
        times["seconds"] = float(np.median(times["all"]))
        times["computed_seconds"] = float(np.median(times["computed"]))
    return found


def bench(flags: Config) -> dict:
    """Runs the benchmark and writes its results."""
    load = timing.load_of_others()
    results = {"provenance": provenance.describe([0]), "load_of_others": load, "gradients": {}}
    results["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch_w1:
        results["torch"] = torch_w1.versions()
    work = w1.Work(tasks=1, num_steps=2, side=8) if flags.smoke else w1.Work()
    times = alternate(w1_contestants(work), flags.repeats)
    user = times[USER]
    results["w1"] = {
        name: t | {f"{kind}_over_user": t[kind] / user[kind] for kind in ("seconds", "computed_seconds")}
        for name, t in times.items()
    }
    for name, t in results["w1"].items():
        ratios = t["seconds_over_user"], t["computed_seconds_over_user"]
        print("W1: {}: {:.2f} x the time of the user's model, {:.2f} x its computation".format(name, *ratios))
    provenance.write_json(Path(flags.output), results)
    for name, (module, count, side, channels, kinds) in list(NETWORKS.items())[: 1 if flags.smoke else None]:
        contestants, difference = gradient_contestants(module, (count, side, side, channels), kinds)
        times = alternate(contestants, flags.repeats)
        row: dict = {"images": [count, side, side, channels], "largest_difference": difference}
        for kind in kinds:
            plain, fast = times["as written", kind], times["rewritten", kind]
            row[kind] = {"as written": plain, "rewritten": fast}
            row[kind] |= {f"{of}_ratio": plain[of] / fast[of] for of in ("seconds", "computed_seconds")}
            print(f"{name}, {kind}: {row[kind]['seconds_ratio']:.2f} x as fast, differs by {difference:.0e}")
        results["gradients"][name] = row
        provenance.write_json(Path(flags.output), results)
    return results


if __name__ == "__main__":
    config.main(Config, bench)
