"""Evaluations of a model against a wrapper that counts, for every oracle, start and proxy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from lft_jax import (
    AttackRecipe,
    Augmentation,
    PatternSearch,
    Proxies,
    WaveSearch,
    ZerothOrder,
    models,
    universal_perturbation,
)
from lft_jax.oracles import per_example_zeroth_order, zeroth_order
from lft_jax.oracles.directions import BASES, DRAW
from tests.trust.cases import for_all

SHAPE, COUNT = (14, 14, 1), 3  # two jigsaw cells along a side
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(COUNT, *SHAPE)).astype(np.float32)
WEIGHTS = RNG.normal(size=(196, 3)).astype(np.float32)
SEED = st.integers(0, 2**32 - 1)
SGD = optax.with_extra_args_support(optax.sgd(0.05))


class Counted:
    """A model outside of JAX, with gradients or without, that counts the images it is asked for."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return np.asarray(images).reshape(len(images), -1) @ WEIGHTS

    def pull_back(self, images):
        return self(images), lambda cotangent: (cotangent @ WEIGHTS.T).reshape(images.shape)

    def differentiable(self):
        return models.host_classifier(models.HostModel(self, self.pull_back))


@st.composite
def estimators(draw):
    """Zeroth-order settings of all kinds."""
    directions = draw(st.sampled_from(sorted(DRAW)))
    subspaces = [(None, "tiles")] if directions == "coordinate" else [(None, "tiles"), *((3, basis) for basis in BASES)]
    resolution, basis = draw(st.sampled_from(subspaces))
    return ZerothOrder(
        draw(st.integers(1, 3)),
        0.05,
        directions,
        draw(st.booleans()),
        resolution,
        basis,
        per_example=draw(st.booleans()),
    )


@st.composite
def recipes(draw):
    """Recipes of all starts, searches and proxies."""
    augmentation = draw(
        st.sampled_from([None, Augmentation(), Proxies(size=5), Proxies(size=4, grids=(2,), noise=0.0)])
    )
    batch = None if isinstance(augmentation, Proxies) else draw(st.sampled_from([None, 2, 7]))
    search = draw(st.sampled_from([None, WaveSearch(2, 1), PatternSearch(tiles=1, waves=1, refinements=2)]))
    return AttackRecipe("cross_entropy", augmentation, draw(st.sampled_from(["zeros", "random"])), search, batch)


@for_all(
    oracle=st.one_of(st.just("gradient"), estimators(), st.sampled_from(["query", "decision"])),
    recipe=st.one_of(st.none(), recipes()),
    steps=st.integers(1, 3),
    given_start=st.booleans(),
    limit=st.one_of(st.none(), st.integers(2, 400)),
    seed=SEED,
)
def test_an_attack_asks_for_as_many_images_as_it_says(oracle, recipe, steps, given_start, limit, seed):
    victim, options = Counted(), {"norm": "linf", "epsilon": 0.1, "steps": steps, "progress": False}
    model = victim.differentiable() if oracle == "gradient" else victim
    if oracle != "decision":  # which has neither
        options |= {"recipe": recipe, "optimizer": SGD} if recipe is not None or seed % 2 else {}
    if oracle == "gradient" and "optimizer" not in options:
        options["optimizer"] = SGD  # with the search and the proxies of the default
    if given_start:
        options["start"] = np.random.default_rng(seed).uniform(-0.1, 0.1, SHAPE).astype(np.float32)
    if limit is not None:
        options["max_queries"] = limit
    try:
        result = universal_perturbation(model, IMAGES, oracle=oracle, key=jax.random.key(seed), **options)
    except ValueError as error:
        assert "max_queries must be at least" in str(error) and limit is not None
        assert victim.images == 0
        return
    assert victim.images == result.queries == result.history["queries"][-1]
    assert limit is None or result.queries <= limit
    assert np.all(np.diff(result.history["queries"]) >= 0)


@for_all(
    settings=estimators(),
    examples=st.integers(1, 4),
    chunk=st.sampled_from([None, 1, 2]),
    opaque=st.booleans(),
    seed=SEED,
)
def test_an_oracle_evaluates_as_many_examples_as_it_says(settings, examples, chunk, opaque, seed):
    theta, counted = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 4, 1)), jnp.float32), []
    targets = np.random.default_rng(seed).normal(size=(examples, 4, 4, 1)).astype(np.float32)
    options = dataclasses.asdict(settings)
    per_example = options.pop("per_example")

    def losses(thetas):  # of a batch of points, or of a copy for each example
        counted.append(len(thetas) * (1 if per_example else examples))
        squares = (thetas - targets) ** 2 if per_example else (thetas[:, None] - targets[None]).mean(1) ** 2
        return squares.sum((1, 2, 3))

    if per_example:
        oracle = per_example_zeroth_order(losses, num_examples=examples, opaque=True, **options)
    elif opaque:
        oracle = zeroth_order(losses, evaluations=examples, chunk_size=chunk, opaque=True, **options)
    else:  # the settings on their own, whose losses are of one point and all examples
        oracle = dataclasses.replace(settings)(
            lambda theta: losses(theta[None]).repeat(examples), num_examples=examples, opaque=True
        )
    answer = oracle(theta, jax.random.key(seed))
    assert sum(counted) == int(answer.queries) == settings.evaluations * examples
    assert answer.grads.shape == theta.shape and bool(jnp.all(jnp.isfinite(answer.grads)))
