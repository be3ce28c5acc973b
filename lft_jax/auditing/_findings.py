"""What the runs of an audit say: the dictionary behind every number of the report."""

import dataclasses
import importlib.metadata
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lft_jax._version import __version__
from lft_jax.auditing import _words
from lft_jax.auditing._model import confidences
from lft_jax.auditing._plan import METHODS, Cell, radius
from lft_jax.auditing._split import Split
from lft_jax.auditing._statistics import Rate, collapse, rate, rate_of, success
from lft_jax.auditing._store import Run

#: Images that are shown before and after.
SHOWN = 12
#: Changes when the dictionary does.
FORMAT = 1


class Examples(NamedTuple):
    """Images before and after the strongest attack: the first query images, whatever became of them.

    Attributes:
      images: `[E, H, W, C]` uint8, or floating-point in [0, 1].
      perturbation: `[H, W, C]`.
      labels: `[E]`.
      names: of the images.
      before, after: `[E]`, predicted classes.
      confidence_before, confidence_after: `[E]`.
    """

    images: np.ndarray
    perturbation: np.ndarray
    labels: np.ndarray
    names: list[str]
    before: np.ndarray
    after: np.ndarray
    confidence_before: np.ndarray
    confidence_after: np.ndarray


class _Judge(NamedTuple):
    """The labels and clean predictions of the choice and query images, by part."""

    choices: int
    labels: np.ndarray
    clean: np.ndarray

    def chosen(self, run: Run) -> Rate:
        """The success rate on the choice images."""
        part = slice(self.choices)
        return success(self.clean[part], run.predicted[part], self.labels[part], run.cell.target)

    def success(self, run: Run) -> Rate:
        """The success rate on the query images."""
        part = slice(self.choices, None)
        return success(self.clean[part], run.predicted[part], self.labels[part], run.cell.target)

    def accuracy(self, run: Run) -> Rate:
        """The share of all query images that are classified correctly when perturbed."""
        return rate(run.predicted[self.choices :] == self.labels[self.choices :])

    def merit(self, run: Run) -> tuple[float, int]:
        """What the strongest of several runs has most of."""
        return np.nan_to_num(self.chosen(run).rate, nan=-1.0), -run.evaluations


def _judge(split: Split, labels: np.ndarray, clean: np.ndarray) -> _Judge:
    rows = np.concatenate([split.choice, split.query])
    return _Judge(len(split.choice), labels[rows], clean[rows].argmax(-1))


def strongest(
    runs: Sequence[Run], split: Split, labels: np.ndarray, clean: np.ndarray, radii: Mapping[str, Sequence[float]]
) -> Run:
    """The run at the largest radius that has most success on the choice images; the query images have no say."""
    judge = _judge(split, labels, clean)
    norms = ["linf", "l2"] if radii["linf"] else ["l2"]
    for norm in norms:
        found = [run for run in runs if run.cell.norm == norm and run.cell.target is None]
        largest = max((run.cell.epsilon for run in found), default=None)
        if largest is not None:
            return max((run for run in found if run.cell.epsilon == largest), key=judge.merit)
    raise ValueError("budget: no run finished.")


def examples(
    images: np.ndarray,
    labels: np.ndarray,
    clean: np.ndarray,
    split: Split,
    best: Run,
    names: Sequence[str] | None,
) -> Examples:
    """Images to show."""
    rows, after = split.query[:SHOWN], slice(len(split.choice), len(split.choice) + SHOWN)
    return Examples(
        images[rows],
        best.perturbation,
        labels[rows],
        [f"image {row}" if names is None else names[row] for row in rows],
        clean[rows].argmax(-1),
        best.predicted[after],
        confidences(clean[rows]),
        best.confidence[after],
    )


def describe(
    runs: Sequence[Run],
    failures: list[dict[str, str]],
    split: Split,
    labels: np.ndarray,
    clean: np.ndarray,
    settings: dict[str, Any],
    about: dict[str, str],
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """All that the page says, as JSON can hold it.

    Args:
      runs: finished ones.
      failures: title and error of those that failed.
      split: rows of the parts.
      labels: `[N]`.
      clean: `[N, classes]`, logits.
      settings: of the audit.
      about: what the user says of model and data.
      shape: `(H, W, C)`.
    """
    judge = _judge(split, labels, clean)
    best = strongest(runs, split, labels, clean, settings["epsilons"])
    before, after = judge.clean[judge.choices :], best.predicted[judge.choices :]
    truth = judge.labels[judge.choices :]
    matrix = collapse(before, after, truth, clean.shape[-1])
    found: dict[str, Any] = {
        "format": FORMAT,
        "about": about,
        "settings": settings,
        "split": {name: len(rows) for name, rows in split._asdict().items()},
        "rows": {name: rows.tolist() for name, rows in split._asdict().items()},
        "shape": list(shape),
        "classes": clean.shape[-1],
        "clean_accuracy": rate(before == truth).as_dict() if settings["labelled"] else None,
        "headline": _threat(best, judge),
        "threats": _threats(runs, judge),
        "cells": _cells(runs, judge),
        "collapse": [[int(i), int(j), int(matrix[i, j])] for i, j in zip(*np.nonzero(matrix), strict=True)],
        "dominant": _dominant(*dominant_class(best, split, labels, clean), before, after, truth),
        "targeted": next((_threat(run, judge) for run in runs if run.cell.target is not None), None),
        "failures": failures,
        "versions": _versions() | {"device": " and ".join(dict.fromkeys(run.device for run in runs))},
    }
    of_best = next(cell for cell in found["cells"] if any(d["run"] == best.cell.name for d in cell["draws"]))
    found["headline"]["spread"] = {name: of_best[name] for name in ("mean", "least", "most")}
    found["headline"]["spread"]["draws"] = len(of_best["draws"])
    found["spectrum"] = spectrum(best.perturbation)[1]
    found["verdict"] = _words.verdict(found)
    found["not_tried"] = _words.not_tried(found)
    return found


def _threat(run: Run, judge: _Judge) -> dict[str, Any]:
    """One run with its rates."""
    cell = run.cell
    return {
        "run": cell.name,
        "title": cell.title,
        "short": f"{METHODS[cell.method].title}, {cell.effort}",
        **_settings(cell),
        "draw": cell.draw,
        "radius": radius(cell.epsilon, cell.norm),
        "success": judge.success(run).as_dict(),
        "accuracy": judge.accuracy(run).as_dict(),
        "chosen_by": judge.chosen(run).as_dict(),
        "evaluations": run.evaluations,
        "seconds": run.seconds,
        "norms": {
            "linf": float(np.abs(run.perturbation).max()),
            "l2": float(np.linalg.norm(run.perturbation.ravel())),
        },
    }


def _threats(runs, judge):
    """For each ball, the run that has most success on the choice images."""
    balls: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        if run.cell.target is None:
            balls.setdefault((run.cell.norm, run.cell.epsilon), []).append(run)
    ordered = sorted(balls, key=lambda ball: (ball[0] != "linf", ball[1]))
    return [_threat(max(balls[ball], key=judge.merit), judge) for ball in ordered]


def _settings(cell: Cell) -> dict[str, Any]:
    names = ("method", "norm", "epsilon", "images", "size", "target", "gradients")
    return {name: getattr(cell, name) for name in names}


def _cells(runs, judge):
    """Runs that differ in the draw of the support images only, together."""
    groups: dict[Cell, list[Run]] = {}
    for run in runs:
        groups.setdefault(dataclasses.replace(run.cell, draw=0), []).append(run)
    found = []
    for cell, draws in groups.items():
        rates = [judge.success(run) for run in draws]
        mean = sum(r.hits for r in rates) / len(rates)
        together = rate_of(mean, rates[0].images)
        timed = [run.seconds for run in draws if not run.compiled]
        found.append(
            {
                **_settings(cell),
                "title": cell.title,
                "mean": together.as_dict()["rate"],
                "low": together.low,
                "high": together.high,
                "least": min(r.rate for r in rates) if together.images else None,
                "most": max(r.rate for r in rates) if together.images else None,
                "evaluations": round(sum(run.evaluations for run in draws) / len(draws)),
                "seconds": round(float(np.median(timed)), 3) if timed else None,
                "draws": [
                    {
                        "run": run.cell.name,
                        "draw": run.cell.draw,
                        "success": rate_.as_dict()["rate"],
                        "support_success": run.history["asr"][-1] if run.history["asr"] else None,
                        "evaluations": run.evaluations,
                        "seconds": run.seconds,
                        "cpu_seconds": run.cpu_seconds,
                        "compiled": run.compiled,
                    }
                    for run, rate_ in zip(draws, rates, strict=True)
                ],
            }
        )
    return found


def dominant_class(best: Run, split: Split, labels: np.ndarray, clean: np.ndarray) -> tuple[int, int]:
    """The class that most choice images fall into by the strongest attack, and how many do.

    If none changes its class, the class that most are in, and 0.
    """
    judge = _judge(split, labels, clean)
    before, after = judge.clean[: judge.choices], best.predicted[: judge.choices]
    moved = after[after != before]
    ((label, count),) = Counter((moved if len(moved) else after).tolist()).most_common(1)
    return int(label), count if len(moved) else 0


def _dominant(label, fallen, before, after, truth):
    """Of the query images of other classes that are right when clean, those that end in this class too."""
    found = success(before, after, truth, label)
    return {"class": label, "choices": fallen, "images": int(found.hits), "of": found.images}


def spectrum(theta: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Magnitudes of the frequencies of a perturbation `[H, W, C]`, and what stands out of them.

    Returns:
      The root mean square over channels `[H, W]`, zero frequency in the centre; and the strongest frequency but zero:
      its period in pixels, and its share of the energy together with its mirror image.
    """
    magnitude = np.abs(np.fft.fft2(theta.astype(np.float64), axes=(0, 1)))
    energy = (magnitude**2).sum(-1)
    total = float(energy.sum()) or 1.0
    rest = energy.copy()
    rest[0, 0] = 0
    row, column = np.unravel_index(int(rest.argmax()), rest.shape)
    height, width = energy.shape
    frequency = math.hypot(min(row, height - row) / height, min(column, width - column) / width)
    mirrored = rest[-row % height, -column % width] if (-row % height, -column % width) != (row, column) else 0.0
    return np.fft.fftshift(np.sqrt(energy / theta.shape[-1])), {
        "period": 1 / frequency if frequency else None,
        "share": float(rest[row, column] + mirrored) / total,
        "constant_share": float(energy[0, 0]) / total,
    }


def _versions():
    packages = ("jax", "jaxlib", "optax", "numpy", "matplotlib", "jinja2")
    found = {"lft_jax": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    return found


def device() -> str:
    """What attacks run on."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"


def methods_used(results: Mapping[str, Any]) -> list[str]:
    """Names of the methods that have cells, in the order of `METHODS`."""
    there = {cell["method"] for cell in results["cells"]}
    return [name for name in METHODS if name in there]
