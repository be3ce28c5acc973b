"""The Python blocks of each page run, in the names that the blocks before left, and print what the page says.

What a page says is a comment on a line with `print`, or a `text` block after a Python block. Numbers may differ as
rounding makes them differ: percentages by 10, others by a tenth, seconds at will.
"""

import contextlib
import functools
import io
import os
import re
from pathlib import Path

import jax
import pytest

import lft_jax.victims

ROOT = Path(__file__).parents[2]
#: Pages of frameworks that `make test` does not install, or whose adapters it tests in tests/models in less time.
FRAMEWORKS = ("frameworks/pytorch", "frameworks/keras", "frameworks/onnx", "frameworks/jax")
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)
SAID = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def pages():
    found = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "```python" in path.read_text(encoding="utf-8")]
    for path in found:
        name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        marks = pytest.mark.frameworks, pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks
        yield pytest.param(name, marks=marks if name in FRAMEWORKS else (), id=name)


def agree(said, printed):
    """Whether a line is what a page says, but for rounding."""
    if NUMBER.sub("#", said) != NUMBER.sub("#", printed):
        return False
    for a, b in zip(NUMBER.finditer(said), NUMBER.finditer(printed), strict=True):
        unit, (x, y) = said[a.end() :], (float(n[0].replace(",", "")) for n in (a, b))
        if not unit.startswith(" s") and abs(x - y) > (10 if unit.startswith("%") else 0.1 * max(1, x)):
            return False
    return True


def run(text, name):
    """Runs the blocks of a page; returns the names that they left, and what was said and printed, as lines."""
    names, printed, said, after = {"__name__": "page"}, io.StringIO(), [], False
    with contextlib.redirect_stdout(printed):
        for kind, block in BLOCK.findall(text):
            if kind == "python":
                exec(compile(block, name, "exec"), names)
                said += SAID.findall(block)
            elif after:
                said += block.splitlines()
            after = kind == "python"
    return names, said, printed.getvalue().splitlines()


@functools.cache
def trained(config):
    from lft_jax.data import load_source

    return train_victim(config, load_source(config.source, "train"), load_source(config.source, "test"))


train_victim = lft_jax.victims.train_victim


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """Where a reader runs the blocks: in a folder with the victims, with JAX as it is by default."""
    (tmp_path / "victims").symlink_to(ROOT / "victims")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
    # Pages that begin with the same victim train it once.
    monkeypatch.setattr(lft_jax.victims, "train_victim", lambda config, train, test: trained(config))
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", list(pages()))
def test_the_blocks_run_and_print_what_the_page_says(name, reader):
    names, said, printed = run((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), name)
    left = iter(printed)
    for line in said:
        assert any(agree(line, other) for other in left), f"the page says {line!r}; printed were {printed}"
    CHECKS.get(name, lambda names, printed: None)(names, printed)


def check_attack(names, printed):
    given, without = (float(line) for line in printed[:2])
    assert 0.1 < given <= 1 and 0.1 < without <= 1
    assert names["result"].history["queries"][-1] <= 2000


def check_meta_training(names, printed):
    assert names["metrics"]["grad_norm"] > 0


def check_own_tasks(names, printed):
    sgd, lft = map(float, re.findall(r"\d\.\d+", " ".join(printed))[:2])
    assert 0.9 < sgd <= 1 and 0.9 < lft <= 1  # guessing is right half the time


def check_defence(names, printed):
    trained, before, after = ([float(number) for number in re.findall(r"\d+\.\d+", line)] for line in printed[:3])
    assert min(trained) > 0.7 and after[0] > before[0] - 0.03
    assert after[1] < before[1] and after[2] < before[2]  # fresh attacks, with gradients and with queries
    assert names["report"].asr < before[1] and Path("runs/audit/index.html").is_file()


CHECKS = {
    "defence": check_defence,
    "attack": check_attack,
    "meta_training": check_meta_training,
    "own_tasks": check_own_tasks,
}


def test_numbers_may_differ_as_rounding_makes_them():
    assert agree("fools 55% of the test images", "fools 61% of the test images")
    assert not agree("fools 55% of the test images", "fools 66% of the test images")
    assert agree("1,610 queries; 7.7 s", "1,610 queries; 0.3 s") and not agree("1,610 queries", "2,610 queries")
    assert not agree("fools 55%", "fooled 55%")


def test_a_page_that_says_something_else_fails():
    text = "```python\nprint(1 + 1)  # 2\nprint('a')\n```\n```text\nb\n```\n"
    _, said, printed = run(text, "page")
    assert said == ["2", "b"] and printed == ["2", "a"]
