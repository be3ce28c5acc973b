"""Strict settings for all tests: no silent rank or dtype promotion; warnings are errors (pyproject.toml)."""

import contextlib
import dataclasses
import gc
import os
import tempfile

from tests.quick import XLA_FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from lft_jax import oracles
from lft_jax.tasks.quadratic import QuadraticFamily

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Most programs of a test were compiled in one of another module, whose programs are gone (see below). Each process has
# a folder of its own, since JAX does not lock it.
_compiled = tempfile.TemporaryDirectory(prefix="lft_jax_tests_", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Few examples, the same in every run. They may share the function-scoped fixture `x64`.
settings.register_profile(
    "tests",
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def promotion(request):
    """Lets tests marked `standard_promotion` mix dtypes; all others keep the strict default.

    The marker is for tests that run optimizers of optax. Several of them, such as Adam, raise a Python float to the
    power of an integer step count, or multiply gradients by booleans, which strict promotion forbids. A marked test
    does not notice a silent promotion in `lft_jax`, so mark single tests or parameters where possible.
    """
    marked = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard") if marked else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """Clears the compiled programs after each module, since XLA crashes with too many in one process."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opaque(QuadraticFamily):
    """Quadratic tasks with a loss in NumPy, which JAX cannot differentiate."""

    def oracle(self, support):
        return oracles.zeroth_order(lambda theta: self.loss(theta, support), num_directions=3, smoothing=0.1)

    def loss(self, theta, data):
        def on_numpy(theta, data):
            return np.mean((np.asarray(theta)[None] - np.asarray(data)) ** 2, dtype=np.float32)

        return jax.pure_callback(on_numpy, jax.ShapeDtypeStruct((), jnp.float32), theta, data, vmap_method="sequential")


@pytest.fixture
def opaque_family():
    """Tasks of three coordinates with two support and two query examples."""
    return Opaque(jnp.ones(3), support=2, query=2)
