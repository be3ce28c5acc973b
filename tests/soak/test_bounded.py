"""What a process keeps of models that are gone: a few compiled programs, and nothing else."""

import ast
import gc
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import _bounded, _present, evaluation, learners
from lft_jax._bounded import BoundedJit
from lft_jax.attack import _patterns, _steps, universal
from lft_jax.attack._start import first_perturbation
from lft_jax.auditing import _model
from lft_jax.evaluation import metrics
from lft_jax.optimizers.rules import coordinate_lstm

ROOT = pathlib.Path(__file__).parents[2] / "lft_jax"
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.uniform(0.2, 0.8, size=(12, 4, 4, 1)).astype(np.float32), np.arange(12) % 3
OPTIMIZER = optax.GradientTransformation(lambda theta: (), lambda g, s, p=None: (-0.1 * g, s))
PLAIN = lft_jax.AttackRecipe(augmentation=None)


class Model:
    """A linear classifier whose weights are an attribute."""

    def __init__(self):
        self.weights = RNG.normal(size=(16, 3)).astype(np.float32)

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.weights


def alive(use, number):
    """How many of so many models are still in memory, after each was used and deleted."""
    references = []
    for _ in range(number):
        model = Model()
        use(model)
        references.append(weakref.ref(model))
        del model
    gc.collect()
    return sum(reference() is not None for reference in references)


def fewer(monkeypatch, *programs):
    """Sets the number of structures that functions keep to 2, which takes fewer models to exceed."""
    for program in programs:
        monkeypatch.setattr(program, "_kept", 2)
        program._programs.clear()


def test_a_bounded_function_is_jax_jit_with_fewer_programs():
    traced = []

    def power(exponent, x, name, scale):
        traced.append((exponent, name))
        return {name: scale * x**exponent}

    call = BoundedJit(power, static=(0, 2), kept=2)
    x = jnp.arange(3.0)
    for exponent, name in ((2, "a"), (3, "a"), (2, "a"), (2, "b"), (2, "a"), (3, "a")):
        found = call(exponent, x, name, jnp.float32(2))
        np.testing.assert_allclose(found[name], 2 * np.arange(3.0) ** exponent)
    # (3, "a") was used before (2, "a") when (2, "b") came, and is traced again.
    assert traced == [(2, "a"), (3, "a"), (2, "b"), (3, "a")] and len(call) == 2
    call(3, jnp.ones(5), "a", jnp.float32(2))
    assert len(call) == 2 and call.compiled() == 3  # another shape of a structure that is kept
    with pytest.raises(TypeError, match="unhashable"):
        call([2], x, "a", jnp.float32(2))


def test_a_bounded_function_is_differentiated_and_mapped_as_jax_jit_is():
    call = BoundedJit(lambda model, x: model(x) ** 2)
    model = jax.tree_util.Partial(lambda w, x: w * x, jnp.float32(3))
    np.testing.assert_allclose(jax.grad(call, argnums=1)(model, jnp.float32(2)), 36)
    np.testing.assert_allclose(jax.vmap(call, in_axes=(None, 0))(model, jnp.arange(3.0)), [0, 9, 36])
    np.testing.assert_allclose(jax.jit(call)(model, jnp.float32(2)), 36)


def test_a_bounded_function_is_a_part_of_others_where_options_of_xla_are_set():
    """JAX takes such options at the top only, and sets none here, where XLA_FLAGS have them."""
    code = """if True:
        import jax, jax.numpy as jnp
        from lft_jax import _bounded
        square, x = _bounded.BoundedJit(lambda x: x**2), jnp.arange(3.0)
        assert _bounded._options() == _bounded._QUICK and "xla_backend_optimization_level" in _bounded._QUICK
        outer = _bounded.BoundedJit(lambda x: square(x) + 1)
        print(square(x), jax.jit(square)(x), outer(x), jax.grad(lambda x: square(x).sum())(x), jax.vmap(square)(x))
        print(jax.lax.scan(lambda c, x: (c, square(x)), 0, x)[1], jax.jit(lambda: square(jnp.ones(())))())
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT.parent, check=True, capture_output=True, text=True
    )
    squares = "[0. 1. 4.]"
    assert found.stdout.split("\n")[:2] == [f"{squares} {squares} [1. 2. 5.] [0. 2. 4.] {squares}", f"{squares} 1.0"]


def test_the_users_flags_of_xla_come_first(monkeypatch):
    monkeypatch.setattr(_bounded, "_QUICK", {"xla_a": 1, "xla_b": False})
    monkeypatch.setattr(_bounded, "_ONCE", {"xla_a": 0})
    monkeypatch.setenv("XLA_FLAGS", "--xla_c=0")
    assert _bounded._options() == {"xla_a": 1, "xla_b": False}
    assert _bounded._options(once=True) == {"xla_a": 0, "xla_b": False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_c=0 --xla_a=3")
    assert _bounded._options() == _bounded._options(once=True) == {"xla_b": False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=true --xla_a=3")
    assert _bounded._options() is None


@pytest.fixture
def compiled(caplog):
    """Counts the compilations of a program by its name, in all threads."""
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level("WARNING"):
        yield lambda name: sum(f"Finished XLA compilation of jit({name})" in entry for entry in caplog.messages)
    jax.config.update("jax_log_compiles", False)


def test_a_prepared_program_is_compiled_once(compiled):
    call, x = BoundedJit(lambda scale, x: scale * jnp.cumsum(x)), np.arange(5, dtype=np.float32)
    call.prepare(np.float32(2), jax.ShapeDtypeStruct((5,), jnp.float32))
    (thread,) = call._threads.values()
    thread.join()
    assert compiled("<lambda>") == 1 and call.compiled() == 0  # before the first call
    np.testing.assert_array_equal(call(np.float32(2), x), 2 * np.cumsum(x))
    assert compiled("<lambda>") == 1 and call.compiled() == 1 and not call._threads


def test_a_program_that_cannot_be_compiled_is_reported_by_its_call(monkeypatch):
    call = BoundedJit(lambda x: x + 1)
    monkeypatch.setattr(_bounded, "_QUICK", {"xla_no_such_option": True})
    call.prepare(np.ones(2, np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        call(np.ones(2, np.float32))


def test_a_prepared_program_that_is_forgotten_is_freed():
    call = BoundedJit(lambda factor, x: factor * x, static=(0,), kept=2)
    for factor in range(5):
        call.prepare(factor, np.ones(2, np.float32))
    assert len(call) == 2 and set(call._threads) == set(call._programs)
    for factor in range(3, 5):
        np.testing.assert_array_equal(call(factor, np.ones(2, np.float32)), [factor, factor])
    assert not call._threads


AFTER = ("_traced_step", "better_end")


def test_the_programs_after_a_search_are_compiled_once_while_it_goes_on(compiled, monkeypatch):
    before = []

    def first(*args):
        for thread in (
            *_steps._traced_step._threads.values(),
            *_steps._compiled(_steps.better_end)[0]._threads.values(),
        ):
            thread.join()
        before.extend(compiled(name) for name in AFTER)
        return first_perturbation(*args)

    monkeypatch.setattr(universal, "first_perturbation", first)
    lft_jax.universal_perturbation(Model(), IMAGES, epsilon=0.15, steps=2, progress=False)
    assert before == [1, 1] and [compiled(name) for name in (*AFTER, "search_turn")] == [1, 1, 1]


def test_arguments_on_a_device_of_choice_are_not_prepared(compiled):
    model, images = Model(), jax.device_put(jnp.asarray(IMAGES), jax.devices()[0])
    labels = model(IMAGES).argmax(-1)
    lft_jax.universal_perturbation(model, images, labels, epsilon=0.15, steps=1, progress=False)
    assert [compiled(name) for name in AFTER] == [1, 1]


def test_the_state_of_an_optimizer_that_jax_does_not_trace():
    def init(theta):
        return {"count": np.zeros((), np.float32), "largest": float(jnp.abs(theta).max())}

    optimizer = optax.GradientTransformation(
        init, lambda g, s, p=None: (-0.1 * jnp.sign(g), {**s, "count": s["count"] + 1})
    )
    found = lft_jax.universal_perturbation(Model(), IMAGES, epsilon=0.15, steps=2, optimizer=optimizer, progress=False)
    assert np.abs(found.perturbation).max() > 0.1


def test_what_a_bounded_function_forgets_is_freed():
    call = BoundedJit(lambda model, x: model(x), kept=2)
    assert alive(lambda model: call(jax.tree_util.Partial(model), IMAGES), 5) == 2


def attack(model, **options):
    options = {"epsilon": 0.15, "steps": 1, "optimizer": OPTIMIZER, "recipe": PLAIN, "oracle": "gradient", **options}
    return lft_jax.universal_perturbation(model, IMAGES, progress=False, **options)


def by_queries(model):
    model = lft_jax.models.from_function(model)
    lft_jax.universal_perturbation(model, IMAGES, epsilon=0.15, oracle="query", max_queries=60, progress=False)


def zeroth_order(model):
    attack(lft_jax.models.from_function(model), oracle=lft_jax.ZerothOrder(num_directions=1, per_example=True))


def rates(model):
    lft_jax.attack_success_rate(model, IMAGES, model(IMAGES).argmax(-1), np.full((4, 4, 1), 0.1, np.float32))
    _model.Asked(model, True, 4, None).logits(IMAGES, np.zeros((4, 4, 1), np.float32))


@pytest.mark.parametrize("use", [attack, by_queries, zeroth_order, rates])
def test_models_that_were_attacked_are_freed(use, monkeypatch):
    scores, _ = _steps._compiled(_steps.scores)
    fewer(monkeypatch, _steps._traced_step, scores, _patterns._called, _model._answer)
    kept = _present._programs.maxlen
    assert kept == 4 <= _bounded.KEPT
    assert alive(use, kept + 2) <= kept


def test_models_that_were_meta_trained_against_are_freed(monkeypatch):
    fewer(monkeypatch, metrics._evaluate)
    rule = learners.lft(coordinate_lstm(2, 1, features="raw"))

    def use(model):
        # Not looked after by `present`, since a Partial is taken as it is.
        family = lft_jax.uap_family(IMAGES, LABELS, jax.tree_util.Partial(model), ways=2, query_shots=1, epsilon=0.1)
        trainer = lft_jax.meta_trainer(rule, [family], num_steps=1, meta_optimizer=optax.sgd(0.1), tasks_per_family=1)
        state, _ = trainer.step(trainer.init(jax.random.key(0)))
        evaluation.evaluate(rule, state.params, family, jax.random.split(jax.random.key(1), 1), num_steps=1, at=(1,))

    assert alive(use, 3) == 2


#: Cached functions without a bound, which have few possible arguments.
FEW = {
    "make_baselines": "norms",
    "_compiled": "programs of this package",
    "options": "methods of an audit",
    "_rule": "optimizers of an audit",
}
#: Names of arguments that hold functions of a user.
MODELS = {"classifier", "families", "family", "function", "learner", "logits_fn", "model"}


def decorated():
    """`(path, function, source of a decorator)` of all functions at the top of modules."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                yield path, node, ast.unparse(decorator)


def test_caches_are_bounded():
    """A `jax.jit` of a module keeps all models that it was called with, and `functools.cache` all arguments."""
    names = [(path, node.name, [a.arg for a in node.args.args], said) for path, node, said in decorated()]
    assert len(names) > 30
    for path, name, arguments, said in names:
        if "jax.jit" in said:
            assert not MODELS & set(arguments), f"{path}: use BoundedJit for {name}"
        if said == "functools.cache":
            assert not arguments or name in FEW, f"{path}: use lru_cache for {name}"
