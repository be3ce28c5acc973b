"""Estimators of scikit-learn as classifiers, which are evaluated only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lft_jax.models._frameworks import required
from lft_jax.models._preparation import Preparation
from lft_jax.models.classifier import Classifier, HostModel, host_classifier


def from_sklearn(
    estimator: Any,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    input_range: tuple[float, float] = (0.0, 1.0),
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is a fitted estimator of scikit-learn, or a pipeline that ends in one; it has no gradients.

    Args:
      estimator: fitted on flattened images `[N, H * W * C]` and labels 0, 1, ..., classes - 1. The logits are the
        logarithms of its `predict_proba`, or its `decision_function` where it has no probabilities.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 16) for the digits of scikit-learn.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier, for attacks by queries (`oracle="query"`).

    Raises:
      ModuleNotFoundError: if scikit-learn is not installed.
      TypeError: for what is no estimator, or one without `predict_proba` and `decision_function`.
      ValueError: for an estimator that is not fitted, whose classes are not 0, 1, ..., or for arguments out of range;
        when called, for images of another number of features or an output without one column per class.

    Examples:
      >>> from sklearn.datasets import load_digits
      >>> from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
      >>> digits = load_digits()
      >>> estimator = LinearDiscriminantAnalysis().fit(digits.data, digits.target)
      >>> model = from_sklearn(estimator, input_range=(0, 16))
      >>> images = digits.images[:3, :, :, None].astype(np.float32) / 16
      >>> model(images).shape, model(images).argmax(1).tolist()
      ((3, 10), [0, 1, 2])
    """
    with required("sklearn", "sklearn"):
        from sklearn.base import BaseEstimator
        from sklearn.utils.validation import check_is_fitted

    preparation = Preparation(mean, std, "last", input_range)
    if not isinstance(estimator, BaseEstimator):
        raise TypeError(f"estimator must be an estimator of scikit-learn, got {type(estimator).__name__}.")
    check_is_fitted(estimator)
    method = next((m for m in ("predict_proba", "decision_function") if hasattr(estimator, m)), None)
    if method is None or not hasattr(estimator, "classes_"):
        raise TypeError(
            "estimator must be a classifier with predict_proba or decision_function, and classes_, got "
            f"{type(estimator).__name__}."
        )
    classes = estimator.classes_
    if not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(
            "estimator.classes_ must be 0, 1, ..., classes - 1, since labels are numbers of columns, got "
            f"{np.array2string(np.asarray(classes, object), threshold=20, separator=', ')}; fit it on "
            "numpy.unique(labels, return_inverse=True)[1]."
        )
    evaluate = getattr(estimator, method)
    num_features = getattr(estimator, "n_features_in_", None)
    columns = {len(classes), 1} if len(classes) == 2 else {len(classes)}

    def values(images):
        features = preparation.on_numpy(images).reshape(len(images), -1)
        if num_features not in (None, features.shape[1]):
            raise ValueError(
                f"images must have H * W * C = {num_features} values, as those that the estimator was fitted on, got "
                f"{features.shape[1]} of {images.shape[1:]}."
            )
        scores = np.asarray(evaluate(features))
        if (1 if scores.ndim == 1 else scores.shape[-1]) not in columns:
            raise ValueError(f"estimator.{method} must return [N, {len(classes)}], got shape {scores.shape}.")
        return scores

    output = "probabilities" if method == "predict_proba" else "logits"
    return host_classifier(HostModel(values, output=output), num_classes=len(classes), batch_size=batch_size)
