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
# # Attacking a PyTorch model
#
# A convolutional network in PyTorch, one image of each class, one pattern for all images. What does the pattern look
# like, whom does it fool, and what does it make of them? About a minute on two cores.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

import lft_jax
from lft_jax.data import load_source

SHORT = "LFT_SHORT" in os.environ  # as tests run it
BLUE, ORANGE, GREY = "#3f88c5", "#e07a3f", "#9aa3ad"

train, test = load_source("mnist_5k", "train"), load_source("mnist_5k", "test")  # uint8 [N, 28, 28, 1]
len(train.images), len(test.images)

# %% [markdown]
# ## The model

# %%
torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 5, padding=2),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(16, 32, 5, padding=2),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 7 * 7, 10),
)
x = (torch.tensor(train.images).permute(0, 3, 1, 2) / 255 - 0.13) / 0.31
y = torch.tensor(train.labels).long()
optimizer = torch.optim.Adam(module.parameters(), 2e-3)
for _ in range(1 if SHORT else 4):
    for rows in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
        optimizer.step()

model = lft_jax.models.from_torch(module, mean=0.13, std=0.31)  # takes images in [0, 1], channels last
predicted = np.asarray(model(test.images / np.float32(255))).argmax(1)
print(f"clean accuracy {np.mean(predicted == test.labels):.1%}")

# %% [markdown]
# ## The attack

# %%
few = np.unique(train.labels, return_index=True)[1]  # one image of each class
result = lft_jax.universal_perturbation(
    model, train.images[few], train.labels[few], epsilon=0.3, steps=1 if SHORT else 20, progress=False
)
rate = lft_jax.attack_success_rate(model, test.images, test.labels, result.perturbation)
print(f"{rate:.0%} of the {len(test.images)} test images are fooled")

# %% [markdown]
# The same pattern on every image. Predictions that are wrong are orange.

# %%
fooled = result.apply(test.images)
after = np.asarray(model(fooled / np.float32(255))).argmax(1)
shown = [np.flatnonzero(test.labels == digit)[0] for digit in range(10)]

figure, axes = plt.subplots(2, 11, figsize=(11, 2.5))
for axis in axes.ravel():
    axis.axis("off")
axes[0, 0].set_title("pattern", fontsize=9, color=GREY)
axes[0, 0].imshow(result.perturbation[..., 0], cmap="RdBu", vmin=-0.3, vmax=0.3)
for column, row in enumerate(shown, start=1):
    for line, (images, classes) in enumerate(((test.images, predicted), (fooled, after))):
        axes[line, column].imshow(images[row, ..., 0], cmap="gray", vmin=0, vmax=255)
        right = classes[row] == test.labels[row]
        axes[line, column].set_title(str(classes[row]), color=GREY if right else ORANGE, fontsize=10)
figure.tight_layout()

# %% [markdown]
# ## Where do the fooled ones go?
#
# Universal perturbations push most images into few classes, which arXiv 1610.08401 calls dominant labels.

# %%
table = np.zeros((10, 10), int)
np.add.at(table, (test.labels, after), 1)
figure, axis = plt.subplots(figsize=(4.2, 3.6))
picture = axis.imshow(table / table.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
axis.set(xlabel="predicted, with the pattern", ylabel="true class", xticks=range(10), yticks=range(10))
figure.colorbar(picture, label="share of the class")
figure.tight_layout()

# %% [markdown]
# ## Step by step
#
# The start is the best of 65 periodic patterns. `history` is measured on the ten images that were given, but what
# counts is the test set: here are whole runs of 1, 2, ... steps. A rule knows how many it has.

# %%
steps = (1,) if SHORT else (1, 2, 5, 10, 20)
curve = []
for count in steps:
    run = lft_jax.universal_perturbation(
        model, train.images[few], train.labels[few], epsilon=0.3, steps=count, progress=False
    )
    curve.append(lft_jax.attack_success_rate(model, test.images, test.labels, run.perturbation))
print(dict(zip(steps, np.round(curve, 3).tolist(), strict=True)))

# %% [markdown]
# ## How large must it be?
#
# Beside the pattern: noise of the same size, one sign for each pixel. A classifier has to bear at least that.

# %%
radii = (0.1,) if SHORT else (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
noise = np.random.default_rng(0).choice([-1.0, 1.0], size=(28, 28, 1)).astype(np.float32)
found, random = [], []
for radius in radii:
    run = lft_jax.universal_perturbation(
        model, train.images[few], train.labels[few], epsilon=radius, steps=1 if SHORT else 20, progress=False
    )
    found.append(lft_jax.attack_success_rate(model, test.images, test.labels, run.perturbation))
    random.append(lft_jax.attack_success_rate(model, test.images, test.labels, radius * noise))

figure, axis = plt.subplots(figsize=(5, 3))
axis.plot(radii, found, "o-", color=ORANGE, label="one learned pattern, ten images")
axis.plot(radii, random, "o-", color=GREY, label="random signs")
axis.set(xlabel="epsilon", ylabel="success on test images", ylim=(0, 1))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# Next: [the guide for PyTorch](../frameworks/pytorch.md), and [an audit](02_audit.ipynb) that does all of this at once.
