"""Finished parts of a study, kept on disk until its results are complete: a program that was killed goes on from them.

cells = Cells("results/mine.json", settings)
rows = [cells.get(name, measure, name) for name in names]   # measured once, whatever happens
cells.finish()                                              # after the results file is written
"""

import base64
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lft_jax._files import write_bytes
from lft_jax.cli import provenance


class Cells:
    """Values by name, in the folder `OUTPUT.unfinished` beside a results file.

    They are used again by a program with equal settings only. Each file is complete or absent, since it is written
    elsewhere and renamed.
    """

    def __init__(self, output: str | Path, settings: Any):
        """Opens the folder, which need not exist.

        Args:
          output: the results file.
          settings: all that the values depend on, such as flags and meta-parameters; as the values of `get`.
        """
        self.folder, self.settings = Path(f"{output}.unfinished"), _text(settings)

    def get(self, name: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """The stored value of a name; if there is none, `measure(*arguments)`, which is stored.

        Args:
          name: of the cell, unique in the program.
          measure: its result consists of None, booleans, numbers, strings and arrays, in lists, tuples and dicts with
            strings as keys. Arrays come back as NumPy arrays, whether they were stored or not.
          arguments: of `measure`.

        Raises:
          TypeError: if the result has something else in it.
        """
        path = self._path(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            text = _text(measure(*arguments))
            write_bytes(path, text.encode())
            found = json.loads(text)
        else:
            print(f"{name}: kept from a run that was interrupted", flush=True)
        return _value(found)

    def provenance(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Provenance of the first start, with the commits of later ones if they differ."""
        now = provenance.describe(seeds)
        first = self.get("provenance", dict, now) if self.folder.is_dir() else now
        commits = [first["commit"], *first.get("resumed_at_commits", ())]
        if now["commit"] not in commits:
            first["resumed_at_commits"] = [*commits[1:], now["commit"]]
        write_bytes(self._path("provenance"), _text(first).encode())
        return first

    def finish(self) -> None:
        """Deletes the folder, with what programs with other settings have left there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name):
        return self.folder / f"{hashlib.sha256(f'{name} {self.settings}'.encode()).hexdigest()[:32]}.cell"


def _text(value):
    return json.dumps(_plain(value), sort_keys=True)


@functools.singledispatch
def _plain(value):
    """The value as JSON has it: all but numbers, strings and lists as an object with one entry."""
    raise TypeError(f"cells: expected numbers, strings and arrays in lists, tuples and dicts, got {type(value)}.")


@_plain.register(type(None) | bool | int | float | str)
def _(value):
    return value


@_plain.register
def _(value: np.generic):
    return _plain(value.item())


@_plain.register(np.ndarray | jax.Array)
def _(value):
    value = np.asarray(value)
    if value.dtype.kind not in "biuf":
        raise TypeError(f"cells: expected arrays of numbers, got {value.dtype}.")
    return {"array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}


@_plain.register
def _(value: list):
    return [_plain(entry) for entry in value]


@_plain.register
def _(value: tuple):
    if type(value) is not tuple:
        raise TypeError(f"cells: expected plain tuples, got {type(value)}.")
    return {"tuple": [_plain(entry) for entry in value]}


@_plain.register
def _(value: dict):
    if bad := [key for key in value if not isinstance(key, str)]:
        raise TypeError(f"cells: expected strings as keys, got {bad[0]!r}.")
    return {"dict": [[key, _plain(entry)] for key, entry in value.items()]}


def _value(plain):
    if isinstance(plain, list):
        return [_value(entry) for entry in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "array":
        dtype, shape, data = content
        return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    if kind == "tuple":
        return tuple(_value(entry) for entry in content)
    return {key: _value(entry) for key, entry in content}
