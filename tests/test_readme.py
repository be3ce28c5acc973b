"""The Python blocks of the README run, and documents name what is there. tests/docs runs the blocks of the pages."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_blocks(name, count):
    """What the blocks of a document printed, and the names that they left."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == count
    names, printed = {"__name__": "document"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, name, "exec"), names)
    return printed.getvalue(), names


@pytest.mark.standard_promotion
def test_the_readme_runs_and_prints_what_it_says():
    printed, names = run_blocks("README.md", 2)
    (said,) = re.findall(r"# fools (\d+)% of the test images", (ROOT / "README.md").read_text(encoding="utf-8"))
    (found,) = re.findall(r"fools (\d+)% of the test images", printed)
    assert abs(int(found) - int(said)) <= 5  # rounding differs between machines and versions
    assert float(names["theta"]["b"].min()) > 0.1  # ten steps from 0 towards 1


COMMAND = re.compile(r"(?:python|\$\(RUN\)) -m ((?:experiments|benchmarks)[\w.]*\w)((?:\s+--?\w+(?:=\S+)?)*)")


def test_commands_name_binaries_and_flags_that_exist():
    commands = []
    for path in [*DOCUMENTS, ROOT / "Makefile"]:
        if "docs/results" not in str(path):  # whose commands are of earlier commits, as the pages say
            text = path.read_text(encoding="utf-8").replace("\\\n", " ")
            commands += [(path.name, *found) for found in COMMAND.findall(text)]
    assert len(commands) > 40
    for name, module, arguments in commands:
        flags = {*importlib.import_module(module).Config.__dataclass_fields__, "preset", "help"}
        given = re.findall(r"--(\w+)", arguments)
        assert len(given) <= 6, f"{name}: {module} is given {len(given)} flags; name a preset"
        for flag in given:
            assert flag in flags or flag.removeprefix("no") in flags, (name, module, flag)


def test_the_readme_is_short():
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert sum(word != "|" for word in words) <= 680


SOURCES = [path for folder in ("lft_jax", "experiments", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")]
PATH = re.compile(r"(?<![\w/.{}*-])((?:docs|experiments|benchmarks|tests|lft_jax)/[\w./-]+\.(?:md|py|png))\b")
CAPITALS = re.compile(r"(?<![\w/.-])([A-Z][A-Z_]+\.md|PAPER|PROTOCOL|STYLE|DESIGN)\b(?! ?=)")


def test_nothing_refers_to_a_file_that_is_not_in_the_repository():
    others = [ROOT / name for name in ("CHANGELOG.md", "Makefile", "setup.py", ".ci/run", "pyproject.toml")]
    missing = []
    for path in [*DOCUMENTS, *SOURCES, *others]:
        text = path.read_text(encoding="utf-8")
        named = {name for name in PATH.findall(text) if "NAME" not in name}
        named |= {name if name.endswith(".md") else f"{name}.md" for name in CAPITALS.findall(text)}
        missing += [(path.name, name) for name in named if not any((p / name).exists() for p in (ROOT, path.parent))]
    assert not missing
