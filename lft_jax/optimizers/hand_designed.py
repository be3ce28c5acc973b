"""Hand-designed optimizers for perturbations, as optax transformations.

Step sizes are in units of `scale`, an extra argument of `update` that the oracle gives: epsilon for an linf ball,
epsilon / sqrt(d) for an l2 ball of `d` coordinates. It is 1 if absent. Only `sgd` has a plain learning rate. Over a
run a step size falls linearly to `final` times the first one, with the extra argument `progress` = k / K. None of them
projects onto the ball; `fine_tune` does.
"""

import jax
import jax.numpy as jnp
import optax

#: A hyperparameter. It may be traced, so that a grid of them runs through one compilation.
Scalar = float | jax.Array


def _step_of_scale(
    direction: optax.GradientTransformation, step: Scalar, final: Scalar
) -> optax.GradientTransformationExtraArgs:
    """Steps of `step * scale` along `direction`, falling linearly with the progress to `final` times that."""
    direction = optax.with_extra_args_support(direction)

    def update(updates, state, params=None, *, scale=1.0, progress=0.0, **extra_args):
        updates, state = direction.update(updates, state, params, **extra_args)
        size = -step * scale * (1 - (1 - final) * progress)
        return jax.tree.map(lambda u: (size * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def projected_gradient(step: Scalar, decay: Scalar = 0.0, final: Scalar = 1.0) -> optax.GradientTransformation:
    """Projected gradient descent (PGD) for an linf ball: steps along the sign of the gradient's momentum.

    The update is `-step * scale * sign(m)`, with the momentum `m = decay * m + gradient`.

    Args:
      step: first step size, in units of `scale`.
      decay: decay of the momentum, in [0, 1); 0 for plain PGD.
      final: last step size relative to the first.

    Returns:
      The transformation, with the optional extra arguments `scale` and `progress`.

    Examples:
      >>> optimizer = projected_gradient(step=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> updates, _ = optimizer.update(jnp.array([3.0, -7.0]), state, scale=0.25)
      >>> updates.tolist()
      [-0.125, 0.125]
    """
    return _step_of_scale(optax.chain(optax.trace(decay), optax.scale_by_sign()), step, final)


def normalized_gradient(step: Scalar, decay: Scalar = 0.0, final: Scalar = 1.0) -> optax.GradientTransformation:
    """Projected gradient descent (PGD) for an l2 ball: steps along the gradient's momentum, of equal length.

    The update is `-step * scale * m / RMS(m)`, with the momentum `m = decay * m + gradient` and its root mean square
    over all coordinates, so that `step=1` is as long as the radius of the ball.

    Args:
      step: first step size, in units of `scale`: the root mean square of the update.
      decay: decay of the momentum, in [0, 1); 0 for plain PGD.
      final: last step size relative to the first.

    Returns:
      The transformation, with the optional extra arguments `scale` and `progress`.

    Examples:
      >>> optimizer = normalized_gradient(step=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> updates, _ = optimizer.update(jnp.array([3.0, -3.0]), state)
      >>> updates.round(3).tolist()
      [-0.5, 0.5]
    """

    def direction(updates, params=None):
        del params
        norm = optax.tree.norm(updates)
        rms = norm / optax.tree.size(updates) ** 0.5
        return jax.tree.map(lambda u: u / jnp.where(rms > 0, rms, 1), updates)

    return _step_of_scale(optax.chain(optax.trace(decay), optax.stateless(direction)), step, final)


def adam(step: Scalar, b1: Scalar = 0.9, final: Scalar = 1.0) -> optax.GradientTransformation:
    """Adam with its step size in units of `scale`.

    Args:
      step: first step size, in units of `scale`.
      b1: decay of the first moment, in [0, 1).
      final: last step size relative to the first.

    Returns:
      The transformation, with the optional extra arguments `scale` and `progress`.

    Examples:
      >>> optimizer = adam(step=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> updates, _ = optimizer.update(jnp.array([3.0, -7.0]), state)
      >>> updates.round(3).tolist()
      [-0.5, 0.5]
    """
    return _step_of_scale(optax.scale_by_adam(b1=b1), step, final)


def adamm(step: Scalar, b1: Scalar = 0.9, final: Scalar = 1.0) -> optax.GradientTransformation:
    """AMSGrad with its step size in units of `scale`; with zeroth-order gradients, ZO-AdaMM.

    ZO-AdaMM projects under a Mahalanobis norm, which for an linf ball is the plain projection. Both moments are
    bias-corrected, as in optax but not in the paper.

    Args:
      step: first step size, in units of `scale`.
      b1: decay of the first moment, in [0, 1).
      final: last step size relative to the first.

    Returns:
      The transformation, with the optional extra arguments `scale` and `progress`.

    References:
      Chen et al. 2019, ZO-AdaMM: zeroth-order adaptive momentum method for black-box optimization, arXiv 1910.06513.
    """
    return _step_of_scale(optax.scale_by_amsgrad(b1=b1), step, final)


def sgd(learning_rate: Scalar, decay: Scalar = 0.0) -> optax.GradientTransformation:
    """Gradient descent, with momentum if `decay` is not 0.

    The update is `-learning_rate * m`, with the momentum `m = decay * m + gradient`.

    Args:
      learning_rate: factor on the momentum; it does not depend on `scale`.
      decay: decay of the momentum, in [0, 1).

    Returns:
      The transformation.

    Examples:
      >>> optimizer = sgd(0.5)
      >>> updates, _ = optimizer.update(jnp.array([3.0, -7.0]), optimizer.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-1.5, 3.5]
    """
    return optax.chain(optax.trace(decay), optax.scale_by_learning_rate(learning_rate))
