"""Pictures in a folder, decoded by Pillow when they are needed, and their labels."""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lft_jax._reading import check_pixels
from lft_jax.data.checks import MOST_CLASSES

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
#: A sub-folder that is named by the number of a class: `3`, `3_cat`.
CLASS = re.compile(r"(\d+)(?:[_-](.*))?")
GREY = {"1", "L", "LA"}


@dataclasses.dataclass(frozen=True)
class Folder:
    """Pictures of a folder.

    Attributes:
      files: the pictures, in order.
      labels: `[N]` int32, or None.
      channels: 1 for grey, 3 for RGB. Transparency is ignored.
      names: of the classes whose sub-folders have one: `{3: "cat"}` for `3_cat`.
      flag: the flag that named the folder, for messages.
      size: side of the square that pictures are brought to, or None if all have the same size. The shorter side is
        scaled to it (bilinear, antialiased), then the centre is cropped.
    """

    files: tuple[Path, ...]
    labels: np.ndarray | None
    channels: int
    size: int | None
    names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    flag: str = "--images"

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images `[len(rows), H, W, channels]`, uint8."""
        return np.stack([self._read(self.files[row]) for row in rows])

    def _read(self, file):
        with _opened(file, self.flag) as picture:
            try:
                found = picture.convert("L" if self.channels == 1 else "RGB")
            except Exception as error:
                raise _damaged(file, error, self.flag) from error
        if self.size is not None:
            found = _cropped(found, self.size)
        pixels = np.asarray(found, np.uint8)
        return pixels[..., None] if pixels.ndim == 2 else pixels


def open_folder(folder: Path, size: int | None = None, channels: int | None = None, flag: str = "--images") -> Folder:
    """The pictures of a folder; their labels are in `labels.csv`, or the numbers of sub-folders, or there are none.

    Args:
      folder: with pictures, or with sub-folders of pictures that are named by the number of their class.
      size: as of `Folder`.
      channels: 1 or 3; None for 1 if all pictures are grey, else 3.
      flag: as of `Folder`.

    Raises:
      ModuleNotFoundError: without Pillow.
      ValueError: for no pictures, other names of sub-folders, wrong lines of `labels.csv`, files that are not in the
        folder, pictures that cannot be read, of more than 8,192 x 8,192 pixels (after scaling, too), or of different
        sizes without a `size`.
    """
    files, labels, names = _listed(folder) if (folder / "labels.csv").is_file() else _found(folder, flag)
    inside = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(inside):
            raise ValueError(f"{flag}={folder}: {file} is, or leads to, a file out of the folder; copy it there.")
    sizes, grey = {}, True
    for file in files:
        with _opened(file, flag) as picture:  # reads its header only
            try:
                check_pixels(picture.size)
                check_pixels(_scaled(picture.size, size or min(picture.size)))
            except ValueError as error:
                raise ValueError(f"{flag}: {file} is too large or too long: scaled, {error}.") from error
            if picture.mode[0] in "IF":
                raise ValueError(f"{flag}: pictures must have 8 bits per channel, got mode {picture.mode} in {file}.")
            sizes.setdefault(picture.size, file)
            grey = grey and picture.mode in GREY
    if size is None and len(sizes) > 1:
        shown = " and ".join(f"{width}x{height} ({file.name})" for (width, height), file in list(sizes.items())[:2])
        raise ValueError(
            f"{flag}: pictures must have one size, got {shown}; pass --image_size=224, say: it scales the shorter "
            "side and crops the centre."
        )
    return Folder(tuple(files), labels, channels or (1 if grey else 3), size, names, flag)


def _found(folder, flag):
    """The pictures in a folder, without labels, or those in its sub-folders, labelled by the names of these."""
    top = _pictures(folder)
    inside = {child: _pictures(child) for child in sorted(folder.iterdir()) if child.is_dir()}
    inside = {child: files for child, files in inside.items() if files and not child.name.startswith(".")}
    if top and inside:
        raise ValueError(
            f"{flag}={folder}: expected pictures in the folder or in its sub-folders, got both; move one part, or "
            "list all in labels.csv."
        )
    if not (top or inside):
        kinds = ", ".join(SUFFIXES)
        raise ValueError(f"{flag}={folder}: there are no pictures ({kinds}) in it or in its sub-folders.")
    if top:
        return top, None, {}
    files, labels, names = [], [], {}
    for child, found in inside.items():
        match = CLASS.fullmatch(child.name)
        if match is None:
            raise ValueError(
                f"{flag}={folder}: sub-folders must be named by the number of their class, such as 3 or 3_cat, got "
                f"{child.name!r}; rename it, or write labels.csv with the columns file,label."
            )
        files += found
        label = _class(match[1], f"{flag}={folder}, sub-folder {child.name!r}")
        labels += [label] * len(found)
        if match[2]:
            names[label] = match[2]
    return files, np.asarray(labels, np.int32), names


def _pictures(folder):
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(file for file in files if not file.name.startswith("."))


def _listed(folder):
    """The files and labels that `labels.csv` lists."""
    path = folder / "labels.csv"
    try:
        lines = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        return _lines(folder, path, csv.DictReader(lines))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no table in UTF-8 that can be read ({error}).") from error


def _lines(folder, path, reader):
    if not {"file", "label"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: the first line must be file,label, got {','.join(reader.fieldnames or ())!r}.")
    files, labels = [], []
    for row in reader:
        name, label = (row["file"] or "").strip(), (row["label"] or "").strip()
        if not label.isdecimal():
            raise ValueError(
                f"{path}, line {reader.line_num}: label must be the number of a class, from 0, got {label[:80]!r}."
            )
        if not name or not os.path.isfile(folder / name):  # False for names that no file can have
            raise ValueError(f"{path}, line {reader.line_num}: there is no file {name[:80]!r} in the folder.")
        files.append(folder / name)
        labels.append(_class(label, f"{path}, line {reader.line_num}"))
    if not files:
        raise ValueError(f"{path}: expected a line for each picture, got none.")
    return files, np.asarray(labels, np.int32), {}


def _class(digits, where):
    if len(digits) > 9 or int(digits) >= MOST_CLASSES:
        raise ValueError(f"{where}: the number of a class must be below {MOST_CLASSES}, got {digits[:80]}.")
    return int(digits)


def _opened(file, flag) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{flag}: a folder of pictures needs Pillow: pip install 'lft_jax[images]'."
        ) from error
    try:
        return Image.open(file)
    except Exception as error:
        raise _damaged(file, error, flag) from error


def _damaged(file, error, flag):
    return ValueError(f"{flag}: {file} is no picture that can be read ({error}).")


def _scaled(sides, size):
    """Width and height of a picture whose shorter side is scaled to `size`."""
    width, height = (max(size, size * side // max(1, min(sides))) for side in sides)
    return width, height


def _cropped(picture, size):
    from PIL import Image

    width, height = _scaled(picture.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))
