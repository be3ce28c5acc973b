r"""An update rule for perturbations that works on frequencies instead of pixels.

A universal perturbation of a convolutional network is nearly a periodic texture, and averages over translations tell it
from what single images add. The rule keeps, for each frequency, a momentum of the mean gradient and of its noise, and
weighs the groups of frequencies that each period of `lft_jax._spectrum.GROUPS` adds to the shorter ones:

    gradients --transform--> momentum M(f), noise N(f) --weights of periods--> w M(f) --inverse--> direction of a step

Short periods, of which an image has many, take part from the start. A longer one, and the frequencies of no period, do
when their momentum stands out of its noise: at 32 pixels from period 8 on, at 224 from 32. How far it has to, depends
on the model and on the progress of the run, so an LSTM corrects it: one cell for each period, with shared weights,
which sees a few numbers of that group. It holds at every size of an image, and costs nothing beside the transforms.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import _spectrum, base
from lft_jax.base import PyTree
from lft_jax.optimizers._network import affine, lstm
from lft_jax.optimizers.features import Signal, root_mean_square, unit_rms

_NUM_FEATURES = 9
_NO_PERIOD = 64  # pixels: the feature "period" of frequencies of no period
_REPEATS = 8  # times that an image has to repeat a period along a side, for it to be open
#: Log of the ratio of signal and noise that a period needs: an open one, and the others of images with a side below
#: `_LARGE` pixels and of larger ones.
_OPEN, _CLOSED, _CLOSED_LARGE, _LARGE = -4.0, math.log(4.0), math.log(8.0), 128
_TINY = 1e-12  # floor of powers in logarithms; the mean power of a gradient is 1


@dataclasses.dataclass(frozen=True)
class SpectralRule:
    """A recurrent update rule for images `[H, W, C]` of any size, on their frequencies.

    With the gradient's transform `G`, divided by its root mean square, and the noise `V` of its power, the rule keeps::

        M = decay * M + G,    N = decay^2 * N + V

    and subtracts from an image, at the progress `t` in [0, 1)::

        S(g) = sum of |M|^2 over the group g / sum of N over it, clipped to [exp(-3), exp(6)]
        w(g) = exp(b) * sigmoid(sharpness * (log S(g) - c(g) - a))
        m    = inverse transform of w M, divided by its root mean square
        scale * step * (1 - (1 - final) * t) * exp(s) * m * sqrt((1 + u^2) / (m^2 + u^2)),    u = tau * exp(r)

    `|M|^2` is summed over channels. A group is that of a period of `p` pixels, or of no period; `c` is -4, which is
    open, for the mean of the image and if it has 8 periods or more along its sides, by their geometric mean, and log 8
    otherwise. For each
    group, `a` and `b` come from a cell of an LSTM; `s` and `r` come from the mean of these cells. All are near 0 before
    meta-training.

    Attributes:
      hidden: units of the LSTM, at least 1.
      step: step size as a fraction of the feasible set's scale, above 0.
      decay: decay of the momentum before meta-training, in (0, 1).
      final: last step size relative to the first, in [0, 1].
      tau: shape of a step, above 0: along the sign of `m` if it is small, along `m` if it is large.

    Raises:
      ValueError: for values outside these ranges.

    Examples:
      >>> rule = SpectralRule(hidden=4)
      >>> leaf = jnp.zeros((28, 28, 1))
      >>> state = jax.eval_shape(rule.init_state, leaf)
      >>> state["momentum"].shape, state["cell"][0].shape  # real and imaginary part, 32 x 17 frequencies
      ((2, 32, 17, 1), (4, 7))

    References:
      Coefficients that are kept by block if they stand out of their noise: Cai 1999, Adaptive wavelet estimation: a
      block thresholding and oracle inequality approach, Annals of Statistics 27(3). Universal perturbations and
      frequencies: Tsuzuku & Sato 2019, arXiv 1809.04098.
    """

    hidden: int = 8
    step: float = 0.8
    decay: float = 0.9
    final: float = 0.1
    tau: float = 0.3

    def __post_init__(self):
        base.check_at_least("hidden", self.hidden, 1)
        base.check_positive("step", self.step)
        base.check_positive("tau", self.tau)
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay!r}.")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], got {self.final!r}.")

    @property
    def base_update(self) -> None:
        """None: the hand-designed part cannot be left out."""
        return None

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Draws initial weights: LeCun normal matrices, and a tenth of that for the two heads.

        Args:
          key: PRNG key of the weights.

        Returns:
          A dict of float32 arrays.
        """
        keys = jax.random.split(key, 3)

        def dense(key, fan_out, fan_in, gain=1.0):
            weight = jax.random.normal(key, (fan_out, fan_in), jnp.float32) * (gain / math.sqrt(fan_in))
            return {"weight": weight, "bias": jnp.zeros((fan_out,), jnp.float32)}

        cell = dense(keys[0], 4 * self.hidden, _NUM_FEATURES + self.hidden)
        cell["bias"] = cell["bias"].at[self.hidden : 2 * self.hidden].set(1.0)
        return {
            "cell": cell,
            "periods": dense(keys[1], 2, self.hidden, 0.1),
            "all": dense(keys[2], 2, self.hidden, 0.1),
            "log_sharpness": jnp.asarray(math.log(6.0), jnp.float32),
            "logit_decay": jnp.asarray(math.log(self.decay / (1 - self.decay)), jnp.float32),
        }

    def init_state(self, leaf: Float[Array, "..."]) -> PyTree:
        """Returns the initial state for one leaf, in the leaf's dtype."""
        shape = _as_image(leaf.shape)
        height, width = _spectrum.sides(shape)
        frequencies, groups = (height, width // 2 + 1), len(_spectrum.GROUPS)
        return {
            "momentum": jnp.zeros((2, *frequencies, shape[2]), leaf.dtype),
            "noise": jnp.zeros(frequencies, leaf.dtype),
            "cell": (jnp.zeros((self.hidden, groups), leaf.dtype), jnp.zeros((self.hidden, groups), leaf.dtype)),
        }

    def apply(self, params: PyTree, signal: Signal, state: PyTree) -> tuple[Float[Array, "..."], PyTree]:
        """Applies the rule to one leaf.

        Args:
          params: the rule's weights.
          signal: gradient of the leaf, its `noise`, `param`, `scale` and `progress`. Without noise, all frequencies
            stand out of it, and take part.
          state: from `init_state` or the previous call.

        Returns:
          The step to *subtract* from the leaf, and the next state.
        """
        shape, dtype = _as_image(signal.grad.shape), signal.grad.dtype
        of, size = _spectrum.frequencies(shape), math.sqrt(math.prod(shape))
        # With a mean power of 1 over the frequencies, a momentum forgets at one pace.
        gradient = _spectrum.transformed(unit_rms(signal.grad).reshape(shape) / size)
        unit = _positive(root_mean_square(signal.grad)) * size
        noise = jnp.zeros(of.group.shape, dtype) if signal.noise is None else signal.noise / unit / unit
        decay = jax.nn.sigmoid(params["logit_decay"].astype(dtype))
        momentum = decay * state["momentum"] + jnp.stack([jnp.real(gradient), jnp.imag(gradient)])
        momentum_noise = decay**2 * state["noise"] + noise
        power = jnp.sum(momentum**2, (0, -1))
        present = jnp.zeros_like(signal.grad) if signal.param is None else signal.param / _positive(signal.scale)
        held = _spectrum.power(_spectrum.transformed(present.reshape(shape) / size))

        quantities = (power, momentum_noise, _spectrum.power(gradient), noise, held)
        features, there, evidence = _features(of, shape, quantities, signal.progress)
        hidden, cell = lstm(params["cell"], features, state["cell"])
        threshold, gain = affine(params["periods"], hidden)
        mean = jnp.sum(hidden * there[None], 1) / jnp.sum(there)
        longer, bend = affine(params["all"], mean[:, None])[:, 0]

        evidence = evidence - jnp.asarray(_needed(shape), dtype) - jnp.clip(threshold, -4, 4)
        sharpness = jnp.exp(jnp.clip(params["log_sharpness"].astype(dtype), -10, 10))
        weight = jax.nn.sigmoid(sharpness * evidence)
        weight = (weight * jnp.exp(jnp.clip(gain, -4, 4)))[of.group]
        real, imaginary = momentum * weight[None, ..., None]
        step = _bent(unit_rms(_spectrum.image_of(jax.lax.complex(real, imaginary), shape)), self.tau, bend)
        step = step * self.step * (1 - (1 - self.final) * signal.progress) * jnp.exp(jnp.clip(longer, -3, 1))
        state = {"momentum": momentum, "noise": momentum_noise, "cell": cell}
        return signal.scale * step.reshape(signal.grad.shape), state


def spectral_lstm(
    hidden: int = 8, *, step: float = 0.8, decay: float = 0.9, final: float = 0.1, tau: float = 0.3
) -> SpectralRule:
    """A rule for perturbations that works on frequencies; see `SpectralRule`.

    Args:
      hidden: units of the LSTM, at least 1.
      step: step size as a fraction of the feasible set's scale, above 0.
      decay: decay of the momentum before meta-training, in (0, 1).
      final: last step size relative to the first, in [0, 1].
      tau: shape of a step, above 0: along the sign of the direction if it is small, along it if it is large.

    Returns:
      The rule.

    Raises:
      ValueError: for values outside these ranges.

    Examples:
      >>> spectral_lstm(hidden=4).hidden
      4
    """
    return SpectralRule(hidden, step, decay, final, tau)


def _periods_in(shape):
    """The periods of the groups `[groups]`, in units of an eighth of a side; no period is the side itself."""
    side = math.sqrt(shape[0] * shape[1])
    return np.asarray([(period or side) * _REPEATS / side for period in _spectrum.GROUPS])


def _needed(shape):
    """The evidence `[groups]` that a group needs. The mean of an image is open at every size."""
    closed = _CLOSED if min(shape[:2]) < _LARGE else _CLOSED_LARGE
    return np.where((_periods_in(shape) <= 1) | (np.asarray(_spectrum.GROUPS) == 1), _OPEN, closed)


def _features(of, shape, quantities, progress):
    """Features `[features, groups]` of the groups, which groups there are, and their evidence `[groups]`.

    Of the momentum: signal to noise (the evidence), and density of power relative to that of all frequencies. Of the
    latest gradient: signal to noise. Of the perturbation: density of power, in units of scale^2. Number of frequencies,
    period in pixels and relative to the size, progress; of the momentum of all frequencies: signal to noise.
    """
    dtype = progress.dtype
    counts, there = jnp.asarray(np.maximum(of.counts, 1), dtype), jnp.asarray(of.counts > 0, dtype)
    powers, noises, new_powers, new_noises, helds = (_spectrum.group_sums(x, of) for x in quantities)
    of_all = jnp.sum(powers) / np.sum(of.counts).item()
    evidence = _log_ratio(powers, noises)
    columns = (
        evidence,
        _log_ratio(powers / counts, of_all),
        _log_ratio(new_powers, new_noises),
        jnp.log1p(helds / counts),
        jnp.log(counts) / 5,
        jnp.asarray([math.log2(period or _NO_PERIOD) / 5 for period in _spectrum.GROUPS], dtype),
        jnp.asarray(np.log2(_periods_in(shape)) / 3, dtype),
        progress,
        _log_ratio(jnp.sum(powers), jnp.sum(noises)),
    )
    return jnp.stack([jnp.broadcast_to(column, there.shape) for column in columns]) * there[None], there, evidence


def _bent(direction, tau, change):
    """`direction * sqrt(1 + tau^2) / sqrt(direction^2 + tau^2)`, where `tau` is changed by the factor `exp(change)`."""
    square = (tau * jnp.exp(jnp.clip(change, -3, 3))) ** 2
    return direction * jnp.sqrt((1 + square) / (direction**2 + square))


def _log(power):
    return jnp.log(jnp.maximum(power, _TINY))


def _log_ratio(signal, noise):
    return jnp.clip(_log(signal) - _log(noise), -3, 6)


def _positive(x):
    return jnp.where(x > 0, x, 1)


def _as_image(shape):
    """Images as they are; with channels of their own `[H, W]`; other leaves are one column."""
    if len(shape) == 3:
        return shape
    return (*shape, 1) if len(shape) == 2 else (math.prod(shape), 1, 1)
