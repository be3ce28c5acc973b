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
# # An audit
#
# One attack says little. An audit runs many, with gradients and by queries, from different images, at several radii,
# and judges the strongest on images that had no say in choosing it. Two minutes on two cores.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import lft_jax
from lft_jax.data import load_source
from lft_jax.victims import VictimConfig, apply_function, train_victim

SHORT = "LFT_SHORT" in os.environ  # as tests run it
BLUE, ORANGE, GREY = "#3f88c5", "#e07a3f", "#9aa3ad"

train, test = load_source("mnist_5k", "train"), load_source("mnist_5k", "test")
variables, _ = train_victim(VictimConfig("mnist_5k", "small_cnn", epochs=1 if SHORT else 4), train, test)
apply = apply_function("small_cnn", 10)


def model(images):
    return apply(variables, images)


# %%
methods = ("patterns",) if SHORT else ("uap-linf", "momentum", "patterns")
budget = lft_jax.AuditBudget(support_images=(10, 20), steps=(20,), queries=(500,), draws=2, methods=methods)
report = lft_jax.audit(
    model,
    test.images,
    test.labels,
    epsilons=(0.1, 0.2, 0.3),
    l2_epsilons=(),
    budget=budget,
    progress=False,
)
print(report.verdict)

# %% [markdown]
# `report.save(folder)` writes one HTML page with all of it. The numbers behind the page are in `report.results`.
#
# ## By radius and attack, from ten images

# %%
cells = [cell for cell in report.results["cells"] if cell["images"] == 10 and cell["target"] is None]
figure, axis = plt.subplots(figsize=(5.4, 3.2))
for method, colour in zip(methods, (ORANGE, BLUE, GREY), strict=False):
    found = sorted(
        (cell["epsilon"], cell["mean"], cell["low"], cell["high"]) for cell in cells if cell["method"] == method
    )
    radii, mean, low, high = np.array(found).T
    axis.plot(radii, mean, "o-", color=colour, label=method)
    axis.fill_between(radii, low, high, color=colour, alpha=0.15, linewidth=0)
axis.set(xlabel="epsilon", ylabel="success on query images", ylim=(0, 1))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## The strongest pattern, and the classes that it leads to

# %%
collapse = np.zeros((10, 10), int)
for true, answer, count in report.results["collapse"]:
    collapse[true, answer] += count
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2))
left.imshow(report.perturbation[..., 0], cmap="RdBu")
left.set_title(report.results["headline"]["title"], fontsize=8)
left.axis("off")
right.imshow(collapse / np.maximum(collapse.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
right.set(xlabel="answer with the pattern", ylabel="true class", xticks=range(10), yticks=range(10))
figure.tight_layout()

# %% [markdown]
# What each number means, how images are split, and exit codes for pipelines: [the guide](../audit.md).
