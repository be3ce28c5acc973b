"""The examples of the docstrings run, with the shapes and types of all public signatures checked by beartype."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys

import beartype
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError, jaxtyped

import lft_jax

# The subpackages that `import lft_jax` leaves out, too, so that the public names of all of them are seen.
MODULES = [importlib.import_module(module.name) for module in pkgutil.walk_packages(lft_jax.__path__, "lft_jax.")]
PACKAGES = [lft_jax, *(module for module in MODULES if hasattr(module, "__path__"))]
PUBLIC = {name: getattr(package, name) for package in PACKAGES for name in package.__all__}
EXAMPLES = {
    test.name: (module, test)
    for module in [lft_jax, *MODULES]
    for test in doctest.DocTestFinder(exclude_empty=True).find(module)
    if test.examples
}
CHECK = jaxtyped(typechecker=beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True)))


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("lft_jax")


@pytest.fixture(scope="module")
def checks():
    """`(functions, methods)`, those of the public names with checks: `{id: function}`, `{(class, name): method}`."""
    functions = {id(thing): CHECK(thing) for thing in PUBLIC.values() if inspect.isfunction(thing)}
    methods = {
        (thing, name): CHECK(method)
        for thing in {id(c): c for c in PUBLIC.values() if inspect.isclass(c) and is_ours(c)}.values()
        for name, method in vars(thing).items()
        if inspect.isfunction(method) and is_ours(method) and (not name.startswith("_") or name == "__call__")
    }
    return functions, methods


@pytest.fixture
def checked(monkeypatch, checks):
    """Every public function, and every public method of a public class, checks its arguments and what it returns."""
    functions, methods = checks
    for module in [name for name in list(sys.modules) if name.startswith("lft_jax")]:
        for name, thing in list(vars(sys.modules[module]).items()):
            if id(thing) in functions:
                monkeypatch.setattr(sys.modules[module], name, functions[id(thing)])
    for (owner, name), method in methods.items():
        monkeypatch.setattr(owner, name, method)
    yield
    for module in MODULES:  # what was built of the checked functions is not for other tests
        for thing in vars(module).values():
            if hasattr(thing, "cache_clear") and is_ours(thing):
                thing.cache_clear()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.standard_promotion
def test_examples_run_and_keep_to_their_signatures(name, checked):
    module, test = EXAMPLES[name]
    test.globs = dict(vars(module))  # with the checked functions in it
    failed = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=failed.append)
    assert not failed, "".join(failed)


def test_examples_are_many():
    functions = {name for name, thing in PUBLIC.items() if inspect.isfunction(thing) and is_ours(thing)}
    shown = {name.rpartition(".")[2] for name in EXAMPLES}
    assert len(functions & shown) >= 0.8 * len(functions), sorted(functions - shown)


def test_a_call_of_another_shape_or_type_is_seen(checked):
    family_of, key = lft_jax.uap_family, jax.random.key(0)
    images, labels = np.zeros((12, 4, 4, 1), np.float32), np.arange(12) % 2
    logits_fn = jax.tree_util.Partial(lambda x: x[:, 0, :2, 0])
    family = family_of(images, labels, logits_fn, ways=2, epsilon=0.1)
    theta, support = family.init(key), family.sample(key).support
    assert family.loss(theta, support).shape == ()
    with pytest.raises(TypeCheckError):
        family.loss(jnp.zeros(3), support)
    with pytest.raises(TypeCheckError):
        family.sample("0")
    with pytest.raises(TypeCheckError):
        family_of(images, labels, logits_fn, ways="two", epsilon=0.1)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    """A docstring; and each argument of a function, each field of a dataclass or tuple, is named in it."""
    thing = PUBLIC[name]
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):  # tables, aliases of types
        return
    assert thing.__doc__ and len(thing.__doc__.split()) >= 4
    if not is_ours(thing):
        return
    words = set(re.findall(r"\w+", thing.__doc__))
    if inspect.isfunction(thing):
        expected = [p for p in inspect.signature(thing).parameters if p not in ("args", "kwargs", "ignored")]
    else:
        expected = getattr(thing, "_fields", None) or [
            f.name for f in getattr(thing, "__dataclass_fields__", {}).values()
        ]
    assert not [name for name in expected if name not in words], "undocumented arguments or fields"
