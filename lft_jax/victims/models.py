"""Victim architectures, as flax modules from images to logits.

Images are `[N, H, W, C]`, floating-point in [0, 1], logits `[N, num_classes]`.
Images and variables must have the same dtype; `lft_jax.victims.apply_function` casts the variables. The modules
normalize their input. Pooling comes before the relu: the function is the same, with fewer ties in the maxima. With
`train=True` batch norm uses the statistics of the batch; this needs `mutable=["batch_stats"]`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lft_jax import base
from lft_jax._layers import conv, max_pool


class Conv(nn.Module):
    """The convolution `conv` with a learned kernel `[k, k, I, features]` and an optional bias `[features]`.

    Attributes:
      features: number of output channels.
      size: side `k` of the kernel, odd.
      stride: 1 or 2.
      use_bias: whether a bias is added; a batch norm that follows makes it redundant.
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """`[N, H, W, I]` -> `[N, ceil(H / stride), ceil(W / stride), features]`."""
        shape = (self.size, self.size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_uniform(), shape, jnp.float32)
        outputs = conv(images, kernel, stride=self.stride)
        if not self.use_bias:
            return outputs
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return outputs + bias[None, None, None]


class SmallCNN(nn.Module):
    """3x3 convolutions of 24 and 48 channels with stride 2, then a hidden layer of 64.

    1.4 MFLOP for 28x28x1 images. There is no pooling, so no feature map has the size of the image: a meta-training
    step is several times faster than with `LeNet`.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        for features in (24, 48):
            x = nn.relu(Conv(features, stride=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(x)


class LeNet(nn.Module):
    """LeNet-like: 5x5 convolutions of 16 and 32 channels, each with 2x2 max pooling, then a hidden layer of 64."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        for features in (16, 32):
            x = nn.relu(max_pool(Conv(features, 5)(x)))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(x)


class Vgg(nn.Module):
    """VGG-like (arXiv 1409.1556) with batch norm: three blocks of two 3x3 convolutions, then global average pooling.

    44 MFLOP and 163,000 parameters for 32x32x3 images.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        for block, features in enumerate((24, 48, 96)):
            if block:
                x = max_pool(x)
            for _ in range(2):
                x = nn.relu(_batch_norm(x, train)(Conv(features, use_bias=False)(x)))
        return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))


class ResNet20(nn.Module):
    """ResNet-20 for small images (arXiv 1512.03385, section 4.2), with parameter-free shortcuts (option A)."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        x = nn.relu(_batch_norm(x, train)(Conv(16, use_bias=False)(x)))
        for features in (16, 32, 64):
            for block in range(3):
                stride = 2 if block == 0 and features > 16 else 1
                y = nn.relu(_batch_norm(x, train)(Conv(features, stride=stride, use_bias=False)(x)))
                y = _batch_norm(y, train)(Conv(features, use_bias=False)(y))
                shortcut = x[:, ::stride, ::stride]
                more = features - shortcut.shape[-1]
                x = nn.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, more))))
        return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))


#: `{name of the architecture: num_classes -> module}`.
MODELS = {"small_cnn": SmallCNN, "lenet": LeNet, "vgg": Vgg, "resnet20": ResNet20}


def build_model(architecture: str, num_classes: int) -> nn.Module:
    """The flax module of an architecture.

    Args:
      architecture: one of `MODELS`.
      num_classes: number of classes, at least 2.

    Returns:
      A module from images `[N, H, W, C]`, floating-point in [0, 1] with sides of at least 4 pixels, to logits
      `[N, num_classes]`.

    Raises:
      ValueError: for an unknown architecture, or fewer than 2 classes.

    Examples:
      >>> model = build_model("small_cnn", num_classes=10)
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> jax.eval_shape(lambda key: model.init_with_output(key, images)[0], jax.random.key(0)).shape
      (2, 10)
    """
    base.check_name("architecture", architecture, MODELS)
    base.check_at_least("num_classes", num_classes, 2)
    return MODELS[architecture](num_classes)


def _normalized(images, minimum):
    if images.ndim != 4 or min(images.shape[1:3]) < minimum:
        expected = f"[N, H, W, C] with H and W at least {minimum} for this architecture"
        raise ValueError(f"images must be {expected}, got shape {images.shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating-point in [0, 1], got {images.dtype}.")
    return 4 * images - 2


def _batch_norm(x, train):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)
