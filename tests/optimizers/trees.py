"""Trees of parameters, and rules with random weights, for tests of the transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm, spatial_lstm
from lft_jax.optimizers.transform import learned_fine_tuner

KEY = jax.random.key(2)
RULES = {
    "coordinate": coordinate_lstm(3, 1, features=("log_sign", "constraint")),
    "spatial": spatial_lstm(3, 1, maps=(2,), features=("momentum", "spread"), base_update=MomentumUpdate(0.3)),
}
DTYPES = {"image": "float32", "list": ["bfloat16", None], "empty": "float16"}
SHAPES = {"image": (2, 2, 1), "list": [(), None], "empty": (0, 2)}
EVERY_RULE = pytest.mark.parametrize("name", RULES)


def tree(seed, dtypes=DTYPES, lead=()):
    """A dict of random arrays with a list, a None, a scalar and an empty leaf; all shapes are prefixed by `lead`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda d, shape: np.asarray(rng.normal(size=(*lead, *shape)), jnp.dtype(d)), dtypes, SHAPES)


def rows(tree, index):
    return jax.tree.map(lambda x: x[np.asarray(index)], tree)


def weights(rule, dtype=np.float32):
    leaves, structure = jax.tree.flatten(jax.eval_shape(rule.init, KEY))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [dtype(0.3 * rng.normal(size=x.shape)) for x in leaves])


def tuner(rule, **options):
    return learned_fine_tuner(weights(rule), rule, **options)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def check(a, e):
        slack = 2000 if a.dtype in ("float16", "bfloat16") else 1  # half precision rounds
        np.testing.assert_allclose(np.float64(a), np.float64(e), rtol=rtol * slack, atol=atol * slack)

    jax.tree.map(check, actual, expected)
