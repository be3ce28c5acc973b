"""Gradient oracles: how a fine-tuner learns which way its loss falls, and what each answer costs in queries.

==========================  ==================================================================================
`gradient`                  one `jax.value_and_grad` of the loss
`per_example_gradient`      the same, with the spread of the per-example gradients at no extra model cost
`zeroth_order`              finite differences along random directions of a loss that is only evaluated, be it a
                            JAX function or an opaque one (NumPy, PyTorch, a remote service)
`per_example_zeroth_order`  the same of a mean over examples, each with directions of its own
==========================  ==================================================================================

Finite differences are taken of a *batched* loss `thetas [n, ...] -> [n]`. Directions are drawn, tried and summed up
in chunks; all that differs between a JAX loss and an opaque one is who loops over the chunks, `lax.scan` or Python::

    seeds [n] --probe--> directions, points --batched loss--> losses --accumulate--> weighted sum of directions

Letters in shape comments: `q` directions, `n` of them in one chunk, `S` examples, `d` coordinates of `theta`, all its
leaves together.
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
