"""What an audit returns."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from lft_jax._files import write_bytes
from lft_jax.auditing import _junit, _page
from lft_jax.auditing._findings import Examples
from lft_jax.auditing._store import Run, write_array, write_json


@dataclasses.dataclass(frozen=True, eq=False)
class AuditReport:
    """The result of `audit`. `print` shows the verdict.

    Attributes:
      results: what is behind every number of the page, as JSON holds it: `headline`, `threats`, `cells`, `collapse`,
        `clean_accuracy`, `split`, `settings`, `versions` and others (docs/audit.md).
      runs: all runs, with their perturbations.
      examples: the images that the page shows.
      class_names: a name for each class, or None.
    """

    results: dict[str, Any]
    runs: tuple[Run, ...]
    examples: Examples
    class_names: tuple[str, ...] | None = None

    @property
    def verdict(self) -> str:
        """The verdict in plain words, with its intervals."""
        found = self.results["verdict"]
        return "\n".join([found["title"], *found["sentences"]])

    @property
    def asr(self) -> float:
        """Success rate of the strongest attack at the largest radius, on the query images right when clean."""
        return self.results["headline"]["success"]["rate"]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `asr`."""
        found = self.results["headline"]["success"]
        return found["low"], found["high"]

    @property
    def perturbation(self) -> np.ndarray:
        """That of the strongest attack at the largest radius, `[H, W, C]`, to be added to images in [0, 1]."""
        return self.examples.perturbation

    def html(self) -> str:
        """The page: one file without scripts that loads nothing, of at most 2 MB.

        Raises:
          ModuleNotFoundError: without matplotlib or jinja2 (the extra `audit`).
        """
        return _page.page(self.results, self.examples, self.class_names)

    def save(self, folder: str | os.PathLike[str], *, fail_above: float | None = None) -> None:
        """Writes the page, the numbers behind it and the perturbations.

        Written are `index.html`, `report.json`, `junit.xml`, `perturbation.npy` (that of the verdict) and
        `runs/*.npy` (those of all runs). Files are replaced when they are complete.

        Args:
          folder: need not exist.
          fail_above: the success rate in [0, 1) whose excess by the lower bound of the interval is a failure in
            `junit.xml`; None for no failure.

        Raises:
          ValueError: for a `fail_above` out of range.
          OSError: if the folder cannot be written.
          ModuleNotFoundError: as `html`.
        """
        folder = Path(folder)
        page, junit = self.html(), _junit.junit(self.results, fail_above)
        for run in self.runs:
            write_array(folder / "runs" / f"{run.cell.name}.npy", run.perturbation)
        write_array(folder / "perturbation.npy", self.perturbation)
        write_json(folder / "report.json", self.results)
        write_bytes(folder / "junit.xml", junit.encode())
        write_bytes(folder / "index.html", page.encode())

    def __repr__(self) -> str:
        parts, failed = self.results["split"], len(self.results["failures"])
        images = f"{parts['support']} images to attack from, {parts['choice']} to choose, {parts['query']} to judge"
        runs = f"{len(self.runs)} runs" + (f", {failed} failed" if failed else "")
        return f"AuditReport: {runs}; {images}\n{self.verdict}"
