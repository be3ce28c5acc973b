"""Task families: what a meta-training run draws its episodes from."""

from lft_jax.tasks.uap import UapFamily, uap_family

__all__ = ["UapFamily", "uap_family"]
