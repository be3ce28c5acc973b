"""The table of the stored victims, for docs/victims.md."""

import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.studies import victims
from lft_jax.victims import build_model, models


def victims_table(root: str | os.PathLike[str]) -> str:
    """A Markdown table of the victims stored in `root`, in the order of their recipes; it reads their cards only."""
    lines = [
        "| victim | parameters | MFLOP | epochs | test accuracy, % | robust accuracy, % | role |",
        "|---|---|---|---|---|---|---|",
    ]
    for source in victims.RECIPES:
        for recipe in (*victims.RECIPES[source], *victims.MORE.get(source, ())):
            path = victims.path_of("victims", source, recipe)
            card = json.loads(Path(root, path, "card.json").read_text(encoding="utf-8"))
            parameters, flop = size_of(card["architecture"], card["num_classes"], tuple(card["image_shape"]))
            robust = f"{100 * card['robust_accuracy']['accuracy']:.2f}" if "robust_accuracy" in card else ""
            cells = [f"`{Path(path).name}`", f"{parameters:,}", f"{flop / 1e6:.1f}", card["epochs"]]
            cells += [f"{100 * card['test_accuracy']:.2f}", robust, recipe.role]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


@functools.lru_cache
def size_of(architecture: str, num_classes: int, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and floating-point operations of the logits of one image: two for each product of its layers."""
    flop = 0

    def count(call, arguments, keywords, context):
        nonlocal flop
        outputs, layer = call(*arguments, **keywords), context.module
        if isinstance(layer, (models.Conv, models.DepthwiseConv, nn.Dense)):
            flop += 2 * math.prod(outputs.shape[:-1]) * layer.variables["params"]["kernel"].size
        elif isinstance(layer, models.SelfAttention):  # queries with keys, weights with values
            flop += 2 * 2 * outputs.shape[1] ** 2 * outputs.shape[2]
        return outputs

    model = build_model(architecture, num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), image)
    with nn.intercept_methods(count):
        jax.eval_shape(model.apply, variables, image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), flop
