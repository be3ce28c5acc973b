"""The parts of a universal attack, against plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lft_jax.tasks.perturbation import LOSSES, AttackLoss, Constraint, margins, norm, perturb

LOGITS = np.random.default_rng(0).normal(scale=3, size=(7, 4)).astype(np.float32)
LOGITS[0] = [30, -1, 0, 2]  # a cross-entropy far above beta, for another label than 0
LABELS = np.array([1, *LOGITS[1:4].argmax(1), 0, 2, 1], np.int32)
# XLA flushes subnormal numbers to zero.
THETAS = hnp.arrays(np.float32, (2, 2, 1), elements=st.floats(-2, 2, width=32, allow_subnormal=False))


def loss_of_one(logits, label, kind, kappa, beta, target):
    """The loss of one image by its definition (docs/method.md)."""
    goal = label if target is None else target
    others = [z for j, z in enumerate(logits) if j != goal]
    margin = logits[goal] - max(others)
    entropy = math.log(sum(math.exp(z - logits[goal]) for z in logits))
    if kind == "hinge":
        return max(margin if target is None else -margin, -kappa)
    return entropy if target is not None else -min(entropy, beta)


@pytest.fixture(scope="module")
def jitted_loss():
    """The loss as an argument of a jitted program, and how often it was traced."""
    traces = []

    @jax.jit
    def losses(loss, logits, labels):
        traces.append(loss)
        return loss(logits, labels)

    return losses, traces


# ---- Losses ----


def test_margins_are_those_of_a_loop():
    expected = [z[y] - max(z[j] for j in range(4) if j != y) for z, y in zip(LOGITS, LABELS, strict=True)]
    found = margins(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found > 0, LOGITS.argmax(1) == LABELS)


def test_losses_of_every_kind_match_a_loop_and_share_a_compilation(jitted_loss):
    losses, traces = jitted_loss
    for target in (None, 2, 0):
        for kind, kappa, beta in (("hinge", 0.0, 12.0), ("hinge", 2.5, 12.0), ("cross_entropy", 0.0, 1.5)):
            found = losses(AttackLoss(kind, kappa, beta, target), LOGITS, LABELS)
            expected = [loss_of_one(z, y, kind, kappa, beta, target) for z, y in zip(LOGITS, LABELS, strict=True)]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(AttackLoss(kind, kappa, beta, target)(LOGITS, LABELS), found, rtol=1e-6)
    assert len(traces) == 2  # with and without a target


def test_images_past_the_clamp_have_no_gradient():
    loss = AttackLoss("cross_entropy", beta=12.0)
    grads = jax.grad(lambda logits: jnp.sum(loss(logits, LABELS)))(jnp.asarray(LOGITS))
    assert not np.any(grads[0])
    assert np.all(np.any(grads[1:], axis=1))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("target", [None, 1])
def test_gradients_are_finite_at_extreme_logits(kind, target):
    logits = jnp.asarray([[3e4, -3e4, 0.0], [0.0, 0.0, 0.0]])
    loss = AttackLoss(kind, target=target)
    assert np.all(np.isfinite(jax.grad(lambda z: jnp.sum(loss(z, jnp.asarray([0, 1]))))(logits)))


@pytest.mark.parametrize("target", [None, 2])
def test_success(target):
    predicted = LOGITS.argmax(1)
    expected = predicted != LABELS if target is None else predicted == target
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(AttackLoss(target=target).success(jnp.asarray(LOGITS), LABELS), expected)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (AttackLoss("hinges"), "loss: unknown name 'hinges'. Did you mean 'hinge'"),
        (AttackLoss(kappa=-1.0), "kappa must be at least 0"),
        (AttackLoss(kappa=math.nan), "kappa must be at least 0"),
        (AttackLoss(beta=0.0), "beta must be a finite number above 0"),
        (AttackLoss(beta=math.nan), "beta must be a finite number above 0"),
        (AttackLoss(target=4), "target: 4 is not one of the victim's 4 classes"),
        (AttackLoss(target=-1), "target: -1 is not one of the victim's 4 classes"),
    ],
)
def test_bad_losses_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        loss.check(num_classes=4)


def test_check_returns_a_valid_loss():
    loss = AttackLoss("cross_entropy", target=3)
    assert loss.check(num_classes=4) is loss


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-30, 30, width=32)),
    hnp.arrays(np.int32, 3, elements=st.integers(0, 3)),
    st.none() | st.integers(0, 3),
)
def test_the_dominant_label_has_the_lowest_mean_loss(logits, labels, target):
    logits = logits.astype(np.float64)
    distances = [[min(math.log(sum(math.exp(z - row[t]) for z in row)), 20.0) for t in range(4)] for row in logits]
    means = [sum(row[t] for row in distances) / 3 for t in range(4)]
    found = AttackLoss("dominant", target=target)(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    means = [math.inf if set(labels) == {t} else means[t] for t in range(4)]
    nearest = [t for t in range(4) if means[t] < min(means) + 1e-4] if target is None else [target]
    assert any(np.allclose(found, [row[t] for row in distances], rtol=1e-4, atol=1e-4) for t in nearest)


def test_the_dominant_label_is_not_the_class_of_all_images():
    logits = jnp.asarray([[5.0, 1.0, 0.0], [4.0, 2.0, 0.0]])
    loss = AttackLoss("dominant")(logits, jnp.asarray([0, 0]))
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)


def test_images_far_from_the_dominant_label_have_no_gradient():
    logits = jnp.asarray([[0.0, 12.0, 11.0], [0.0, 12.0, 11.0], [40.0, 0.0, 0.0]])
    loss, labels = AttackLoss("dominant"), jnp.asarray([0, 0, 0])
    grads = jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits)
    np.testing.assert_allclose(
        grads[:2], jax.nn.softmax(logits[:2]) - jnp.asarray([[0.0, 1.0, 0.0]]), rtol=1e-4, atol=1e-6
    )
    assert not np.any(grads[2])


# ---- The perturbed image ----


@given(hnp.arrays(np.float32, (3, 2, 2, 1), elements=st.floats(0, 1, width=32, allow_subnormal=False)), THETAS)
def test_one_perturbation_is_added_to_every_image_within_range(images, theta):
    expected = np.stack([np.minimum(np.maximum(image + theta, 0), 1) for image in images])
    np.testing.assert_array_equal(perturb(jnp.asarray(images), jnp.asarray(theta)), expected)
    copies = jnp.asarray(np.stack([theta, 0 * theta, -theta]))
    each = np.stack([np.clip(image + t, 0, 1) for image, t in zip(images, np.asarray(copies), strict=True)])
    np.testing.assert_array_equal(perturb(jnp.asarray(images), copies), each)


# ---- Constraints ----


@pytest.mark.parametrize("kind", ["l1", "l2", "linf"])
@given(theta=THETAS)
def test_norms(kind, theta):
    expected = np.linalg.norm(theta.ravel().astype(np.float64), {"l1": 1, "l2": 2, "linf": np.inf}[kind])
    np.testing.assert_allclose(norm(jnp.asarray(theta), kind), expected, rtol=1e-5, atol=1e-18)


def test_the_gradient_of_the_l2_norm_is_safe():
    grad = jax.grad(lambda theta: norm(theta, "l2"))
    np.testing.assert_array_equal(grad(jnp.zeros(3)), 0)
    np.testing.assert_allclose(grad(jnp.asarray([3.0, 0.0, -4.0])), [0.6, 0, -0.8], rtol=1e-6)


@pytest.mark.parametrize("kind", ["linf", "l2"])
@given(theta=THETAS, seed=st.integers(0, 1000), epsilon=st.floats(0.05, 1))
def test_projection_is_the_nearest_point_of_the_ball(kind, theta, seed, epsilon):
    order = {"linf": np.inf, "l2": 2}[kind]
    constraint = Constraint(kind, epsilon).check()
    projected = np.asarray(constraint.project(jnp.asarray(theta)), np.float64)
    assert np.linalg.norm(projected.ravel(), order) <= epsilon * (1 + 1e-5)
    if np.linalg.norm(theta.ravel().astype(np.float64), order) <= epsilon * (1 - 1e-5):
        np.testing.assert_array_equal(projected, theta)
    np.testing.assert_allclose(constraint.project(jnp.asarray(projected, jnp.float32)), projected, rtol=1e-5)
    # No other point of the ball is nearer: of a convex set that is so if all others lie behind the projection.
    others = np.random.default_rng(seed).normal(size=(20, *theta.shape))
    sizes = np.linalg.norm(others.reshape(20, -1), order, axis=1).reshape(-1, 1, 1, 1)
    others *= epsilon / sizes
    products = np.sum((others - projected) * (theta - projected), axis=(1, 2, 3))
    assert np.all(products <= 1e-4 * epsilon)


@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_projection_at_zero_has_a_finite_derivative(kind):
    jacobian = jax.jacobian(Constraint(kind, 0.5).project)(jnp.zeros((2, 1, 1)))
    np.testing.assert_array_equal(jacobian.reshape(2, 2), np.eye(2))


def test_clipped_coordinates_are_only_pulled_back_into_the_ball():
    """The derivative of `sum(slopes * projection)`: a descent step goes against it."""
    theta = jnp.asarray([0.1, -0.3, 0.9, -0.9, 0.9, -0.9])
    slopes = jnp.asarray([2.0, -3.0, 4.0, -4.0, -4.0, 4.0])  # the last two would push further outside
    grad = jax.grad(lambda t: jnp.sum(slopes * Constraint("linf", 0.5).project(t)))(theta)
    np.testing.assert_array_equal(grad[:2], slopes[:2])
    assert 0 < grad[2] == -grad[3] < 4
    np.testing.assert_array_equal(grad[4:], 0)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_a_penalty_costs_and_does_not_project(kind):
    theta = jnp.asarray([[[3.0]], [[-4.0]]])
    constraint = Constraint(kind, penalty=0.1).check()
    np.testing.assert_allclose(constraint.cost(theta), {"l1": 0.7, "l2": 0.5}[kind], rtol=1e-6)
    assert constraint.project(theta) is theta
    np.testing.assert_allclose(constraint.scale(theta), 0.1)


def test_a_ball_costs_nothing_and_has_a_scale():
    theta = jnp.full((4, 4, 1), 9.0)
    assert Constraint("l2", 2.0).cost(theta) == 0
    # The point whose coordinates all are the scale is on the ball's border.
    for kind in ("linf", "l2"):
        corner = jnp.full(theta.shape, Constraint(kind, 2.0).scale(theta))
        np.testing.assert_allclose(norm(corner, kind), 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l3", 0.1), "norm: unknown name 'l3'"),
        (("lin", 0.1), "Did you mean 'linf'"),
        (("linf", 0.0), "epsilon must be a finite number above 0"),
        (("linf", -0.1), "epsilon must be a finite number above 0"),
        (("l2", math.nan), "epsilon must be a finite number above 0"),
        (("l2", math.inf), "epsilon must be a finite number above 0"),
        (("l1", None, 0.0), "penalty must be a finite number above 0"),
        (("l2", None, math.nan), "penalty must be a finite number above 0"),
        (("l2", 0.1, 0.1), "exactly one of epsilon"),
        (("l2",), "exactly one of epsilon"),
        (("linf", None, 0.1), "there is no 'linf' penalty, choose one of 'l1', 'l2'"),
        (("l1", 0.1), "there is no 'l1' ball, choose one of 'linf', 'l2'"),
    ],
)
def test_bad_constraints_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Constraint(*arguments).check()


def test_constraints_of_one_norm_share_a_compilation():
    traces = []

    @jax.jit
    def project(constraint, theta):
        traces.append(constraint)
        return constraint.project(theta)

    for epsilon in (0.1, 0.2):
        np.testing.assert_allclose(project(Constraint("linf", epsilon), jnp.ones(2)), epsilon)
    assert len(traces) == 1
