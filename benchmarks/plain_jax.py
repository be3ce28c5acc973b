"""W1 in plain JAX: vmap over tasks, scan over steps, autodiff through everything, layers of flax."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks import w1
from lft_jax.tasks.perturbation import AttackLoss, Batch


class LeNet(nn.Module):
    """The LeNet of `lft_jax.victims.models` with the layers of flax. It has the same variables."""

    @nn.compact
    def __call__(self, images):
        x = 4 * images - 2
        for number, features in enumerate((16, 32)):
            x = nn.Conv(features, (5, 5), name=f"Conv_{number}")(x)
            x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(w1.CLASSES)(x)


def _features(grad):
    small = jnp.exp(-10.0)
    magnitude = jnp.log(jnp.maximum(jnp.abs(grad), small)) / 10
    return jnp.stack([magnitude, jnp.clip(grad / small, -1, 1)])


def _cell(cell, x, carry):
    hidden, memory = carry
    x = jnp.concatenate([x, hidden])
    gates = jnp.tensordot(cell["weight"], x, axes=1) + cell["bias"].reshape(-1, *[1] * (x.ndim - 1))
    write, forget, read, candidate = jnp.split(gates, 4)
    memory = nn.sigmoid(forget) * memory + nn.sigmoid(write) * jnp.tanh(candidate)
    hidden = nn.sigmoid(read) * jnp.tanh(memory)
    return hidden, (hidden, memory)


def meta_loss(work: w1.Work, variables, params, support: Batch, query: Batch):
    """Query loss, summed over steps, mean over tasks. Batches have leading axes `[T, 10]` (tasks, images)."""
    hinge = AttackLoss("hinge", w1.KAPPA)

    def attack_loss(theta, batch):
        images = batch.images + theta
        images = jnp.clip(images, 0, 1) if work.clip else images
        return jnp.mean(hinge(LeNet().apply(variables, images), batch.labels))

    def task(support, query):
        shape = support.images.shape[1:]

        def step(carry, _):
            theta, cells = carry
            x = _features(jax.lax.stop_gradient(jax.grad(attack_loss)(theta, support)))
            new = []
            for cell, carry in zip(params["cells"], cells, strict=True):
                x, carry = _cell(cell, x, carry)
                new.append(carry)
            head = params["head"]
            update = 0.1 * (jnp.tensordot(head["weight"], x, axes=1)[0] + head["bias"][0])
            theta = jnp.clip(theta - update, -w1.EPSILON, w1.EPSILON)
            return (theta, new), attack_loss(theta, query)

        zeros = jnp.zeros((work.hidden, *shape), support.images.dtype)
        initial = jnp.zeros(shape, support.images.dtype), [(zeros, zeros)] * work.layers
        return jnp.sum(jax.lax.scan(step, initial, None, length=work.num_steps)[1])

    return jnp.mean(jax.vmap(task)(support, query))


def meta_step(work: w1.Work, variables, family):
    """A function that samples tasks and makes one meta-step. It blocks until ready."""
    optimizer = optax.adam(1e-3)
    params = w1.make_rule(work).init(jax.random.key(0))
    params = {"cells": params["cells"], "head": params["head"]}

    @jax.jit
    def step(params, state, key):
        support, query = jax.vmap(family.sample)(jax.random.split(key, work.tasks))
        grads = jax.grad(lambda p: meta_loss(work, variables, p, support, query))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state, count = optimizer.init(params), 0

    def run():
        nonlocal params, state, count
        params, state = jax.block_until_ready(step(params, state, jax.random.key(count)))
        count += 1

    return run
