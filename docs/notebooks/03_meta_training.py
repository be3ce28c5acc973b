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
# # Meta-training a fine-tuner in a few minutes
#
# Three small networks for 8x8 digits, a new rule, and two hundred meta-steps. Then it attacks a fourth network, which
# it has never seen, beside PGD. Some three minutes on two cores.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import lft_jax
from lft_jax import evaluation, learners
from lft_jax.data import load_source
from lft_jax.optimizers import projected_gradient
from lft_jax.victims import VictimConfig, apply_function, train_victim

SHORT = "LFT_SHORT" in os.environ  # as tests run it
BLUE, ORANGE, GREY = "#3f88c5", "#e07a3f", "#9aa3ad"
META_STEPS, TASKS, K = (1, 2, 2) if SHORT else (200, 50, 10)

train, test = load_source("digits", "train"), load_source("digits", "test")
apply = apply_function("small_cnn", 10)
victims = [
    train_victim(VictimConfig("digits", "small_cnn", epochs=1 if SHORT else 15, seed=seed), train, test)[0]
    for seed in range(2 if SHORT else 4)
]


def family_of(variables, source):
    """Tasks of one image of each class to fine-tune on, and five of each to be judged on."""
    return lft_jax.uap_family(
        source.images,
        source.labels,
        jax.tree_util.Partial(apply, variables),
        ways=10,
        shots=1,
        query_shots=5,
        epsilon=0.25,
        loss="cross_entropy",
    )


# %% [markdown]
# ## Meta-training
#
# The outer loss is the loss on query images after each of the K steps; its gradient by the rule's weights goes through
# all of them.

# %%
rule = lft_jax.spatial_lstm(hidden=8, maps=(8,))
learner = learners.lft(rule)
trainer = lft_jax.meta_trainer(
    learner,
    families=tuple(family_of(variables, train) for variables in victims[:-1]),
    num_steps=K,
    tasks_per_family=2,
    meta_optimizer=lft_jax.clipped_adam(1e-2, META_STEPS),
)
state, losses = trainer.init(jax.random.key(0)), []
untrained = state.params
for _ in range(META_STEPS):
    state, metrics = trainer.step(state)
    losses.append(float(metrics["loss"]))

figure, axis = plt.subplots(figsize=(6, 2.6))
axis.plot(losses, color=GREY, linewidth=0.7)
window = min(20, len(losses))
axis.plot(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"), color=BLUE)
axis.set(xlabel="meta-step", ylabel="outer loss")
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## On a network that it has never seen
#
# All methods get the same tasks, of test images. PGD has the best of five step sizes, chosen on tasks of the very
# network from training images. The untrained rule is its base update, a step along the sign of the momentum.

# %%
unseen, choosing = family_of(victims[-1], test), family_of(victims[-1], train)
keys, at = jax.random.split(jax.random.key(1), TASKS), tuple(range(1, K + 1))


def success(learner, params, family=unseen, steps=at):
    return evaluation.evaluate(learner, params, family, keys, num_steps=K, at=steps)["asr"]


pgd = learners.fixed("pgd", projected_gradient)
settings = [{"step": step, "decay": 0.0, "final": 1.0} for step in (0.05, 0.1, 0.2, 0.4, 0.8)]
best = max(settings, key=lambda setting: success(pgd, setting, choosing, (K,)).mean())
rates = {
    "meta-trained": success(learner, state.params),
    "untrained rule": success(learner, untrained),
    f"PGD, step {best['step']} epsilon": success(pgd, best),
}

figure, axis = plt.subplots(figsize=(5.4, 3.2))
for (name, values), colour in zip(rates.items(), (ORANGE, BLUE, GREY), strict=True):
    mean = values.mean(0)
    error = 1.96 * values.std(0) / np.sqrt(len(values))
    axis.plot(at, mean, "o-", color=colour, label=name)
    axis.fill_between(at, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    print(f"{name}: {mean[0]:.0%} after one step, {mean[-1]:.0%} after {K}")
axis.set(xlabel="fine-tuning step", ylabel="success on query images", ylim=(0, 1))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## An optimizer for optax
#
# The weights and the rule are an optax transformation, for parameters of any shape:

# %%
tx = lft_jax.learned_fine_tuner(state.params, rule, scale=0.1)
theta = {"image": jax.numpy.ones((5, 7, 3)), "vector": jax.numpy.zeros(4)}
updates, _ = tx.update(jax.tree.map(lambda leaf: leaf - 0.5, theta), tx.init(theta), theta)
jax.tree.map(lambda leaf: leaf.shape, optax.apply_updates(theta, updates))

# %% [markdown]
# Longer runs, checkpoints, other learners: [the guide](../meta_training.md). What meta-training adds to a hand-designed
# attack that is tuned and augmented as well: [results](../results.md).
