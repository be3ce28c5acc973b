r"""Measures memory of a meta-step by K, compile time, and speed by number of tasks, devices and processes.

python -m benchmarks.growth --output=results/bench_growth.json

Every case runs in new processes, so that memory and compilation are not shared.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import lft_jax
from benchmarks import timing, w1
from experiments import config
from lft_jax import _memory, meta
from lft_jax.cli import provenance

#: Ways to bound the memory of `meta_trainer`, by name.
MEMORY = {
    "all stored, one part": lft_jax.Unroll(remat=False, memory_mib=1e9),
    "chosen by the budget": lft_jax.Unroll(),
    "remat": lft_jax.Unroll(remat=True),
}
LAYOUTS = ((1, 1), (2, 1), (4, 1), (2, 2))  # devices in total, processes


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_growth.json", "Results file.")
    repeats: int = config.option(5, "Timed meta-steps after the first; the result is their median.")
    smoke: bool = config.option(False, "Smoke test: tiny sizes, without the check for other load.")


def measure(work, repeats, unroll, cache, devices=1, coordinator=None, processes=1, process=0):
    """Runs meta-steps of W1 in this process, which must be new.

    Returns seconds, peak MiB before and after, and the meta-parameters.
    """
    config.tune_process()
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, process)
    mesh = meta.task_mesh(devices) if devices > 1 else None
    run = w1.ours(work, w1.make_family(work, w1.lenet_variables(work.side)), mesh=mesh, unroll=unroll)
    before, seconds = timing.peak_memory(), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        state = run()
        seconds.append(time.perf_counter() - began)
    parameters = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.tree.map(np.asarray, state.params))])
    return {
        "first_seconds": seconds[0],
        "seconds": statistics.median(seconds[1:]),
        "all": seconds[1:],
        "tasks_per_second": work.tasks / statistics.median(seconds[1:]),
        "peak_mib_before": before,
        "peak_mib": timing.peak_memory(),
        "parameters": parameters,
    }


def fresh(work, repeats, unroll=MEMORY["chosen by the budget"], cache=None, layout=(1, 1)):
    """Runs `measure` in new processes. Returns the results of the first one, and its parameters separately."""
    devices, processes = layout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices // processes}"
    try:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
            arguments = (work, repeats, unroll, cache, devices, coordinator, processes)
            found = [pool.submit(measure, *arguments, process) for process in range(processes)]
            result, *_ = (future.result() for future in found)
    finally:
        os.environ["XLA_FLAGS"] = flags
    return result, result.pop("parameters")


def bench(flags: Config) -> dict:
    """Runs the benchmark and writes its results."""
    load = None if flags.smoke else timing.require_quiet()
    results = {"provenance": provenance.describe([0]), "load_of_others": load, "budget_mib": _memory.DEFAULT_MIB}
    base = w1.Work(tasks=2, num_steps=2, side=8, hidden=4) if flags.smoke else w1.Work()

    results["memory"] = {}
    for num_steps in (2,) if flags.smoke else (20, 100, 500):
        for name, unroll in list(MEMORY.items())[: 1 if flags.smoke else None]:
            work = dataclasses.replace(base, num_steps=num_steps)
            case, _ = fresh(work, 1, unroll)
            results["memory"].setdefault(f"K = {num_steps}", {})[name] = case
            added = case["peak_mib"] - case["peak_mib_before"]
            print(f"K = {num_steps}, {name}: peak {case['peak_mib']:.0f} MiB, {added:.0f} of them by the meta-step")
        provenance.write_json(Path(flags.output), results)

    with tempfile.TemporaryDirectory() as cache:
        results["first_meta_step"] = {name: fresh(base, flags.repeats, cache=cache)[0] for name in ("cold", "warm")}
    for name, case in results["first_meta_step"].items():
        print(f"first meta-step, {name} cache: {case['first_seconds']:.1f} s; later ones {case['seconds']:.2f} s")

    results["devices"] = {}
    for layout in ((1, 1), (2, 2)) if flags.smoke else LAYOUTS:
        case, parameters = fresh(base, flags.repeats, layout=layout)
        if layout == (1, 1):
            expected = parameters
        case["largest_difference"] = float(np.abs(parameters - expected).max() / np.abs(expected).max())
        name = "{} devices, {} processes".format(*layout)
        results["devices"][name] = case
        print(f"{name}: {case['tasks_per_second']:.1f} tasks/s, relative difference {case['largest_difference']:.0e}")
    provenance.write_json(Path(flags.output), results)

    results["tasks"] = {}
    for tasks in (1,) if flags.smoke else (1, 4, 16, 64, 256):
        case, _ = fresh(dataclasses.replace(base, tasks=tasks), 1 if tasks > 16 else flags.repeats)
        results["tasks"][f"{tasks}"] = case
        print(f"{tasks} tasks per meta-step: {case['tasks_per_second']:.1f} tasks/s")
    provenance.write_json(Path(flags.output), results)
    return results


if __name__ == "__main__":
    config.main(Config, bench)
