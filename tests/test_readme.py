"""Every Python block of the README and of the docs runs, in order, in the names that the blocks before it left."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
OWN_TASKS = README.parent / "docs" / "own_tasks.md"


def run_blocks(document, at_least):
    """What the document's blocks printed, and the names that they left."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= at_least
    names, printed = {"__name__": "document"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, str(document), "exec"), names)
    return printed.getvalue(), names


@pytest.mark.standard_promotion
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_readme_runs():
    printed, names = run_blocks(README, 5)
    rate = float(printed.splitlines()[0])
    assert 0.1 < rate <= 1  # a universal perturbation of this size fools a digit classifier on more than one in ten
    assert names["metrics"]["grad_norm"] > 0


@pytest.mark.standard_promotion
def test_a_task_of_ones_own_is_learned():
    sgd, lft = map(float, re.findall(r"\d\.\d+", run_blocks(OWN_TASKS, 2)[0]))
    assert 0.9 < sgd <= 1  # guessing is right half the time
    assert 0.9 < lft <= 1


def test_commands_name_binaries_and_flags_that_exist():
    import importlib

    commands = re.findall(r"python -m (experiments\.\w+)((?: --?[\w=/.,]+)*)", README.read_text(encoding="utf-8"))
    assert len(commands) >= 4
    for module, arguments in commands:
        fields = importlib.import_module(module).Config.__dataclass_fields__
        for name in re.findall(r"--(\w+)", arguments):
            assert name in fields or name.removeprefix("no") in fields, (module, name)
