"""Random changes of the support images, against overfitting them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Shifts, mixes and adds noise to the support images, re-sampled in each step.

    A universal perturbation overfits the few images that it is fine-tuned on. Changing these images in each step keeps
    its gradient from settling on their details. With `x` an image that is randomly shifted, `x'` another one of the
    batch and `u` uniform in [-1, 1] for each pixel and channel, the changed image is::

        clip((1 - mix) * x + mix * x' + noise * u, 0, 1)

    The perturbation is not shifted, labels are not mixed, and no queries are spent.

    Attributes:
      shift: largest shift, as a fraction of the height and of the width, in [0, 1). Shifts are whole pixels; pixels
        beyond the border repeat it.
      mix: mixing coefficient, in [0, 1). A random permutation of the batch pairs the images; it may pair an image with
        itself.
      noise: half-width of the uniform noise, in units of the image range, in [0, 1].

    Examples:
      >>> images = jnp.full((2, 10, 10, 3), 0.5)
      >>> changed = Augmentation(noise=0.25)(images, jax.random.key(0))
      >>> changed.shape, bool(jnp.all(jnp.abs(changed - 0.5) <= 0.25))
      ((2, 10, 10, 3), True)

    References:
      Mixing: Wang et al. 2021, Admix, arXiv 2102.00436.
    """

    shift: float = 0.1
    mix: float = 0.3
    noise: float = 0.2

    def check(self) -> "Augmentation":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        for name in ("shift", "mix"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augmentation: {name} must be in [0, 1), got {getattr(self, name)!r}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"augmentation: noise must be in [0, 1], got {self.noise!r}.")
        return self

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, images: Float[Array | np.ndarray, "N H W C"], key: PRNGKeyArray) -> Float[Array, "N H W C"]:
        """The changed images.

        Args:
          images: `[N, H, W, C]` in [0, 1].
          key: PRNG key of the changes.

        Returns:
          `[N, H, W, C]` in [0, 1].
        """
        key_shift, key_mix, key_noise = jax.random.split(key, 3)
        images = jnp.asarray(images)
        reach = [round(self.shift * side) for side in images.shape[1:3]]
        if any(reach):
            images = _shifted(images, reach, key_shift)
        if self.mix:
            other = images[jax.random.permutation(key_mix, len(images))]
            images = (1 - self.mix) * images + self.mix * other
        if self.noise:
            noise = jax.random.uniform(key_noise, images.shape, images.dtype, -self.noise, self.noise)
            images = jnp.clip(images + noise, 0, 1)
        return images


def _shifted(images, reach, key):
    """Shifts each image on its own by up to `reach` (rows, columns)."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), *[(r, r) for r in reach], (0, 0)), mode="edge")
    axes = zip(jax.random.split(key), reach, strict=True)
    offsets = jnp.stack([jax.random.randint(k, (len(images),), 0, 2 * r + 1) for k, r in axes], axis=1)

    def shifted(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, image.shape[-1]))

    return jax.vmap(shifted)(padded, offsets)
