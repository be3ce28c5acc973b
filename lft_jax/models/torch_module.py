"""PyTorch modules as classifiers, differentiated by torch autograd."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lft_jax.models._frameworks import required
from lft_jax.models._preparation import Preparation, select_output
from lft_jax.models.classifier import Classifier, HostModel, host_classifier


def from_torch(
    module: Any,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "first",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is a `torch.nn.Module`; its gradients are those of torch autograd.

    The module is in evaluation mode during each call, and in its own modes again afterwards. Its parameters get no
    gradients. It stays on its device; images are moved there.

    Args:
      module: images as described by the other arguments -> its output.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "first" if it takes `[N, C, H, W]`, "last" for `[N, H, W, C]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in what it returns.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier. It runs eagerly, with one forward and one backward pass for a gradient; under `jax.jit` it is
      called back, with a second forward pass.

    Raises:
      ModuleNotFoundError: if torch is not installed.
      TypeError: for another kind of module.
      ValueError: for arguments out of range; when called, for an output that is not `[N, classes]`.

    Examples:
      With torch installed::

        model = lft_jax.models.from_torch(module, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        result = lft_jax.universal_perturbation(model, images, labels, epsilon=8 / 255)
    """
    with required("torch", "torch"):
        import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    host = autograd_host(module, module, Preparation(mean, std, channels, input_range), output)
    return host_classifier(host, batch_size=batch_size)


def autograd_host(
    module: Any,
    call: Callable[[Any], Any],
    preparation: Preparation,
    output: str | int | Callable[[Any], Any],
    fixed_batch: int | None = None,
) -> HostModel:
    """The model that is a torch module, with the gradients of torch autograd.

    Args:
      module: the module; in evaluation mode during each call.
      call: prepared images, a tensor -> what `output` finds the logits in.
      preparation: of the images.
      output: as of `from_torch`.
      fixed_batch: as of `HostModel`.
    """
    import torch

    scale, offset = (torch.from_numpy(x) for x in preparation.scale_and_offset())

    def forward(images):
        """What `output` names of the module's answer to torch images `[N, H, W, C]`, differentiable."""
        preparation.check_images(images)
        tensors = itertools.chain(module.parameters(), module.buffers())
        tensor = next((t for t in tensors if t.is_floating_point()), scale)
        x = images.to(tensor.device) * scale.to(tensor.device) + offset.to(tensor.device)
        x = (x.permute(0, 3, 1, 2) if preparation.channels == "first" else x).to(tensor.dtype)
        with _evaluating(module):
            found = select_output(call(x), output)
        if not isinstance(found, torch.Tensor):
            raise ValueError(f"output must be a tensor of the module, got {type(found).__name__}.")
        return found.float()

    def values(images):
        with torch.no_grad():  # not `inference_mode`: a tensor that the module keeps could have no gradient later
            return forward(torch.from_numpy(np.array(images))).cpu().numpy()

    def pull_back(images):
        inputs = torch.from_numpy(np.array(images)).requires_grad_(True)
        with torch.enable_grad():
            outputs = forward(inputs)
        if not outputs.requires_grad:
            raise ValueError(
                "module has no gradients: its output does not depend on the images by torch autograd (detach, no_grad, "
                "argmax, ...). Pass oracle='query' to evaluate it only."
            )

        def vjp(cotangent):
            cotangent = torch.from_numpy(np.array(cotangent)).to(outputs.device).reshape(outputs.shape)
            with _evaluating(module):  # checkpointed parts run again
                (found,) = torch.autograd.grad(outputs, inputs, cotangent)
            return found.cpu().numpy()

        return outputs.detach().cpu().numpy(), vjp

    return HostModel(values, pull_back, "probabilities" if output == "probabilities" else "logits", fixed_batch)


@contextlib.contextmanager
def _evaluating(module):
    training, left = [], [module]
    while left:  # `module.modules()` takes several times as long, which counts in each call
        m = left.pop()
        if m.training:
            training.append(m)
        left.extend(child for child in m._modules.values() if child is not None)
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
