"""Adapters: a classifier of any framework as a function of images in [0, 1] that `lft_jax` can attack.

How the pieces compose::

    images [N, H, W, C] in [0, 1] --mean, std, range, channels--> what the model expects      `_preparation`
    what the model returns --output--> logits [N, classes]                                    `_preparation`
    JAX function --from_function--> Classifier, traced and differentiated by JAX              `functions`
    module of Flax or Equinox --from_flax, from_nnx, from_equinox--> Classifier, likewise     `jax_modules`
    model on NumPy arrays, perhaps with gradients --host_classifier--> Classifier             `classifier`
    torch.nn.Module --from_torch--> Classifier, differentiated by torch autograd              `torch_module`
    Keras 3 model --from_keras--> Classifier, differentiated by the backend of Keras          `keras_model`
    ONNX model --from_onnx--> Classifier without gradients                                    `onnx_session`
    estimator --from_sklearn--> Classifier without gradients                                  `sklearn_estimator`
    HTTP service --from_url--> Classifier without gradients                                   `service`
    jitted program that asks such a model --replayed--> program cut at its questions          `replay`

A `Classifier` goes wherever a model is expected: `lft_jax.universal_perturbation`, `lft_jax.attack_success_rate`,
`lft_jax.uap_family`. Frameworks are imported inside their adapter, never by `import lft_jax`.
"""

from lft_jax.models.classifier import Classifier, HostModel, as_classifier, host_classifier, on_numpy
from lft_jax.models.functions import from_function
from lft_jax.models.jax_modules import from_equinox, from_flax, from_nnx
from lft_jax.models.keras_model import from_keras
from lft_jax.models.onnx_session import from_onnx
from lft_jax.models.replay import replayed
from lft_jax.models.service import from_url
from lft_jax.models.sklearn_estimator import from_sklearn
from lft_jax.models.torch_module import from_torch

__all__ = [
    "Classifier",
    "HostModel",
    "as_classifier",
    "from_equinox",
    "from_flax",
    "from_function",
    "from_keras",
    "from_nnx",
    "from_onnx",
    "from_sklearn",
    "from_torch",
    "from_url",
    "host_classifier",
    "on_numpy",
    "replayed",
]
