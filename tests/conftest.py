"""Tests run as strictly as JAX allows: no silent rank or dtype promotion, warnings are errors (pyproject.toml)."""

import contextlib
import dataclasses
import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests' time is nearly all compilation, which these flags make less than half as long. Of the last one, later
# versions than 0.10 know nothing, and end the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""),
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from lft_jax import oracles
from lft_jax.tasks.quadratic import QuadraticFamily

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Few, but the same examples every time; `x64` below is safe to share among them.
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

    The marker is for tests that run optax's own optimizers: several of them, Adam first, raise a Python float to the
    power of an integer step count, or multiply gradients by booleans, which strict promotion forbids. Be warned: in a
    marked test a silent promotion in `lft_jax` goes unnoticed, so mark single tests or parameters, never a module.
    """
    marked = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard") if marked else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """Forgets the programs that a module compiled: those of all of them are more than XLA survives in one process."""
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
    """Quadratic tasks whose loss only NumPy can tell."""

    def oracle(self, support):
        return oracles.zeroth_order(lambda theta: self.loss(theta, support), num_directions=3, smoothing=0.1)

    def loss(self, theta, data):
        def on_numpy(theta, data):
            return np.mean((np.asarray(theta)[None] - np.asarray(data)) ** 2, dtype=np.float32)

        return jax.pure_callback(on_numpy, jax.ShapeDtypeStruct((), jnp.float32), theta, data, vmap_method="sequential")


@pytest.fixture
def opaque_family():
    """Two examples of three coordinates a task."""
    return Opaque(jnp.ones(3), support=2, query=2)
