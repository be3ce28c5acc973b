"""Checks that the oracles share."""

import jax.numpy as jnp
import numpy as np


def check_count(argument, value):
    if not (isinstance(value, int | np.integer) and value >= 1):
        raise ValueError(f"{argument} must be a whole number of at least 1, got {value!r}.")


def check_losses(argument, losses, count):
    """Returns the losses of a batch if they are floating-point `[count]`."""
    if losses.shape != (count,) or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"{argument} must give one floating-point loss for each of {count} copies of theta, i.e. shape ({count},), "
            f"got {losses.dtype}{list(losses.shape)}."
        )
    return losses
