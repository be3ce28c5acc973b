"""Gradients by automatic differentiation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lft_jax.base import Estimate, Oracle, PyTree, safe_sqrt
from lft_jax.oracles._checks import check_count, check_losses
from lft_jax.oracles.directions import floats


def gradient(loss_fn: Callable[[PyTree], jax.Array], *, evaluations: int = 1) -> Oracle:
    """The gradient by automatic differentiation.

    Args:
      loss_fn: `theta -> []`, differentiable.
      evaluations: examples that one call of `loss_fn` evaluates, at least 1: the queries of one answer.

    Returns:
      An oracle without extras, which ignores its key.

    Raises:
      ValueError: for `evaluations` below 1; when called, for a `theta` with leaves that are not floating-point.
    """
    check_count("evaluations", evaluations)

    def oracle(theta, key):
        del key
        value, grads = jax.value_and_grad(loss_fn)(floats(theta))
        return Estimate(value, grads, jnp.asarray(evaluations, jnp.int32), {})

    return oracle


def per_example_gradient(
    example_losses: Callable[[PyTree], jax.Array],
    *,
    num_examples: int,
    second_losses: Callable[[PyTree], jax.Array] | None = None,
) -> Oracle:
    """The gradient of a mean over examples, and how much the examples disagree on it.

    Every example gets its own copy of `theta`, as a universal perturbation does anyway when it is added to a batch
    of images. One backward pass of the summed losses then leaves each example's gradient in its copy.

    Args:
      example_losses: `thetas -> [S]`, where `thetas` is like `theta` with a leading axis `[S]`. Loss s may depend on
        copy s only (so no batch statistics inside).
      num_examples: `S`, at least 1.
      second_losses: like `example_losses`, another loss of the same examples, or None. The two are added up, and the
        mean gradient of this one is also an extra of its own, `second`: for a second backward pass a fine-tuner can
        tell the two apart.

    Returns:
      An oracle whose value and grads are means over `S`, with the extra `spread` (like `theta`, not negative): the
      population standard deviation of the per-example gradients. It ignores its key; an answer costs `S` queries.

    Raises:
      ValueError: for `num_examples` below 1; when called, for a `theta` with leaves that are not floating-point or
        losses that are not `[S]`.
    """
    check_count("num_examples", num_examples)

    def oracle(theta, key):
        del key
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_examples, *x.shape)), floats(theta))

        def seconds(thetas):
            return check_losses("second_losses", second_losses(thetas), num_examples)

        def summed(thetas):
            losses = check_losses("example_losses", example_losses(thetas), num_examples)
            if second_losses is not None:
                losses = losses + seconds(thetas)
            return jnp.sum(losses), losses

        grads, losses = jax.grad(summed, has_aux=True)(copies)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        extras = {"spread": jax.tree.map(lambda g: safe_sqrt(jnp.var(g, axis=0)), grads)}
        if second_losses is not None:
            grads = jax.grad(lambda thetas: jnp.sum(seconds(thetas)))(copies)
            extras["second"] = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        return Estimate(jnp.mean(losses), mean, jnp.asarray(num_examples, jnp.int32), extras)

    return oracle
