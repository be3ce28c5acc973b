"""Jitted programs that ask a model outside of JAX.

A callback inside a compiled program blocks the threads of the compiled program and cannot keep the graph of a forward
pass for its backward pass. Here the program is cut at its questions instead::

    program(no answers)            --compiled--> images of the first forward pass     --model--> its scores
    program(scores)                --compiled--> cotangent of the backward pass       --model--> gradient
    program(scores, gradient)      --compiled--> the result

Each piece is the whole program, traced with the answers known so far up to the next question; XLA drops what no longer
matters. So any program can be cut, and all that is not the model is compiled.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax._bounded import BoundedJit
from lft_jax.models._preparation import as_logits
from lft_jax.models.classifier import Classifier

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Question:
    """What a program asks the model.

    Attributes:
      value: the images of a forward pass, or the cotangent of a backward pass.
      graph: whether a backward pass may follow a forward pass.
      backward: number of the forward pass that a backward pass belongs to; None for a forward pass.
    """

    value: jax.Array
    graph: bool = dataclasses.field(default=True, metadata=_STATIC)
    backward: int | None = dataclasses.field(default=None, metadata=_STATIC)


class _Asked(Exception):
    """Ends the tracing of a program at its first question without an answer."""

    def __init__(self, question):
        super().__init__()
        self.question = question


def replayed(program: Callable[..., Any], *, static: tuple[int, ...] = ()) -> Callable[..., Any]:
    """A program that is compiled, but for the model that it asks.

    Args:
      program: `(model, *args) -> result`, a pytree of arrays. It calls `model` on images under `jax.grad` or `jax.vjp`,
        `model.evaluate` elsewhere, and neither within `jax.jit`, `jax.vmap`, `jax.lax.scan` and the like.
      static: numbers of the static ones of `args`, from 0.

    Returns:
      `(classifier, *args) -> result`, for a `Classifier` of a model outside of JAX.

    Examples:
      >>> from lft_jax.models.classifier import HostModel, host_classifier
      >>> def pull_back(x):
      ...     total = x.sum((1, 2))
      ...     return total**2, lambda c: np.broadcast_to((2 * c * total)[:, None, None], x.shape)
      >>> square = HostModel(lambda x: x.sum((1, 2)) ** 2, pull_back)
      >>> gradient = replayed(lambda model, x: jax.grad(lambda x: jnp.sum(model(x)))(x))
      >>> gradient(host_classifier(square), np.full((1, 1, 1, 2), 3.0, np.float32)).tolist()
      [[[[6.0, 6.0]]]]
    """

    def until_question(output, answers, *args):
        log, calls = iter(answers), itertools.count()

        def ask(question):
            for answer in log:
                return answer
            raise _Asked(question)

        @jax.custom_vjp
        def scores(images):
            raise ValueError(f"model: a replayed program differentiates it; model.evaluate takes {images.shape} alone.")

        def forward(images):
            return ask(Question(images)), _Call(next(calls))

        def backward(call, cotangent):
            return (ask(Question(cotangent, backward=call.number)),)

        def evaluate(images):
            next(calls)
            return as_logits(ask(Question(images, graph=False)), output, len(images))

        scores.defvjp(forward, backward)
        try:
            return program(_Model(lambda images: as_logits(scores(images), output, len(images)), evaluate), *args)
        except _Asked as asked:
            return asked.question

    # A program has a structure for each number of answers.
    compiled = BoundedJit(until_question, static=(0, *(n + 2 for n in static)), kept=64)

    def run(classifier: Classifier, *args: Any) -> Any:
        host, answers, pulls = classifier.host, (), []
        assert host is not None
        while isinstance(found := compiled(host.output, answers, *args), Question):
            if found.backward is None:
                classifier.check_shape(found.value.shape)
                if found.graph:
                    answer, pull = host.pulled(found.value, classifier.batch_size)
                else:
                    answer, pull = host.scores(found.value, classifier.batch_size), None
                pulls.append(pull)
            else:
                answer = pulls[found.backward](found.value)
            answers = (*answers, jnp.asarray(np.asarray(answer)))
        return found

    return run


@dataclasses.dataclass(frozen=True)
class _Model:
    """The model that a program asks."""

    function: Callable[[jax.Array], jax.Array]
    evaluate: Callable[[jax.Array], jax.Array]

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.function(images)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Call:
    number: int
