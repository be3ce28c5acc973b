# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A task of your own: filling in hidden pixels
#
# A fine-tuner can learn more than attacks. Here it gets a picture of which most pixels are hidden, and gradients of the
# error on the others. The gradient is 0 at hidden pixels, so gradient descent never changes them. A rule that is
# meta-trained on the error at the *hidden* pixels (the query set) has to find out how pixels hang together.
#
# It learns that on 8x8 digits, 28x28 digits and small parts of one photograph in colour at once: three shapes, which
# share no initialization. Then it restores another photograph, many times as large. About two minutes on two cores.

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_sample_image

import lft_jax
from lft_jax import evaluation
from lft_jax.data import load_source

SHORT = "LFT_SHORT" in os.environ  # as tests run it
META_STEPS, VISIBLE, K = (3 if SHORT else 400), 0.3, 10

# %% [markdown]
# ## The task
#
# Six methods, all traceable by JAX ([the guide](../own_tasks.md)). `theta` is the picture, from grey.


# %%
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden(lft_jax.TaskFamily):
    """See some pixels of a picture, restore the others."""

    images: jax.Array  # [N, H, W, C] in [0, 1]

    def sample(self, key):
        key_image, key_mask = jax.random.split(key)
        image = self.images[jax.random.randint(key_image, (), 0, len(self.images))]
        seen = jnp.broadcast_to(jax.random.bernoulli(key_mask, VISIBLE, (*image.shape[:2], 1)), image.shape)
        seen = seen.astype(jnp.float32)
        return lft_jax.Episode(support=(image * seen, seen), query=(image * (1 - seen), 1 - seen))

    def init(self, key):
        return jnp.full(self.images.shape[1:], 0.5)

    def oracle(self, support):
        return lft_jax.oracles.gradient(lambda theta: self.loss(theta, support), evaluations=1)

    def loss(self, theta, data):
        values, mask = data
        return jnp.sum(mask * (theta - values) ** 2) / jnp.sum(mask)

    def project(self, theta):
        return jnp.clip(theta, 0, 1)

    def metrics(self, theta, data):
        return {"error": jnp.sqrt(self.loss(theta, data))}


def photo(name, side):
    image = jnp.asarray(load_sample_image(name)[100:400, 150:450] / np.float32(255))
    return jax.image.resize(image, (side, side, 3), "linear", antialias=True).clip(0, 1)


flower = photo("flower.jpg", 128)
parts = jnp.stack([flower[i : i + 16, j : j + 16] for i in range(0, 112, 8) for j in range(0, 112, 8)])
digits = [jnp.asarray(load_source(name, "train").images / np.float32(255)) for name in ("digits", "mnist_5k")]
families = tuple(Hidden(images) for images in (*digits, parts))
[family.images.shape for family in families]

# %% [markdown]
# ## Meta-training
#
# `spatial_lstm` sees each pixel and its neighbours. It has no base update, so it has to learn everything.

# %%
rule = lft_jax.spatial_lstm(hidden=12, maps=(16, 16), features=("momentum", "progress"), base_update=None)
learner = lft_jax.learners.lft(rule)
trainer = lft_jax.meta_trainer(
    learner,
    families,
    num_steps=K,
    tasks_per_family=4,
    meta_optimizer=lft_jax.clipped_adam(1e-2, META_STEPS),
)
state, losses = trainer.init(jax.random.key(0)), []
for _ in range(META_STEPS):
    state, metrics = trainer.step(state)
    losses.append(float(metrics["loss"]))

figure, axis = plt.subplots(figsize=(6, 2.6))
axis.semilogy(losses, color="#3f88c5")
axis.set(xlabel="meta-step", ylabel="squared error,\nhidden pixels")
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## On pictures it has not seen
#
# Beside it: gradient descent, and the mean of the visible pixels in a 5x5 window, as one would write by hand.


# %%
def window_mean(values, seen):
    def total(x):
        padded = jnp.pad(x, ((2, 2), (2, 2), (0, 0)))
        return sum(padded[i : i + x.shape[0], j : j + x.shape[1]] for i in range(5) for j in range(5))

    mean = jnp.where(total(seen) > 0, total(values) / jnp.maximum(total(seen), 1), 0.5)
    return jnp.where(seen > 0, values, mean)


def restore(family, key, optimizer):
    episode = family.sample(key)
    start = family.init(key)
    run = lft_jax.fine_tune(optimizer, family.oracle(episode.support), start, key, num_steps=K, project=family.project)
    return episode, run.thetas[-1]


def compare(family, key, scale=2.0):
    """A row: what is visible, three restorations with their errors at hidden pixels, the picture."""
    episode, learned = restore(family, key, learner.optimizer(state.params))
    _, descent = restore(family, key, optax.sgd(0.5 * float(episode.support[1].sum())))
    values, seen = episode.support
    shown = {
        "visible": np.where(seen > 0, values, 1.0 if family.images.shape[-1] == 3 else 0.5),
        "gradient descent": descent,
        "5x5 mean": window_mean(values, seen),
        "learned": learned,
        "picture": values + episode.query[0],
    }
    error = {name: float(family.metrics(jnp.asarray(image), episode.query)["error"]) for name, image in shown.items()}
    titles = {n: n if n in ("visible", "picture") else f"{n}\n{error[n]:.3f}" for n in shown}
    figure, axes = plt.subplots(1, 5, figsize=(5 * scale, scale * 1.25))
    for axis, (name, image) in zip(axes, shown.items(), strict=True):
        axis.imshow(np.asarray(image).squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(titles[name], fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    return error


unseen = [Hidden(jnp.asarray(load_source(name, "test").images / np.float32(255))) for name in ("digits", "mnist_5k")]
for family in unseen:
    compare(family, jax.random.key(3))

# %% [markdown]
# The same weights on a photograph that it has not seen:

# %%
china = Hidden(photo("china.jpg", 32 if SHORT else 128)[None])
_ = compare(china, jax.random.key(0), scale=1.9)

# %% [markdown]
# ## Judged on many tasks
#
# The root of the mean squared error at hidden pixels, over 100 tasks of unseen digits, and on the photograph:

# %%
for family, name in zip((*unseen, china), ("8x8", "28x28", "photograph"), strict=True):
    keys = jax.random.split(jax.random.key(7), 4 if SHORT else 5 if family is china else 100)
    learned = evaluation.evaluate(learner, state.params, family, keys, num_steps=K, at=(1, K))["error"]
    episodes = [family.sample(key) for key in keys]
    by_hand = [float(family.metrics(window_mean(*e.support), e.query)["error"]) for e in episodes]
    one, last = learned.mean(0)
    print(f"{name}: learned {one:.3f} after 1 step, {last:.3f} after {K}; 5x5 mean {np.mean(by_hand):.3f}")

# %% [markdown]
# One rule for three shapes is ahead of the mean on digits, whose strokes it has learned to draw, and behind it on the
# photograph: a mean in a window is hard to beat where pictures are smooth. More kinds of pictures, more maps and more
# meta-steps are the next things to try.
