import io

import pytest

from lft_jax.auditing._plan import Cell
from lft_jax.auditing._progress import COMPILATION, Progress, Terminal


def cells(count, method="momentum", images=10):
    return [Cell(method, 0.1, images, 20, draw) for draw in range(count)]


def test_time_left_is_that_of_the_runs_so_far():
    now, seen = [0.0], []
    tracker = Progress(seen.append, lambda: now[0])
    plan = cells(4)
    tracker.plan(plan, 2, seconds_per_evaluation=1e-3)
    cost = plan[0].evaluations
    assert tracker.left() == pytest.approx(4 * cost * 1e-3 + COMPILATION)
    assert tracker.compiles(plan[0])
    tracker.finished(plan[0], 7 + cost * 1e-3)  # 7 s of compilation
    assert not tracker.compiles(plan[1])
    assert tracker.left() == pytest.approx(3 * cost * 1e-3)
    tracker.finished(plan[1], 2.0)
    assert tracker.left() == pytest.approx(2 * 2.0)
    assert tracker.left(share=0.5) == pytest.approx(1.5 * 2.0)
    other = Cell("momentum", 0.1, 1, 20, 0)
    tracker.add(other)
    assert tracker.left() == pytest.approx(3 * 2.0 + 7)  # another compilation, as long as the first
    now[0] = 9.5
    tracker.say("what")
    assert seen[-1] == {"runs": 7, "done": 4, "stored": 2, "now": "what", "seconds": 9.5, "left": tracker.left()}
    for cell in (*plan[2:], other):
        tracker.finished(cell, 1.0)
    assert tracker.left() == 0 and tracker.runs == 7


def test_a_search_for_a_start_is_counted_where_there_is_one():
    searched, plain, queries = (Cell(name, 0.1, 10, 20, 0).evaluations for name in ("uap-linf", "momentum", "patterns"))
    assert (searched - plain, plain, queries) == (808, 20 * 130, 20)


def test_lines_are_not_too_many(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    terminal = Terminal(True)
    for second in range(25):
        terminal({"runs": 3, "done": 0, "now": "an attack", "seconds": float(second), "left": 75.0})
    terminal({"runs": 3, "done": 3, "now": "report", "seconds": 26.0, "left": 0.0})
    assert out.getvalue().splitlines() == [
        "0/3 runs, 0:00 gone, about 1:15 left: an attack",
        "0/3 runs, 0:10 gone, about 1:15 left: an attack",
        "0/3 runs, 0:20 gone, about 1:15 left: an attack",
        "3/3 runs, 0:26 gone, done: report",
    ]
    silent = Terminal(False)
    silent({"runs": 3, "done": 3, "now": "report", "seconds": 99.0, "left": 0.0})
    assert len(out.getvalue().splitlines()) == 4
