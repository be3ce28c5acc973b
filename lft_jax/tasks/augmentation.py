"""Changed support images, so that a perturbation fits the images that they stand for and not these few alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Shifts images, mixes them and adds noise; the perturbation stays where it is. Costs no queries.

    Few support images are what a universal perturbation overfits. Changed anew in every step, they keep its gradient
    from settling on what is special to them. Mixing is that of admix (Wang et al. 2021), which made adversarial
    examples of single images carry over between models; labels are not mixed.

    Attributes:
      shift: images are moved by up to this fraction of their height and width, rounded to whole pixels, in [0, 1);
        what comes in from outside repeats the border.
      mix: weight, in [0, 1), of the image that a permutation of the batch puts in the same place, now and then itself.
      noise: half-width of uniform noise, in units of the image range, in [0, 1].
    """

    shift: float = 0.1
    mix: float = 0.3
    noise: float = 0.2

    def check(self) -> "Augmentation":
        """Returns itself; raises a ValueError if a field is out of range."""
        for name in ("shift", "mix"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augmentation: {name} must be in [0, 1), got {getattr(self, name)!r}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"augmentation: noise must be in [0, 1], got {self.noise!r}.")
        return self

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """`[N, H, W, C]` in [0, 1] -> the same, changed."""
        key_shift, key_mix, key_noise = jax.random.split(key, 3)
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
    """Each image moved on its own by up to `reach` (rows, columns)."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), *[(r, r) for r in reach], (0, 0)), mode="edge")
    axes = zip(jax.random.split(key), reach, strict=True)
    offsets = jnp.stack([jax.random.randint(k, (len(images),), 0, 2 * r + 1) for k, r in axes], axis=1)

    def moved(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, image.shape[-1]))

    return jax.vmap(moved)(padded, offsets)
