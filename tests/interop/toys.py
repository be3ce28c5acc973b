"""A small PyTorch module and a quick attack, for tests with other libraries."""

import lft_jax
from lft_jax.optimizers import hand_designed

SETTINGS = {"optimizer": hand_designed.projected_gradient(0.4), "recipe": lft_jax.AttackRecipe(augmentation=None)}


def module():
    """A fixed convolution with a dense layer, of images [N, 3, 6, 5]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(120, 4)
    )
    for parameter in layers.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return layers.eval()
