"""Runs all that measures reliability, and merges what it found into one file: `make trust`.

Killed runs, properties, meta-gradients against finite differences, damaged input, and a soak; an hour or two in all. A
part whose file is there, and was written by the code that is checked out, is kept. A part that failed or is missing is
listed as such. The exit code is 1 unless all parts passed.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lft_jax.cli import provenance


class Part(NamedTuple):
    """A program that writes a JSON file, with a non-zero exit code if something is wrong.

    Attributes:
      module: takes `--output=`.
      file: name of its file in the folder of the output.
      wrong: counts what is wrong in a file.
      left_out: keys that are not merged, since they are long; the file has them.
    """

    module: str
    file: str
    wrong: Callable[[dict[str, Any]], int]
    left_out: tuple[str, ...] = ()


def _findings(found):
    return len(found["findings"])


def _failures(found):
    return found["failures"] + (not found.get("complete", True))  # a table under way proves nothing yet


PARTS = {
    "kills": Part("tests.chaos", "chaos.json", _findings),
    "properties": Part("tests.trust.properties", "properties.json", _failures),
    "gradients": Part("tests.trust.gradients", "meta_gradients.json", _failures, ("failed",)),
    "fuzz": Part("tests.fuzz", "fuzz.json", _findings),
    "soak": Part("tests.soak", "soak.json", _findings, ("series",)),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description=__doc__)
    parser.add_argument("--output", default="results/reliability.json", help="JSON file; those of the parts lie beside")
    parser.add_argument("--again", action="store_true", help="run parts again that the present code has run")
    parser.add_argument("--merge_only", action="store_true", help="run nothing: merge the files that are there")
    given = parser.parse_args(arguments)
    parts = {}
    for name, part in PARTS.items():
        path = Path(given.output).with_name(part.file)
        code = None
        if not given.merge_only and (given.again or not _is_present(_read(path))):
            print(f"{name}: {part.module}", flush=True)
            path.unlink(missing_ok=True)  # or the file of another commit would stand for a run that crashed
            code = run(part.module, path)
        parts[name] = outcome(part, _read(path), code)
        print(f"{name}: {parts[name]['state']}", flush=True)
    passed = all(part["state"] == "passed" for part in parts.values())
    content = {"passed": passed, "parts": parts, "provenance": provenance.describe([])}
    provenance.write_json(given.output, content)
    return 0 if passed else 1


def run(module: str, path: Path) -> int:
    """Runs a part; returns its exit code."""
    return subprocess.run([sys.executable, "-m", module, f"--output={path}"], check=False).returncode


def outcome(part: Part, found: dict[str, Any] | None, code: int | None) -> dict[str, Any]:
    """What is merged of a part: its state, its provenance and its results.

    Args:
      part: the part.
      found: its file, or None.
      code: exit code of its run, or None if it was not run now.
    """
    if found is None:
        return {"state": "missing" if code is None else "failed", "exit_code": code}
    wrong = part.wrong(found)
    results = {key: value for key, value in found.items() if key not in ("provenance", *part.left_out)}
    origin = {key: found["provenance"][key] for key in ("command", "commit", "device", "date")}
    return {"state": "failed" if wrong or code else "passed", "exit_code": code, **origin, "results": results}


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_present(found):
    """Whether a file was written by the code that is checked out: nothing but results and pages changed since."""
    if found is None or not re.fullmatch("[0-9a-f]{12}", found["provenance"]["commit"]):
        return False
    if not re.fullmatch("[0-9a-f]{12}", provenance.describe([])["commit"]):  # uncommitted changes, or no repository
        return False
    others = (":(top)", *(f":(top,exclude){path}" for path in ("results", "docs", "*.md")))
    command = ["git", "diff", "--quiet", found["provenance"]["commit"], "HEAD", "--", *others]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
