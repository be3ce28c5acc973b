"""`universal_perturbation` and `attack_success_rate`, on linear victims of 4x4 images."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import (
    AttackLoss,
    AttackRecipe,
    Augmentation,
    Constraint,
    Proxies,
    WaveSearch,
    attack_success_rate,
    learned_fine_tuner,
    universal_perturbation,
)
from lft_jax.attack import QUERY, _steps
from lft_jax.attack.universal import SEARCH
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm
from lft_jax.pretrained import save_rule

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
IMAGES = RNG.uniform(0.2, 0.8, size=(6, 4, 4, 1)).astype(np.float32)
LABELS = (IMAGES.reshape(6, -1) @ WEIGHTS).argmax(1)
DESCENT = optax.chain(optax.trace(0.5), optax.scale_by_sign(), optax.scale(-0.05))
NUM, DIRECTIONS, STEPS, EPSILON = len(IMAGES), 4, 6, 0.15
COSTS = {"gradient": 2 * NUM, "query": (2 * DIRECTIONS + 1) * NUM}
PROXIES = AttackRecipe(augmentation=Proxies())
RECIPE = [field.name for field in dataclasses.fields(AttackRecipe)]
HISTORY = {"loss", "asr", "fooling_rate", "margin", "clean_accuracy", "l1", "l2", "linf", "queries"}


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


class Counted:
    """The victim as a NumPy function that writes to its input and counts the images."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        assert type(images) is np.ndarray
        self.images += len(images)
        logits = linear(images).astype(np.float64)
        images[:] = np.nan
        return logits.tolist()


def run(model=linear, images=IMAGES, labels=LABELS, **options):
    """`universal_perturbation`; options may also be fields of the recipe and of the query oracle."""
    options = {"steps": STEPS, "optimizer": DESCENT, "epsilon": EPSILON, **options}
    parts = {name: options.pop(name) for name in RECIPE if name in options}
    settings = {name: options.pop(name) for name in ("resolution", "num_directions", "smoothing") if name in options}
    if options.get("oracle") == "query":
        options["oracle"] = dataclasses.replace(QUERY, **{"num_directions": DIRECTIONS, **settings})
    options.setdefault("recipe", AttackRecipe(**{"augmentation": None, **parts}))
    return universal_perturbation(model, images, labels, **options)


def mean_loss(theta, loss="cross_entropy"):
    logits = jnp.asarray(linear(np.clip(IMAGES + theta, 0, 1)))
    return float(np.mean(AttackLoss(loss)(logits, jnp.asarray(LABELS))))


# ---- The result ----


@pytest.fixture(scope="module")
def results():
    """`{oracle: (result, images that the victim saw)}`; the query victim is not JAX."""
    victim = Counted()
    return {"gradient": (run(), None), "query": (run(victim, oracle="query"), victim.images)}


@pytest.mark.parametrize("oracle", COSTS)
def test_both_oracles_find_a_perturbation_in_the_ball(results, oracle):
    result, _ = results[oracle]
    theta = result.perturbation
    assert type(theta) is np.ndarray
    assert theta.shape == (4, 4, 1)
    assert np.abs(theta).max() <= EPSILON * (1 + 1e-6)
    assert mean_loss(theta) < mean_loss(0 * theta) - 0.1
    history = result.history
    assert history.keys() == HISTORY
    assert {values.shape for values in history.values()} == {(STEPS,)}
    np.testing.assert_allclose(history["loss"][-1], mean_loss(theta), rtol=1e-4)
    np.testing.assert_allclose(history["l2"][-1], np.linalg.norm(theta), rtol=1e-5)
    np.testing.assert_allclose(history["clean_accuracy"], 1)
    np.testing.assert_allclose(history["asr"][-1], attack_success_rate(linear, IMAGES, LABELS, theta), rtol=1e-6)
    np.testing.assert_array_equal(history["queries"], NUM + COSTS[oracle] * np.arange(1, STEPS + 1))


def test_gradient_steps_are_those_of_a_loop(results):
    theta, state = jnp.zeros((4, 4, 1)), DESCENT.init(jnp.zeros((4, 4, 1)))
    loss = AttackLoss("cross_entropy")
    grad = jax.jit(jax.grad(lambda t: jnp.mean(loss(linear(jnp.clip(IMAGES + t[None], 0, 1)), jnp.asarray(LABELS)))))
    losses = []
    for _ in range(STEPS):
        updates, state = DESCENT.update(grad(theta), state)
        theta = jnp.clip(theta + updates, -EPSILON, EPSILON)
        losses.append(mean_loss(np.asarray(theta)))
    np.testing.assert_allclose(results["gradient"][0].perturbation, theta, atol=1e-6)
    np.testing.assert_allclose(results["gradient"][0].history["loss"], losses, rtol=1e-4)


@pytest.mark.parametrize("oracle", COSTS)
def test_augmentation_costs_no_queries_and_metrics_use_the_given_images(oracle):
    given = linear if oracle == "gradient" else Counted()
    options = {"oracle": oracle, "num_directions": 16}  # many directions, so that the estimates are not too noisy
    plain = run(given, **options)
    result = run(given, augmentation=Augmentation(shift=0.25), **options)
    assert not np.allclose(result.perturbation, plain.perturbation)
    np.testing.assert_array_equal(result.history["queries"], plain.history["queries"])
    np.testing.assert_allclose(result.history["loss"][-1], mean_loss(result.perturbation), rtol=1e-4)
    assert mean_loss(result.perturbation) < mean_loss(0 * result.perturbation)
    again = run(given, augmentation=Augmentation(shift=0.25), **options)
    np.testing.assert_array_equal(again.perturbation, result.perturbation)
    with pytest.raises(ValueError, match="augmentation: mix must be"):
        run(augmentation=Augmentation(mix=2.0))


@pytest.mark.parametrize("oracle", COSTS)
def test_a_penalty_instead_of_a_ball_is_part_of_the_loss(oracle):
    constraint = Constraint("l1", penalty=0.02)
    result = run(oracle=oracle, epsilon=None, constraint=constraint, optimizer=optax.sgd(0.05))
    theta = result.perturbation
    expected = mean_loss(theta) + 0.02 * np.abs(theta).sum()
    np.testing.assert_allclose(result.history["loss"][-1], expected, rtol=1e-4)
    assert expected < mean_loss(0 * theta)
    with pytest.raises(ValueError, match="constraint: leave out norm and epsilon"):
        run(constraint=constraint)
    with pytest.raises(ValueError, match="give exactly one of epsilon"):
        run(epsilon=None)


def test_coarse_directions_move_whole_tiles():
    theta = run(oracle="query", resolution=2, steps=1).perturbation
    tiles = theta.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    np.testing.assert_allclose(tiles, np.repeat(tiles[:, :1], 4, axis=1))
    assert len(np.unique(tiles)) > 1
    with pytest.raises(ValueError, match="resolution must be at least 1, got 0"):
        run(oracle="query", resolution=0)


def test_every_evaluation_is_counted(results):
    result, seen = results["query"]
    assert result.history["queries"][-1] == seen


@pytest.mark.parametrize("oracle", COSTS)
def test_a_search_of_waves_makes_the_start_and_is_counted(oracle):
    """After a step of size 0 the result is the wave that the same search finds under jit; its queries are counted."""
    search, key, victim = WaveSearch(5, 4), jax.random.key(3), Counted()
    still = optax.sgd(0.0)
    options = {"oracle": oracle, "search": search, "key": key, "steps": 1, "optimizer": still}
    result = run(victim if oracle == "query" else linear, **options)

    def loss(theta):
        logits = linear(jnp.clip(IMAGES + theta[None], 0, 1))
        return jnp.mean(AttackLoss("cross_entropy")(logits, jnp.asarray(LABELS)))

    zeros = jnp.zeros(result.perturbation.shape)
    expected = jax.jit(lambda key: search(loss, zeros, jnp.float32(EPSILON), key))(jax.random.split(key)[1])
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(result.perturbation, expected, rtol=1e-5)
    assert result.history["queries"].tolist() == [NUM * (1 + 10) + COSTS[oracle]]
    if oracle == "query":
        assert victim.images == result.history["queries"][-1]
    with pytest.raises(ValueError, match="waves: candidates must be at least 1, got 0"):
        run(search=WaveSearch(0))


@pytest.mark.parametrize(("budget", "steps"), [(NUM + COSTS["query"], 1), (NUM + 3 * COSTS["query"] - 1, 2)])
def test_max_queries_is_not_exceeded(results, budget, steps):
    victim = Counted()
    result = run(victim, oracle="query", max_queries=budget)
    assert result.history["queries"][-1] == victim.images <= budget
    np.testing.assert_allclose(result.history["loss"], results["query"][0].history["loss"][:steps])
    with pytest.raises(ValueError, match=f"max_queries must be at least {NUM + COSTS['query']}"):
        run(oracle="query", max_queries=NUM + COSTS["query"] - 1)


def test_a_callback_sees_each_step_and_can_stop(results):
    seen = []

    def callback(entry):
        seen.append(entry)
        return entry["step"] == 3

    result = run(callback=callback)
    assert [entry["step"] for entry in seen] == [1, 2, 3]
    for name, values in result.history.items():
        np.testing.assert_allclose(values, results["gradient"][0].history[name][:3])
        np.testing.assert_allclose(values, [entry[name] for entry in seen])


def test_the_key_decides_the_directions(results):
    again = [run(oracle="query", steps=1, key=key).perturbation for key in (None, jax.random.key(0), jax.random.key(1))]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[1], again[2])


def test_the_l2_ball_and_uint8_images():
    images = np.round(IMAGES * 255).astype(np.uint8)
    theta = run(images=images, norm="l2", epsilon=0.4).perturbation
    np.testing.assert_allclose(np.linalg.norm(theta), 0.4, rtol=1e-5)
    assert mean_loss(theta) < mean_loss(0 * theta) - 0.1


def test_a_target_class_is_reached():
    result = run(loss=AttackLoss("cross_entropy", target=2), epsilon=0.6, steps=12)
    predicted = linear(np.clip(IMAGES + result.perturbation, 0, 1)).argmax(1)
    assert LABELS.min() != 2
    assert np.mean(predicted == 2) > np.mean(LABELS == 2)
    expected = np.mean(predicted[LABELS != 2] == 2)
    np.testing.assert_allclose(result.history["asr"][-1], expected, rtol=1e-6)
    np.testing.assert_allclose(
        attack_success_rate(linear, IMAGES, LABELS, result.perturbation, target=2), expected, rtol=1e-6
    )


@pytest.mark.standard_promotion
def test_adam_works():
    assert mean_loss(run(optimizer=optax.adam(0.05)).perturbation) < mean_loss(0) - 0.1


def test_stored_rules_are_found_by_path(tmp_path):
    rule = coordinate_lstm(3, 1, features=("momentum", "spread"), base_update=MomentumUpdate(0.3))
    params, path = rule.init(jax.random.key(0)), str(tmp_path / "rule.safetensors")
    save_rule(path, params, rule, {})
    found = run(optimizer=path)
    assert mean_loss(found.perturbation) < mean_loss(0) - 0.1
    expected = run(optimizer=learned_fine_tuner(params, rule))
    np.testing.assert_array_equal(found.perturbation, expected.perturbation)


def test_the_default_search_is_left_out_where_it_does_not_fit():
    searching = dataclasses.replace(PROXIES, search=SEARCH)
    full = run(recipe=None, steps=1)
    np.testing.assert_array_equal(full.perturbation, run(recipe=searching, steps=1).perturbation)
    least = full.queries + len(IMAGES)  # which a start that is kept is measured on
    assert run(recipe=None, steps=1, max_queries=least).queries == full.queries
    without = run(recipe=None, steps=1, max_queries=least - 1)
    np.testing.assert_array_equal(without.perturbation, run(recipe=PROXIES, steps=1).perturbation)
    # Images of this size have no jigsaws.
    assert without.queries == full.queries - SEARCH.evaluations * 12 - 2 * len(IMAGES) - 2 * 30
    with pytest.raises(ValueError, match="for the search of a start"):
        run(recipe=searching, steps=1, max_queries=least - 1)
    penalty = {"constraint": Constraint("l1", penalty=0.1), "epsilon": None}
    assert run(recipe=None, steps=1, **penalty).queries == without.queries


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_images_of_half_precision_are_attacked_in_single_precision(dtype):
    images = jnp.asarray(IMAGES, dtype)
    found, expected = (
        run(linear, images=given, recipe=None, steps=2) for given in (images, images.astype(jnp.float32))
    )
    assert found.perturbation.dtype == np.float32
    np.testing.assert_array_equal(found.perturbation, expected.perturbation)


def test_the_same_victim_and_optimizer_do_not_compile_again():
    traces = []

    def victim(images):
        traces.append(images)
        return linear(images)

    options = {"optimizer": optax.GradientTransformation(lambda theta: (), lambda g, s, p=None: (-0.1 * g, s))}
    run(victim, **options)
    before = len(traces)
    run(victim, images=IMAGES[::-1], labels=LABELS[::-1], epsilon=0.2, loss="hinge", steps=3, **options)
    assert len(traces) == before + 1  # to see whether it has changed


# ---- Keywords of earlier versions ----


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"loss": "hinge"}, {"recipe": AttackRecipe(loss="hinge")}),
        ({"augmentation": None}, {"recipe": AttackRecipe(augmentation=None)}),
        ({"waves": WaveSearch.within(9)}, {"recipe": AttackRecipe(search=WaveSearch.within(9))}),
        ({"norm": "l1", "penalty": 0.1, "epsilon": None}, {"epsilon": None, "constraint": Constraint("l1", None, 0.1)}),
        (
            {"oracle": "query", "num_directions": 3, "smoothing": 0.1, "resolution": 2},
            {"oracle": dataclasses.replace(QUERY, num_directions=3, smoothing=0.1, resolution=2)},
        ),
    ],
)
def test_old_keywords_still_work_with_a_warning(old, new):
    options = {"steps": 2, "optimizer": DESCENT, "epsilon": EPSILON}
    expected = universal_perturbation(linear, IMAGES, LABELS, **{**options, **new})
    with pytest.warns(DeprecationWarning, match="is deprecated, write "):
        found = universal_perturbation(linear, IMAGES, LABELS, **{**options, **old})
    np.testing.assert_array_equal(found.perturbation, expected.perturbation)
    with pytest.raises(TypeError, match="not both"):
        universal_perturbation(
            linear, IMAGES, LABELS, **{**options, **new, **old, "oracle": new.get("oracle", "query")}
        )


def test_another_start_compiles_no_other_step():
    options = {"optimizer": optax.GradientTransformation(lambda theta: (), lambda g, s, p=None: (-0.1 * g, s))}
    model = jax.tree_util.Partial(linear)
    before = None
    for parts in ({}, {"search": WaveSearch.within(8)}, {"search": WaveSearch.within(12)}, {"start": "random"}):
        run(model, **options, **parts)
        before = before or _steps._traced_step.compiled()
    assert _steps._traced_step.compiled() == before


def test_the_model_by_its_old_name():
    with pytest.warns(DeprecationWarning, match="attack_success_rate: logits_fn= is deprecated, write model= instead"):
        found = attack_success_rate(images=IMAGES, labels=LABELS, perturbation=0 * IMAGES[0], logits_fn=linear)
    assert found == 0
    with pytest.raises(ValueError, match="resolution: exact gradients have no directions"), pytest.warns():
        universal_perturbation(linear, IMAGES, LABELS, epsilon=EPSILON, resolution=2)


def test_a_query_oracle_may_share_its_directions_among_the_images():
    """An estimate of the mean loss costs as many queries, and lowers the loss as well."""
    counted, shared = Counted(), dataclasses.replace(QUERY, num_directions=DIRECTIONS, per_example=False)
    options = {"optimizer": DESCENT, "epsilon": EPSILON, "steps": STEPS, "recipe": AttackRecipe(augmentation=None)}
    result = universal_perturbation(counted, IMAGES, LABELS, oracle=shared, **options)
    assert counted.images == result.history["queries"][-1] == NUM + STEPS * COSTS["query"]
    assert mean_loss(result.perturbation) < mean_loss(0) - 0.05


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images must be .* no axis of length 0"),
        ({"images": np.full_like(IMAGES, np.nan)}, r"images must lie in \[0, 1\]"),
        ({"images": IMAGES * 2}, r"images must lie in \[0, 1\]"),
        ({"images": IMAGES[..., 0]}, r"images must be \[N, H, W, C\]"),
        ({"labels": LABELS + 2}, r"labels must be within \[0, 3\)"),
        ({"labels": LABELS - 1}, "labels must be at least 0"),
        ({"labels": LABELS[:-1]}, r"labels must be \[N\]"),
        ({"epsilon": 0.0}, "epsilon must be a finite number above 0"),
        ({"epsilon": -1}, "epsilon must be a finite number above 0"),
        ({"epsilon": math.nan}, "epsilon must be a finite number above 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2.0}, "steps must be a whole number of at least 1, got 2.0"),
        ({"max_queries": 1e2}, "max_queries must be a whole number of at least 1, got 100.0"),
        ({"norm": "linff"}, "norm: unknown name 'linff'. Did you mean 'linf'"),
        ({"norm": "l1"}, "norm: there is no 'l1' ball"),
        ({"oracle": "querry"}, "oracle: unknown name 'querry'. Did you mean 'query'"),
        ({"loss": "crossentropy"}, "loss: unknown name 'crossentropy'. Did you mean 'cross_entropy'"),
        ({"loss": "dominant", "oracle": "query"}, "loss: 'dominant' is for exact gradients only"),
        ({"loss": AttackLoss(target=3)}, "target: 3 is not one of the victim's 3 classes"),
        ({"optimizer": "uap-linff"}, "optimizer: name: unknown name 'uap-linff'"),
        ({"optimizer": "absent.safetensors"}, "optimizer: name: the card absent.json"),
        ({"model": lambda images: linear(images)[:4]}, r"model must return \[6, classes\]"),
        ({"oracle": "query", "num_directions": 0}, "num_directions must be at least 1, got 0"),
        ({"oracle": "query", "smoothing": 0.0}, "smoothing must be a finite number above 0"),
        (
            {"max_queries": 3 * NUM - 1},
            "max_queries must be at least 18: 6 for the clean images, and 12 for the first step; got 17",
        ),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
