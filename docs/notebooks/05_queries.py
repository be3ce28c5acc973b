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
# # Without gradients
#
# A random forest has no gradients, and its votes are flat almost everywhere. How far do queries alone come? A minute on
# two cores.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.ensemble import RandomForestClassifier

import lft_jax
from lft_jax.data import load_source

SHORT = "LFT_SHORT" in os.environ  # as tests run it
BLUE, ORANGE, GREY = "#3f88c5", "#e07a3f", "#9aa3ad"

train, test = load_source("mnist_5k", "train"), load_source("mnist_5k", "test")
trees = 5 if SHORT else 50
forest = RandomForestClassifier(trees, random_state=0).fit(train.images.reshape(len(train.images), -1), train.labels)
model = lft_jax.models.from_sklearn(forest, input_range=(0, 255))
few = np.unique(train.labels, return_index=True)[1]  # one image of each class
print(f"gradients: {model.differentiable}")

# %% [markdown]
# ## Success against queries
#
# With the forest's votes, and with nothing but its answer. More queries fit the ten images better, which is not always
# better on others.

# %%
budgets = (50, 100) if SHORT else (50, 100, 200, 500, 1000, 2000)
found = {"query": [], "decision": []}
for oracle, runs in found.items():
    for budget in budgets:
        run = lft_jax.universal_perturbation(
            model,
            train.images[few],
            train.labels[few],
            epsilon=0.15,
            oracle=oracle,
            max_queries=budget,
            progress=False,
        )
        runs.append((run, lft_jax.attack_success_rate(model, test.images, test.labels, run.perturbation)))

figure, axis = plt.subplots(figsize=(5.4, 3.2))
for (oracle, runs), colour in zip(found.items(), (ORANGE, BLUE), strict=True):
    axis.semilogx(budgets, [rate for _, rate in runs], "o-", color=colour, label=f'oracle="{oracle}"')
axis.set(xlabel="queries: evaluations of one image", ylabel="success on 1,000 test images", ylim=(0, 1))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# The patterns behind these points, from few queries to many:

# %%
figure, axes = plt.subplots(2, len(budgets), figsize=(1.6 * len(budgets), 4.2), squeeze=False)
for line, (oracle, runs) in zip(axes, found.items(), strict=True):
    for axis, (run, rate), budget in zip(line, runs, budgets, strict=True):
        axis.imshow(run.perturbation[..., 0], cmap="RdBu", vmin=-0.15, vmax=0.15)
        axis.set_title(f"{oracle}, {budget:,}\n{rate:.0%}", fontsize=8)
        axis.axis("off")
figure.tight_layout()

# %% [markdown]
# ## Estimates of a gradient
#
# Where a loss is smooth, its gradient can be estimated from values along random directions. How close is the estimate?
# For `d` coordinates and `q` directions the cosine to the true gradient is about the root of `q / (q + d)`: a good step
# needs as many queries as there are pixels. That is why the search above does not estimate gradients.

# %%
d, trials = 784, 2 if SHORT else 20
weights = jax.random.normal(jax.random.key(0), (d,))
counts = (10, 100) if SHORT else (10, 30, 100, 300, 1000)


def loss(theta):
    return jnp.sum(jnp.sin(weights * theta))


def cosine(num_directions, key):
    estimate = lft_jax.zeroth_order_value_and_grad(loss, num_directions=num_directions, smoothing=1e-2)
    _, found = estimate(jnp.zeros(d), key)
    return found @ weights / (jnp.linalg.norm(found) * jnp.linalg.norm(weights))


keys = jax.random.split(jax.random.key(1), trials)
cosines = [float(np.mean([cosine(q, key) for key in keys])) for q in counts]
figure, axis = plt.subplots(figsize=(5.4, 3))
q = np.geomspace(counts[0], counts[-1], 100)
axis.semilogx(q, np.sqrt(q / (q + d)), color=GREY, label="root of q / (q + d)")
axis.semilogx(counts, cosines, "o", color=ORANGE, label=f"measured, d = {d}")
axis.set(xlabel="directions q", ylabel="cosine to the gradient", ylim=(0, 1))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# More: [queries only](../queries.md), [a model behind HTTP](../frameworks/http.md).
