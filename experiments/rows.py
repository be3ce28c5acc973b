"""Results files to which rows are added, draw by draw, so that a study that was interrupted goes on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def opened(path: str | Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file holds, or that of a new one: `{"flags": flags, "rows": []}`.

    Args:
      path: the file, which need not exist.
      flags: what all of its rows depend on, as JSON has it or not.

    Raises:
      ValueError: if the file has results of other flags.
    """
    path, described = Path(path), json.loads(json.dumps(flags))
    if not path.is_file():
        return {"flags": described, "rows": []}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["flags"] != described:
        raise ValueError(f"output: {path} has results of {results['flags']}, expected {described}.")
    return results


def row_of(
    rows: list[dict[str, Any]], cell: Mapping[str, Any], columns: Sequence[str] = ("draw_asr",)
) -> dict[str, Any]:
    """The row of a cell; a new one with empty columns, which is added, if there is none.

    Examples:
      >>> rows = []
      >>> row_of(rows, {"model": "lenet"})["draw_asr"].append(0.5)
      >>> row_of(rows, {"model": "lenet"}), len(rows)
      ({'model': 'lenet', 'draw_asr': [0.5]}, 1)
    """
    found = next((row for row in rows if cell.items() <= row.items()), None)
    if found is None:
        found = {**cell, **{name: [] for name in columns}}
        rows.append(found)
    return found
