"""Few-shot regression of sine curves, as in MAML (arXiv 1703.03400, section 5.1) and Meta-SGD (arXiv 1707.09835)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import base, oracles
from lft_jax._deprecation import renamed
from lft_jax.base import Episode, Oracle, PyTree, TaskFamily

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SineFamily(TaskFamily):
    """Sine-curve tasks: fit a curve from a few of its points with a small network. Built by `sine_family`.

    A task draws a curve and points on it, all parameters uniformly::

        y = amplitude * sin(frequency * x - phase)

    Support and query set are pairs `(x [n], y [n])`; the loss is the mean squared error. The optimizee is the network,
    a list of layers `{"weight": [in, out], "bias": [out]}` with a relu between them. Families of different `widths` are
    incongruous: their optimizees have different shapes.

    Attributes:
      amplitude: `[2]`, lower and upper end of the range of amplitudes.
      frequency: `[2]`, range of angular frequencies, in radians per unit of x.
      phase: `[2]`, range of phases, in radians.
      x: `[2]`, range of the points.
      widths: units of each hidden layer.
      shots: number of support points.
      query_shots: number of query points.
    """

    amplitude: jax.Array
    frequency: jax.Array
    phase: jax.Array
    x: jax.Array
    widths: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    shots: int = dataclasses.field(metadata=_STATIC)
    query_shots: int = dataclasses.field(metadata=_STATIC)

    def sample(self, key: PRNGKeyArray) -> Episode:
        """Draws a curve, and support and query points on it."""
        keys, dtype = jax.random.split(key, 4), self.x.dtype

        def uniform(key, bounds, shape=()):
            return jax.random.uniform(key, shape, dtype, bounds[0], bounds[1])

        x = uniform(keys[2], self.x, (self.shots + self.query_shots,))
        angle = uniform(keys[3], self.frequency) * x - uniform(keys[1], self.phase)
        y = uniform(keys[0], self.amplitude) * jnp.sin(angle)
        return Episode((x[: self.shots], y[: self.shots]), (x[self.shots :], y[self.shots :]))

    def init(self, key: PRNGKeyArray) -> PyTree:
        """The start: a network with LeCun-normal weights and biases of 0."""
        sizes = (1, *self.widths, 1)
        layers = []
        keys = jax.random.split(key, len(sizes) - 1)
        for layer_key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True):
            weight = jax.random.normal(layer_key, (inputs, outputs), self.x.dtype) / math.sqrt(inputs)
            layers.append({"weight": weight, "bias": jnp.zeros(outputs, self.x.dtype)})
        return layers

    def oracle(self, support: PyTree) -> Oracle:
        """The exact gradient, at one query per point."""
        return oracles.gradient(lambda theta: self.loss(theta, support), evaluations=self.shots)

    def loss(self, theta: PyTree, data: PyTree) -> Float[Array, ""]:
        """The mean squared error over the points."""
        x, y = data
        hidden = x[:, None]
        for number, layer in enumerate(theta):
            hidden = hidden @ layer["weight"] + layer["bias"][None]
            if number < len(theta) - 1:
                hidden = jax.nn.relu(hidden)
        return jnp.mean((hidden[:, 0] - y) ** 2)

    def project(self, theta: PyTree) -> PyTree:
        """The identity."""
        return theta

    def metrics(self, theta: PyTree, data: PyTree) -> dict[str, Float[Array, ""]]:
        """`error`, the mean squared error."""
        return {"error": self.loss(theta, data)}


@renamed(queries="query_shots")
def sine_family(
    *,
    widths: tuple[int, ...] = (40, 40),
    shots: int = 10,
    query_shots: int = 10,
    amplitude: tuple[float, float] = (0.1, 5.0),
    frequency: tuple[float, float] = (1.0, 1.0),
    phase: tuple[float, float] = (0.0, math.pi),
    x: tuple[float, float] = (-5.0, 5.0),
) -> SineFamily:
    """A family of sine-curve tasks; see `SineFamily`.

    The defaults are the setting of MAML; a `frequency` of (0.8, 1.2) gives that of Meta-SGD.

    Args:
      widths: units of each hidden layer, at least 1.
      shots: number of support points, at least 1.
      query_shots: number of query points, at least 1.
      amplitude: lower and upper end of the range of amplitudes.
      frequency: range of angular frequencies, in radians per unit of x; the two ends may be equal.
      phase: range of phases, in radians.
      x: range of the points.

    Raises:
      ValueError: for a range that does not ascend, or a number below 1.

    Examples:
      >>> family = sine_family(widths=(8,), shots=5, query_shots=20)
      >>> (x, y), _ = jax.eval_shape(family.sample, jax.random.key(0))
      >>> x.shape, y.shape
      ((5,), (5,))
      >>> [layer["weight"].shape for layer in jax.eval_shape(family.init, jax.random.key(0))]
      [(1, 8), (8, 1)]

    References:
      Finn et al. 2017, MAML, arXiv 1703.03400, section 5.1; Li et al. 2017, Meta-SGD, arXiv 1707.09835.
    """
    ranges = {"amplitude": amplitude, "frequency": frequency, "phase": phase, "x": x}
    for name, bounds in ranges.items():
        constant = name == "frequency" and len(bounds) == 2 and bounds[0] == bounds[1]
        if not constant and (len(bounds) != 2 or not bounds[0] < bounds[1]):
            raise ValueError(f"{name} must be two ascending numbers, got {bounds!r}.")
    for name, value in (("shots", shots), ("query_shots", query_shots), *(("widths", width) for width in widths)):
        base.check_at_least(name, value, 1)
    arrays = {name: jnp.asarray(bounds, jnp.result_type(float)) for name, bounds in ranges.items()}
    return SineFamily(**arrays, widths=tuple(widths), shots=shots, query_shots=query_shots)
