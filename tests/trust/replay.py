"""Learners whose optimizer keeps what it was called with, and such that are called with that again."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import Learner

STEPS = 3  # K, fine-tuning steps


class _Seen(NamedTuple):
    """State of `recording`: also the weights in use, and the gradients and extras of all steps `[K, ...]`."""

    state: object
    params: object
    answers: object
    count: jax.Array


def recording(learner: Learner, like) -> Learner:
    """The learner, whose optimizer also keeps its weights, and what it is called with, if `like` says what that is."""

    def optimizer(params):
        inner = optax.with_extra_args_support(learner.optimizer(params))

        def init(theta):
            buffers = jax.tree.map(lambda x: jnp.zeros((STEPS, *x.shape), x.dtype), like)
            return _Seen(inner.init(theta), jax.lax.stop_gradient(params), buffers, jnp.zeros((), jnp.int32))

        def update(grads, state, theta=None, **extras):
            answers = state.answers
            if like:
                seen = jax.lax.stop_gradient((grads, extras))
                answers = jax.tree.map(lambda buffer, x: buffer.at[state.count].set(x), answers, seen)
            updates, after = inner.update(grads, state.state, theta, **extras)
            return updates, _Seen(after, state.params, answers, state.count + 1)

        return optax.GradientTransformationExtraArgs(init, update)

    return dataclasses.replace(learner, optimizer=optimizer)


def replaying(learner: Learner, answers) -> Learner:
    """The learner, whose optimizer is called with what was recorded instead of what the oracle answers."""

    def optimizer(params):
        inner = optax.with_extra_args_support(learner.optimizer(params))

        def update(grads, state, theta=None, **extras):
            grads, extras = jax.tree.map(lambda x: x[state[1]], answers)
            updates, after = inner.update(grads, state[0], theta, **extras)
            return updates, (after, state[1] + 1)

        def init(theta):
            return inner.init(theta), jnp.zeros((), jnp.int32)

        return optax.GradientTransformationExtraArgs(init, update)

    return dataclasses.replace(learner, optimizer=optimizer, adaptation_steps=0, second_order=False)
