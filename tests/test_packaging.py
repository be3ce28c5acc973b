"""Requirements, package contents, and the time and imports of `import lft_jax`."""

import ast
import importlib
import importlib.metadata
import itertools
import json
import pathlib
import runpy
import subprocess
import sys

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13"]
#: Distributions of packages by another name, which may not be installed.
NAMED = {"art": "adversarial-robustness-toolbox"}
HEAVY = {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "mlxtend", "pandas", "orbax", "flax"}


def requirements(lines):
    lines = [line.partition("#")[0].strip() for line in lines]
    return [Requirement(line) for line in lines if line]


def pins(python):
    """`{name: version}` in requirements.txt for a Python version."""
    found = {}
    files = ROOT / "requirements.txt", ROOT / ".ci" / "requirements-frameworks.txt"
    for requirement in requirements(line for path in files for line in path.read_text().splitlines()):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            specifiers = list(requirement.specifier)
            assert [s.operator for s in specifiers] == ["=="], f"{requirement} is not an exact pin"
            (specifier,) = specifiers
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice on Python {python}"
            found[name] = specifier.version
    return found


@pytest.fixture
def package(monkeypatch):
    """The keyword arguments of `setup` in setup.py."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return arguments


def ranges(package):
    return requirements(itertools.chain(package["install_requires"], *package["extras_require"].values()))


@pytest.mark.parametrize("python", PYTHONS)
def test_version_ranges_admit_pinned_versions(package, python):
    pinned = pins(python)
    assert {canonicalize_name(r.name) for r in ranges(package)} == set(pinned)
    for requirement in ranges(package):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


def third_party_imports(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"lft_jax", "experiments"}


def test_every_import_is_declared(package):
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(r.name) for r in ranges(package)}
    for path in [*ROOT.glob("lft_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        for name in third_party_imports(path):
            own = [NAMED.get(name, name)]
            found = {canonicalize_name(distribution) for distribution in distributions.get(name, own)}
            assert found & declared, f"{path.relative_to(ROOT)} imports {name}, which setup.py does not declare"


def test_package_data_and_packages_exist(package):
    assert {"lft_jax", "lft_jax.pretrained", "lft_jax.cli"} <= set(package["packages"])
    assert all(
        name.partition(".")[0] == "lft_jax" for name in package["packages"]
    )  # users may have an experiments package
    for script in package["entry_points"]["console_scripts"]:
        module, _, function = script.partition(" = ")[2].partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert set(package["package_data"]) <= set(package["packages"])
    assert package["version"] == runpy.run_path(str(ROOT / "lft_jax" / "_version.py"))["__version__"]


def test_import_is_light():
    """The time of `import lft_jax` after `import jax`. Up to three attempts, since machines are shared."""
    program = (
        "import json, sys, time, jax\n"
        "start = time.perf_counter()\n"
        "import lft_jax\n"
        "print(json.dumps([time.perf_counter() - start, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        seconds, modules = json.loads(run.stdout)
        assert not HEAVY & set(modules)
        if seconds < 1.5:
            break
    assert seconds < 1.5
