"""Gradient oracles: the gradient of a loss, or an estimate of it, and the queries that it takes.

How the pieces compose::

    (loss, settings) --gradient | zeroth_order | ...--> oracle
    (theta, key) --oracle--> Estimate (value, grads, queries, extras)

==========================  ===================================================================================
`gradient`                  automatic differentiation of the loss
`per_example_gradient`      the same, with the spread of the per-example gradients at no extra model evaluation
`zeroth_order`              finite differences along random directions; the loss is only evaluated, and may be a
                            JAX function or an opaque one (NumPy, PyTorch, a remote service)
`per_example_zeroth_order`  the same for a mean over examples, with independent directions for each example
`ZerothOrder`               the settings of a zeroth-order oracle as one value
==========================  ===================================================================================

Finite differences are taken of a *batched* loss `thetas [n, ...] -> [n]`. Directions are drawn, evaluated and
accumulated in chunks. JAX losses and opaque ones differ only in the loop over the chunks, `lax.scan` or Python::

    seeds [n] --probe--> directions, points --batched loss--> losses --accumulate--> weighted sum of directions

Letters in shape comments: `q` directions, `n` of them in one chunk, `S` examples, `d` coordinates of `theta` over all
its leaves.
"""

from lft_jax.oracles.finite_differences import (
    ZerothOrder,
    per_example_zeroth_order,
    zeroth_order,
    zeroth_order_value_and_grad,
)
from lft_jax.oracles.first_order import gradient, per_example_gradient

__all__ = [
    "ZerothOrder",
    "gradient",
    "per_example_gradient",
    "per_example_zeroth_order",
    "zeroth_order",
    "zeroth_order_value_and_grad",
]
