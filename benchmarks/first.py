r"""Measures what a user waits for before anything is computed: imports, and the first attack of a process.

python -m benchmarks.first --output=results/bench_first.json

Every case runs in new processes, without a compilation cache, the cases in turn.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lft_jax
from benchmarks import timing
from experiments import config
from lft_jax.cli import provenance
from lft_jax.victims import apply_function, build_model

_IMPORTS = "import time; began = time.perf_counter(); import jax; first = time.perf_counter(); import lft_jax; "
_IMPORTS += "print(first - began, time.perf_counter() - first)"


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_first.json", "Results file.")
    repeats: int = config.option(5, "Processes of each case; the result is their median.")
    smoke: bool = config.option(False, "Smoke test: one process of each case, without the check for other load.")


def attacks() -> dict[str, dict[str, Any]]:
    """The attacks of ten images by name: arguments of `universal_perturbation`."""
    signs = optax.chain(optax.scale_by_sign(), optax.scale(-0.01))
    plain = lft_jax.AttackRecipe(augmentation=None)
    return {"uap-linf, the default": {}, "sign steps on the images alone": {"optimizer": signs, "recipe": plain}}


def first_attack(name: str, steps: int) -> tuple[float, float]:
    """Seconds of the first and of the second attack on a LeNet of this process, which must be new."""
    jax.config.update("jax_compilation_cache_dir", None)
    shapes = jax.eval_shape(build_model("lenet", 10).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    rng = np.random.default_rng(1)  # compiles nothing
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) / 10, shapes)
    model = functools.partial(apply_function("lenet", 10), variables)
    images = np.random.default_rng(0).uniform(size=(10, 28, 28, 1)).astype(np.float32)
    seconds, options = [], attacks()[name]  # another object as the optimizer would be another program
    for _ in range(2):
        began = time.perf_counter()
        lft_jax.universal_perturbation(model, images, epsilon=0.1, steps=steps, progress=False, **options)
        seconds.append(time.perf_counter() - began)
    first, second = seconds
    return first, second


def imports() -> tuple[float, float]:
    """Seconds of `import jax`, and of `import lft_jax` after it, in a new process."""
    found = subprocess.run([sys.executable, "-c", _IMPORTS], check=True, capture_output=True, text=True).stdout
    of_jax, ours = map(float, found.split())
    return of_jax, ours


def bench(flags: Config) -> dict[str, Any]:
    """Runs the benchmark and writes its results."""
    load = None if flags.smoke else timing.require_quiet()
    repeats, steps = (1, 1) if flags.smoke else (flags.repeats, 20)
    runs: dict[str, list[tuple[float, float]]] = {"imports": [], **{name: [] for name in attacks()}}
    imports()  # reads the files from disk
    for _ in range(repeats):
        runs["imports"].append(imports())
        for name in attacks():
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                runs[name].append(pool.submit(first_attack, name, steps).result())
    medians = {name: [statistics.median(column) for column in zip(*pairs, strict=True)] for name, pairs in runs.items()}
    of_jax, ours = medians.pop("imports")
    results = {
        "provenance": provenance.describe([0]),
        "load_of_others": load,
        "import_seconds": {"jax": of_jax, "lft_jax": ours},
        "attacks": {name: {"first": first, "second": second} for name, (first, second) in medians.items()},
        "runs": runs,
    }
    provenance.write_json(Path(flags.output), results)
    print(f"import jax {of_jax:.2f} s, then lft_jax {ours:.2f} s")
    for name, seconds in results["attacks"].items():
        print(f"{name}: first attack {seconds['first']:.2f} s, second {seconds['second']:.3f} s")
    return results


if __name__ == "__main__":
    config.main(Config, bench)
