"""Reads files that may come from anywhere: nothing in them is run, and sizes are checked before memory is allocated.

Files of arrays are read here instead of by `numpy.load`, which believes the shape that a header claims. Only numbers
and strings are read, never objects, so that no pickle is ever loaded.
"""

import ast
import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

#: Bytes that an archive may always expand to, and as a multiple of its own size.
EXPANDED, RATIO = 2**28, 100
#: Largest number of pixels of a picture: 8,192 x 8,192.
PIXELS = 2**26
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[SU][1-9]\d{0,7})")
_LONGEST_HEADER = 4096  # bytes
_PIECE = 2**20  # bytes read at a time


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an `.npy` file of numbers or strings. The array is in native byte order.

    Args:
      path: name of the file.

    Returns:
      The array.

    Raises:
      OSError: for a file that is not there or cannot be opened.
      ValueError: for another kind of file, one that is shorter than its header claims, or an array of other things.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/a.npy", np.arange(3.0))
      ...     read_npy(f"{folder}/a.npy").tolist()
      [0.0, 1.0, 2.0]
    """
    path = Path(path)
    with _file(path) as file, _as_value_error("is no .npy file"):
        return _array(file, path.stat().st_size)


def parse_npy(content: BinaryIO, size: int) -> np.ndarray:
    """`read_npy` of an open file of `size` bytes."""
    with _as_value_error("is no array in the .npy format"):
        return _array(content, size)


def read_npz(path: str | os.PathLike[str], names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of numbers or strings of an `.npz` file.

    Args:
      path: name of the file.
      names: of the arrays to read, those of them that are there; None for all.

    Returns:
      `{name: array}`.

    Raises:
      OSError: for a file that is not there or cannot be opened.
      ValueError: for another kind of file, arrays that `read_npy` refuses, compression other than that of NumPy, and
        arrays that expand to more than 256 MiB and more than 100 times the size of the file.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/a.npz", images=np.zeros((2, 4)), other=np.ones(1))
      ...     {name: array.shape for name, array in read_npz(f"{folder}/a.npz", ["images", "labels"]).items()}
      {'images': (2, 4)}
    """
    path, found = Path(path), {}
    with _file(path) as file, _as_value_error("is no .npz file"), zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if names is not None:
            entries = {name: entry for name, entry in entries.items() if name in names}
        check_expansion(list(entries.values()), path.stat().st_size)
        for name, entry in entries.items():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                raise ValueError(f"its entry {name!r} is encrypted or compressed in another way than NumPy does")
            with archive.open(entry) as member:
                try:
                    found[name] = _array(member, entry.file_size)
                except ValueError as error:
                    raise ValueError(f"entry {name!r}: {error}") from error
    return found


def npz_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of the arrays of an `.npz` file; errors are those of `read_npz`."""
    with _file(Path(path)) as file, _as_value_error("is no .npz file"), zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def check_expansion(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Raises a ValueError if entries of an archive of `size` bytes claim to expand to too much."""
    expanded, most = sum(entry.file_size for entry in entries), max(EXPANDED, RATIO * size)
    if expanded > most:
        raise ValueError(f"its {size} bytes expand to {expanded}, more than {most}; store it without compression")


def parse_json(content: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: for text that is not JSON in UTF-8, or too deeply nested.

    Examples:
      >>> parse_json('{"seed": 0}')
      {'seed': 0}
    """
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError("it is too deeply nested") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file says; raises an OSError, or a ValueError as `parse_json` does."""
    return parse_json(Path(path).read_bytes())


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`read_json` of a file that must hold an object; raises a ValueError for another value."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"it must be a JSON object, got {type(found).__name__}")
    return found


def check_pixels(size: tuple[int, int]) -> None:
    """Raises a ValueError for a picture, `(width, height)`, of more than 8,192 x 8,192 pixels."""
    width, height = size
    if width * height > PIXELS:
        raise ValueError(f"it has {width}x{height} pixels, more than {PIXELS}")


def _file(path):
    """The open file; not a pipe, which might never answer."""
    if path.exists() and not path.is_file():
        raise IsADirectoryError(f"{path} is no file.")
    return open(path, "rb")


@contextlib.contextmanager
def _as_value_error(said: str) -> Iterator[None]:
    """Of what zipfile, zlib and NumPy raise for damaged content, which are many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{said} of numbers or strings that can be read ({error})") from error


def _array(file, size):
    """The array in a file in the `.npy` format of `size` bytes."""
    dtype, fortran, shape, start = _header(file)
    expected = math.prod(shape) * dtype.itemsize
    if expected > size - start:
        raise ValueError(f"its header claims {expected} bytes, shape {shape}, of which {size - start} are there")
    content = np.empty(expected, np.uint8)
    view, done = content.data, 0
    while done < expected:
        read = file.readinto(view[done : done + _PIECE])
        if not read:
            raise ValueError(f"it ends after {done} of {expected} bytes")
        done += read
    found = content.view(dtype).reshape(shape, order="F" if fortran else "C")
    return found if dtype.isnative else found.astype(dtype.newbyteorder("="))


def _header(file):
    """The dtype, whether the order is that of Fortran, the shape, and where the numbers begin."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError("it does not begin as an array of numbers does")
    digits = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(digits), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header claims {length} bytes, more than {_LONGEST_HEADER}")
    header = ast.literal_eval(file.read(length).decode("latin1").strip())
    dtype, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    if len(header) != 3 or not isinstance(fortran, bool):
        raise ValueError("its header has other entries than descr, fortran_order and shape")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"it holds {str(dtype)[:80]!r}, expected numbers or strings")
    if not isinstance(shape, tuple) or not all(type(side) is int and 0 <= side < 2**62 for side in shape):
        raise ValueError(f"its header claims the shape {str(shape)[:80]}")
    return np.dtype(dtype), fortran, shape, 8 + digits + length
