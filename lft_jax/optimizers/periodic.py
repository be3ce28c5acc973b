"""Steps in the space of perturbations that repeat.

A universal perturbation of a convolutional network is nearly a periodic texture. The mean of a gradient over
translations by a period keeps what such a texture shares and averages out what single images add.
"""

import jax
import jax.numpy as jnp
import optax

from lft_jax import _periods
from lft_jax.base import check_at_least
from lft_jax.optimizers.hand_designed import Scalar, normalized_gradient, projected_gradient


def periodic(period: int) -> optax.GradientTransformation:
    """Replaces each update `[H, W, C]` by its mean over translations by multiples of a period, in both directions.

    With it in front, any optimizer moves in the space of the images that repeat with this period, so that a
    perturbation from zeros stays one of them: `optax.chain(periodic(4), lft_jax.optimizers.projected_gradient(0.8))`.
    The mean is the orthogonal projection onto that space. Sides need no multiple of the period.

    Args:
      period: in pixels, at least 1.

    Returns:
      The transformation, without state.

    Raises:
      ValueError: for a period below 1; when called, for an update of another rank.

    Examples:
      >>> updates = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])[..., None]
      >>> found, _ = periodic(2).update(updates, optax.EmptyState())
      >>> found.ravel().tolist()
      [2.0, 3.0, 2.0, 3.0]

    References:
      Tsuzuku & Sato 2019, On the structural sensitivity of deep convolutional networks to the directions of Fourier
      basis functions, arXiv 1809.04098.
    """
    check_at_least("period", period, 1)

    def mean(update):
        _check(update)
        return _periods.repeated(_periods.tile_of(update, period), update.shape)

    return optax.stateless(lambda updates, params: jax.tree.map(mean, updates))


def shrink_periods() -> optax.GradientTransformationExtraArgs:
    """Weighs what each period adds to the gradient by its signal: an empirical Wiener filter.

    Let `g_p` be the mean gradient over examples and over translations by `p = 2, 4, 8, 16, 32` pixels, and `g` the mean
    gradient over examples alone. With the bands `d_p = g_p - g_(p/2)`, and the last one `g - g_32`, the update is::

        sum_p  max(|d_p|^2 - |e_p|^2, 0) / |d_p|^2 * d_p

    where `e_p` is the standard error of `d_p` over the examples. Few images at a large size leave the short periods;
    many images leave the gradient as it is.

    Returns:
      The transformation, without state. Its extra argument `periods` comes from the oracle of a universal attack with
      exact gradients; without it, updates stay as they are.

    Raises:
      ValueError: when called with `periods` for an update of another rank.

    Examples:
      >>> updates = jnp.ones((4, 4, 1))
      >>> found, _ = shrink_periods().update(updates, optax.EmptyState(), periods=_periods.summarized(updates[None]))
      >>> bool(jnp.all(found == updates))
      True
    """

    def update(updates, state, params=None, *, periods=None, **extra_args):
        del params, extra_args
        if periods is None:
            return updates, state
        _check(updates)
        # What was added to the mean over examples, such as the gradient of a penalty, has no error.
        added = updates - periods[0].mean
        return (_periods.shrunk(periods, updates.shape) + added).astype(updates.dtype), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def periodic_descent(
    step: Scalar = 0.8, decay: Scalar = 0.9, final: Scalar = 0.1, norm: str = "linf"
) -> optax.GradientTransformationExtraArgs:
    """Momentum steps along the gradient after `shrink_periods`, for an attack from few images.

    Args:
      step: first step size, in units of the extra argument `scale`.
      decay: decay of the momentum of the gradient, which is normalized in each step; in [0, 1).
      final: last step size relative to the first.
      norm: "linf" for `projected_gradient`, "l2" for `normalized_gradient`.

    Returns:
      The transformation, with the extra arguments `periods`, `scale` and `progress`.

    Examples:
      >>> optimizer, updates = periodic_descent(step=0.5), jnp.asarray([[3.0, -7.0]])[..., None]
      >>> found, _ = optimizer.update(updates, optimizer.init(updates), scale=0.25)
      >>> found.ravel().tolist()
      [-0.125, 0.125]
    """
    descent = {"linf": projected_gradient, "l2": normalized_gradient}[norm](step, decay, final)
    return optax.chain(shrink_periods(), optax.stateless(_normalized), optax.with_extra_args_support(descent))


def _normalized(updates, params=None):
    """Divides by the mean absolute value, so that a momentum forgets at one pace."""
    del params

    def divided(update):
        mean = jnp.mean(jnp.abs(update))
        return update / jnp.where(mean > 0, mean, 1)

    return jax.tree.map(divided, updates)


def _check(update):
    if update.ndim != 3:
        raise ValueError(f"updates must be perturbations [H, W, C], got shape {update.shape}.")
