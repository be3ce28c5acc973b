"""JAX functions as classifiers, traced and differentiated by JAX."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lft_jax.models._preparation import Preparation, as_logits
from lft_jax.models.classifier import Classifier


def from_function(
    function: Callable[[Any], Any],
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "last",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is a JAX function, with what its images must look like.

    Args:
      function: traced and differentiated by JAX; images as described by the other arguments -> its output. A
        `jax.tree_util.Partial` whose arguments are its weights is not compiled again for other weights.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "last" if it takes `[N, H, W, C]`, "first" for `[N, C, H, W]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in what it returns.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier.

    Raises:
      ValueError: for arguments out of range; when called, for an output that is not `[N, classes]`.

    Examples:
      >>> model = from_function(lambda x: x.mean((2, 3)), mean=0.5, std=0.25, channels="first")
      >>> model(jnp.ones((1, 4, 4, 3))).tolist()
      [[2.0, 2.0, 2.0]]
    """
    prepared = _Prepared(Preparation(mean, std, channels, input_range), output)
    partial = function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)
    return Classifier(jax.tree_util.Partial(prepared, partial), batch_size=batch_size)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Images in [0, 1] -> logits, of a function of prepared images. Equal ones share compiled programs."""

    preparation: Preparation
    output: str | int | Callable[[Any], Any]

    def __call__(self, function, images):
        self.preparation.check_images(images)
        scale, offset = (jnp.asarray(x, images.dtype)[None, None, None] for x in self.preparation.scale_and_offset())
        x = images * scale + offset
        x = jnp.moveaxis(x, -1, 1) if self.preparation.channels == "first" else x
        return as_logits(function(x), self.output, len(images))
