"""Convolution and pooling that are fast on a CPU, forwards and backwards, also inside `lax.scan`.

What XLA makes of a convolution depends on its shapes. Of few input channels it is up to 3 times slower than one matrix
product; autodiff's gradients inside a loop are about 8 times slower than need be for the input, and up to 300 times for
the kernel. Here each is written out in the form that measured best (docs/performance.md).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lft_jax import base


def conv(images: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """A convolution with SAME padding, equal to `lax.conv_general_dilated`, differentiable any number of times.

    Args:
      images: `[N, H, W, I]`.
      kernel: `[k, k', I, O]` of the same dtype, k and k' odd.
      stride: 1 or 2.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), O]`.

    Raises:
      ValueError: for an even kernel or another stride.
    """
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}.")
    if not all(size % 2 for size in kernel.shape[:2]):
        raise ValueError(f"kernel must have odd height and width, got shape {kernel.shape}.")
    padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    return _conv(images, kernel, stride, tuple(padding))


def conv_by_patches(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`conv` of stride 1 by one product with all that the kernel meets: where each of many tasks has its own kernel.

    Under `vmap` over kernels XLA makes a grouped convolution of any other form, which is up to twice as slow on a CPU.
    """
    if not all(size % 2 for size in kernel.shape[:2]):
        raise ValueError(f"kernel must have odd height and width, got shape {kernel.shape}.")
    padding = ((0, 0), *((size // 2, size // 2) for size in kernel.shape[:2]), (0, 0))
    patches = _patches(jnp.pad(images, padding), kernel.shape[:2], 1, *images.shape[1:3])
    return (patches @ kernel.reshape(-1, kernel.shape[3])).reshape(*images.shape[:3], kernel.shape[3])


_FEW_CHANNELS = 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(images, kernel, stride, padding):
    channels, features = kernel.shape[2:]
    if stride == 1 and images.shape[1] * images.shape[2] <= kernel.shape[0] * kernel.shape[1]:
        return _conv_of_small_images(images, kernel, padding)
    if channels > _FEW_CHANNELS:
        return lax.conv_general_dilated(
            images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    # A sum of shifted images, without any product of matrices, would be faster still for one channel. But XLA then
    # computes it anew wherever it is read, with other rounding, and a maximum pool does not find its own maximum.
    if stride == 1:
        return _conv_by_blocks(images, kernel, padding)
    padded, size = jnp.pad(images, ((0, 0), *padding, (0, 0))), kernel.shape[:2]
    height, width = ((length - k) // stride + 1 for length, k in zip(padded.shape[1:3], size, strict=True))
    outputs = _patches(padded, size, stride, height, width) @ kernel.reshape(-1, features)
    return outputs.reshape(len(images), height, width, features)


def _conv_by_blocks(images, kernel, padding):
    """Blocks of a few pixels of a line by one product, of what they see with a banded matrix: for few channels."""
    n, _, length, channels = images.shape
    (top, bottom), (left, right) = padding
    height, more = images.shape[1] + top + bottom - kernel.shape[0] + 1, kernel.shape[1] - 1
    width, block = length + left + right - more, max(4, more)
    blocks = -(-width // block)
    right = (blocks + 1) * block - left - length
    lines = jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
    lines = lines.reshape(n, -1, blocks + 1, block * channels)  # a block sees itself and a part of the next
    seen = [
        part
        for i in range(kernel.shape[0])
        for part in (lines[:, i : i + height, :-1], lines[:, i : i + height, 1:, : more * channels])
    ]
    band = _band(kernel, block)
    outputs = jnp.concatenate(seen, axis=-1).reshape(-1, len(band)) @ band
    return outputs.reshape(n, height, blocks * block, -1)[:, :, :width]


def _conv_of_small_images(images, kernel, padding):
    """One product with the whole linear map, for images no larger than the kernel: XLA is 16 times slower there."""

    def along(axis):  # [k, in, out], where the kernel's k-th entry takes an input to an output
        size, length = kernel.shape[axis - 1], images.shape[axis]
        low, high = padding[axis - 1]
        offset, source, target = np.ogrid[:size, :length, : length + low + high - size + 1]
        return (source == target + offset - low).astype(kernel.dtype)

    rows, columns = along(1), along(2)
    linear = jnp.einsum("ihp,jwq,ijco->hwcpqo", rows, columns, kernel)
    outputs = images.reshape(len(images), -1) @ linear.reshape(math.prod(images.shape[1:]), -1)
    return outputs.reshape(len(images), *linear.shape[3:])


def _band(kernel, block):
    """`[k * (block + k' - 1) * I, block * O]`: takes what `block` neighbours see of k lines to their outputs."""
    column = np.arange(block + kernel.shape[1] - 1)[None, :, None]
    column = column == np.arange(kernel.shape[1])[:, None, None] + np.arange(block)
    band = jnp.einsum("jpw,ijco->ipcwo", column.astype(kernel.dtype), kernel)
    return band.reshape(-1, block * kernel.shape[3])


def _conv_forward(images, kernel, stride, padding):
    return _conv(images, kernel, stride, padding), (images, kernel)


def _conv_backward(stride, padding, saved, cotangent):
    images, kernel = saved
    return _image_gradient(images.shape, kernel, stride, padding, cotangent), _kernel_gradient(
        images, kernel.shape, stride, padding, cotangent
    )


_conv.defvjp(_conv_forward, _conv_backward)


def _image_gradient(shape, kernel, stride, padding, cotangent):
    if kernel.shape[2] <= _FEW_CHANNELS:
        return _shifted(shape, kernel, stride, padding, cotangent)
    if stride > 1:
        return _scattered(shape, kernel, stride, padding, cotangent)
    # Through `_conv` again, so that the gradient of the gradient is as fast.
    before = [size - 1 - low for size, (low, _) in zip(kernel.shape[:2], padding, strict=True)]
    after = [
        image + size - 1 - low - out
        for image, size, low, out in zip(shape[1:3], kernel.shape[:2], before, cotangent.shape[1:3], strict=True)
    ]
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return _conv(cotangent, flipped, 1, tuple(zip(before, after, strict=True)))


def _shifted(shape, kernel, stride, padding, cotangent):
    """One matrix product for all offsets of the kernel, whose long columns are shifted and added: for few channels.

    A column is all images end to end, with zeros between their lines, so that a shift is a plain slice. If offsets were
    added where they came from, as in `_scattered`, XLA would store each where mean and spread over images are wanted.
    """
    n, height, width, features = cotangent.shape
    offsets, channels = kernel.shape[:2], kernel.shape[2]
    down, right = ((size - 1) // stride for size in offsets)  # farthest shifts
    padded = jnp.pad(cotangent, ((0, 0), (0, down), (0, right), (0, 0)))
    height, width = height + down, width + right
    length, farthest = n * height * width, down * width + right
    lines = jnp.concatenate([jnp.zeros((farthest, features), padded.dtype), padded.reshape(length, features)])
    pieces = (lines @ kernel.reshape(-1, features).T).reshape(farthest + length, *offsets, channels)

    def phase(a, b):  # of the offsets that meet each stride-th pixel, the a-th row and b-th column of them
        total = jnp.zeros((length, channels), pieces.dtype)
        for i, j in np.ndindex(offsets):
            if i % stride == a and j % stride == b:
                first = farthest - i // stride * width - j // stride
                total += pieces[first : first + length, i, j]
        return total

    phases = jnp.stack([phase(a, b) for a, b in np.ndindex(stride, stride)])
    phases = phases.reshape(stride, stride, n, height, width, channels).transpose(2, 3, 0, 4, 1, 5)
    full = phases.reshape(n, stride * height, stride * width, channels)
    (top, _), (left, _) = padding
    return full[:, top : top + shape[1], left : left + shape[2]]


def _scattered(shape, kernel, stride, padding, cotangent):
    """One matrix product for all offsets of the kernel, each added where it came from."""
    n, height, width, features = cotangent.shape
    offsets, channels = kernel.shape[:2], kernel.shape[2]
    pieces = cotangent.reshape(-1, features) @ kernel.reshape(-1, features).T
    pieces = pieces.reshape(n, height, width, offsets[0] * offsets[1], channels)
    full = [size + low + high for size, (low, high) in zip(shape[1:3], padding, strict=True)]
    last = [stride * (size - 1) + 1 for size in (height, width)]
    zero, total = jnp.zeros((), cotangent.dtype), 0
    for number, (i, j) in enumerate(np.ndindex(offsets)):
        places = [(i, full[0] - i - last[0], stride - 1), (j, full[1] - j - last[1], stride - 1)]
        total += lax.pad(pieces[:, :, :, number], zero, [(0, 0, 0), *places, (0, 0, 0)])
    (top, _), (left, _) = padding
    return total[:, top : top + shape[1], left : left + shape[2]]


def _kernel_gradient(images, shape, stride, padding, cotangent):
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    n, height, width, features = cotangent.shape
    cotangent = cotangent.reshape(n * height * width, features)
    if shape[2] <= _FEW_CHANNELS:
        return (_patches(padded, shape[:2], stride, height, width).T @ cotangent).reshape(shape)
    last = (stride * (height - 1) + 1, stride * (width - 1) + 1)

    def at(offset):
        window = lax.dynamic_slice(padded, tuple(offset), (n, *last, shape[2]))[:, ::stride, ::stride]
        return window.reshape(n * height * width, shape[2]).T @ cotangent

    # A loop, since one product for each of 25 offsets takes seconds to compile.
    offsets = np.stack(np.indices((1, *shape[:2], 1)), -1).reshape(-1, 4).astype(np.int32)
    return lax.map(at, offsets).reshape(shape)


def _patches(padded, size, stride, height, width):
    """`[N * height * width, k * k' * I]`: what a kernel of the given size meets at each place."""
    taps = [padded[:, i : i + stride * height : stride, j : j + stride * width : stride] for i, j in np.ndindex(size)]
    patches = jnp.concatenate(taps, axis=-1)
    return patches.reshape(-1, patches.shape[-1])


def max_pool(images: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows: `[N, H, W, C]` -> `[N, H // 2, W // 2, C]`; an odd last row or column is left out.

    3.5 times as fast as `flax.linen.max_pool` backwards on a CPU. The gradient is shared among ties.

    Raises:
      ValueError: if H or W is less than 2.
    """
    n, height, width, channels = images.shape
    base.check_at_least("images: height and width before a pooling", min(height, width), 2)
    height, width = height // 2, width // 2
    windows = images[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels)
    return jnp.max(windows, axis=(2, 4))
