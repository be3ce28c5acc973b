"""Checks shared by the oracles."""

from typing import Any

import jax.numpy as jnp


def check_losses(argument: str, losses: Any, count: int) -> Any:
    """Returns the losses of a batch; raises a ValueError unless they are floating-point of shape `[count]`."""
    if losses.shape != (count,) or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"{argument} must give one floating-point loss for each of {count} copies of theta, i.e. shape ({count},), "
            f"got {losses.dtype}{list(losses.shape)}."
        )
    return losses
