"""The shell blocks of the pages: programs, flags, targets and extras that they name are there, and flags are read."""

import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from lft_jax.cli import attack, audit, config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
CONSOLE = {"lft-attack": attack.Config, "lft-audit": audit.Config}
#: Their modules and flags are looked at in tests/test_readme.py, but for those of other packages.
MODULES = ("python", ".venv/bin/python", ".venv/bin/pre-commit", "srun")


def commands():
    """Page and words of each command of each block."""
    for path in PAGES:
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if words := shlex.split(part, comments=True):
                        yield pytest.param(words, id=f"{path.name}: {' '.join(words)}")


def in_setup():
    """The extras that setup.py names."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return set(re.findall(r'^        "(\w+)": \[', text[text.index("extras_require") :], re.MULTILINE))


def targets():
    """The targets of the Makefile."""
    return set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_a_page_is_there_and_takes_its_flags(words):
    program, arguments = words[0], words[1:]
    if program in CONSOLE:
        values = flags.FlagValues()
        config.define_flags(CONSOLE[program], values)
        assert values(words) == [program]  # nothing that is no flag
        config.read_flags(CONSOLE[program], values, {})
    elif program == "make":
        assert {word for word in arguments if "=" not in word} <= targets()
    elif program == "pip":
        extras = re.findall(r"(?:\.|lft_jax)\[([\w,]+)\]", " ".join(arguments))
        assert arguments[0] == "install" and {name for names in extras for name in names.split(",")} <= in_setup()
    else:
        assert program in MODULES, f"{program}: say in this test how to look at it"


def test_what_is_looked_at_is_there():
    assert {"audit", "torch", "images"} <= in_setup() and {"test", "docs"} <= targets()
    found = [param.values[0][0] for param in commands()]
    assert {"lft-audit", "lft-attack", "pip", "make"} <= set(found)
    values = flags.FlagValues()
    config.define_flags(audit.Config, values)
    with pytest.raises(flags.UnrecognizedFlagError):
        values(["lft-audit", "--modle=x"])
