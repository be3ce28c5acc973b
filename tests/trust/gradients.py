"""Meta-gradients against finite differences in float64, for every rule, feature set, oracle, learner and constraint.

    python -m tests.trust.gradients --output=results/meta_gradients.json

The cells are those of the package's own tables; what it refuses is counted with its words. A learner of the first order
holds the answers of the oracle constant, so its differences are taken with the answers of the unmoved run replayed.

Three things make the table affordable. A rule has all feature sets at once; zero weights at all but one of them make it
the rule of that one. One program serves all oracles of one kind of answer, all constraints and all feature sets. And
second-order differences are taken of the values of the program that computes the gradient.
"""

import argparse
import collections
import dataclasses
import functools
import inspect
import itertools
import sys
import time
import zlib
from typing import NamedTuple

import tests.conftest  # noqa: F401  (flags of XLA, strict promotion of dtypes)

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from lft_jax import Constraint, Learner, MomentumUpdate, TaskFamily, ZerothOrder, learners
from lft_jax.meta.outer_loss import Scored, losses_of_part
from lft_jax.optimizers.features import FEATURES
from lft_jax.optimizers.rules import RULES
from lft_jax.oracles.directions import BASES, DRAW
from lft_jax.tasks import sine_family
from lft_jax.tasks.perturbation import NORMS
from tests.trust.replay import STEPS, recording, replaying
from tests.trust.tasks import AnyConstraint, Bowl

DIRECTIONS = 2
#: Sizes of differences. The smaller ones are for cells with a kink, of `log_sign` or a ReLU, within the larger ones.
SIZES = (1e-4, 1e-6, 1e-7)
#: Largest error, of the slopes along random directions relative to their norm.
TOLERANCE = 1e-5
#: Rounding of a difference, absolute, for cells whose slopes are about 0.
ROUNDING = 1e-10
ALL = tuple(FEATURES)
KEY = jax.random.key(1)
REFUSALS = (TypeError, ValueError)
#: With such steps nothing leaves an linf ball, where the derivative of a projection is not that of its value, on
#: purpose: a direction along one coordinate of 16 is four times as long there as its root mean square.
BOUND, _BASE = 0.3, 0.03


class Program(NamedTuple):
    """A part of the table that is compiled together.

    Attributes:
      rule: its name, "" for learners without one.
      learner: its name.
      features: names of the feature sets.
      constraints: those of the tasks; empty for tasks without.
      oracles: `{name: estimator}`, where None stands for exact gradients.
    """

    rule: str
    learner: str
    features: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    oracles: dict[str, ZerothOrder | None]


# ---- The tables of the package ----


def constraints_of(refused):
    """Balls and penalties of all norms."""
    found = []
    for norm, bound in itertools.product(NORMS, ({"epsilon": BOUND}, {"penalty": 0.1})):
        try:
            found.append(Constraint(norm, **bound).check())
        except REFUSALS as error:
            refused[f"constraint: {error}"] += 1
    return tuple(found)


def oracles_of(refused):
    """Exact gradients; all directions, which take turns in form of differences, subspace and directions per example."""
    estimators, bases = {}, (None, *BASES)
    for number, directions in enumerate(DRAW):
        for basis in bases[number % len(bases) :] + bases:
            options = {} if basis is None else {"resolution": 2, "basis": basis}
            options |= {"antithetic": number % 2 == 1, "per_example": number > 1}
            estimator = ZerothOrder(2, directions=directions, **options)
            try:
                estimator(jnp.sum, num_examples=1)
            except REFUSALS as error:
                refused[f"oracle: {error}"] += 1
                continue
            said = [directions, basis or "", "in pairs" * options["antithetic"], "per example" * options["per_example"]]
            estimators[" ".join(filter(None, said))] = estimator
            break
    return {"gradient": None}, estimators


def rule_of(name, refused=None):
    """The rule with all feature sets, or as it is if it takes none."""
    build = RULES[name]
    maps = {"maps": (2,)} if "maps" in inspect.signature(build).parameters else {}
    try:
        return build(2, 1, features=ALL, output_scale=0.1, base_update=MomentumUpdate(_BASE), **maps)
    except REFUSALS as error:
        if refused is not None:
            refused[f"rule: {error}"] += len(ALL)
        return build(2, step=0.2, final=1.0)


def learner_table():
    """`{name: (makes a learner of a rule or of None, whether it takes one)}`."""
    given = {"inner_optimizer": optax.sgd(0.02), "learning_rate": 0.02, "steps": 1, "head": 0, "name": "fixed"}
    given |= {"make_optimizer": optax.sgd}
    table = {}
    for name, build in vars(learners).items():
        if name.startswith("_") or getattr(build, "__annotations__", {}).get("return") is not Learner:
            continue
        parameters = inspect.signature(build).parameters
        make = functools.partial(build, **{key: value for key, value in given.items() if key in parameters})
        table[name] = functools.partial(make, second_order=False) if "second_order" in parameters else make
        if "second_order" in parameters:
            table[f"{name} of second order"] = functools.partial(make, second_order=True)
    return {name: (make, "rule" in inspect.signature(make.func).parameters) for name, make in table.items()}


def programs(refused):
    """The whole table."""
    constraints, groups = constraints_of(refused), oracles_of(refused)
    rules = {name: rule_of(name, refused) for name in RULES}
    for oracles, (learner, (_, takes_rule)) in itertools.product(groups, learner_table().items()):
        for name, rule in rules.items() if takes_rule else [("", None)]:
            features = (*ALL, "all") if hasattr(rule, "features") else ("",)
            yield Program(name, learner, features, constraints, oracles)


# ---- One program ----


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A rule whose network is traced once for all learners."""

    rule: object

    def __post_init__(self):
        object.__setattr__(self, "init", self.rule.init)
        object.__setattr__(self, "init_state", self.rule.init_state)
        object.__setattr__(self, "apply", _apply(self.rule))


@functools.cache
def _apply(rule):
    return jax.jit(rule.apply)


class Cell(NamedTuple):
    """One entry of the table.

    Attributes:
      rule, features, oracle, learner, constraint: their names.
      error: norm of the difference of the slopes along random directions, relative to their norm.
      slope: that norm.
    """

    rule: str
    features: str
    oracle: str
    learner: str
    constraint: str
    error: float
    slope: float


def named(constraint):
    """The name of a constraint."""
    return f"{constraint.norm} {'ball' if constraint.penalty is None else 'penalty'}"


def _task(learner, program, refused) -> TaskFamily | None:
    """The first family that the learner accepts, of the bowls and of networks, whose optimizee is a list of layers."""
    families: list[TaskFamily] = [sine_family(widths=(3,), shots=3, query_shots=2)]
    if program.constraints:
        number = jnp.zeros((), jnp.int32)
        any_of = AnyConstraint(number, program.constraints)
        families.insert(0, Bowl(any_of, jnp.asarray(0.2), tuple(program.oracles.values()), number))
    for family in families:
        try:
            learner.init(KEY, (family,))
        except REFUSALS as error:
            refused[f"learner: {error}"] += len(program.oracles) * max(len(program.constraints), 1)
        else:
            return family
    return None


def _weights(params, rule, rng):
    """Random weights; a learned initialization is so small that the steps stay inside a ball."""

    def drawn(path, leaf):
        name, uniform = jax.tree_util.keystr(path), rng.uniform(-1, 1, leaf.shape)
        if "rates" in name:
            return 0.02 + 0.01 * uniform
        return 0.15 * uniform if rule is None or "start" in name else 0.4 * rng.normal(size=leaf.shape)

    return jax.tree_util.tree_map_with_path(drawn, params)


def _kept(params, rule, features):
    """1 at the weights of the rule of these features, 0 at those of the others."""
    columns = np.concatenate([np.full(FEATURES[f].size, features in (f, "all")) for f in ALL])

    def of(path, leaf):
        name, kept = jax.tree_util.keystr(path), np.ones(leaf.shape)
        if "['weight']" in name and "['convolutions'][0]" in name:
            kept *= np.tile(columns, 9)[None]
        elif "['weight']" in name and "['cells'][0]" in name:
            kept[:, : len(columns)] *= columns[None]
        return kept

    return jax.tree_util.tree_map_with_path(of, params) if features else jax.tree.map(np.ones_like, params)


def _lengthened(params, constraint):
    """Weights whose steps reach the border of an l2 ball, whose projection has a derivative, and no other border."""
    outward = constraint is not None and named(constraint) == "l2 ball"

    def of(path, leaf):
        name = jax.tree_util.keystr(path)
        if "['head']['bias']" in name:
            return leaf + 3 * outward
        return leaf + (0.7 if outward else -1) if "['all']['bias']" in name else leaf

    return jax.tree_util.tree_map_with_path(of, params)


@jax.enable_x64(True)
def checked(program: Program, refused, only=None) -> list[Cell]:
    """The cells of a program; with `only`, of the oracle of this name."""
    rule = rule_of(program.rule) if program.rule else None
    make, _ = learner_table()[program.learner]
    learner = make() if rule is None else make(_Traced(rule))
    family = _task(learner, program, refused)
    if family is None or (not isinstance(family, Bowl) and None not in program.oracles.values()):
        return []  # networks have exact gradients only
    constraints = program.constraints if isinstance(family, Bowl) else (None,)
    rng = np.random.default_rng(zlib.crc32(repr(program[:2]).encode()))
    params = _weights(learner.init(KEY, (family,)), rule, rng)
    _, unravel = ravel_pytree(params)

    def flat(tree):
        return np.asarray(ravel_pytree(tree)[0])

    names, starts, directions = [], [], []
    for features, (number, constraint) in itertools.product(program.features, enumerate(constraints)):
        kept = flat(_kept(params, rule, features))
        names.append((features, constraint, number))
        starts.append(kept * flat(_lengthened(params, constraint)))
        drawn = kept * rng.normal(size=(DIRECTIONS, len(kept)))
        directions.append(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    starts, directions, numbers = np.stack(starts), np.stack(directions), np.asarray([name[2] for name in names])
    run, replay = _compiled(learner, family, unravel)
    cells = []
    for kind, oracle in enumerate(program.oracles):
        if only not in (None, oracle):
            continue
        kind = np.int32(kind)
        (_, grads), (ends, used, answers) = run(kind, starts, numbers, np.full(len(starts), learner.adaptation_rate))
        errors = sizes = np.full(len(starts), np.inf)
        for size in SIZES:
            if np.max(errors) <= TOLERANCE:
                break
            steps = size * np.stack([directions, -directions], 1)
            points = np.asarray(used)[:, None, None] + steps
            if learner.objective == "end":
                # Half the squared distance from the start, which moves as the weights do, to the end, which stays.
                first, last = (np.reshape(x, (len(starts), 1, 1, -1)) for x in ends)
                values = np.sum((first + steps - last) ** 2, -1) / 2
            elif learner.second_order:
                moved = points.reshape(-1, points.shape[-1])
                values = run(kind, moved, np.repeat(numbers, 2 * DIRECTIONS), np.zeros(len(moved)))[0][0]
            else:
                values = replay(points.reshape(len(points), -1, points.shape[-1]), numbers, answers)
            up, down = np.moveaxis(np.reshape(values, (len(starts), 2, DIRECTIONS)), 1, 0)
            differences, slopes = (up - down) / (2 * size), np.einsum("cdp,cp->cd", directions, grads)
            found = np.linalg.norm(differences, axis=1)
            apart = np.linalg.norm(differences - slopes, axis=1) / (found + ROUNDING / TOLERANCE)
            sizes = np.where(apart < errors, found, sizes)
            errors = np.fmin(apart, errors)
        errors = np.where(np.isfinite(errors), errors, np.inf)
        for (features, constraint, _), error, size in zip(names, errors, sizes, strict=True):
            bound = "none" if constraint is None else named(constraint)
            cells.append(Cell(program.rule, features, oracle, program.learner, bound, float(error), float(size)))
    return cells


def _compiled(learner, family, unravel):
    """`run` and `replay`, each for rows of weights `[n, ...]` and numbers of constraints `[n]`.

    `run(kind, rows, numbers, rates)` is the loss and its gradient; and first and last optimizee, the weights after
    adaptation at these rates, and the answers of the oracle. `replay(points, numbers, answers)` are the losses at
    points around each row, with the answers of that row.
    """

    def of(number, kind):
        if not isinstance(family, Bowl):
            return family
        constraint = dataclasses.replace(family.constraint, number=number)
        return dataclasses.replace(family, constraint=constraint, kind=kind)

    def answered(key):
        estimate = family.oracle(family.sample(key).support)(family.init(key), key)
        return estimate.grads, {"value": estimate.value, "progress": jnp.zeros((), jnp.float32), **estimate.extras}

    like = () if learner.second_order else jax.eval_shape(answered, KEY)

    def losses(learner, weights, family, differentiable):
        scored = Scored(np.arange(STEPS), differentiable=differentiable)
        found, ends = losses_of_part(learner, weights, family, KEY[None], num_steps=STEPS, scored=scored)
        return jnp.mean(found), jax.tree.map(lambda x: x[0], ends)

    @jax.jit
    def run(kind, rows, numbers, rates):
        def one(row):
            weights, number, rate = row

            def loss(weights):
                adapting = {"adaptation_rate": rate} if learner.adaptation_steps else {}
                recorded = recording(dataclasses.replace(learner, **adapting), like)
                value, (last, state) = losses(recorded, unravel(weights), of(number, kind), True)
                start = learner.start(unravel(weights), of(number, kind), KEY)
                return value, ((start, last), ravel_pytree(state.params)[0], state.answers)

            (value, seen), grad = jax.value_and_grad(loss, has_aux=True)(weights)
            return (value, grad), seen

        return jax.lax.map(one, (rows, numbers, rates))

    @jax.jit
    def replay(points, numbers, answers):
        def one(row):
            points, number, answers = row
            again = replaying(learner, answers)
            family = of(number, np.int32(0))  # whose oracle is not listened to
            return jax.lax.map(lambda weights: losses(again, unravel(weights), family, False)[0], points)

        return jax.lax.map(one, (points, numbers, answers))

    return run, replay


# ---- The program ----


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.trust.gradients", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="", help="JSON file for the counts; none if empty")
    given = parser.parse_args(arguments)
    from lft_jax.cli import provenance

    began, refused, cells, found = time.perf_counter(), collections.Counter(), [], {}
    table = list(programs(refused))
    for number, program in enumerate(table, 1):
        cells += checked(program, refused)
        jax.clear_caches()
        found = {"complete": number == len(table), **summary(cells, refused, time.perf_counter() - began)}
        print(f"{number} of {len(table)} programs: {found['cells']} cells, worst {found['worst']}", flush=True)
        if given.output:
            provenance.write_json(given.output, {**found, "provenance": provenance.describe([1])})
    return 1 if found["failures"] else 0


def summary(cells, refused, seconds):
    """Counts and worst errors, of all cells and for each entry of each table."""
    axes = {}
    for axis in ("rule", "features", "oracle", "learner", "constraint"):
        axes[axis] = {}
        for name in dict.fromkeys(getattr(cell, axis) for cell in cells):
            errors = [cell.error for cell in cells if getattr(cell, axis) == name]
            axes[axis][name or "none"] = {"cells": len(errors), "worst": max(errors)}
    failed = [cell for cell in cells if not cell.error <= TOLERANCE]
    return {
        "cells": len(cells),
        "failures": len(failed),
        "tolerance": TOLERANCE,
        "worst": max(cells, key=lambda cell: cell.error)._asdict() if cells else None,
        "without_slope": sum(cell.slope <= ROUNDING / TOLERANCE for cell in cells),
        "failed": [cell._asdict() for cell in failed[:20]],
        "by": axes,
        "refused": dict(sorted(refused.items())),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
