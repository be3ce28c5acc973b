"""Convolution and pooling that are fast on a CPU, forwards and backwards, also inside `lax.scan`.

The speed of XLA's convolution depends on its shapes. With few input channels it is up to 3 times slower than one matrix
product. Inside a loop, the gradients of autodiff are about 8 times slower than necessary for the input, and up to 300
times for the kernel. Here each case is written in the form that was measured to be fastest (docs/performance.md).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lft_jax import base


def conv(images: jax.Array | np.ndarray, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Convolution with SAME padding, equal to `lax.conv_general_dilated`; differentiable any number of times.

    Args:
      images: `[N, H, W, I]`.
      kernel: `[k, k', I, O]` of the same dtype, k and k' odd.
      stride: 1 or 2.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), O]`.

    Raises:
      ValueError: for an even kernel or another stride.
    """
    return _conv(images, kernel, stride, _same_padding(images.shape, kernel.shape, stride))


def depthwise_conv(images: jax.Array | np.ndarray, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Convolution of each channel with its own kernel, SAME padding; differentiable any number of times.

    Forwards and backwards 6 times as fast on a CPU as `lax.conv_general_dilated` with as many groups as channels. The
    gradient of the gradient is right, but no faster than that of autodiff.

    Args:
      images: `[N, H, W, C]`.
      kernel: `[k, k', C]` of the same dtype, k and k' odd.
      stride: 1 or 2.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C]`.

    Raises:
      ValueError: for an even kernel or another stride.
    """
    return _depthwise(images, kernel, stride, _same_padding(images.shape, kernel.shape, stride))


def padded_conv(images: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """`conv` with any kernel `[k, k', I, O]`, stride and padding `((top, bottom), (left, right))`, also below 0."""
    if kernel.shape[:2] == (1, 1):
        images = _padded(images, padding)[:, ::stride, ::stride]
        return images @ kernel[0, 0]
    reached = []  # the padding without what no output sees
    for length, size, (low, high) in zip(images.shape[1:3], kernel.shape[:2], padding, strict=True):
        reached.append((low, high - (length + low + high - size) % stride))
    if any(not 0 <= pad < size for size, pads in zip(kernel.shape[:2], reached, strict=True) for pad in pads):
        images, reached = _padded(images, reached), ((0, 0), (0, 0))
    return _conv(images, kernel, stride, tuple(reached))


def padded_depthwise_conv(
    images: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """`depthwise_conv` with any kernel `[k, k', C]`, stride and padding `((top, bottom), (left, right))`."""
    return _depthwise(images, kernel, stride, tuple(map(tuple, padding)))


def _padded(images, padding):
    """Images with zeros around them, or cut off where the padding is below 0."""
    return lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *((*pads, 0) for pads in padding), (0, 0, 0)])


def conv_by_patches(images: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """`conv` as one matrix product with all patches, for `vmap` over tasks that each have a kernel.

    XLA turns any other form under `vmap` over kernels into a grouped convolution, which is up to twice as slow on a
    CPU.
    """
    padding = _same_padding(images.shape, kernel.shape, stride)
    height, width = (-(-length // stride) for length in images.shape[1:3])
    patches = _patches(_padded(images, padding), kernel.shape[:2], stride, height, width)
    return (patches @ kernel.reshape(-1, kernel.shape[3])).reshape(len(images), height, width, kernel.shape[3])


def _same_padding(shape, kernel_shape, stride):
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}.")
    if not all(size % 2 for size in kernel_shape[:2]):
        raise ValueError(f"kernel must have odd height and width, got shape {kernel_shape}.")
    return tuple(lax.padtype_to_pads(shape[1:3], kernel_shape[:2], (stride, stride), "SAME"))


#: Largest number of input channels for which matrix products are faster than XLA's convolution.
_FEW_CHANNELS = 3
#: Number of inputs of an output above which XLA's convolution of few channels with a stride is faster.
_LARGE_PATCH = 27
#: Largest number of entries of the matrix of a whole convolution: 64 MiB.
_LARGEST_MATRIX = 2**24


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(images, kernel, stride, padding):
    channels, features = kernel.shape[2:]
    if stride == 1 and _is_small(images.shape, kernel.shape):
        return _conv_of_small_images(images, kernel, padding)
    if channels > _FEW_CHANNELS or (stride > 1 and math.prod(kernel.shape[:3]) > _LARGE_PATCH):
        return lax.conv_general_dilated(
            images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    # A sum of shifted images, without a matrix product, would be even faster for one channel. But XLA would recompute
    # it wherever it is read, with different rounding, and a max pool would not find its own maximum again.
    if stride == 1:
        return _conv_by_blocks(images, kernel, padding)
    padded, size = _padded(images, padding), kernel.shape[:2]
    height, width = ((length - k) // stride + 1 for length, k in zip(padded.shape[1:3], size, strict=True))
    outputs = _patches(padded, size, stride, height, width) @ kernel.reshape(-1, features)
    return outputs.reshape(len(images), height, width, features)


def _is_small(shape, kernel_shape):
    pixels, (channels, features) = shape[1] * shape[2], kernel_shape[2:]
    few = pixels <= kernel_shape[0] * kernel_shape[1]
    return few and (pixels * channels) * (pixels * features) <= _LARGEST_MATRIX


def _conv_by_blocks(images, kernel, padding):
    """For few channels: one product of the inputs of blocks of a few pixels of a row with a banded matrix."""
    n, _, length, channels = images.shape
    (top, bottom), (left, right) = padding
    height, more = images.shape[1] + top + bottom - kernel.shape[0] + 1, kernel.shape[1] - 1
    width, block = length + left + right - more, max(4, more)
    blocks = -(-width // block)
    right = (blocks + 1) * block - left - length
    lines = _padded(images, ((top, bottom), (left, right)))
    lines = lines.reshape(n, -1, blocks + 1, block * channels)  # inputs of a block: itself and a part of the next
    seen = [
        part
        for i in range(kernel.shape[0])
        for part in (lines[:, i : i + height, :-1], lines[:, i : i + height, 1:, : more * channels])
    ]
    band = _band(kernel, block)
    outputs = jnp.concatenate(seen, axis=-1).reshape(-1, len(band)) @ band
    return outputs.reshape(n, height, blocks * block, -1)[:, :, :width]


def _conv_of_small_images(images, kernel, padding):
    """For images no larger than the kernel: one product with the whole linear map. XLA is 16 times slower there."""

    def along(axis):  # [k, in, out], 1 where entry k of the kernel maps an input to an output
        size, length = kernel.shape[axis - 1], images.shape[axis]
        low, high = padding[axis - 1]
        offset, source, target = np.ogrid[:size, :length, : length + low + high - size + 1]
        return (source == target + offset - low).astype(kernel.dtype)

    rows, columns = along(1), along(2)
    linear = jnp.einsum("ihp,jwq,ijco->hwcpqo", rows, columns, kernel)
    outputs = images.reshape(len(images), -1) @ linear.reshape(math.prod(images.shape[1:]), -1)
    return outputs.reshape(len(images), *linear.shape[3:])


def _band(kernel, block):
    """`[k * (block + k' - 1) * I, block * O]`: maps the inputs of `block` neighbouring pixels to their outputs."""
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
    """For few channels: one matrix product for all offsets of the kernel, whose columns are shifted and added.

    A column holds all images end to end, with zeros between their rows, so that a shift is a plain slice. If each
    offset were added in place, as in `_scattered`, XLA would store every offset when the mean and the spread over
    images are needed.
    """
    n, height, width, features = cotangent.shape
    offsets, channels = kernel.shape[:2], kernel.shape[2]
    down, right = ((size - 1) // stride for size in offsets)  # largest shifts
    padded = _padded(cotangent, ((0, down), (0, right)))
    height, width = height + down, width + right
    length, farthest = n * height * width, down * width + right
    lines = jnp.concatenate([jnp.zeros((farthest, features), padded.dtype), padded.reshape(length, features)])
    pieces = (lines @ kernel.reshape(-1, features).T).reshape(farthest + length, *offsets, channels)

    def phase(a, b):  # the pixels in rows a and columns b modulo the stride
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
    """One matrix product for all offsets of the kernel; each offset is added at its place in the image."""
    n, height, width, features = cotangent.shape
    offsets, channels = kernel.shape[:2], kernel.shape[2]
    pieces = cotangent.reshape(-1, features) @ kernel.reshape(-1, features).T
    pieces = pieces.reshape(n, height, width, offsets[0] * offsets[1], channels)
    full = [size + low + high for size, (low, high) in zip(shape[1:3], padding, strict=True)]
    last = [stride * (size - 1) + 1 for size in (height, width)]
    zero, total = jnp.zeros((), cotangent.dtype), jnp.zeros((), cotangent.dtype)
    for number, (i, j) in enumerate(np.ndindex(offsets)):
        places = [(i, full[0] - i - last[0], stride - 1), (j, full[1] - j - last[1], stride - 1)]
        total += lax.pad(pieces[:, :, :, number], zero, [(0, 0, 0), *places, (0, 0, 0)])
    (top, _), (left, _) = padding
    return total[:, top : top + shape[1], left : left + shape[2]]


def _kernel_gradient(images, shape, stride, padding, cotangent):
    padded = _padded(images, padding)
    n, height, width, features = cotangent.shape
    cotangent = cotangent.reshape(n * height * width, features)
    if shape[2] <= _FEW_CHANNELS:
        return (_patches(padded, shape[:2], stride, height, width).T @ cotangent).reshape(shape)
    last = (stride * (height - 1) + 1, stride * (width - 1) + 1)

    def at(offset):
        window = lax.dynamic_slice(padded, tuple(offset), (n, *last, shape[2]))[:, ::stride, ::stride]
        return window.reshape(n * height * width, shape[2]).T @ cotangent

    # A loop: unrolled, the products for 25 offsets take seconds to compile.
    offsets = np.moveaxis(np.indices((1, *shape[:2], 1)), 0, -1).reshape(-1, 4).astype(np.int32)
    return lax.map(at, offsets).reshape(shape)


def _patches(padded, size, stride, height, width):
    """`[N * height * width, k * k' * I]`: the patches of a kernel of the given size at each output position."""
    taps = [padded[:, i : i + stride * height : stride, j : j + stride * width : stride] for i, j in np.ndindex(size)]
    patches = jnp.concatenate(taps, axis=-1)
    return patches.reshape(-1, patches.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(images, kernel, stride, padding):
    """A sum of shifted images. XLA makes one loop of it, which it does not of the sum that autodiff makes."""
    taps, weights = _taps(images, kernel.shape, stride, padding), kernel.reshape(-1, kernel.shape[2])
    return sum(tap * weight[None, None, None] for tap, weight in zip(taps, weights, strict=True))


def _depthwise_forward(images, kernel, stride, padding):
    return _depthwise(images, kernel, stride, padding), (images, kernel)


def _depthwise_backward(stride, padding, saved, cotangent):
    images, kernel = saved
    taps = _taps(images, kernel.shape, stride, padding)
    kernel_gradient = jnp.stack([jnp.sum(tap * cotangent, (0, 1, 2)) for tap in taps]).reshape(kernel.shape)
    # The transpose: zeros between the pixels of a strided output, then the flipped kernel with stride 1.
    apart = (0, 0, stride - 1)
    spread = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), ((0, 0, 0), apart, apart, (0, 0, 0)))
    before = [size - 1 - low for size, (low, _) in zip(kernel.shape[:2], padding, strict=True)]
    after = [
        image + size - 1 - low - out
        for image, size, low, out in zip(images.shape[1:3], kernel.shape[:2], before, spread.shape[1:3], strict=True)
    ]
    back = _depthwise(spread, jnp.flip(kernel, (0, 1)), 1, tuple(zip(before, after, strict=True)))
    return back, kernel_gradient


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _taps(images, kernel_shape, stride, padding):
    """What each entry of a kernel sees: `[N, height, width, C]`, one for each."""
    # `lax.pad` and not `jnp.pad`: the padding is negative where the last row or column reached no output.
    edges = [(low, high, 0) for low, high in padding]
    padded = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    last = [
        (length - size) // stride * stride + 1 for length, size in zip(padded.shape[1:3], kernel_shape, strict=False)
    ]
    return [padded[:, i : i + last[0] : stride, j : j + last[1] : stride] for i, j in np.ndindex(kernel_shape[:2])]


def max_pool(images: jax.Array) -> jax.Array:
    """Max pooling over 2x2 windows: `[N, H, W, C]` -> `[N, H // 2, W // 2, C]`; an odd last row or column is dropped.

    The backward pass is 3.5 times as fast as that of `flax.linen.max_pool` on a CPU. Ties share the gradient equally.

    Raises:
      ValueError: if H or W is less than 2.
    """
    n, height, width, channels = images.shape
    base.check_at_least("images: height and width before a pooling", min(height, width), 2)
    height, width = height // 2, width // 2
    windows = images[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels)
    return jnp.max(windows, axis=(2, 4))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def window_max(x: jax.Array, size: tuple[int, ...], padding: tuple[tuple[int, int], ...]) -> jax.Array:
    """The largest entry of each window, equal to `lax.reduce_window` with `lax.max` and windows side by side.

    With its gradient three times as fast on a CPU. The first one of equal entries has the gradient, as there.

    Args:
      x: floating-point, of any number of axes.
      size: of a window along each axis, which is the stride too.
      padding: `(low, high)` of each axis.
    """
    windows, axes = _windows(x, size, padding, -np.inf)
    return jnp.max(windows, axes)


@window_max.defjvp
def _window_max_jvp(size, padding, primals, tangents):
    (x,), (tangent,) = primals, tangents
    windows, axes = _windows(x, size, padding, -np.inf)
    largest, *others = [
        windows[tuple(dict(zip(axes, place, strict=True)).get(axis, slice(None)) for axis in range(windows.ndim))]
        for place in np.ndindex(*[windows.shape[axis] for axis in axes])
    ]
    places = jnp.zeros(largest.shape, np.uint8)
    for number, entry in enumerate(others, 1):
        places = jnp.where(entry > largest, np.uint8(number), places)
        largest = jnp.maximum(entry, largest)
    # The numbers of the entries, not the entries again: XLA may compute these twice, and round them in two ways.
    numbers = np.arange(math.prod(size), dtype=np.uint8)
    numbers = numbers.reshape([n if axis in axes else 1 for axis, n in enumerate(windows.shape)])
    changes, _ = _windows(tangent, size, padding, 0)
    chosen = jnp.expand_dims(places, axes) == numbers
    return largest, jnp.sum(jnp.where(chosen, changes, jnp.zeros((), changes.dtype)), axes)


def _windows(x, size, padding, fill):
    """Padded and cut into windows, whose entries have axes of their own: the array and these axes."""
    pads = [
        (low, high - (length + low + high) % k, 0)
        for length, k, (low, high) in zip(x.shape, size, padding, strict=True)
    ]
    if any(map(any, pads)):
        x = lax.pad(x, jnp.asarray(fill, x.dtype), pads)
    shape, axes = [], []
    for length, k in zip(x.shape, size, strict=True):
        shape.append(length // k)
        if k > 1:
            axes.append(len(shape))
            shape.append(k)
    return x.reshape(shape), tuple(axes)
