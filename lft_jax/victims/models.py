"""Victim architectures, as flax modules from images to logits.

Images are `[N, H, W, C]`, floating-point in [0, 1], logits `[N, num_classes]`.
Images and variables must have the same dtype; `lft_jax.victims.apply_function` casts the variables. The modules
normalize their input. Pooling comes before the relu: the function is the same, with fewer ties in the maxima. With
`train=True` batch norm uses the statistics of the batch; this needs `mutable=["batch_stats"]`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lft_jax import base
from lft_jax._layers import conv, depthwise_conv, max_pool


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


class ResNet(nn.Module):
    """Residual network for small images (arXiv 1512.03385, section 4.2), with parameter-free shortcuts (option A).

    For 32x32x3 images: ResNet-20 has 81 MFLOP and 270,000 parameters, ResNet-14 of width 12 has 30 MFLOP and 97,000.

    Attributes:
      num_classes: number of classes.
      blocks: residual blocks of each of the three resolutions; the network has 6 `blocks` + 2 layers.
      width: channels of the first resolution; they double twice.
    """

    num_classes: int
    blocks: int = 3
    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        x = nn.relu(_batch_norm(x, train)(Conv(self.width, use_bias=False)(x)))
        for features in (self.width, 2 * self.width, 4 * self.width):
            for block in range(self.blocks):
                stride = 2 if block == 0 and features > self.width else 1
                y = nn.relu(_batch_norm(x, train)(Conv(features, stride=stride, use_bias=False)(x)))
                y = _batch_norm(y, train)(Conv(features, use_bias=False)(y))
                shortcut = x[:, ::stride, ::stride]
                more = features - shortcut.shape[-1]
                x = nn.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, more))))
        return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))


class DepthwiseConv(nn.Module):
    """The convolution `depthwise_conv` with a learned kernel `[3, 3, C]`, without bias.

    Attributes:
      stride: 1 or 2.
    """

    stride: int = 1

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[N, H, W, C]` -> `[N, ceil(H / stride), ceil(W / stride), C]`."""
        # Each channel sees 9 inputs, which the initializers cannot tell from the shape.
        init = nn.initializers.normal((2 / 9) ** 0.5)
        kernel = self.param("kernel", init, (3, 3, images.shape[-1]), jnp.float32)
        return depthwise_conv(images, kernel, stride=self.stride)


class MobileNet(nn.Module):
    """MobileNet-like (arXiv 1704.04861): six depthwise-separable convolutions, each half with batch norm.

    42 MFLOP and 206,000 parameters for 32x32x3 images.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        x = nn.relu(_batch_norm(x, train)(Conv(32, use_bias=False)(x)))
        for features, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1)):
            x = nn.relu(_batch_norm(x, train)(DepthwiseConv(stride)(x)))
            x = nn.relu(_batch_norm(x, train)(nn.Dense(features, use_bias=False)(x)))
        return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))


class VisionTransformer(nn.Module):
    """Small vision transformer (arXiv 2010.11929): a token for 4x4 pixels, five blocks of dimension 96, no class token.

    The tokens come from two 3x3 convolutions of stride 2 (arXiv 2106.14881): without them so small a transformer learns
    less from so few images. 49 MFLOP and 332,000 parameters for 32x32x3 images.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array | np.ndarray, *, train: bool = False) -> jax.Array:
        x = _normalized(images, minimum=4)
        x = nn.relu(_batch_norm(x, train)(Conv(48, stride=2, use_bias=False)(x)))
        x = Conv(96, stride=2)(x)
        n, height, width, dimension = x.shape
        x = x.reshape(n, height * width, dimension)
        position = self.param("position", nn.initializers.normal(0.02), x.shape[1:], jnp.float32)
        x = x + position[None]
        for _ in range(5):
            x = x + SelfAttention(4)(LayerNorm()(x))
            x = x + nn.Dense(dimension)(nn.gelu(nn.Dense(dimension)(LayerNorm()(x))))
        return nn.Dense(self.num_classes)(jnp.mean(LayerNorm()(x), 1))


class LayerNorm(nn.Module):
    """Layer normalization (arXiv 1607.06450) of the last axis, in the dtype of the tokens, as that of flax is not."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[N, T, D]` -> `[N, T, D]`."""
        shape = tokens.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        centered = tokens - jnp.mean(tokens, -1, keepdims=True)
        variance = jnp.mean(centered**2, -1, keepdims=True)
        return centered * jax.lax.rsqrt(variance + 1e-6) * scale[None, None] + bias[None, None]


class SelfAttention(nn.Module):
    """Self-attention of tokens (arXiv 1706.03762, section 3.2).

    Attributes:
      heads: number of heads, a divisor of the dimension of the tokens.
    """

    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[N, T, D]` -> `[N, T, D]`."""
        n, length, dimension = tokens.shape
        size = dimension // self.heads
        mixed = nn.Dense(3 * dimension)(tokens).reshape(n, length, 3, self.heads, size)
        query, key, value = (mixed[:, :, i].swapaxes(1, 2) for i in range(3))  # [N, heads, T, size]
        weights = nn.softmax(query @ key.swapaxes(2, 3) * size**-0.5)
        return nn.Dense(dimension)((weights @ value).swapaxes(1, 2).reshape(n, length, dimension))


#: `{name of the architecture: num_classes -> module}`.
MODELS = {
    "small_cnn": SmallCNN,
    "lenet": LeNet,
    "vgg": Vgg,
    "resnet14": functools.partial(ResNet, blocks=2, width=12),
    "resnet20": ResNet,
    "mobilenet": MobileNet,
    "vit": VisionTransformer,
}


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
