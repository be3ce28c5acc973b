"""How far an audit is, and how long the rest will take."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lft_jax.auditing._plan import Cell

#: Seconds that a step takes to compile, until one has been compiled.
COMPILATION = 10.0
#: Seconds between two lines where the terminal cannot overwrite one.
PAUSE = 10.0


class Progress:
    """Predicts the time of runs from those that were made, and reports.

    A run takes the time of its evaluations and, the first of its kind, that of a compilation. The time of an evaluation
    is the median over the runs so far of the same method, or else of all; that of a compilation the mean.
    """

    def __init__(self, report: bool | Callable[[dict[str, Any]], object], clock: Callable[[], float] = time.monotonic):
        self.report: Callable[[dict[str, Any]], object] = report if callable(report) else Terminal(report)
        self.clock, self.began = clock, clock()
        self.runs = self.stored = 0
        self.remaining: list[Cell] = []
        self.programs: set[Any] = set()
        self.paces: dict[str, list[float]] = {}
        self.compilations: list[float] = []
        self.speed = 1e-3

    def plan(self, cells: Sequence[Cell], stored: int, seconds_per_evaluation: float) -> None:
        """Starts: with these cells to run, and this many that are there already."""
        self.remaining, self.stored, self.runs = list(cells), stored, len(cells) + stored
        self.speed = seconds_per_evaluation

    def add(self, cell: Cell) -> None:
        """Adds a run to the plan."""
        self.remaining.append(cell)
        self.runs += 1

    def compiles(self, cell: Cell) -> bool:
        """Whether the run is the first of its kind in this process."""
        return cell.program not in self.programs

    def finished(self, cell: Cell, seconds: float) -> None:
        """Takes the time of a run."""
        if self.compiles(cell):
            self.compilations.append(max(0.0, seconds - self._evaluating(cell)))
            self.programs.add(cell.program)
        else:
            self.paces.setdefault(cell.method, []).append(seconds / cell.evaluations)
        self.remaining.remove(cell)

    def left(self, share: float = 0.0) -> float:
        """Predicted seconds until the end, where this share of the first remaining run is done."""
        found, seen = 0.0, set(self.programs)
        for place, cell in enumerate(self.remaining):
            seconds = self._evaluating(cell)
            if cell.program not in seen:
                seen.add(cell.program)
                seconds += sum(self.compilations) / len(self.compilations) if self.compilations else COMPILATION
            found += seconds * (1 - share if place == 0 else 1)
        return found

    def say(self, what: str, share: float = 0.0) -> None:
        """Reports: what is being done, and which share of it is done."""
        done = self.runs - len(self.remaining)
        entry = {"runs": self.runs, "done": done, "stored": self.stored, "now": what}
        self.report({**entry, "seconds": self.clock() - self.began, "left": self.left(share)})

    def _evaluating(self, cell):
        paces = self.paces.get(cell.method) or [pace for found in self.paces.values() for pace in found]
        return (statistics.median(paces) if paces else self.speed) * cell.evaluations


class Terminal:
    """Prints progress to standard error: one line that is overwritten, or a line every ten seconds."""

    def __init__(self, shown: bool):
        self.shown, self.last = shown, -PAUSE
        self.overwrites = shown and sys.stderr.isatty()

    def __call__(self, entry: dict[str, Any]) -> None:
        if not self.shown:
            return
        ended = 0 < entry["runs"] == entry["done"]
        left = "done" if ended else f"about {clock(entry['left'])} left" if entry["runs"] else "planning"
        text = f"{entry['done']}/{entry['runs']} runs, {clock(entry['seconds'])} gone, {left}: {entry['now']}"
        if self.overwrites:
            print(f"\r\033[K{text[:118]}", end="\n" if ended else "", file=sys.stderr, flush=True)
        elif ended or entry["seconds"] - self.last >= PAUSE:
            self.last = entry["seconds"]
            print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds.

    Examples:
      >>> clock(75.2), clock(3700)
      ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
