"""One step of an attack, for each kind of oracle."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax._bounded import BoundedJit
from lft_jax.models import Classifier, replayed
from lft_jax.optimizers.fine_tuning import fine_tune_step
from lft_jax.oracles import ZerothOrder
from lft_jax.tasks.perturbation import Batch, Constraint, perturb
from lft_jax.tasks.recipe import AttackRecipe, attack_oracle, begin_search, better_end, end_search, resolved_loss
from lft_jax.tasks.uap import attack_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """The constants of a run.

    Attributes:
      batch: the support images `[N, H, W, C]` and their labels.
      shown: the images `[M, H, W, C]` that the history is measured on, all or some of them, and their labels.
      clean: `[M, classes]`, the logits of these images when clean.
      recipe: resolved.
      constraint: the ball or the penalty.
    """

    batch: Batch
    shown: Batch
    clean: jax.Array
    recipe: AttackRecipe
    constraint: Constraint


#: `(problem, theta, state, key, progress) -> (theta, state, metrics)`.
Step = Callable[..., tuple[Any, Any, dict[str, jax.Array]]]


def make_step(
    classifier: Classifier,
    function: jax.tree_util.Partial | None,
    tx: optax.GradientTransformationExtraArgs,
    estimator: ZerothOrder | None,
) -> Step:
    """The step of a run.

    Args:
      classifier: the model.
      function: for a model that JAX traces, to compile into the step; else None.
      tx: the optimizer; one object stands for one compiled program.
      estimator: None for exact gradients.
    """
    if estimator is not None:
        tx = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))  # the oracle runs eagerly
        opaque = functools.partial(estimator, opaque=True)
        update = functools.partial(_update_and_perturb, classifier, tx, opaque)
        return functools.partial(_eager_step, update, classifier)
    if classifier.host is not None:
        update = functools.partial(_asked_update, classifier, tx, None)
        return functools.partial(_eager_step, update, classifier)
    return functools.partial(_traced_step, tx, function)


def _update(model, tx, estimator, problem, theta, state, key, progress):
    """The next perturbation and the next optimizer state."""
    oracle = attack_oracle(model, problem.batch, problem.recipe, problem.constraint, estimator)
    project = problem.constraint.project
    theta, state, _ = fine_tune_step(tx, oracle, theta, state, key, progress=progress, project=project)
    return theta, state


def _update_and_perturb(model, tx, estimator, problem, theta, state, key, progress):
    """What `_update` returns, and the perturbed images of the history."""
    theta, state = _update(model, tx, estimator, problem, theta, state, key, progress)
    return theta, state, perturb(problem.shown.images, theta)


#: With a model outside of JAX all but the model is compiled.
_asked_update = replayed(_update_and_perturb, static=(0, 1))


@jax.jit
def _metrics(problem, logits, theta):
    loss = resolved_loss(problem.recipe)
    return attack_metrics(problem.clean, logits, problem.shown.labels, theta, loss, problem.constraint)


def asker(classifier: Classifier, function: jax.tree_util.Partial | None) -> Callable[..., Any]:
    """`(program, *args) -> program(model, *args)`, where all but a model outside of JAX is compiled.

    Args:
      classifier: the model.
      function: the model, to compile into the programs; None for one outside of JAX, or one that JAX may not trace,
        with which the programs run operation by operation.
    """

    def ask(program, *args):
        traced, asked = _compiled(program)
        if function is not None:
            return traced(function, *args)
        return program(classifier, *args) if classifier.host is None else asked(classifier, *args)

    return ask


@functools.cache
def _compiled(program):
    """A program of this package, which is a function of a module, compiled for both kinds of models."""
    return BoundedJit(program, once=program in (begin_search, end_search, better_end)), replayed(program)


def prepare(
    tx: optax.GradientTransformationExtraArgs,
    function: jax.tree_util.Partial,
    problem: Problem,
    key: jax.Array,
    *,
    compared: bool,
) -> None:
    """Compiles the programs of a run that follow the search for a start, while it goes on.

    Args:
      tx: the optimizer.
      function: the model, which JAX traces.
      problem: the constants of the steps.
      key: a PRNG key.
      compared: whether the start is compared with the end.
    """
    images = problem.batch.images
    if any(getattr(leaf, "committed", False) for leaf in jax.tree.leaves((function, images))):
        return  # the programs depend on the devices that their other arguments will be on
    theta = jnp.zeros(images.shape[1:], images.dtype)
    _traced_step.prepare(tx, function, problem, theta, tx.init(theta), key, np.float32(0))
    if compared:
        traced, _ = _compiled(better_end)
        traced.prepare(function, problem.batch, problem.recipe, problem.constraint, theta, theta, key)


def scores(model: Any, images: jax.Array) -> jax.Array:
    """The logits of images, as a program of the model."""
    return getattr(model, "evaluate", model)(images)


def measured(model: Any, problem: Problem, theta: Any) -> dict[str, jax.Array]:
    """The metrics of a perturbation on the images of the history, as a program of the model."""
    return _metrics(problem, scores(model, perturb(problem.shown.images, theta)), theta)


def _eager_step(update, model, problem, theta, state, key, progress):
    """A step whose update is not compiled as a whole, and its metrics."""
    theta, state, images = update(problem, theta, state, key, progress)
    return theta, state, _metrics(problem, model(images), theta)


@functools.partial(BoundedJit, static=(0,))
def _traced_step(tx, model, problem, theta, state, key, progress):
    theta, state, images = _update_and_perturb(model, tx, None, problem, theta, state, key, progress)
    return theta, state, _metrics(problem, model(images), theta)
