"""Wrong calls are refused or warned of, never answered with wrong numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import attack_success_rate, models, universal_perturbation

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(6, 4, 4, 1)).astype(np.float32)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
LABELS = (IMAGES.reshape(6, -1) @ WEIGHTS).argmax(1)
OPTIONS = {"epsilon": 0.15, "steps": 3, "optimizer": optax.sgd(0.1), "recipe": lft_jax.AttackRecipe(augmentation=None)}


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def run(model=linear, images=IMAGES, labels=LABELS, **options):
    return universal_perturbation(model, images, labels, **{**OPTIONS, **options})


# ---- NaN ----


def of_root(images):
    """The derivative of the square root is infinite at 0, and NaN times 0."""
    return linear(images) + jnp.sqrt(jnp.maximum(images - 0.9, 0)).sum((1, 2, 3))[:, None] * 0


def test_a_gradient_of_nan_is_refused_with_its_step_and_causes():
    with pytest.raises(ValueError, match=r"gradient is NaN or infinite in step 1 of 3\. Usual: .* square root"):
        run(of_root)


def test_logits_of_nan_are_refused_where_they_appear():
    def bright_is_nan(images):
        return linear(images) + jnp.where(images.max() > 0.9, jnp.nan, 0)

    brighter = optax.GradientTransformation(lambda theta: (), lambda g, s, p=None: (jnp.full_like(g, 0.06), s))
    with pytest.raises(ValueError, match="NaN or infinite logits for perturbed images in step 2 of 3") as caught:
        run(bright_is_nan, optimizer=brighter)
    np.testing.assert_allclose(caught.value.partial.perturbation, 0.06)  # that of the step before
    with pytest.raises(ValueError, match="model returns NaN for 6 of 6 clean images, the first is number 0"):
        run(lambda images: linear(images) * jnp.nan)
    one = jnp.where(jnp.arange(6)[:, None] == 2, jnp.nan, 0)
    with pytest.raises(ValueError, match="model returns NaN for 1 of 6 clean images, the first is number 2"):
        run(lambda images: linear(images) + one)


def test_half_precision_that_overflows_is_refused():
    """The largest number of float16 is 65,504; the clean images stay below it."""

    def model(images):
        scores = (images.reshape(len(images), -1) @ jnp.abs(WEIGHTS)).astype(jnp.float16)
        return (scores * (60_000 / jnp.float16(clean.max()))).astype(jnp.float32)

    clean = (IMAGES.reshape(6, -1) @ np.abs(WEIGHTS)).astype(np.float16)
    brighter = optax.GradientTransformation(lambda theta: (), lambda g, s, p=None: (jnp.full_like(g, 0.1), s))
    with pytest.raises(ValueError, match=r"NaN or infinite .* float16 that overflows"):
        run(model, labels=None, optimizer=brighter)


# ---- The output ----


def test_one_output_column_is_a_logit_of_two_classes():
    column = WEIGHTS[:, :1] - WEIGHTS[:, 1:2]
    labels = (IMAGES.reshape(6, -1) @ column > 0).astype(int)[:, 0]
    assert set(labels) == {0, 1}
    both = run(lambda x: jnp.concatenate([jnp.zeros((len(x), 1)), x.reshape(len(x), -1) @ column], 1), labels=labels)
    for shape in ((-1, 1), (-1,)):
        found = run(lambda x, shape=shape: (x.reshape(len(x), -1) @ column).reshape(shape), labels=labels)
        np.testing.assert_allclose(found.perturbation, both.perturbation, atol=1e-6)


def test_one_output_column_of_a_sigmoid_is_refused_or_named():
    column = WEIGHTS[:, :1] - WEIGHTS[:, 1:2]
    labels = (IMAGES.reshape(6, -1) @ column > 0).astype(int)[:, 0]

    def sigmoid(x):
        return jax.nn.sigmoid(x.reshape(len(x), -1) @ column)

    for call in (
        lambda m: run(m, labels=labels),
        lambda m: attack_success_rate(m, IMAGES, labels, 0 * IMAGES[0]),
    ):
        with pytest.raises(ValueError, match=r"one column within \[0, 1\].*output='probabilities'"):
            call(sigmoid)
    found = run(models.from_function(sigmoid, output="probabilities"), labels=labels)
    assert found.clean_accuracy == 1


def test_probabilities_are_warned_of():
    def model(images):
        return jax.nn.softmax(linear(images))

    with pytest.warns(UserWarning, match="sum to 1, .* output='probabilities'"):
        run(model)
    with pytest.warns(UserWarning, match="sum to 1"):
        attack_success_rate(model, IMAGES, LABELS, 0 * IMAGES[0])
    right = run(models.from_function(model, output="probabilities"))
    np.testing.assert_allclose(right.perturbation, run().perturbation, atol=1e-6)


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (lambda x: {"scores": linear(x)}, r"returns a dict of \['scores'\]; an adapter .*output= the key"),
        (lambda x: (linear(x), x), "returns a tuple of 2; an adapter .*the index"),
        (lambda x: None, "returns None"),
    ],
)
def test_answers_that_are_no_arrays_name_the_adapters(wrapped, message):
    for oracle in ("auto", "gradient", "query"):
        with pytest.raises(ValueError, match=message):
            run(wrapped, oracle=oracle)


def test_objects_of_other_frameworks_name_their_adapter():
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(TypeError, match=r"LogisticRegression: pass lft_jax.models.from_sklearn\(estimator\)"):
        run(LogisticRegression())
    with pytest.raises(TypeError, match=r"model must be a function of images .*, got str"):
        run("resnet")


def test_a_function_of_numpy_has_queries_only():
    def model(images):
        return np.asarray(images).reshape(len(images), -1) @ WEIGHTS

    with pytest.warns(UserWarning, match="cannot differentiate, so only its values are used.*from_torch"):
        assert run(model).oracle == "query"
    assert run(model, oracle="query").oracle == "query"
    assert run(models.on_numpy(model)).oracle == "query"
    assert run(linear).oracle == "gradient"
    with pytest.raises(ValueError, match=r"cannot be differentiated by JAX \(TracerArrayConversionError.*from_torch"):
        run(model, oracle="gradient")


# ---- Images, labels, radii ----


def test_clean_accuracy_at_chance_is_warned_of():
    with pytest.warns(UserWarning, match=r"only 0 of 6 clean images .* mean, std .* count from 1"):
        run(labels=(LABELS + 1) % 3)


def test_images_in_the_wrong_range_are_warned_of_or_refused():
    with pytest.warns(UserWarning, match="uint8 with values up to 1: were they in"):
        run(images=np.rint(IMAGES).astype(np.uint8), labels=None)
    with pytest.warns(UserWarning, match="were they divided by 255 twice"):
        run(images=IMAGES / 255, labels=None)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\].* Divide them by 255\?"):
        run(images=IMAGES * 255)


def test_rounding_beside_the_range_is_clipped():
    images = np.clip((IMAGES - 0.5) * 3 + 0.5, 0, 1)
    assert images.min() == 0 and images.max() == 1
    labels = linear(images).argmax(1)
    images = np.where(images == 0, np.float32(-3e-8), np.where(images == 1, np.float32(1 + 1e-7), images))
    exact = run(images=images.clip(0, 1), labels=labels)
    np.testing.assert_array_equal(run(images=images, labels=labels).perturbation, exact.perturbation)
    assert attack_success_rate(linear, images, labels, 0 * IMAGES[0]) == 0
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        run(images=images - 1e-5)


def test_channels_first_are_refused():
    images = RNG.uniform(size=(2, 3, 8, 8)).astype(np.float32)
    for call in (
        lambda: run(images=images, labels=np.zeros(2, int)),
        lambda: attack_success_rate(linear, images, np.zeros(2, int), images[0]),
        lambda: lft_jax.fooling_rate(linear, images, images[0]),
    ):
        with pytest.raises(ValueError, match=r"channels last, got shape \(2, 3, 8, 8\); pass images.transpose"):
            call()


@pytest.mark.parametrize("epsilon", [8, 16, 1.5])
def test_a_radius_in_levels_is_refused(epsilon):
    with pytest.raises(ValueError, match=rf"epsilon must be at most 1, .* got {epsilon}: {epsilon} / 255"):
        run(epsilon=epsilon)


def test_a_target_is_a_keyword_as_of_the_success_rate():
    recipe = lft_jax.AttackRecipe(loss=lft_jax.AttackLoss("cross_entropy", target=2), augmentation=None)
    expected = run(recipe=recipe)
    np.testing.assert_array_equal(run(target=2).perturbation, expected.perturbation)
    np.testing.assert_array_equal(run(target=np.int64(2)).perturbation, expected.perturbation)
    with pytest.raises(ValueError, match="target: 1 is not that of the recipe's loss, 2"):
        run(recipe=recipe, target=1)
    for call in (
        lambda target: run(target=target),
        lambda target: attack_success_rate(linear, IMAGES, LABELS, 0 * IMAGES[0], target=target),
    ):
        for target in (3.0, "cat", True):
            with pytest.raises(TypeError, match="target must be an integer, the number of a class, got"):
                call(target)
        with pytest.raises(ValueError, match="target: 7 is not one of the victim's 3 classes"):
            call(7)


def test_too_few_queries_name_both_costs():
    recipe = lft_jax.AttackRecipe(augmentation=None, search=lft_jax.WaveSearch.within(9))
    message = "at least 186: 6 for the clean images, 54 for the search of a start, and 126 for the first step; got 185"
    with pytest.raises(ValueError, match=message):
        run(oracle="query", recipe=recipe, max_queries=185)
    run(oracle="query", recipe=recipe, max_queries=186)


def test_batch_sizes_below_1_are_refused():
    for size in (0, -5, True):
        with pytest.raises(ValueError, match=f"batch_size must be an integer, at least 1, got {size}"):
            run(batch_size=size)


# ---- Labels of the model ----


def test_without_labels_the_predictions_are_the_labels():
    found, expected = run(labels=None), run()
    np.testing.assert_array_equal(found.perturbation, expected.perturbation)
    np.testing.assert_array_equal(found.history["asr"], found.history["fooling_rate"])
    assert not found.labelled
    changed = linear(np.clip(IMAGES + found.perturbation, 0, 1)).argmax(1) != LABELS
    np.testing.assert_allclose(found.fooling_rate, changed.mean())
