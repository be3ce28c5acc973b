"""Estimates of memory, and what fits into a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax._memory import fitting, stored_bytes, working_bytes


@pytest.mark.parametrize("sines", [1, 4])
def test_a_chain_of_sines_stores_a_cosine_each(sines):
    def chain(x):
        for _ in range(sines):
            x = jnp.sin(x)
        return x

    assert stored_bytes(chain, jnp.zeros((7, 5))) == sines * 7 * 5 * 4
    assert stored_bytes(chain, jax.ShapeDtypeStruct((7, 5), jnp.bfloat16)) == sines * 7 * 5 * 2


def test_a_scan_stores_its_steps_and_a_checkpoint_its_input():
    def steps(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=9)[0]

    x = jnp.zeros(6)
    assert stored_bytes(steps, x) == 9 * 6 * 4
    assert stored_bytes(jax.checkpoint(steps), x) == 6 * 4


def test_nothing_is_run():
    def loud(x):
        return jax.pure_callback(lambda x: pytest.fail("it was run"), x, jax.lax.stop_gradient(x)) + x

    assert stored_bytes(loud, np.zeros(3, np.float32)) == 0


def test_the_largest_operation_is_found_also_inside_a_loop():
    @jax.jit
    def narrow(x):
        return (jnp.tanh(x) @ jnp.ones((5, 300)))[:, :5]

    def product(x):
        return jax.lax.scan(lambda x, _: (narrow(x), None), x, length=3)[0]

    assert working_bytes(lambda x: x, jnp.zeros(3)) == 0
    assert working_bytes(jnp.sin, jnp.zeros((7, 5))) == 2 * 7 * 5 * 4
    assert working_bytes(product, jnp.zeros((7, 5))) == (7 * 5 + 5 * 300 + 7 * 300) * 4  # the product


@given(st.integers(1, 100), st.integers(0, 2**24), st.floats(1e-3, 100))
def test_fitting_is_the_most_that_fits(most, each, mib):
    count = fitting(most, each, mib)
    assert 1 <= count <= most
    assert count == 1 or count * each <= mib * 2**20
    assert count == most or (count + 1) * each > mib * 2**20


@pytest.mark.parametrize("mib", [0, -1.0, float("nan"), float("inf")])
def test_budgets_must_be_positive_and_finite(mib):
    with pytest.raises(ValueError, match="memory_mib must be a finite number above 0"):
        fitting(3, 4, mib)
