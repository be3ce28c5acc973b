"""Hand-designed optimizers for perturbations, as optax transformations.

Step sizes are in units of the scale that the oracle tells (epsilon, for an linf ball), except SGD's, which multiplies
raw gradients. The ball is `fine_tune`'s to enforce.
"""

import jax
import jax.numpy as jnp
import optax


def _step_of_scale(direction: optax.GradientTransformation, step, final) -> optax.GradientTransformation:
    """Steps of `step * scale` along `direction`, falling linearly with the progress to `final` times that."""
    direction = optax.with_extra_args_support(direction)

    def update(grads, state, theta=None, *, scale=1.0, progress=0.0, **extra_args):
        updates, state = direction.update(grads, state, theta, **extra_args)
        size = -step * scale * (1 - (1 - final) * progress)
        return jax.tree.map(lambda u: (size * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def projected_gradient(step: float, decay: float = 0.0, final: float = 1.0) -> optax.GradientTransformation:
    """PGD for an linf ball: steps along the sign of the gradient's momentum (the ball is `fine_tune`'s to enforce).

    Args:
      step: in units of the scale.
      decay: of the momentum; 0 for plain PGD.
      final: the last step's size relative to the first's.
    """
    return _step_of_scale(optax.chain(optax.trace(decay), optax.scale_by_sign()), step, final)


def normalized_gradient(step: float, decay: float = 0.0, final: float = 1.0) -> optax.GradientTransformation:
    """PGD for an l2 ball: steps of root mean square `step` (in units of the scale) along the gradient's momentum."""

    def direction(updates, theta=None):
        del theta
        norm = optax.tree.norm(updates)
        rms = norm / optax.tree.size(updates) ** 0.5
        return jax.tree.map(lambda u: u / jnp.where(rms > 0, rms, 1), updates)

    return _step_of_scale(optax.chain(optax.trace(decay), optax.stateless(direction)), step, final)


def adam(step: float, b1: float = 0.9, final: float = 1.0) -> optax.GradientTransformation:
    """Adam with its step in units of the scale."""
    return _step_of_scale(optax.scale_by_adam(b1=b1), step, final)


def adamm(step: float, b1: float = 0.9, final: float = 1.0) -> optax.GradientTransformation:
    """AMSGrad with its step in units of the scale: ZO-AdaMM under zeroth-order gradients (Chen et al. 2019).

    Its projection under a Mahalanobis norm is the plain one for an linf ball, coordinate by coordinate. Both moments
    are corrected for their bias, as optax does it and the authors do not.
    """
    return _step_of_scale(optax.scale_by_amsgrad(b1=b1), step, final)


def sgd(learning_rate: float, decay: float = 0.0) -> optax.GradientTransformation:
    """Plain gradient descent, with momentum if `decay` is not 0."""
    return optax.chain(optax.trace(decay), optax.scale_by_learning_rate(learning_rate))
