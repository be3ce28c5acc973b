"""Programs of the command line, each in a process of its own, forked from one that has imported what they need."""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import weakref
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ("lft_jax.cli.attack", "lft_jax.cli.audit", "experiments.meta_train", "experiments.train_victim")
IMPORTED += ("sklearn.datasets",)  # which a program imports when it asks for digits
# A process with threads that compute should not be forked. One of jemalloc, which comes with sklearn, allows it.
_ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Program:
    """`python -m module arguments`, without the seconds that its imports take.

    Args:
      module: the name of the module.
      *arguments: of the command line.
      folder: the current directory, from which modules can be imported too.
      **environment: variables that differ from those of this process; those that JAX reads when it is imported, such
        as JAX_PLATFORMS, have no effect.
    """

    def __init__(self, module: str, *arguments: str, folder: Path = ROOT, **environment: str):
        written = tempfile.mkdtemp(prefix="lft_jax_program_")
        weakref.finalize(self, shutil.rmtree, written)
        self._files = [str(Path(written) / name) for name in ("stdout", "stderr")]
        for path in self._files:
            Path(path).touch()
        variables = {**os.environ, **environment}
        # A daemon, so that it ends with the tests.
        self._process = _server().Process(
            target=_run, args=(module, arguments, str(folder), variables, self._files), daemon=True
        )
        self._process.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and the negative number of a signal that ended it."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return Path(self._files[0]).read_text()

    @property
    def stderr(self) -> str:
        """What it has written so far, errors and warnings."""
        return Path(self._files[1]).read_text()

    def kill(self) -> None:
        """Ends it at once, by SIGKILL."""
        self._process.kill()

    def wait(self, seconds: float = 240) -> "Program":
        """Waits for its end, and returns it.

        Raises:
          AssertionError: if it takes more seconds.
        """
        self._process.join(seconds)
        assert self.exit_code is not None, f"still running after {seconds} s: {self.stdout} {self.stderr}"
        return self


def _server():
    """What forks the processes; it starts with the first one."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*IMPORTED, "tests.programs"])
    before = {name: os.environ.get(name) for name in _ALONE}
    os.environ.update(_ALONE)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return server


def _run(module: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str], files: list[str]) -> None:
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which multiprocessing leaves to the first process
    sys.path.insert(0, folder)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # else runpy warns of it
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
