"""`from_function` and the preparation of images, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lft_jax
from lft_jax.models import from_function

IMAGES = np.random.default_rng(0).uniform(size=(5, 4, 4, 3)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(48, 3)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize(("mean", "std"), [(None, None), (0.4, 0.2), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])
@pytest.mark.parametrize("input_range", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_images_are_prepared_as_numpy_does_it(channels, mean, std, input_range):
    low, high = input_range
    expected = IMAGES * (high - low) + low
    expected = (expected - np.asarray(0 if mean is None else mean)) / np.asarray(1 if std is None else std)
    expected = expected.transpose(0, 3, 1, 2) if channels == "first" else expected
    seen = []

    def model(x):
        seen.append(x)
        return linear(x)

    made = from_function(model, mean=mean, std=std, channels=channels, input_range=input_range)
    np.testing.assert_allclose(made(IMAGES), linear(expected), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_probabilities_become_their_logarithms_and_one_column_two_classes():
    logits = linear(IMAGES)
    probabilities = jax.nn.softmax(logits)
    found = from_function(lambda x: probabilities, output="probabilities")(IMAGES)
    np.testing.assert_allclose(jax.nn.softmax(found), probabilities, rtol=1e-5)
    column = logits[:, :1]
    both = from_function(lambda x: column)(IMAGES)
    np.testing.assert_allclose(jax.nn.softmax(both)[:, 1:], jax.nn.sigmoid(column), rtol=1e-5)
    for shaped in (column, column[:, 0]):
        of_probability = from_function(lambda x, s=shaped: jax.nn.sigmoid(s), output="probabilities")(IMAGES)
        np.testing.assert_allclose(jax.nn.softmax(of_probability), jax.nn.softmax(both), rtol=1e-4)
    silent = from_function(lambda x: jnp.asarray([[1.0, 0.0]]), output="probabilities")(IMAGES[:1])
    assert np.all(np.isfinite(silent))


def test_its_text_says_what_it_is_without_the_weights():
    partial = jax.tree_util.Partial(lambda weights, x: x.reshape(len(x), -1) @ weights, jnp.asarray(WEIGHTS))
    made = from_function(partial, batch_size=2)
    assert repr(made) == "Classifier(a JAX function, with gradients, batch_size=2)"
    host = lft_jax.models.host_classifier(lft_jax.models.HostModel(linear), num_classes=3, input_shape=(4, 4, 3))
    assert repr(host) == "Classifier(a host model, without gradients, num_classes=3, input_shape=(4, 4, 3))"


@pytest.mark.parametrize("output", ["scores", lambda result: result["scores"]])
def test_an_output_is_found_by_key_or_function(output):
    found = from_function(lambda x: {"scores": linear(x), "features": x}, output=output)(IMAGES)
    np.testing.assert_allclose(found, linear(IMAGES), rtol=1e-5)
    np.testing.assert_allclose(from_function(lambda x: (x, linear(x)), output=1)(IMAGES), linear(IMAGES), rtol=1e-5)


def test_a_classifier_is_attacked_as_the_function_is():
    labels = linear(IMAGES).argmax(1)
    options = {"epsilon": 0.1, "steps": 3}
    found = lft_jax.universal_perturbation(from_function(linear), IMAGES, labels, **options)
    expected = lft_jax.universal_perturbation(linear, IMAGES, labels, **options)
    np.testing.assert_allclose(found.perturbation, expected.perturbation, atol=1e-6)
    rates = [
        lft_jax.attack_success_rate(m, IMAGES, labels, found.perturbation) for m in (from_function(linear), linear)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": "frist"}, "channels: unknown name 'frist'. Did you mean 'first'"),
        ({"std": 0.0}, "std must be a finite number above 0, or one per channel, got 0.0"),
        ({"mean": (0.1, float("nan"))}, "mean must be a finite number, or one per channel"),
        ({"input_range": (1, 0)}, r"input_range must be two ascending numbers, such as \(0, 255\)"),
        ({"input_range": 255}, "input_range must be two ascending numbers, .*got 255"),
        ({"batch_size": 2.5}, "batch_size must be an integer, at least 1, got 2.5"),
        ({"batch_size": "8"}, "batch_size must be an integer, at least 1, got '8'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_function(linear, **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": 1}, r"output: the model returns a dict of \['scores'\]; an adapter .* the key"),
        ((1, 2), "output: the model returns a tuple of 2; .* the index of its logits, or a function"),
        (None, "output: the model returns None"),
        (np.zeros((4, 3)), r"model must return \[5, classes\], got shape \(4, 3\)"),
        (np.zeros((5, 3, 1)), r"model must return \[5, classes\], got shape \(5, 3, 1\)"),
        (object(), "output: the model returns a object, which is no array; .* a function that finds the logits"),
    ],
)
def test_answers_that_are_no_logits_are_named(answer, message):
    with pytest.raises(ValueError, match=message):
        from_function(lambda x: answer)(IMAGES)


@pytest.mark.parametrize(
    ("answer", "output", "message"),
    [
        (np.zeros((5, 5)), 0, r"the model returns one array \(5, 5\), which has no part 0"),  # row 0 is no column
        (np.zeros((5, 3)), "probability", "the model returns one array .* has no part 'probability'"),
        ({"scores": 1}, "logit", r"'logit' is no part of what the model returns, \['scores'\]"),
        ((1, 2), 2, "2 is no part of what the model returns, tuple"),
    ],
)
def test_an_output_that_is_not_there_is_named(answer, output, message):
    with pytest.raises(ValueError, match=message):
        from_function(lambda x: answer, output=output)(IMAGES)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_channels_of_the_mean_must_be_those_of_the_images(name):
    model = from_function(lambda x: x.mean((1, 2)), **{name: (0.5, 0.5, 0.5)})
    assert model(IMAGES).shape == (5, 3)
    with pytest.raises(ValueError, match=rf"{name} must be a number, or one per channel of the images \(5, 4, 4, 1\)"):
        model(IMAGES[..., :1])


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="images must be uint8 or floating-point, got int32"):
        from_function(linear)((255 * IMAGES).astype(np.int32))


def test_batches_are_not_traced_again_in_each_call():
    seen = []

    def model(x):
        seen.append(isinstance(x, jax.core.Tracer))
        return linear(x)

    found = from_function(model, batch_size=2)(IMAGES)
    np.testing.assert_allclose(found, linear(IMAGES), rtol=1e-5)
    assert seen == [False] * 3
