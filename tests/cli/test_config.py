import dataclasses
import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import attack, evaluate, meta_train, quickstart, train_victim
from experiments.report import render
from experiments.studies import (
    ablation,
    breadth,
    classification,
    directions,
    omniglot,
    ship,
    sine,
    study,
    theory_gap,
    train_on_gpu,
    victims,
    zo_l2l,
)
from lft_jax.cli import config
from tests.programs import Program

PROGRAMS = (ablation, attack, breadth, evaluate, meta_train, quickstart, render, ship, sine, study, theory_gap)
PROGRAMS += (classification, directions, omniglot, train_on_gpu, train_victim, victims, zo_l2l)


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = config.required("A name.")
    kind: str = config.option("a", "A choice.", ("a", "b"))
    count: int | None = config.option(None, "A number.")
    sizes: tuple[int, ...] = config.option((1, 2), "Numbers.")
    fast: bool = config.option(False, "A switch.")


def parse(*arguments):
    values = flags.FlagValues()
    config.define_flags(Config, values)
    values(["program", *arguments])
    return config.read_flags(Config, values)


def test_flags_are_parsed_to_a_configuration():
    assert parse("--name=x") == Config("x")
    expected = Config("x", kind="b", count=3, sizes=(4, 5, 6), fast=True)
    assert parse("--name=x", "--kind=b", "--count=3", "--sizes=4,5,6", "--fast") == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((), "--name"), (("--name=x", "--kind=c"), "kind"), (("--name=x", "--count=two"), "count")],
)
def test_errors_name_the_invalid_flag(arguments, named):
    with pytest.raises(flags.Error, match=named):
        parse(*arguments)


def test_errors_name_a_list_with_invalid_entries():
    with pytest.raises(ValueError, match="--sizes: expected a list of int"):
        parse("--name=x", "--sizes=1,b")


PRESETS = {"small": {"name": "tiny", "count": 1}, "large": {"name": "huge", "sizes": (9,)}}


def test_flags_override_presets():
    def parse(*arguments):
        values = flags.FlagValues()
        config.define_flags(Config, values, PRESETS)
        values(["program", *arguments])
        return config.read_flags(Config, values, PRESETS)

    assert parse("--preset=small") == Config("tiny", count=1)
    assert parse("--preset=large", "--count=4", "--name=x") == Config("x", count=4, sizes=(9,))
    assert parse("--preset=large", "--sizes=1") == Config("huge", sizes=(1,))
    assert parse("--name=x") == Config("x")
    with pytest.raises(ValueError, match="--name is required, unless a --preset sets it"):
        parse()
    with pytest.raises(flags.Error, match="preset"):
        parse("--preset=medium")


def test_pairs():
    assert config.pairs("epsilon", ("digits=0.2", "mnist=1")) == {"digits": 0.2, "mnist": 1.0}
    with pytest.raises(ValueError, match="epsilon: expected name=number, got 'digits'"):
        config.pairs("epsilon", ("digits",))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_flag_has_a_help_text(program):
    assert program.__doc__
    for field in dataclasses.fields(program.Config):
        assert field.metadata["help"].endswith("."), field.name


def test_help_and_errors_of_a_program():
    def run(*arguments):
        return Program("experiments.attack", *arguments).wait()

    shown = run("--help")
    assert shown.exit_code == 0
    for text in (
        "universal perturbation",
        "Exit codes: 0 success",
        "--max_queries: Maximum number of image evaluations",
    ):
        assert text in shown.stdout
    missing = run("--victim=nowhere", "--output=x")
    assert missing.exit_code == 2
    assert "nowhere" in missing.stderr and "Traceback" not in missing.stderr


def test_compilation_cache_flag(tmp_path):
    script = (
        "import dataclasses, jax; from lft_jax.cli import config\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n"
        "    size: int = config.option(3, 'Size.')\n"
        "config.main(Config, lambda flags: print('cache:', jax.config.jax_compilation_cache_dir))\n"
    )

    def printed(*arguments, **variables):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        environment |= variables
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert printed() == f"cache: {tmp_path / 'lft_jax' / 'compiled'}"
    assert printed(f"--compilation_cache={tmp_path / 'here'}") == f"cache: {tmp_path / 'here'}"
    ours = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "ours")}
    assert printed(**ours) == f"cache: {tmp_path / 'ours'}"
    assert printed("--compilation_cache=", **ours) == "cache: None"
