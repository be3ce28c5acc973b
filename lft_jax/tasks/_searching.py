"""A search among patterns of few parameters: random ones, then changes of the best, one turn at a time.

So that a turn can be compiled on its own, between questions to a model that JAX cannot trace.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray


class Searched(NamedTuple):
    """Where a search is.

    Attributes:
      drawn: the random patterns, their parameters stacked.
      inputs: the random inputs of the changes, stacked.
      best: parameters of the best pattern so far.
      lowest: `[]`, its loss; infinite before the first one.
      of_start: `[]`, the loss of the start.
    """

    drawn: Any
    inputs: Any
    best: Any
    lowest: Float[Array, ""]
    of_start: Float[Array, ""]


class Search(abc.ABC):
    """What searches for a start have in common; a subclass is a frozen dataclass."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> int:
        """Evaluations of the loss that a search makes, including that of the start."""

    @abc.abstractmethod
    def _drawn(self, key, channels, dtype) -> tuple[Any, Any]:
        """The random patterns and the inputs of the changes."""

    @abc.abstractmethod
    def _changed(self, parameters, inputs) -> Any:
        """The parameters of a pattern with a small change."""

    @abc.abstractmethod
    def _image(self, parameters, shape) -> Array:
        """The pattern `[H, W, C]` of -1 and 1."""

    def begin(self, theta: Float[Array, "H W C"], key: PRNGKeyArray) -> Searched:
        """A search before its first turn."""
        drawn, inputs = self._drawn(key, theta.shape[-1], theta.dtype)
        dtype = theta.dtype if jnp.finfo(theta.dtype).bits >= 32 else jnp.float32
        infinite = jnp.asarray(jnp.inf, dtype)
        return Searched(drawn, inputs, _at(drawn, 0), infinite, infinite)

    def turn(
        self,
        state: Searched,
        number: Integer[Array, ""] | int,
        theta: Float[Array, "H W C"],
        scale: Float[Array, ""],
        loss_fn: Callable[[jax.Array], jax.Array],
    ) -> tuple[Searched, Float[Array, "H W C"], Float[Array, ""]]:
        """Tries the start in turn 0, then the random patterns, then changes of the best one.

        Args:
          state: that of the turn before.
          number: of the turn, below `evaluations`.
          theta: `[H, W, C]`, the start.
          scale: `[]`, absolute value of a pattern's coordinates.
          loss_fn: `[H, W, C] -> []`.

        Returns:
          The state, the perturbation that was tried, and its loss.
        """
        random, changes = (len(jax.tree.leaves(part)[0]) for part in (state.drawn, state.inputs))
        parameters = _at(state.drawn, jnp.clip(number - 1, 0, random - 1))
        if changes:
            inputs = _at(state.inputs, jnp.clip(number - 1 - random, 0, changes - 1))
            parameters = _where(number > random, self._changed(state.best, inputs), parameters)
        tried = jnp.where(number == 0, theta, scale * self._image(parameters, theta.shape))
        loss = loss_fn(tried).astype(state.lowest.dtype)
        better = (number > 0) & (loss < state.lowest)
        best, lowest = _where(better, (parameters, loss), (state.best, state.lowest))
        of_start = jnp.where(number == 0, loss, state.of_start)
        return state._replace(best=best, lowest=lowest, of_start=of_start), tried, loss

    def end(self, state: Searched, theta: Float[Array, "H W C"], scale: Float[Array, ""]) -> Float[Array, "H W C"]:
        """The best pattern, or the start if none has a lower loss."""
        return jnp.where(state.lowest < state.of_start, scale * self._image(state.best, theta.shape), theta)

    def __call__(
        self,
        loss_fn: Callable[[jax.Array], jax.Array],
        theta: Float[Array, "H W C"],
        scale: Float[Array, ""],
        key: PRNGKeyArray,
    ) -> Float[Array, "H W C"]:
        """The best pattern, or `theta` if no pattern has a lower loss.

        Args:
          loss_fn: `[H, W, C] -> []`; it is traced and evaluated, for one pattern at a time, and never differentiated.
          theta: `[H, W, C]`, the start that patterns are compared with.
          scale: `[]`, absolute value of a pattern's coordinates.
          key: PRNG key of the search.

        Returns:
          `[H, W, C]`.
        """
        fixed = jax.lax.stop_gradient(theta)  # the comparison has no derivative, a kept start has its own

        def turn(state, number):
            return self.turn(state, number, fixed, scale, loss_fn)[0], None

        numbers = jnp.arange(self.evaluations, dtype=jnp.int32)
        state, _ = jax.lax.scan(turn, self.begin(fixed, key), numbers)
        return self.end(state, theta, scale)


def _at(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def _where(condition, new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
