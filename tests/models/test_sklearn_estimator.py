"""`from_sklearn` against scikit-learn itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

import lft_jax
from lft_jax.models import from_sklearn

DIGITS = load_digits()
IMAGES = (DIGITS.images[..., None] / 16).astype(np.float32)
FEATURES, LABELS = DIGITS.data[:1000], DIGITS.target[:1000]


def colour(count=8):
    rng = np.random.default_rng(0)
    return rng.uniform(size=(count, 2, 2, 3)).astype(np.float32), np.arange(count) % 2


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(tol=0.1),
        make_pipeline(StandardScaler(), LinearDiscriminantAnalysis()),
        GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [4, 8]}, cv=2),
    ],
)
def test_logits_are_the_logarithms_of_its_probabilities(estimator):
    estimator.fit(FEATURES, LABELS)
    model = from_sklearn(estimator, input_range=(0, 16))
    assert (model.num_classes, model.differentiable) == (10, False)
    expected = estimator.predict_proba(DIGITS.data[1000:1100])
    np.testing.assert_allclose(np.exp(model(IMAGES[1000:1100])), expected, rtol=1e-3, atol=1e-6)


def test_mean_and_std_are_those_of_each_channel():
    images, labels = colour()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    prepared = ((images - np.float32(mean)) / np.float32(std)).reshape(8, -1)
    estimator = LogisticRegression().fit(prepared, labels)
    expected = np.log(estimator.predict_proba(prepared))
    np.testing.assert_allclose(from_sklearn(estimator, mean=mean, std=std)(images), expected, rtol=1e-4)


def test_without_probabilities_the_decision_function_is_taken():
    ten = LinearSVC(random_state=0, max_iter=10_000, C=0.01).fit(FEATURES, LABELS)
    model = from_sklearn(ten, input_range=(0, 16), batch_size=3)
    np.testing.assert_allclose(model(IMAGES[:7]), ten.decision_function(DIGITS.data[:7]), rtol=1e-3, atol=1e-4)
    images, labels = colour()
    two = LinearSVC().fit(images.reshape(8, -1), labels)
    found = from_sklearn(two)(images)
    np.testing.assert_allclose(found[:, 1], two.decision_function(images.reshape(8, -1)), rtol=1e-4)
    np.testing.assert_array_equal(np.argmax(found, 1), two.predict(images.reshape(8, -1)))


def test_an_estimator_is_attacked_by_queries():
    forest = RandomForestClassifier(20, random_state=0).fit(FEATURES, LABELS)
    model = from_sklearn(forest, input_range=(0, 16))
    unseen, labels = IMAGES[1000:1500], DIGITS.target[1000:1500]
    assert abs(np.mean(np.argmax(model(unseen), 1) == labels) - forest.score(DIGITS.data[1000:1500], labels)) < 0.01
    few = np.unique(LABELS, return_index=True)[1]
    result = lft_jax.universal_perturbation(model, IMAGES[few], LABELS[few], epsilon=0.4, steps=10, oracle="query")
    assert lft_jax.attack_success_rate(model, unseen, labels, result.perturbation) > 0.3


def test_it_has_no_gradients():
    model = from_sklearn(DecisionTreeClassifier().fit(FEATURES, LABELS))
    with pytest.raises(ValueError, match="oracle='query'"):
        jax.grad(lambda x: jnp.sum(model(x)))(jnp.asarray(IMAGES[:2]))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (DIGITS, r"estimator must be an estimator of scikit-learn, got Bunch"),
        (
            LinearRegression().fit(FEATURES, LABELS),
            r"estimator must be a classifier with predict_proba .* got LinearReg",
        ),
        (StandardScaler().fit(FEATURES), r"estimator must be a classifier with predict_proba .* got StandardScaler"),
    ],
)
def test_what_is_no_classifier_is_refused(estimator, message):
    with pytest.raises(TypeError, match=message):
        from_sklearn(estimator)


@pytest.mark.parametrize("labels", [LABELS % 3 + 1, np.array(["dog", "cat"])[LABELS % 2], LABELS % 2 * 2])
def test_classes_that_are_no_numbers_of_columns_are_refused(labels):
    estimator = DecisionTreeClassifier().fit(FEATURES, labels)
    with pytest.raises(
        ValueError, match=r"estimator.classes_ must be 0, 1, .* got \[.*numpy.unique\(labels, return_inv"
    ):
        from_sklearn(estimator)


def test_other_estimators_and_images_are_refused():
    with pytest.raises(ValueError, match="not fitted"):
        from_sklearn(LogisticRegression())
    two = MultiOutputClassifier(DecisionTreeClassifier()).fit(FEATURES, np.stack([LABELS, LABELS], 1))
    with pytest.raises(ValueError, match=r"estimator.classes_ must be 0, 1"):
        from_sklearn(two)
    fitted = DecisionTreeClassifier().fit(FEATURES, LABELS)
    with pytest.raises(ValueError, match=r"images must have H \* W \* C = 64 values, .* got 192 of \(8, 8, 3\)"):
        from_sklearn(fitted)(np.zeros((2, 8, 8, 3), np.float32))
    pairs = SVC(decision_function_shape="ovo").fit(FEATURES, LABELS)
    with pytest.raises(ValueError, match=r"estimator.decision_function must return \[N, 10\], got shape \(1, 45\)"):
        from_sklearn(pairs)(IMAGES[:1])
    with pytest.raises(ValueError, match="std must be a finite number above 0"):
        from_sklearn(fitted, std=0)
