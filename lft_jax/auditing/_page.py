"""The page: what the template gets, and its rendering."""

import datetime
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lft_jax.auditing import _plots, _words
from lft_jax.auditing._findings import Examples, methods_used, spectrum
from lft_jax.auditing._plan import METHODS, radius

#: Classes that a matrix shows.
CLASSES = 12


def page(results: Mapping[str, Any], examples: Examples, class_names: Sequence[str] | None) -> str:
    """The page as HTML.

    Args:
      results: of the audit.
      examples: images to show.
      class_names: a name for each class, or None.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"The page needs {error.name}: pip install 'lft_jax[audit]'.") from error
    folder = importlib.resources.files("lft_jax.auditing") / "templates"
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _words.percent, "interval": _words.interval, "radius": radius}
    names = _Names(class_names)
    return environment.get_template("page.html").render(
        results=results,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        panels=_plots.panels(results),
        accuracy=_plots.accuracy(results),
        matrix=matrix(results, names),
        perturbation=_perturbation(examples.perturbation),
        examples=_examples(examples, names, results["settings"]["labelled"]),
        methods=[METHODS[name] for name in methods_used(results)],
        name_of=names,
        date=datetime.date.today().isoformat(),
    )


class _Names:
    """The name of a class."""

    def __init__(self, names: Sequence[str] | None):
        self.names = names or ()

    def __call__(self, label: int) -> str:
        """With its number, if it has a name."""
        return f"{label} {self.names[label]}".rstrip() if label < len(self.names) else f"{label}"


def matrix(results: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """Which classes end in which: the classes with most images that change, and the answers that most of these get.

    Returns:
      `columns`: headings; `rows`: of each class its heading and cells, each a count, its share of the row, and whether
      it is the class itself; `more`: whether there are other classes.
    """
    counts: dict[tuple[int, int], int] = {(i, j): count for i, j, count in results["collapse"]}
    classes = range(results["classes"])
    if results["classes"] <= CLASSES:
        rows, columns = list(classes), list(classes)
    else:
        moved: dict[int, int] = {}
        answers: dict[int, int] = {}
        for (i, j), count in counts.items():
            moved[i] = moved.get(i, 0) + (count if i != j else 0)
            answers[j] = answers.get(j, 0) + count
        rows = sorted(moved, key=lambda label: (-moved[label], label))[:CLASSES]
        columns = sorted(answers, key=lambda label: (-answers[label], label))[: CLASSES - 1]
    shown = []
    for i in rows:
        total = sum(count for (row, _), count in counts.items() if row == i)
        cells = [(counts.get((i, j), 0), i == j) for j in columns]
        if len(columns) < results["classes"]:
            cells.append((total - sum(count for count, _ in cells), False))
        shown.append(
            {
                "name": names(i),
                "total": total,
                "cells": [{"count": c, "share": c / total if total else 0.0, "same": same} for c, same in cells],
            }
        )
    headings = [names(j) for j in columns] + (["others"] if len(columns) < results["classes"] else [])
    return {"columns": headings, "rows": shown, "more": len(rows) < results["classes"]}


def _perturbation(theta):
    """The perturbation as it is, amplified, and its spectrum."""
    largest = float(np.abs(theta).max()) or 1.0
    cut = _plots.middle(theta)
    plain = _plots.picture(0.5 + cut, lossless=True)
    amplified = _plots.picture(0.5 + cut / (2 * largest))
    frequencies = _plots.picture(_plots.heat(spectrum(theta)[0]), lossless=min(theta.shape[:2]) <= _plots.LOSSLESS)
    return {
        "plain": plain,
        "amplified": _plots.magnified(amplified, 240),
        "spectrum": _plots.magnified(frequencies, 240),
        "factor": 0.5 / largest,
        "cut": cut.shape != theta.shape,
        "grey": theta.shape[-1] not in (1, 3),
    }


def _examples(examples, names, labelled):
    """The images before and after, with the answers of the model."""
    images = examples.images
    before = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    after = np.clip(before + examples.perturbation[None], 0, 1)
    found = []
    for place, name in enumerate(examples.names):
        pictures = [_plots.magnified(_plots.picture(part[place]), 112) for part in (before, after)]
        first, then = int(examples.before[place]), int(examples.after[place])
        found.append(
            {
                "name": name,
                "label": names(int(examples.labels[place])) if labelled else None,
                "pictures": pictures,
                "before": names(first),
                "after": names(then),
                "wrong_before": labelled and first != examples.labels[place],
                "changed": first != then,
                "confidence_before": float(examples.confidence_before[place]),
                "confidence_after": float(examples.confidence_after[place]),
            }
        )
    return found
