"""Finished runs on disk, so that an audit that was interrupted goes on."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lft_jax._files import replacing, write_bytes
from lft_jax._reading import read_npy, read_object
from lft_jax._version import __version__
from lft_jax.auditing._plan import Cell, options
from lft_jax.optimizers import rule_to_dict
from lft_jax.pretrained import load_pretrained

#: Logits of a model on the same images differ by rounding from process to process.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Run:
    """What an attack found.

    Attributes:
      cell: what was run.
      perturbation: `[H, W, C]` float32.
      predicted: `[C + Q]`, the classes of the perturbed choice and query images.
      confidence: `[C + Q]`, the model's softmax for these classes.
      history: after each step: `loss`, `asr` on the support images, `queries`.
      evaluations: evaluations of the model on one image.
      seconds: wall time.
      cpu_seconds: time of all processor cores, that of other threads of the process included.
      compiled: whether the times include compilation, as that of the first run of its kind in a process does.
      device: what it ran on.
      warnings: what was said in it, each once.
    """

    cell: Cell
    perturbation: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    history: dict[str, list[float]]
    evaluations: int
    seconds: float
    cpu_seconds: float
    compiled: bool
    device: str
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the perturbation, for JSON."""
        found = dataclasses.asdict(dataclasses.replace(self, perturbation=np.zeros(0)))
        del found["perturbation"]
        return found | {
            "predicted": self.predicted.tolist(),
            "confidence": [round(float(value), 4) for value in self.confidence],
        }


def digest(*parts: Any) -> str:
    """A name for arrays and for anything that JSON can hold."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).tobytes())
        else:
            total.update(json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file atomically."""
    with replacing(path) as file:
        np.save(file, array)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically; NaN is refused."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


class Store:
    """The folder `runs` of an audit.

    A run is a `.json` file, written last, and an `.npy` file with its perturbation. It is used again by an audit of
    the same images, labels, split and settings, by the same version and weights of the rule, of a model that answers
    the probes as it did.
    """

    def __init__(self, folder: Path, data: str, answers: np.ndarray):
        """Opens the folder.

        Args:
          folder: need not exist.
          data: digest of images, labels and split.
          answers: `[N, classes]`, the logits of the probes: clean images, and some with noise.
        """
        self.folder, self.keys = folder, {}
        path = folder / f"answers-{data[:12]}.npy"
        known = _array(path)
        if known is None or not _alike(known, answers):
            write_array(path, answers)
            known = answers
        self.data = digest(__version__, data, known)

    def load(self, cell: Cell) -> Run | None:
        """The stored run of a cell; None if there is none, or one of other data, of another model, or damaged."""
        path = self.path(cell)
        try:
            found = read_object(path.with_suffix(".json"))
            perturbation = read_npy(path)
            if found.pop("key") != self.key(cell) or found.pop("perturbation") != digest(perturbation):
                return None
            fields: dict[str, Any] = {**found, "cell": cell, "perturbation": perturbation}
            fields |= {name: np.asarray(found[name]) for name in ("predicted", "confidence")}
            fields["warnings"] = tuple(found["warnings"])
            return Run(**fields)
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or of another version
            return None

    def save(self, run: Run) -> None:
        """Stores a finished run."""
        path = self.path(run.cell)
        path.with_suffix(".json").unlink(missing_ok=True)
        write_array(path, run.perturbation)
        write_json(path.with_suffix(".json"), {**run.as_dict(), **self._marks(run)})

    def _marks(self, run):
        return {"key": self.key(run.cell), "perturbation": digest(run.perturbation)}

    def key(self, cell: Cell) -> str:
        """The digest of all that a run depends on."""
        return digest(self.data, dataclasses.asdict(cell), _rule(options(cell.method).get("optimizer")))

    def path(self, cell: Cell) -> Path:
        """Of the .npy file."""
        return self.folder / f"{cell.name}.npy"


@functools.cache
def _rule(optimizer):
    """The digest of a shipped rule and its weights, by its name; empty for other optimizers."""
    if not isinstance(optimizer, str):
        return ""
    params, rule = load_pretrained(optimizer)
    return digest(rule_to_dict(rule), *(np.asarray(leaf) for leaf in jax.tree.leaves(params)))


def _array(path):
    try:
        return read_npy(path)
    except (OSError, ValueError):
        return None


def _alike(known, answers):
    """Whether two arrays of logits differ by rounding only."""
    if known.shape != answers.shape:
        return False
    scale = max(float(np.std(answers)), 1e-6)
    return bool(np.array_equal(known.argmax(-1), answers.argmax(-1))) and bool(
        np.allclose(known, answers, rtol=TOLERANCE, atol=TOLERANCE * scale)
    )
