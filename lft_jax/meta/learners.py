"""Learners: what is meta-learned, and from which outer loss.

An update rule (`lft`, `l2o`, `adaptive_lft`), an initialization (`maml`, `sign_maml`, `anil`, `reptile`, `meta_sgd`),
or both (`joint`). `fixed` makes a learner of a hand-designed optimizer, for comparison. With `f` the loss of a task,
`w_k` weights of the steps, and `theta_0 ... theta_K` its optimizees while fine-tuning on the support set, most learners
minimize `sum_k w_k f(theta_k; query set)`.

An update rule can serve tasks of different shapes at once. Initializations need tasks of one shape.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lft_jax import base
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.optimizers.rules import Rule, UpdateRule
from lft_jax.optimizers.sampling import learned_sampler
from lft_jax.optimizers.transform import learned_fine_tuner


def _family_start(params: PyTree, family: TaskFamily, key: jax.Array) -> PyTree:
    del params
    return family.init(key)


def lft(rule: UpdateRule, *, sampler: Rule | None = None, second_order: bool = False) -> Learner:
    """Learned fine-tuner (LFT): an update rule, trained on the *query* set.

    With the rule `m` of weights phi, its state `h`, and the gradient `g_k` of the support loss at `theta_(k-1)`::

        theta_k = project(theta_(k-1) - m(g_k, h_(k-1); phi)),      minimize over phi  sum_k w_k f(theta_k; query set)

    Args:
      rule: the update rule.
      sampler: a second rule, which sets the standard deviation of random directions, for zeroth-order oracles
        (`optimizers.learned_sampler`). The meta-parameters are then `{"rule": weights, "sampler": weights}`, which are
        learned together. To learn the sampler in a second stage, start from the rule's weights of the first one, with
        the meta-optimizer
        `optax.partition({"train": optimizer, "hold": optax.set_to_zero()}, {"rule": "hold", "sampler": "train"})`.
      second_order: whether meta-gradients flow through the inner gradients.

    Returns:
      A learner of the rule's weights, for tasks of any shape.

    References:
      Zhao et al., Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.

    Examples:
      >>> from lft_jax.optimizers import coordinate_lstm
      >>> learner = lft(coordinate_lstm(hidden=4))
      >>> learner.name, learner.objective, learner.second_order
      ('lft', 'query', False)
    """
    return _learned_rule("lft", rule, "query", second_order, sampler)


def l2o(rule: UpdateRule, *, sampler: Rule | None = None, second_order: bool = False) -> Learner:
    """Learning to optimize (L2O): an update rule, trained on the *support* set.

    As `lft`, with another outer loss: minimize over phi `sum_k w_k f(theta_k; support set)`.

    Args:
      rule, sampler, second_order: see `lft`.

    Returns:
      A learner of the rule's weights, for tasks of any shape.

    References:
      Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv 1606.04474.

    Examples:
      >>> from lft_jax.optimizers import coordinate_lstm
      >>> l2o(coordinate_lstm(hidden=4)).objective
      'support'
    """
    return _learned_rule("l2o", rule, "support", second_order, sampler)


def adaptive_lft(
    rule: UpdateRule, *, steps: int = 5, learning_rate: float = 1e-2, second_order: bool = False
) -> Learner:
    """An LFT whose own weights adapt to a task, by a few gradient steps, before it fine-tunes (M-L2O).

    For each adaptation step the rule fine-tunes once for K steps, and its weights phi descend on the mean support loss
    of the optimizees::

        phi <- phi - learning_rate * d/dphi mean_k f(theta_k; support set)

    The outer loss is that of `lft` afterwards. The derivative of the adaptation gradient is dropped, as in first-order
    MAML. Adaptation differentiates the family's loss by backpropagation, whatever the oracle: the model must be
    differentiable.

    Args:
      rule: the update rule.
      steps: adaptation steps, at least 1.
      learning_rate: learning rate of the adaptation steps, above 0.
      second_order: whether meta-gradients flow through the inner gradients.

    Returns:
      A learner of the rule's weights, for tasks of any shape.

    Raises:
      ValueError: for a number out of range.

    References:
      Yang et al. 2023, M-L2O: Towards generalizable learning-to-optimize by test-time fast self-adaptation, ICLR.

    Examples:
      >>> from lft_jax.optimizers import coordinate_lstm
      >>> adaptive_lft(coordinate_lstm(hidden=4), steps=2).adaptation_steps
      2
    """
    base.check_at_least("steps", steps, 1)
    base.check_positive("learning_rate", learning_rate)
    learner = _learned_rule("adaptive_lft", rule, "query", second_order)
    return dataclasses.replace(learner, adaptation_steps=steps, adaptation_rate=learning_rate)


@functools.lru_cache(maxsize=64)
def _rule_optimizer(rule, sampler):
    # One function object per rule, so that jitted functions of learners of equal rules are compiled once.
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
    """MAML: an initialization shared by all tasks, which a hand-designed optimizer fine-tunes.

    Minimizes over theta_0 `sum_k w_k f(theta_k; query set)`. MAML's original loss is that of the last step alone,
    `Unroll(step_weights="final")`.

    Args:
      inner_optimizer: fine-tunes. `optax.sgd(learning_rate)` in the reference.
      second_order: True for the full meta-gradient. False drops the derivative of the inner gradients (first-order
        MAML).

    Returns:
      A learner of theta_0. Its `init` raises a ValueError unless the optimizees of all families have the same shapes.

    References:
      Finn et al. 2017, Model-agnostic meta-learning for fast adaptation of deep networks, arXiv 1703.03400.

    Examples:
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> learner = maml(optax.sgd(0.1))
      >>> learner.init(jax.random.key(0), (QuadraticFamily(jnp.ones(3)),)).shape
      (3,)
    """

    return Learner(
        name="maml",
        init=functools.partial(_congruous_start, "maml"),
        optimizer=lambda params: inner_optimizer,
        start=lambda params, family, key: family.project(params),
        objective="query",
        second_order=second_order,
    )


def sign_maml(learning_rate: float | Float[Array, ""]) -> Learner:
    """Sign-MAML: MAML whose inner steps follow the sign of the gradient.

    With the gradient `g` of the support loss, a step is `theta <- theta - learning_rate * scale * sign(g)`. The
    derivative of a sign is 0, so the full meta-gradient equals the first-order one.

    Args:
      learning_rate: step per coordinate, above 0, in units of the `scale` that the oracle reports, or of 1.

    Returns:
      A learner of theta_0, for tasks of one shape (see `maml`).

    Raises:
      ValueError: for a learning rate out of range.

    References:
      Fan et al. 2021, Sign-MAML: Efficient model-agnostic meta-learning by SignSGD, arXiv 2109.07497.

    Examples:
      >>> tx = sign_maml(0.25).optimizer(None)
      >>> tx.update(jnp.asarray([3.0, -0.1]), tx.init(None))[0].tolist()
      [-0.25, 0.25]
    """
    _check_rate(learning_rate)

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, scale=1.0, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: (-learning_rate * scale * jnp.sign(g)).astype(g.dtype), updates), state

    inner = optax.GradientTransformationExtraArgs(init, update)
    return dataclasses.replace(
        maml(inner, second_order=False), name="sign_maml", init=functools.partial(_congruous_start, "sign_maml")
    )


def anil(
    inner_optimizer: optax.GradientTransformation, *, head: str | int = "head", second_order: bool = True
) -> Learner:
    """ANIL: MAML that fine-tunes only the head of a network. The rest of the initialization is constant per task.

    Args:
      inner_optimizer: fine-tunes the head.
      head: key of the head in the optimizee, which is a dictionary, or its index from 0 in a list.
      second_order: see `maml`.

    Returns:
      A learner of theta_0, for tasks of one shape (see `maml`). Its `init` raises a ValueError if there is no such
      head.

    References:
      Raghu et al. 2020, Rapid learning or feature reuse? Towards understanding the effectiveness of MAML, arXiv
      1909.09157.

    Examples:
      >>> theta = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = anil(optax.sgd(0.5)).optimizer(theta)
      >>> updates, _ = tx.update(theta, tx.init(theta), theta)
      >>> updates["body"].tolist(), updates["head"].tolist()
      ([0.0, 0.0], [-0.5, -0.5])
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
    """Reptile: an initialization that moves towards the result of fine-tuning on the support set.

    The meta-gradient is `theta_0 - theta_K`, averaged over tasks, where theta_0 is projected onto the feasible set. No
    query set is used, and the weights of the steps are ignored.

    Args:
      inner_optimizer: fine-tunes.

    Returns:
      A learner of theta_0, for tasks of one shape (see `maml`).

    References:
      Nichol et al. 2018, On first-order meta-learning algorithms, arXiv 1803.02999.

    Examples:
      >>> reptile(optax.sgd(0.1)).objective
      'end'
    """
    return Learner(
        name="reptile",
        init=functools.partial(_congruous_start, "reptile"),
        optimizer=lambda params: inner_optimizer,
        start=lambda params, family, key: family.project(params),
        objective="end",
    )


def meta_sgd(learning_rate: float | Float[Array, ""], *, second_order: bool = True) -> Learner:
    """Meta-SGD: an initialization, and one learning rate per coordinate, which may become negative.

    With the gradient `g` of the support loss, a step is `theta <- theta - rates * g`, coordinate by coordinate.

    Args:
      learning_rate: initial value of all learning rates, above 0.
      second_order: see `maml`.

    Returns:
      A learner of `{"start": theta_0, "rates": like theta_0}`, for tasks of one shape (see `maml`).

    Raises:
      ValueError: for a learning rate out of range.

    References:
      Li et al. 2017, Meta-SGD: Learning to learn quickly for few-shot learning, arXiv 1707.09835.

    Examples:
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> params = meta_sgd(0.5).init(jax.random.key(0), (QuadraticFamily(jnp.ones(3)),))
      >>> params["rates"].tolist()
      [0.5, 0.5, 0.5]
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
    if not isinstance(learning_rate, jax.core.Tracer):  # a traced one, as in tuning, has no value to check
        base.check_positive("learning_rate", learning_rate)


def _own_start(params, family, key):
    del key
    return family.project(params["start"])


def _descent_at_rates(params):
    return optax.stateless(lambda grads, theta: jax.tree.map(lambda r, g: -r * g, params["rates"], grads))


def joint(rule: UpdateRule, *, second_order: bool = False) -> Learner:
    """An update rule and an initialization, learned together on the query set.

    Minimizes over phi and theta_0 `sum_k w_k f(theta_k; query set)`, with the steps of `lft`.

    Args:
      rule: the update rule.
      second_order: whether meta-gradients flow through the inner gradients.

    Returns:
      A learner of `{"start": theta_0, "rule": weights}`, for tasks of one shape (see `maml`).

    References:
      Zhao et al., Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.

    Examples:
      >>> from lft_jax.optimizers import coordinate_lstm
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> learner, families = joint(coordinate_lstm(hidden=4)), (QuadraticFamily(jnp.ones(3)),)
      >>> params = jax.eval_shape(lambda key: learner.init(key, families), jax.random.key(0))
      >>> sorted(params), params["start"].shape
      (['rule', 'start'], (3,))
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


@functools.lru_cache(maxsize=64)
def _joint_optimizer(rule):
    return lambda params: learned_fine_tuner(params["rule"], rule)


def _congruous_start(name, key, families):
    """An initialization for all families, whose optimizees must have the same shapes."""
    shapes = [jax.eval_shape(family.init, key) for family in families]
    for shape in shapes[1:]:
        if shape != shapes[0]:
            raise ValueError(
                f"{name} needs congruous tasks: one initialization cannot serve optimizees of different shapes, "
                f"got {shapes[0]} and {shape}. Train one for each, or meta-learn the fine-tuner alone (lft)."
            )
    return families[0].init(key)


def fixed(name: str, make_optimizer: Callable[..., optax.GradientTransformation]) -> Learner:
    """A hand-designed optimizer as a learner, for comparison. Its hyperparameters take the place of meta-parameters.

    Args:
      name: name in tables.
      make_optimizer: `**hyperparameters -> optax transformation`. The hyperparameters may be traced values.

    Returns:
      A learner whose `params` are the dictionary of hyperparameters. Its `init` raises a ValueError.

    Examples:
      >>> tx = fixed("descent", optax.sgd).optimizer({"learning_rate": 0.5})
      >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0].tolist()
      [-0.5, -0.5]
    """

    def init(key, families):
        raise ValueError(f"{name} has nothing to meta-learn: its params are the keyword arguments of its optimizer.")

    return Learner(name=name, init=init, optimizer=lambda params: make_optimizer(**params), start=_family_start)
