"""Programs other than meta-training, killed and started again until they are complete: evaluate, a study, an audit.

  python -m tests.chaos.programs evaluate

The exit code is 1 if their results differ from those of a run that was not killed.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Entries of results that differ from run to run.
TIMES = {"seconds", "cpu_seconds", "compiled", "provenance"}
#: Processes after which a program should be complete.
MOST = 30


def evaluate(folder: Path) -> None:
    """Two victims, a shipped rule."""
    from experiments import evaluate

    protocol = {"at": (1, 2), "num_tasks": 2, "num_validation": 2, "methods": ("sgd",), "oracle_steps": 2}
    paths = tuple(str(ROOT / "victims" / name) for name in ("digits_small_cnn_1000", "digits_lenet_1001"))
    output = str(folder / "results.json")
    evaluate.evaluate(evaluate.Config(learned=("uap-linf",), victims=paths, output=output, transfer=False, **protocol))


def study(folder: Path) -> None:
    """Meta-training with two seeds on one victim, and an attack on another one."""
    from experiments.studies import study, victims

    recipes = (victims.Recipe("train", "small_cnn", 1000, 1), victims.Recipe("unseen", "lenet", 1001, 1))
    victims.RECIPES = {"digits": recipes}
    meta = {"rule": "coordinate_lstm", "hidden": 2, "num_steps": 2, "meta_steps": 4, "checkpoint_every": 1}
    protocol = {"at": (1, 2), "num_tasks": 2, "num_validation": 2, "methods": ("sgd",), "oracle_steps": 2}
    runs = (study.Run("lft", ("digits",)),)
    study.STUDIES = {"tiny": study.Study(runs, {**meta, "validation_tasks": 0, "augment": False}, protocol)}
    places = {"victims": str(ROOT / "victims"), "workdir": str(folder / "runs"), "output": str(folder / "results.json")}
    study.study(study.Config(study="tiny", seeds=2, attacked=("digits",), **places))


def audit(folder: Path) -> None:
    """Four attacks by queries on a linear model, and a targeted one."""
    import numpy as np

    import lft_jax

    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, 3)).astype(np.float32)
    weights -= weights.mean(0)
    images = rng.uniform(0.2, 0.8, (100, 4, 4, 1)).astype(np.float32)
    budget = lft_jax.AuditBudget(support_images=(5,), queries=(60,), draws=2, methods=("patterns",))
    report = lft_jax.audit(
        lambda x: np.reshape(x, (len(x), -1)) @ weights,
        images,
        epsilons=(0.1, 0.2),
        l2_epsilons=(),
        budget=budget,
        output=folder,
        progress=False,
    )
    (folder / "results.json").write_text(json.dumps(report.results))


PROGRAMS = {"evaluate": evaluate, "study": study, "audit": audit}


def main(name: str) -> int:
    """Runs a program without a kill, then with kills, and compares the results."""
    os.environ.update(JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1")
    import matplotlib.pyplot  # noqa: F401  all that the programs import, once

    import experiments.evaluate
    import experiments.studies.study  # noqa: F401
    from lft_jax.auditing import audit  # noqa: F401

    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, cache = (Path(folder, part) for part in ("whole", "killed", "cache"))
        if code := _launch(PROGRAMS[name], whole, cache, 0):
            print(f"{name} ends with {code}: {_log(whole)}")
            return 1
        kills, code = 0, -signal.SIGKILL
        while code == -signal.SIGKILL and kills < MOST:
            code = _launch(PROGRAMS[name], killed, cache, 1 if kills == 0 else 2)
            kills += code == -signal.SIGKILL
        if code:
            print(f"{name} ends with {code} after {kills} kills: {_log(killed)}")
            return 1
        found = [_results(place) for place in (whole, killed)]
        left = sorted(str(path) for path in killed.rglob("*.unfinished"))
    print(f"{name}: {kills} kills, results are {'equal' if found[0] == found[1] else 'different'}, left: {left}")
    return int(found[0] != found[1] or bool(left) or kills < 2)


def _launch(program: Callable[[Path], None], folder: Path, cache: Path, number: int) -> int:
    """Forks a process that runs a program, and is killed soon after it has stored so many finished parts."""
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        _process(program, folder, cache, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _process(program, folder, cache, number):
    code = 1
    with contextlib.suppress(BaseException), (folder / "log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            import jax

            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            if number:
                _kill_after(number)
            program(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
    os._exit(code)


def _kill_after(number):
    """Kills this process a moment after it has renamed so many files or folders to those of a finished part."""
    from tests.chaos.target import start_timer

    left = number

    def hook(event, arguments):
        nonlocal left
        if event != "os.rename":
            return
        to = Path(os.fsdecode(arguments[1]))
        kept = to.parent.name == "checkpoints" or (to.parent.name == "runs" and to.suffix == ".json")
        if to.suffix == ".cell" or kept:
            left -= 1
            if left == 0:
                start_timer(0.02 * os.getpid() % 0.1 + 1e-3, signal.SIGKILL)

    sys.addaudithook(hook)


def _log(folder):
    return (folder / "log").read_text(errors="replace")[-3000:]


def _results(folder) -> Any:
    """The results file without times, and without the name of the folder."""
    text = (folder / "results.json").read_text().replace(str(folder), "")

    def timeless(entries):
        return {name: value for name, value in entries.items() if name not in TIMES}

    return json.loads(text, object_hook=timeless)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
