"""What an attack returns."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from lft_jax._reading import read_npz
from lft_jax.base import PyTree
from lft_jax.tasks.perturbation import Constraint


class Paused(NamedTuple):
    """Where a run stopped before its last step, to go on from.

    Attributes:
      theta: `[H, W, C]`, the last perturbation.
      state: the optimizer's state.
      done: steps done.
      start: `[H, W, C]`, what a search or a race found, which the last perturbation has to outdo; or None.
      shown: the labels `[M]` and the clean logits `[M, classes]` of the images of the history.
    """

    theta: PyTree
    state: PyTree
    done: int
    start: PyTree = None
    shown: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class UniversalPerturbation:
    """The result of `universal_perturbation`. `print` shows a summary.

    Attributes:
      perturbation: NumPy `[H, W, C]`, that of the last step, or the start that a search found, or the winner of a
        race, if the steps ended no better; if an error ended the run, the best one so far: the one with the highest
        success rate, and among these with the lowest loss. `apply` adds it to images.
      history: `{name: NumPy [number of steps]}`, measured after each step on the given images. Of more than 50, these
        are 50 random ones, the same in each step:

        - `loss`: the mean loss, plus the penalty, if any.
        - `asr`: share of the images classified correctly when clean that the attack succeeds on.
        - `fooling_rate`: share of the images whose predicted class changes.
        - `margin`: mean difference between the logit of the true class and the largest other logit.
        - `clean_accuracy`: share of the images classified correctly when clean.
        - `l1`, `l2`, `linf`: norms of the perturbation.
        - `queries`: evaluations of the model on one image so far.

        In a data-free attack these are synthetic images with the model's predictions as labels. Their `asr` is their
        fooling rate, and tells little of that on real images.
      constraint: the ball or the penalty.
      oracle: "gradient", "query" or "decision".
      steps: the planned number of steps.
      queries: evaluations of the model on one image, also those of a step that an error ended.
      seconds: time that the run took.
      labelled: whether labels were given. Without them, the model's own predictions are the labels, and `asr` is the
        fooling rate, unless there is a target.
      synthetic: whether no images were given, and synthetic ones were attacked.
      paused: where the run stopped, if before its last step: `universal_perturbation(..., start=result)` goes on there.

    Examples:
      >>> theta = np.full((2, 2, 1), 8 / 255, np.float32)
      >>> result = UniversalPerturbation(theta, {}, Constraint("linf", 8 / 255))
      >>> result.apply(np.full((1, 2, 2, 1), 250, np.uint8)).ravel().tolist()
      [255, 255, 255, 255]
    """

    perturbation: np.ndarray
    history: dict[str, np.ndarray]
    constraint: Constraint
    oracle: str = "gradient"
    steps: int = 0
    queries: int = 0
    seconds: float = 0.0
    labelled: bool = True
    synthetic: bool = False
    paused: Paused | None = None

    @property
    def asr(self) -> float:
        """Success rate on the images of the `history`; NaN before the first step."""
        return self._last("asr")

    @property
    def fooling_rate(self) -> float:
        """Share of the images of the `history` whose predicted class changes; NaN before the first step."""
        return self._last("fooling_rate")

    @property
    def clean_accuracy(self) -> float:
        """Share of the images of the `history` classified correctly when clean; NaN before the first step."""
        return self._last("clean_accuracy")

    def apply(self, images: Shaped[Array | np.ndarray, "N H W C"]) -> Shaped[np.ndarray, "N H W C"]:
        """The perturbed images.

        Args:
          images: `[N, H, W, C]` uint8, or floating-point in [0, 1].

        Returns:
          NumPy `[N, H, W, C]` of the same dtype and range. For uint8 the perturbation is rounded towards 0, so that it
          stays in its ball.

        Raises:
          ValueError: for images of another shape, or of other integers.
        """
        array = np.asarray(images)
        if array.dtype.kind in "iub" and array.dtype != np.uint8:
            raise ValueError(f"images must be uint8 or floating-point, got {array.dtype}.")
        if array.shape[1:] != self.perturbation.shape:
            raise ValueError(f"images must be [N, {', '.join(map(str, self.perturbation.shape))}], got {array.shape}.")
        if array.dtype == np.uint8:
            theta = self.perturbation.astype(np.float32)
            levels = np.trunc(255 * theta + 1e-3 * np.sign(theta)).astype(np.int16)
            return np.clip(array.astype(np.int16) + levels, 0, 255).astype(np.uint8)
        return np.clip(array + self.perturbation.astype(array.dtype), 0, 1).astype(array.dtype)  # bfloat16 too

    def to_uint8(self) -> UInt8[np.ndarray, "H W C"]:
        """The perturbation as a picture: 0 is grey, 128; the largest absolute value is 1 or 255."""
        largest = np.abs(self.perturbation).max()
        return np.rint(128 + 127 * self.perturbation / (largest or 1)).astype(np.uint8)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the perturbation as `.npy`, or all but `paused` as `.npz`, which `load` reads.

        A perturbation in bfloat16, which NumPy's files cannot hold, is written as float32.

        Args:
          path: name of the file, with its suffix.

        Raises:
          ValueError: for another suffix.
        """
        path = Path(path)
        if path.suffix not in (".npy", ".npz"):
            raise ValueError(f"path must end with .npy or .npz, got {str(path)!r}.")
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:  # renamed when complete
            if path.suffix == ".npy":
                np.save(file, self._stored()["perturbation"])
            else:
                np.savez(file, **self._stored())
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UniversalPerturbation":
        """Reads a file that `save` wrote as `.npz`.

        Args:
          path: name of the file.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: for another file.
        """
        try:
            return cls._of_fields(read_npz(path))
        except (ValueError, TypeError, KeyError) as error:  # also of the constructor, for other fields
            raise ValueError(f"path: {os.fspath(path)} is no .npz file of a result ({error}).") from error

    @classmethod
    def _of_fields(cls, fields: dict[str, np.ndarray]) -> "UniversalPerturbation":
        history = {name.removeprefix("history/"): fields.pop(name) for name in list(fields) if "/" in name}
        perturbation, norm = fields.pop("perturbation"), fields.pop("norm").item()
        if perturbation.ndim != 3 or perturbation.dtype.kind != "f" or not np.all(np.isfinite(perturbation)):
            raise ValueError(f"perturbation must be [H, W, C], finite, got {perturbation.dtype} {perturbation.shape}")
        bounds = {name: fields.pop(name).item() for name in ("epsilon", "penalty") if name in fields}
        return cls(
            perturbation, history, Constraint(norm, **bounds), **{n: value.item() for n, value in fields.items()}
        )

    def _stored(self) -> dict[str, Any]:
        fields = {f"history/{name}": values for name, values in self.history.items()}
        bounds = {"epsilon": self.constraint.epsilon, "penalty": self.constraint.penalty}
        fields |= {name: value for name, value in bounds.items() if value is not None}
        names = ("oracle", "steps", "queries", "seconds", "labelled", "synthetic")
        fields |= {"norm": self.constraint.norm, **{name: getattr(self, name) for name in names}}
        theta = self.perturbation
        return {**fields, "perturbation": theta.astype(np.float32) if theta.dtype.name == "bfloat16" else theta}

    def _last(self, name):
        return float(self.history[name][-1]) if len(self.history.get(name, ())) else float("nan")

    def __repr__(self) -> str:
        bound, done = self.constraint, len(self.history.get("loss", ()))
        if bound.epsilon is None:
            kind = f"{bound.norm} penalty {bound.penalty:.4g}"
        else:
            kind = f"{bound.norm} ball of radius {bound.epsilon:.4g}"
            kind += f" ({255 * bound.epsilon:.3g}/255)" if bound.norm == "linf" else ""
        shape = ", ".join(map(str, self.perturbation.shape))
        norms = ", ".join(f"{name} {_norm(self.perturbation, name):.4g}" for name in ("linf", "l2", "l1"))
        success = f"clean accuracy {self.clean_accuracy:.2f}, " if self.labelled else ""
        if self.labelled or abs(self.asr - self.fooling_rate) > 1e-6:  # towards a target
            success += f"success (ASR) {self.asr:.2f}, "
        images = "synthetic" if self.synthetic else "the given"
        lines = [
            f"UniversalPerturbation [{shape}], {kind}, {done} of {self.steps} steps by {self.oracle}",
            f"  on {images} images: {success}fooling rate {self.fooling_rate:.2f}",
            f"  norms: {norms}",
            f"  evaluations of the model on one image: {self.queries}; {self.seconds:.1f} s",
            "  on unseen images: lft_jax.attack_success_rate(model, images, labels, result.perturbation)",
        ]
        return "\n".join(lines)


def _norm(theta: Float[np.ndarray, "*shape"], name: str) -> float:
    return float(np.linalg.norm(theta.ravel(), {"linf": np.inf, "l2": 2, "l1": 1}[name]))
