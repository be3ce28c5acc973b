"""Imports go one way: read from the source, module by module, imports inside functions included."""

import ast
import functools
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
#: What each part of the package may import besides the modules of the base and its own.
BASE = {"base"} | {f"_{part}" for part in ("version", "deprecation", "files", "layers", "memory", "periods", "present")}
BASE |= {"_bounded", "_reading", "_rewriting", "_spectrum"}
MAY_IMPORT = {
    **{name: set() for name in BASE},
    "optimizers": set(),
    "oracles": set(),
    "data": set(),
    "tasks": {"oracles", "data"},
    "meta": {"optimizers", "oracles", "data", "tasks"},
    "victims": {"data"},
    "models": set(),
    "pretrained": {"optimizers"},
    "evaluation": {"optimizers", "oracles", "data", "tasks", "meta"},
    "attack": {"optimizers", "oracles", "data", "tasks", "pretrained", "models"},
    "defence": {"optimizers", "oracles", "data", "tasks", "pretrained"},
    "interop": {"data", "tasks", "attack", "models"},
    "auditing": {"optimizers", "oracles", "data", "tasks", "pretrained", "attack", "models"},
    "cli": {
        "optimizers",
        "oracles",
        "data",
        "tasks",
        "meta",
        "victims",
        "pretrained",
        "evaluation",
        "attack",
        "auditing",
        "interop",
        "models",
    },
}
PACKAGES = [path.parent.name for path in sorted((ROOT / "lft_jax").glob("*/__init__.py"))]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path
    for folder in ("lft_jax", "experiments", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
}


@functools.cache
def imports(name):
    """The modules of this repository that a module imports; `from package import module` is an import of the module."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            targets = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {target if target in MODULES else node.module for target in targets}
    return {module for module in found if module in MODULES}


def part(module):
    return module.split(".")[1] if "." in module else None


def test_the_table_holds_every_part():
    assert MAY_IMPORT.keys() == {part(name) for name in MODULES if name.startswith("lft_jax.")}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("lft_jax.")))
def test_no_module_imports_what_is_above_it(name):
    above = {
        module
        for module in imports(name)
        if part(module) not in {part(name), *BASE, *MAY_IMPORT[part(name)]} or not module.startswith("lft_jax")
    }
    assert not above, f"{name} may not import {', '.join(sorted(above))}"


def test_nothing_below_the_binaries_imports_them():
    for name in MODULES:
        tops = {module.partition(".")[0] for module in imports(name)}
        assert name.startswith("benchmarks") or "benchmarks" not in tops, name
        assert not name.startswith("lft_jax") or tops <= {"lft_jax"}, name


def test_there_is_no_circle():
    graph = {name: imports(name) - {name} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_a_circle_and_an_import_upwards_would_be_seen(tmp_path, monkeypatch):
    for name, text in {"a": "from lft_jax.tasks import b", "b": "def f():\n    import lft_jax.oracles.a"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    made = {"lft_jax.oracles.a": tmp_path / "a.py", "lft_jax.tasks.b": tmp_path / "b.py"}
    monkeypatch.setattr(sys.modules[__name__], "MODULES", made)
    with pytest.raises(AssertionError, match=r"lft_jax.oracles.a may not import lft_jax.tasks.b"):
        test_no_module_imports_what_is_above_it("lft_jax.oracles.a")
    test_no_module_imports_what_is_above_it("lft_jax.tasks.b")
    with pytest.raises(graphlib.CycleError):
        test_there_is_no_circle()


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_has_a_docstring_and_an_explicit_face(name):
    package = importlib.import_module(f"lft_jax.{name}")
    assert "::\n\n" in package.__doc__  # a drawing of how the modules fit together
    assert sorted(package.__all__) == sorted(set(package.__all__))
    for public in package.__all__:
        assert getattr(package, public) is not None and not (public.startswith("_") and public != "__version__")


def test_modules_that_only_their_package_uses_are_private():
    """Neither imported from elsewhere nor the home of a public name: then the name begins with an underscore."""
    for name in [name for name in MODULES if name.count(".") == 2 and name.startswith("lft_jax.")]:
        package, _, own = name.rpartition(".")
        face = importlib.import_module(package)
        exports = {getattr(getattr(face, public), "__module__", None) for public in face.__all__}
        users = {user for user in MODULES if name in imports(user) and not user.startswith(package)}
        binary = package == "lft_jax.cli"
        assert own.startswith("_") or name in exports or users or binary, name


def test_import_loads_only_what_it_needs():
    """Beyond jax and optax, which loads absl itself."""
    program = (
        "import sys, jax, optax\n"
        "before = set(sys.modules)\n"
        "import lft_jax\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(run.stdout.split()) - sys.stdlib_module_names
    assert loaded <= {"lft_jax", "jaxtyping", "safetensors", "jax", "optax", "numpy"}
