"""The start of a run, and whether its steps outdo it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax._bounded import BoundedJit
from lft_jax.attack._run import Run
from lft_jax.attack._steps import Problem, measured
from lft_jax.attack.result import UniversalPerturbation
from lft_jax.tasks.recipe import AttackRecipe, better_end, initial_perturbation, searched_in_turns


def keys(recipe: AttackRecipe, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key of the start and that of the steps; only a random start or a search uses one."""
    if recipe.start != "random" and recipe.search is None:
        return key, key
    return _split(key)


_fold_in = BoundedJit(jax.random.fold_in, once=True)


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """`jax.random.fold_in`, which compiles in half the time."""
    return _fold_in(key, np.uint32(number))


@functools.partial(BoundedJit, once=True)
def _split(key):
    key, key_start = jax.random.split(key)
    return key_start, key


def first_perturbation(
    ask: Callable[..., Any], problem: Problem, key: jax.Array, given: Any, run: Run
) -> tuple[jax.Array, jax.Array]:
    """The given start or that of the recipe, `[H, W, C]`, and the key of the steps.

    Raises:
      ValueError: for a given one that is not finite or has another shape.
    """
    x, recipe, constraint = problem.batch.images, problem.recipe, problem.constraint
    key_start, key = keys(recipe, key)
    if given is not None:
        theta = np.asarray(given.perturbation if isinstance(given, UniversalPerturbation) else given)
        if theta.shape != x.shape[1:] or not np.all(np.isfinite(theta)):
            raise ValueError(f"start must be a finite perturbation {x.shape[1:]}, got shape {theta.shape}.")
        return constraint.project(jnp.asarray(theta, x.dtype)), key
    key_random = fold_in(key_start, 3)  # none of those of the search
    theta = initial_perturbation(recipe.start, constraint, x.shape[1:], x.dtype, key_random)

    def watch(theta, loss):
        run.see(np.asarray(theta), 0.0, float(loss))

    if recipe.search is not None:
        theta = searched_in_turns(ask, problem.batch, recipe, constraint, theta, key_start, watch)
    return theta, key


def better(
    ask: Callable[..., Any], problem: Problem, start: jax.Array, end: jax.Array, key: jax.Array, metrics: dict[str, Any]
) -> tuple[jax.Array, dict[str, Any], bool]:
    """The start if the steps ended no better, or the end; its metrics; and whether it is the start.

    Args:
      ask: runs programs of the model.
      problem: the constants of the run.
      start: `[H, W, C]`, what a search found.
      end: `[H, W, C]`, the perturbation after the last step.
      key: PRNG key of the proxies that both are compared on.
      metrics: those of the end.
    """
    if ask(better_end, problem.batch, problem.recipe, problem.constraint, start, end, key):
        return end, metrics, False
    return start, ask(measured, problem, start), True
