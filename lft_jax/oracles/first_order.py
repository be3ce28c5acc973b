"""Gradients by automatic differentiation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lft_jax.base import Estimate, Oracle, PyTree, check_count, safe_sqrt
from lft_jax.oracles._checks import check_losses
from lft_jax.oracles.directions import floats


def gradient(loss_fn: Callable[[PyTree], Float[Array, ""]], *, evaluations: int = 1) -> Oracle:
    """The exact gradient, by automatic differentiation.

    Args:
      loss_fn: `theta -> []`, differentiable.
      evaluations: number of examples that one call of `loss_fn` evaluates, at least 1: the queries of one answer.

    Returns:
      An oracle `(theta, key) -> Estimate` without extras. It ignores its key.

    Raises:
      ValueError: for `evaluations` below 1; when called, for a `theta` with leaves that are not floating-point.

    Examples:
      >>> oracle = gradient(lambda theta: jnp.sum(theta**2), evaluations=5)
      >>> answer = oracle(jnp.array([1.0, 2.0]), jax.random.key(0))
      >>> answer.grads.tolist(), int(answer.queries)
      ([2.0, 4.0], 5)
    """
    check_count("evaluations", evaluations, 1)

    def oracle(theta, key):
        del key
        value, grads = jax.value_and_grad(loss_fn)(floats(theta))
        return Estimate(value, grads, jnp.asarray(evaluations, jnp.int32), {})

    return oracle


def per_example_gradient(
    example_losses: Callable[[PyTree], Float[Array, " S"]],
    *,
    num_examples: int,
    summarize: Callable[[PyTree], dict[str, PyTree]] | None = None,
) -> Oracle:
    """The gradient of a mean over examples, and its spread across the examples.

    Every example gets its own copy of `theta`, as happens anyway when a universal perturbation is added to a batch of
    images. One backward pass of the summed losses then leaves the gradient of each example in its copy.

    Args:
      example_losses: `thetas -> [S]`, where `thetas` is like `theta` with a leading axis `[S]`. Loss `s` may depend on
        copy `s` only, so batch statistics are not allowed.
      num_examples: `S`, at least 1.
      summarize: per-example gradients, like `theta` with a leading axis `[S]` -> further extras; or None.

    Returns:
      An oracle `(theta, key) -> Estimate` whose value and grads are means over `S`, with the extra `spread` (like
      `theta`, not negative): the population standard deviation of the per-example gradients. It ignores its key. An
      answer costs `S` queries.

    Raises:
      ValueError: for `num_examples` below 1; when called, for a `theta` with leaves that are not floating-point, or
        losses that are not `[S]`.

    Examples:
      >>> targets = jnp.array([[0.0], [2.0]])  # two examples of one coordinate
      >>> oracle = per_example_gradient(lambda thetas: jnp.sum((thetas - targets) ** 2, axis=1), num_examples=2)
      >>> answer = oracle(jnp.array([3.0]), jax.random.key(0))
      >>> answer.grads.tolist(), answer.extras["spread"].tolist(), int(answer.queries)
      ([4.0], [2.0], 2)
    """
    check_count("num_examples", num_examples, 1)

    def oracle(theta, key):
        del key
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_examples, *x.shape)), floats(theta))

        def summed(thetas):
            losses = check_losses("example_losses", example_losses(thetas), num_examples)
            return jnp.sum(losses), losses

        grads, losses = jax.grad(summed, has_aux=True)(copies)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        extras = {"spread": jax.tree.map(lambda g: safe_sqrt(jnp.var(g, axis=0)), grads)}
        if summarize is not None:
            extras |= summarize(grads)
        return Estimate(jnp.mean(losses), mean, jnp.asarray(num_examples, jnp.int32), extras)

    return oracle
