"""Few-shot regression of sine curves, the settings of MAML (Finn et al. 2017, section 5.1) and of Meta-SGD."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lft_jax import base, oracles
from lft_jax.base import Episode, Oracle, PyTree, TaskFamily

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SineFamily(TaskFamily):
    """Fit `y = amplitude * sin(frequency * x - phase)` from a few points with a small network.

    Build it with `sine_family`.

    The optimizee is the network: a list of layers `{"weight": [in, out], "bias": [out]}`, relu between them. Families
    of other widths share no variables: incongruous tasks. Data are pairs `(x [n], y [n])`, the loss is the mean squared
    error.

    Attributes:
      amplitude: `[2]`, ends of the range that a task's amplitude is drawn from, uniformly.
      frequency: `[2]`, the same of its angular frequency, in radians a unit of x.
      phase: `[2]`, the same of its phase, in radians.
      x: `[2]`, the same of the points.
      widths: of the hidden layers.
      shots: support points.
      query_shots: query points.
    """

    amplitude: jax.Array
    frequency: jax.Array
    phase: jax.Array
    x: jax.Array
    widths: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    shots: int = dataclasses.field(metadata=_STATIC)
    query_shots: int = dataclasses.field(metadata=_STATIC)

    def sample(self, key: jax.Array) -> Episode:
        """Points of one curve."""
        keys, dtype = jax.random.split(key, 4), self.x.dtype

        def uniform(key, ends, shape=()):
            return jax.random.uniform(key, shape, dtype, ends[0], ends[1])

        x = uniform(keys[2], self.x, (self.shots + self.query_shots,))
        angle = uniform(keys[3], self.frequency) * x - uniform(keys[1], self.phase)
        y = uniform(keys[0], self.amplitude) * jnp.sin(angle)
        return Episode((x[: self.shots], y[: self.shots]), (x[self.shots :], y[self.shots :]))

    def init(self, key: jax.Array) -> PyTree:
        """A network with LeCun-normal weights and biases of 0."""
        sizes = (1, *self.widths, 1)
        layers = []
        keys = jax.random.split(key, len(sizes) - 1)
        for layer_key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True):
            weight = jax.random.normal(layer_key, (inputs, outputs), self.x.dtype) / math.sqrt(inputs)
            layers.append({"weight": weight, "bias": jnp.zeros(outputs, self.x.dtype)})
        return layers

    def oracle(self, support: PyTree) -> Oracle:
        """The exact gradient; a query is a point."""
        return oracles.gradient(lambda theta: self.loss(theta, support), evaluations=self.shots)

    def loss(self, theta: PyTree, data: PyTree) -> jax.Array:
        """`[]`, the mean squared error."""
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

    def metrics(self, theta: PyTree, data: PyTree) -> dict[str, jax.Array]:
        """`error`, the mean squared error."""
        return {"error": self.loss(theta, data)}


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
    """A `SineFamily`; the defaults are MAML's. With a `frequency` of (0.8, 1.2) it is Meta-SGD's (Li et al. 2017).

    Raises:
      ValueError: for ranges that do not ascend (a frequency may be constant), or numbers below 1.
    """
    ranges = {"amplitude": amplitude, "frequency": frequency, "phase": phase, "x": x}
    for name, ends in ranges.items():
        constant = name == "frequency" and len(ends) == 2 and ends[0] == ends[1]
        if not constant and (len(ends) != 2 or not ends[0] < ends[1]):
            raise ValueError(f"{name} must be two ascending numbers, got {ends!r}.")
    for name, value in (("shots", shots), ("query_shots", query_shots), *(("widths", width) for width in widths)):
        base.check_at_least(name, value, 1)
    arrays = {name: jnp.asarray(ends, jnp.result_type(float)) for name, ends in ranges.items()}
    return SineFamily(**arrays, widths=tuple(widths), shots=shots, query_shots=query_shots)
