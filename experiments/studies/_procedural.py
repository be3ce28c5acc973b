"""Procedural noise for universal attacks, tuned by Bayesian optimisation: arXiv 1810.00470, in an linf ball.

Parameters are in [0, 1]; `PERLIN` and `GABOR` have what they stand for. A pattern `[H, W, 1]` is of -1 and 1, the same
in all channels.
"""

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

#: `{name: (least, largest)}`; octaves are rounded.
PERLIN = {"frequency": (0.02, 0.5), "octaves": (1.0, 4.0), "lacunarity": (1.5, 3.0), "sine": (1.0, 36.0)}
GABOR = {"sigma": (1.0, 8.0), "wavelength": (2.0, 16.0), "orientation": (0.0, np.pi), "spread": (0.0, np.pi)}
_CANDIDATES, _FIRST = 300, 5  # points of the acquisition; random points before there is a model


def _values(parameters, ranges):
    return [low + x * (high - low) for x, (low, high) in zip(parameters, ranges.values(), strict=True)]


def perlin(parameters: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sign of a sine of Perlin noise; see `PERLIN`, frequencies in cycles per pixel."""
    frequency, octaves, lacunarity, sine = _values(parameters, PERLIN)
    total = np.zeros(shape[:2])
    for octave in range(round(octaves)):
        total += _gradient_noise(shape, min(frequency * lacunarity**octave, 1.0)) / 2**octave
    return np.where(np.sin(2 * np.pi * sine * total) >= 0, 1.0, -1.0)[..., None].astype(np.float32)


def _gradient_noise(shape, frequency):
    """Perlin's gradient noise with this many lattice points per pixel."""
    rng = np.random.default_rng(0)
    y, x = (frequency * np.arange(side) for side in shape[:2])
    angles = 2 * np.pi * rng.random((int(y[-1]) + 2, int(x[-1]) + 2))
    row, column, v, u = y.astype(int), x.astype(int), y % 1, x % 1

    def corner(i, j):
        at = angles[np.ix_(row + i, column + j)]
        return np.cos(at) * (v - i)[:, None] + np.sin(at) * (u - j)[None]

    v, u = v.copy(), u.copy()
    fade_v, fade_u = (t**3 * (t * (6 * t - 15) + 10) for t in (v, u))
    top = corner(0, 0) * (1 - fade_u)[None] + corner(0, 1) * fade_u[None]
    bottom = corner(1, 0) * (1 - fade_u)[None] + corner(1, 1) * fade_u[None]
    return top * (1 - fade_v)[:, None] + bottom * fade_v[:, None]


def gabor(parameters: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sign of sparse noise convolved with Gabor kernels of three orientations; see `GABOR`, lengths in pixels."""
    sigma, wavelength, orientation, spread = _values(parameters, GABOR)
    rng = np.random.default_rng(0)
    height, width = shape[:2]
    y, x = np.meshgrid(*(np.fft.fftfreq(side) * side for side in (height, width)), indexing="ij")
    total = np.zeros((height, width))
    for angle in orientation + spread * np.asarray([-0.5, 0.0, 0.5]):
        points = np.where(rng.random((height, width)) < 0.1, rng.choice([-1.0, 1.0], (height, width)), 0.0)
        kernel = np.exp(-(y**2 + x**2) / (2 * sigma**2))
        kernel = kernel * np.cos(2 * np.pi / wavelength * (np.cos(angle) * y + np.sin(angle) * x))
        total += np.fft.ifft2(np.fft.fft2(points) * np.fft.fft2(kernel)).real
    return np.where(total >= 0, 1.0, -1.0)[..., None].astype(np.float32)


def optimised(loss: Callable[[np.ndarray], float], size: int, number: int, rng: np.random.Generator) -> None:
    """Bayesian optimisation in the unit cube: a Gaussian process with a Matern kernel, expected improvement.

    Args:
      loss: `[size] -> float`, evaluated `number` times.
      size: number of parameters.
      number: of evaluations.
      rng: source of the first points and of the candidates.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    points, values = [], []
    for i in range(number):
        if i < _FIRST:
            point = rng.random(size)
        else:
            kernel = Matern(length_scale=0.3 * np.ones(size), nu=2.5) + WhiteKernel(1e-2)
            fitted = i in (10, 25, 60, 150)  # the likelihood is maximised now and then
            model = GaussianProcessRegressor(kernel, normalize_y=True, optimizer="fmin_l_bfgs_b" if fitted else None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(np.stack(points), np.asarray(values))
            candidates = rng.random((_CANDIDATES, size))
            mean, deviation = model.predict(candidates, return_std=True)
            better = (min(values) - mean) / np.maximum(deviation, 1e-9)
            gain = deviation * (better * stats.norm.cdf(better) + stats.norm.pdf(better))
            point = candidates[np.argmax(gain)]
        points.append(point)
        values.append(loss(point))
