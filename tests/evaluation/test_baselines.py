"""Hand-designed optimizers against their formulas in NumPy, and their grids."""

import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.evaluation import baselines

GRADS = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
GRADS[1] *= 5  # large, then small: where AMSGrad differs from Adam
SCALE = 0.3


def moments(decay, power=1):
    total, found = np.zeros_like(GRADS[0], np.float64), []
    for k, grad in enumerate(GRADS):
        total = decay * total + (1 - decay) * grad.astype(np.float64) ** power
        found.append(total / (1 - decay ** (k + 1)))
    return found


def momentum(decay):
    total, found = np.zeros_like(GRADS[0], np.float64), []
    for grad in GRADS:
        total = decay * total + grad
        found.append(total)
    return found


def sizes(step, final):
    return [step * SCALE * (1 - (1 - final) * k / len(GRADS)) for k in range(len(GRADS))]


def expected(name):
    """The update for each gradient, by the formula."""
    if name == "projected_gradient":
        return [-size * np.sign(m) for size, m in zip(sizes(0.4, 0.1), momentum(0.5), strict=True)]
    if name == "normalized_gradient":
        return [-size * m / np.sqrt(np.mean(m**2)) for size, m in zip(sizes(0.4, 0.1), momentum(0.5), strict=True)]
    if name == "sgd":
        return [-2.0 * m for m in momentum(0.9)]
    squares = moments(0.999, 2)
    if name == "adamm":
        squares = np.maximum.accumulate(squares)
    pairs = zip(sizes(0.2, 0.5), moments(0.9), squares, strict=True)
    return [-size * mean / (np.sqrt(square) + 1e-8) for size, mean, square in pairs]


OPTIMIZERS = {
    "projected_gradient": {"step": 0.4, "decay": 0.5, "final": 0.1},
    "normalized_gradient": {"step": 0.4, "decay": 0.5, "final": 0.1},
    "sgd": {"learning_rate": 2.0, "decay": 0.9},
    "adam": {"step": 0.2, "b1": 0.9, "final": 0.5},
    "adamm": {"step": 0.2, "b1": 0.9, "final": 0.5},
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_formula(name):
    tx = getattr(baselines, name)(**OPTIMIZERS[name])
    theta = jnp.zeros((3, 2))
    state, extras = tx.init(theta), {}
    for k, (grad, update) in enumerate(zip(GRADS, expected(name), strict=True)):
        if name != "sgd":
            extras = {"scale": SCALE, "progress": k / len(GRADS)}
        found, state = tx.update(jnp.asarray(grad), state, theta, **extras)
        np.testing.assert_allclose(found, update, rtol=1e-4)


def test_a_zero_gradient_moves_nothing():
    tx = baselines.normalized_gradient(0.4)
    found, _ = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)), jnp.zeros(3), scale=1.0, progress=0.0)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_baseline_has_a_grid_of_at_least_twenty_settings_and_several_losses(norm):
    for name, baseline in baselines.make_baselines(norm).items():
        assert len(baseline.grid) >= 20, name
        assert len({setting.support_loss for setting in baseline.grid}) >= 3, name
        keys = {tuple(setting.params) for setting in (*baseline.grid, baseline.default)}
        assert len(keys) == 1, name
        assert len({(*s.params.values(), s.support_loss) for s in baseline.grid}) == len(baseline.grid), name
