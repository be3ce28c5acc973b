"""What can be meta-learned: an update rule (LFT, L2O), an initialization (MAML and kin), or both (joint)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lft_jax import base
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.optimizers.rules import Rule
from lft_jax.optimizers.sampling import learned_sampler
from lft_jax.optimizers.transform import learned_fine_tuner


def _family_start(params: PyTree, family: TaskFamily, key: jax.Array) -> PyTree:
    del params
    return family.init(key)


def lft(rule: Rule, *, sampler: Rule | None = None, second_order: bool = False) -> Learner:
    """Learned fine-tuner: the rule's weights, trained on the loss of the *query* examples (PAPER "LFT").

    Args:
      rule: the update rule.
      sampler: a second rule, which sets the deviation of zeroth-order directions (`optimizers.learned_sampler`).
        The meta-parameters are then `{"rule": weights, "sampler": weights}`, learned together; to learn the sampler
        in a second stage, start from the first one's weights with a meta-optimizer that leaves them alone, such as
        `optax.partition({"train": optimizer, "hold": optax.set_to_zero()}, {"rule": "hold", "sampler": "train"})`.
      second_order: whether meta-gradients flow through the inner gradients.
    """
    return _learned_rule("lft", rule, "query", second_order, sampler)


def l2o(rule: Rule, *, sampler: Rule | None = None, second_order: bool = False) -> Learner:
    """Learning to optimize: as `lft`, but trained on the loss of the *support* examples (PAPER "L2O")."""
    return _learned_rule("l2o", rule, "support", second_order, sampler)


def adaptive_lft(rule: Rule, *, steps: int = 5, learning_rate: float = 1e-2, second_order: bool = False) -> Learner:
    """An LFT whose weights take a few gradient steps of their own on a task's support loss before it fine-tunes.

    Each of these steps fine-tunes once and descends on the mean support loss along the way; the derivative of that
    gradient is dropped, as in first-order MAML. That descent differentiates the family's loss itself, whatever its
    oracle: not for models that can only be called.

    Args:
      rule: the update rule.
      steps: of the weights, at least 1.
      learning_rate: of these steps, above 0.
      second_order: whether meta-gradients flow through the inner gradients.

    References:
      M-L2O: Yang et al. 2023, towards generalizable learning-to-optimize by test-time fast self-adaptation.
    """
    base.check_at_least("steps", steps, 1)
    base.check_positive("learning_rate", learning_rate)
    learner = _learned_rule("adaptive_lft", rule, "query", second_order)
    return dataclasses.replace(learner, adaptation_steps=steps, adaptation_rate=learning_rate)


@functools.cache
def _rule_optimizer(rule, sampler):
    # One function object for each rule, so that programs compiled for it are found again.
    if sampler is None:
        return lambda params: learned_fine_tuner(params, rule)
    return lambda params: learned_sampler(params["sampler"], sampler, learned_fine_tuner(params["rule"], rule))


def _learned_rule(name, rule, objective, second_order, sampler=None):
    def init(key, families):
        if sampler is None:
            return rule.init(key)
        keys = jax.random.split(key)
        return {"rule": rule.init(keys[0]), "sampler": sampler.init(keys[1])}

    return Learner(
        name=name,
        init=init,
        optimizer=_rule_optimizer(rule, sampler),
        start=_family_start,
        objective=objective,
        second_order=second_order,
    )


def maml(inner_optimizer: optax.GradientTransformation, *, second_order: bool = True) -> Learner:
    """MAML: an initialization shared by all tasks, fine-tuned by a hand-designed optimizer (PAPER "MAML").

    Args:
      inner_optimizer: fine-tunes; `optax.sgd(learning_rate)` in Finn et al. 2017.
      second_order: the full meta-gradient; False drops the derivative of the inner gradients (first-order MAML).

    Returns:
      A learner whose `init` raises a ValueError unless all families have optimizees of the same shapes.
    """

    return Learner(
        name="maml",
        init=functools.partial(_congruous_start, "maml"),
        optimizer=lambda params: inner_optimizer,
        start=lambda params, family, key: family.project(params),
        objective="query",
        second_order=second_order,
    )


def sign_maml(learning_rate: float) -> Learner:
    """Sign-MAML: an initialization from which tasks step along the sign of their gradients.

    A sign has derivative 0, so that the full meta-gradient is the first-order one: there is nothing to choose.

    Args:
      learning_rate: size of a coordinate's step, above 0, in units of the scale that a task's oracle tells (1 if none).

    Returns:
      A learner for tasks of one shape, as of `maml`.

    References:
      Fan et al. 2021, Sign-MAML: efficient model-agnostic meta-learning by signSGD.
    """
    _check_rate(learning_rate)

    def descent(grads, state, theta=None, *, scale=1.0, **extra_args):
        del theta, extra_args
        return jax.tree.map(lambda g: (-learning_rate * scale * jnp.sign(g)).astype(g.dtype), grads), state

    inner = optax.GradientTransformationExtraArgs(lambda theta: optax.EmptyState(), descent)
    return dataclasses.replace(
        maml(inner, second_order=False), name="sign_maml", init=functools.partial(_congruous_start, "sign_maml")
    )


def anil(
    inner_optimizer: optax.GradientTransformation, *, head: str | int = "head", second_order: bool = True
) -> Learner:
    """ANIL: MAML of which tasks fine-tune the head alone; the rest of the learned initialization stays as it is.

    Args:
      inner_optimizer: fine-tunes the head.
      head: key of the head among the optimizee's entries, a dictionary's or a list's (from 0).
      second_order: as for `maml`.

    Returns:
      A learner for tasks of one shape, as of `maml`, whose `init` also raises a ValueError if there is no such entry.

    References:
      Raghu et al. 2020, Rapid learning or feature reuse? Towards understanding the effectiveness of MAML.
    """

    def part(path, leaf):
        del leaf
        return "head" if path and getattr(path[0], "key", getattr(path[0], "idx", None)) == head else "body"

    def parts(theta):
        return jax.tree_util.tree_map_with_path(part, theta)

    def init(key, families):
        start = _congruous_start("anil", key, families)
        if "head" not in jax.tree.leaves(parts(start)):
            raise ValueError(
                f"anil fine-tunes a head: optimizees must be a dictionary or a list with an entry {head!r}, got "
                f"{jax.tree.map(jnp.shape, start)}."
            )
        return start

    inner = optax.multi_transform({"head": inner_optimizer, "body": optax.set_to_zero()}, parts)
    return dataclasses.replace(maml(inner, second_order=second_order), name="anil", init=init)


def reptile(inner_optimizer: optax.GradientTransformation) -> Learner:
    """Reptile: an initialization that moves towards where fine-tuning on the support set takes it; no query examples.

    Args:
      inner_optimizer: fine-tunes.

    Returns:
      A learner for tasks of one shape, as of `maml`. Its meta-gradient is the mean of start - end over tasks, the
      start being projected onto the feasible set; the weights of the steps do not matter.

    References:
      Nichol et al. 2018, On first-order meta-learning algorithms.
    """
    return Learner(
        name="reptile",
        init=functools.partial(_congruous_start, "reptile"),
        optimizer=lambda params: inner_optimizer,
        start=lambda params, family, key: family.project(params),
        objective="end",
    )


def meta_sgd(learning_rate: float, *, second_order: bool = True) -> Learner:
    """Meta-SGD: an initialization, and a learning rate for each of its coordinates, which may become negative.

    Args:
      learning_rate: of all coordinates at first, above 0.
      second_order: as for `maml`.

    Returns:
      A learner of `{"start": theta, "rates": like theta}`, for tasks of one shape, as of `maml`.

    References:
      Li et al. 2017, Meta-SGD: learning to learn quickly for few-shot learning.
    """
    _check_rate(learning_rate)

    def init(key, families):
        start = _congruous_start("meta_sgd", key, families)
        return {"start": start, "rates": jax.tree.map(lambda x: jnp.full_like(x, learning_rate), start)}

    return Learner(
        name="meta_sgd",
        init=init,
        optimizer=_descent_at_rates,
        start=_own_start,
        objective="query",
        second_order=second_order,
    )


def _check_rate(learning_rate):
    if not isinstance(learning_rate, jax.core.Tracer):  # a traced one has no value yet: it is being tuned
        base.check_positive("learning_rate", learning_rate)


def _own_start(params, family, key):
    del key
    return family.project(params["start"])


def _descent_at_rates(params):
    return optax.stateless(lambda grads, theta: jax.tree.map(lambda r, g: -r * g, params["rates"], grads))


def joint(rule: Rule, *, second_order: bool = False) -> Learner:
    """An update rule and an initialization for it, learned together on query examples, where tasks are congruous.

    Returns:
      A learner of `{"start": theta, "rule": the rule's weights}`, for tasks of one shape, as of `maml`.
    """

    def init(key, families):
        key_rule, key_start = jax.random.split(key)
        return {"start": _congruous_start("joint", key_start, families), "rule": rule.init(key_rule)}

    return Learner(
        name="joint",
        init=init,
        optimizer=_joint_optimizer(rule),
        start=_own_start,
        objective="query",
        second_order=second_order,
    )


@functools.cache
def _joint_optimizer(rule):
    return lambda params: learned_fine_tuner(params["rule"], rule)


def _congruous_start(name, key, families):
    """An initialization for all families, which must have optimizees of the same shapes."""
    shapes = [jax.eval_shape(family.init, key) for family in families]
    for shape in shapes[1:]:
        if shape != shapes[0]:
            raise ValueError(
                f"{name} needs congruous tasks: one initialization cannot serve optimizees of different shapes, "
                f"got {shapes[0]} and {shape}. Train one for each, or meta-learn the fine-tuner alone (lft)."
            )
    return families[0].init(key)


def fixed(name: str, make_optimizer: Callable[..., optax.GradientTransformation]) -> Learner:
    """A hand-designed optimizer, for comparison: its hyperparameters stand where meta-parameters would.

    Args:
      name: as printed in tables.
      make_optimizer: keyword arguments (which may be traced) -> transformation. `params` is a dict of these.
    """

    def init(key, families):
        raise ValueError(f"{name} has nothing to meta-learn: its params are the keyword arguments of its optimizer.")

    return Learner(name=name, init=init, optimizer=lambda params: make_optimizer(**params), start=_family_start)
