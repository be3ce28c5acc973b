"""Task families: what a meta-training run draws its episodes from."""

from lft_jax.tasks.uap import UapFamily, uap_family
from lft_jax.tasks.waves import WaveSearch

__all__ = ["UapFamily", "WaveSearch", "uap_family"]
