"""Provenance of results files: command, commit, versions, device, seeds and date."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lft_jax._files import write_bytes
from lft_jax._version import __version__


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically: an interrupted call leaves no partial file."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


_FOLDERS = ("--data_dir", "--compilation_cache")  # local paths, left out of the command


def describe(seeds: Sequence[int]) -> dict[str, Any]:
    """Command, commit, versions, device, seeds and date, for a results file."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    spec = sys.modules["__main__"].__spec__  # of what `python -m` was given; a console script has none
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    return {
        "command": " ".join([program, *(a for a in sys.argv[1:] if not a.startswith(_FOLDERS))]),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "seeds": list(seeds),
        "date": datetime.date.today().isoformat(),
    }


def _commit():
    """The commit of the checkout that has this file, or the version of the installed package."""
    here = Path(__file__)
    if shutil.which("git") is None:
        return f"lft_jax {__version__}"

    def git(*arguments):
        run = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    if not git("ls-files", here.name):  # installed, perhaps inside another repository
        return f"lft_jax {__version__}"
    outputs = (f":(top,exclude){folder}" for folder in ("results", "docs"))  # runs write there
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *outputs)
    return git("rev-parse", "--short=12", "HEAD") + (" + uncommitted changes" if changed else "")
