"""The Adversarial Robustness Toolbox (ART): its estimators as classifiers, our attack as an `EvasionAttack`."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lft_jax import base
from lft_jax.attack import universal_perturbation
from lft_jax.interop._layout import Layout
from lft_jax.models._frameworks import required
from lft_jax.models.classifier import Classifier, HostModel, host_classifier

_NORMS = {np.inf: "linf", "inf": "linf", "linf": "linf", 2: "l2", "l2": "l2"}


def from_art(
    estimator: Any,
    *,
    channels: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    output: str | None = None,
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is an estimator of ART, with its preprocessing and its defences.

    A `PyTorchClassifier` has gradients: those of torch, then those of its preprocessing as ART computes them, so that a
    preprocessor without derivatives counts as its `estimate_gradient` says (the identity, mostly). Of every other
    estimator only `predict` is called, for attacks by queries.

    Args:
      estimator: an ART classifier with `clip_values`, which are 0 and 1 here: `PyTorchClassifier`,
        `TensorFlowV2Classifier`, `KerasClassifier`, `ScikitlearnClassifier`, `BlackBoxClassifier`, ...
      channels: "first" or "last"; None for that of the estimator, "last" where it has none.
      image_shape: `(H, W, C)` where the estimator takes flat images `[N, H * W * C]`, as those of scikit-learn do.
      output: "logits" or "probabilities", what its `predict` returns; None for "logits" of a neural network, and
        "probabilities" of all others, among them one-hot predictions.
      batch_size: largest number of images in one call, or None for no limit; see `lft_jax.models.Classifier`.

    Returns:
      The classifier.

    Raises:
      ModuleNotFoundError: if ART is not installed.
      TypeError: for what is no classifier of ART.
      ValueError: for an estimator without `clip_values`, or with other ones for each feature; for arguments out of
        range.

    Examples:
      With ART installed::

        model = lft_jax.interop.from_art(classifier)
        lft_jax.attack_success_rate(model, images, labels, result.perturbation)  # images [N, H, W, C] in [0, 1]

    References:
      Nicolae et al. 2018, Adversarial Robustness Toolbox, arXiv 1807.01069. Gradients of what has none: Athalye et al.
      2018, arXiv 1802.00420, section 4.1.
    """
    with required("art", "art"):
        import art  # noqa: F401
        from art.estimators.classification import PyTorchClassifier
        from art.estimators.classification.classifier import ClassGradientsMixin, ClassifierMixin

    if not isinstance(estimator, ClassifierMixin):
        raise TypeError(f"estimator must be a classifier of ART, got {type(estimator).__name__}.")
    if isinstance(estimator, PyTorchClassifier) and estimator.postprocessing_defences:
        raise ValueError(
            "estimator: its postprocessing_defences change the scores without a derivative; wrap its predict with "
            "lft_jax.models.from_function to attack it by queries, or leave them out."
        )
    layout, predict = _layout(estimator, channels, image_shape), getattr(estimator, "predict")  # noqa: B009
    if output is None:
        network = isinstance(estimator, ClassGradientsMixin) and hasattr(estimator, "channels_first")
        output = "logits" if network else "probabilities"
    base.check_name("output", output, ("logits", "probabilities"))

    def values(images):
        return predict(layout.theirs(images), batch_size=max(len(images), 1))

    pull_back = functools.partial(_pulled, estimator, layout) if isinstance(estimator, PyTorchClassifier) else None
    classes = int(estimator.nb_classes)
    return host_classifier(HostModel(values, pull_back, output), num_classes=classes, batch_size=batch_size)


def _layout(estimator, channels, image_shape):
    clip = estimator.clip_values
    if clip is None:
        raise ValueError(
            "estimator: its clip_values are None, which are the values of 0 and 1 here; build it with "
            "clip_values=(0, 1), say."
        )
    bounds = [np.unique(np.asarray(side)) for side in clip]
    if any(len(side) != 1 for side in bounds):
        raise ValueError("estimator: its clip_values must be two numbers for all features, got arrays that vary.")
    if channels is None:
        channels = "first" if getattr(estimator, "channels_first", False) else "last"
    return Layout(channels, float(bounds[0][0]), float(bounds[1][0]), image_shape).check()


def _pulled(estimator, layout, images):
    """The scores of a PyTorchClassifier, and their derivatives."""
    import torch

    x = layout.theirs(images)
    prepared, _ = estimator._apply_preprocessing(x, y=None, fit=False)
    inputs = torch.from_numpy(np.array(prepared)).to(estimator.device).requires_grad_(True)
    estimator.model.eval()
    with torch.enable_grad():
        outputs = estimator._model(inputs)[-1]

    def vjp(cotangent):
        cotangent = torch.from_numpy(np.array(cotangent)).to(outputs.device).reshape(outputs.shape)
        (found,) = torch.autograd.grad(outputs, inputs, cotangent.to(outputs.dtype))
        return layout.gradient(estimator._apply_preprocessing_gradient(x, found.cpu().numpy()))

    return outputs.detach().float().cpu().numpy(), vjp


def art_attack(
    estimator: Any,
    *,
    eps: float = 0.3,
    norm: float | str = np.inf,
    max_iter: int = 20,
    batch_size: int = 128,
    verbose: bool = False,
    channels: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    output: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """`lft_jax.universal_perturbation` as an `EvasionAttack` of ART, beside its `UniversalPerturbation`.

    `attack.generate(x, y)` makes one perturbation from all of `x`, and returns `x` with it, clipped to the
    `clip_values` of the estimator. As those of ART, attacks have `noise` (`[1, ...]`, like one image; `x + noise` is
    for unseen images), `fooling_rate` (share of `x` that is not classified as `y`), `set_params` and `repr`; also
    `result`, the `lft_jax.UniversalPerturbation`. Defences of ART that take an attack, such as `AdversarialTrainer`,
    take it.

    Args:
      estimator: see `from_art`, as `channels`, `image_shape` and `output`.
      eps: radius of the ball, in units of the estimator's images: 0.3 of [0, 1], but 76.5 of [0, 255].
      norm: `numpy.inf` ("inf") or 2.
      max_iter: steps of the attack.
      batch_size: largest number of images in one call of the model.
      verbose: whether to show a progress bar.
      channels: see `from_art`.
      image_shape: see `from_art`.
      output: see `from_art`.
      settings: further arguments of `lft_jax.universal_perturbation`: `{"oracle": "query", "max_queries": 1000}`.

    Returns:
      The attack.

    Raises:
      ModuleNotFoundError: if ART is not installed.
      TypeError: as `from_art`, or for settings that are arguments of this function or unknown.
      ValueError: as `from_art` and `lft_jax.universal_perturbation`.

    Examples:
      With ART installed::

        attack = lft_jax.interop.art_attack(classifier, eps=8 / 255)
        x_adversarial = attack.generate(x_few, y_few)
        accuracy = np.mean(classifier.predict(x_test + attack.noise).argmax(1) == y_test)

    References:
      Nicolae et al. 2018, Adversarial Robustness Toolbox, arXiv 1807.01069.
    """
    with required("art", "art"):
        import art  # noqa: F401

    return _art_class()(
        estimator,
        eps=eps,
        norm=norm,
        max_iter=max_iter,
        batch_size=batch_size,
        verbose=verbose,
        channels=channels,
        image_shape=image_shape,
        output=output,
        settings=settings,
    )


@functools.cache
def _art_class():
    """The class of attacks, which derives from one of ART."""
    from art.attacks.attack import EvasionAttack
    from art.estimators.classification.classifier import ClassifierMixin
    from art.estimators.estimator import BaseEstimator
    from art.utils import check_and_transform_label_format

    class LearnedUniversalPerturbation(EvasionAttack):
        """See `lft_jax.interop.art_attack`."""

        attack_params = [  # noqa: RUF012  as in ART
            *EvasionAttack.attack_params,
            *("eps", "norm", "max_iter", "batch_size", "verbose", "channels", "image_shape", "output", "settings"),
        ]
        _estimator_requirements = (BaseEstimator, ClassifierMixin)
        eps: float
        norm: float | str
        max_iter: int
        batch_size: int
        verbose: bool
        channels: str | None
        image_shape: tuple[int, int, int] | None
        output: str | None
        settings: Mapping[str, Any] | None
        result: Any
        _noise: Any
        _fooling_rate: float | None

        def __init__(self, estimator, **parameters):
            super().__init__(estimator=estimator)
            self.result = None
            self._noise, self._fooling_rate = None, None
            self.set_params(**parameters)

        @property
        def noise(self):
            """The perturbation `[1, ...]` in units of the estimator's images; None before `generate`."""
            return self._noise

        @property
        def fooling_rate(self):
            """Share of the images of the last `generate` that are not classified as `y`; None before."""
            return self._fooling_rate

        def generate(self, x, y=None, **kwargs):
            """The images `x` with one perturbation made from all of them."""
            if kwargs:
                raise TypeError(f"generate takes x and y alone, got {', '.join(sorted(kwargs))}.")
            layout = _layout(self.estimator, self.channels, self.image_shape)
            labels = None
            if y is not None:
                y = check_and_transform_label_format(np.asarray(y), nb_classes=self.estimator.nb_classes)
                labels = np.argmax(y, 1)
            self.result = universal_perturbation(
                self._classifier(),
                layout.ours(x),
                labels,
                norm=_norm(self.norm),
                epsilon=self.eps / layout.width,
                steps=self.max_iter,
                progress=self.verbose,
                **(self.settings or {}),
            )
            self._noise = layout.difference(self.result.perturbation[None])
            if labels is None:
                labels = np.argmax(self.estimator.predict(x, batch_size=self.batch_size), 1)
            x_adv = np.clip(x + self._noise, layout.low, layout.high).astype(np.float32)
            predicted = np.argmax(self.estimator.predict(x_adv, batch_size=self.batch_size), 1)
            self._fooling_rate = float(np.mean(predicted != labels))
            return x_adv

        def _classifier(self):
            return from_art(
                self.estimator,
                channels=self.channels,
                image_shape=self.image_shape,
                output=self.output,
                batch_size=self.batch_size,
            )

        def _check_params(self):
            base.check_positive("eps", self.eps)
            _norm(self.norm)
            for name in ("max_iter", "batch_size"):
                base.check_at_least(name, getattr(self, name), 1)
            taken = {"norm", "epsilon", "constraint", "steps", "batch_size", "progress", "shape"}
            wrong = sorted(taken & set(self.settings or {}))
            if wrong:
                raise TypeError(f"settings: {', '.join(wrong)} cannot be set here; see eps, norm and max_iter.")

    return LearnedUniversalPerturbation


def _norm(norm):
    if norm not in _NORMS:
        raise ValueError(f"norm must be numpy.inf, 'inf' or 2, got {norm!r}.")
    return _NORMS[norm]
