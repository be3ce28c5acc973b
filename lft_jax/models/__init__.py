"""Adapters: a classifier of any framework as a function of images in [0, 1] that `lft_jax` can attack.

How the pieces compose::

    images [N, H, W, C] in [0, 1] --mean, std, range, channels--> what the model expects      `classifier`
    what the model returns --output--> logits [N, classes]                                    `classifier`
    JAX function --from_function--> Classifier, traced and differentiated by JAX              `classifier`
    torch.nn.Module --from_torch--> Classifier, differentiated by torch autograd              `torch_module`

A `Classifier` goes wherever a model is expected: `lft_jax.universal_perturbation`, `lft_jax.attack_success_rate`,
`lft_jax.uap_family`. Frameworks are imported inside their adapter, never by `import lft_jax`.
"""

from lft_jax.models.classifier import Classifier, from_function
from lft_jax.models.torch_module import from_torch

__all__ = ["Classifier", "from_function", "from_torch"]
