"""Where results come from: file, command, commit and device."""

import importlib.util
from collections.abc import Mapping
from typing import Any

#: What commands contain whose code was removed, and the last commit with it.
REMOVED, UNTIL = ("--study=two_losses", "--study=gradient_start", ",positions"), "5bddad1687e3"


def origin(results: Mapping[str, Any], path: str) -> str:
    """Origin of a results file: its path, the command, the commit and the device."""
    made = results.get("provenance", results)
    return f"From `{path}`: `{made['command']}`{_now(made['command'])}, commit {made['commit']}, {made['device']}."


def _now(command):
    """A note on the present name of the module of a command, if it has moved or is gone."""
    module = command.split()[2] if len(command.split()) > 2 else ""
    moved = f"experiments.studies.{module.rpartition('.')[2]}"
    renamed = module not in ("", moved) and importlib.util.find_spec(moved)
    if any(part in command for part in REMOVED):
        return f" (up to commit {UNTIL}{f', there `{moved}`' if renamed else ''}; gone since)"
    return f" (now `{moved}`)" if renamed else ""
