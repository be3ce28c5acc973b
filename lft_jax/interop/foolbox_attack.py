"""Foolbox: our attack as a `FixedEpsilonAttack`."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lft_jax import base
from lft_jax.attack import universal_perturbation
from lft_jax.interop._layout import Layout
from lft_jax.models._frameworks import required
from lft_jax.models.classifier import HostModel, host_classifier

NORMS = ("linf", "l2")
_FORMATS = {"channels_first": "first", "channels_last": "last"}


def foolbox_attack(
    *,
    norm: str = "linf",
    steps: int = 20,
    channels: str | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """`lft_jax.universal_perturbation` as a `FixedEpsilonAttack` of Foolbox.

    `raw, clipped, success = attack(fmodel, inputs, criterion, epsilons=...)` as with every attack of Foolbox. For each
    epsilon, one perturbation is made from all inputs, and added to all of them; `attack.results[epsilon]` is its
    `lft_jax.UniversalPerturbation`, to be added to unseen images. The model is differentiated by its own framework
    (PyTorch, TensorFlow, JAX); a `NumPyModel` is only called. It must return logits.

    Args:
      norm: "linf" or "l2". Epsilons are in units of the bounds of the model: 8 / 255 for `bounds=(0, 1)`.
      steps: steps of the attack.
      channels: "first" or "last"; None for the `data_format` of the model.
      batch_size: largest number of images in one call of the model, or None for no limit.
      settings: further arguments of `lft_jax.universal_perturbation`: `{"oracle": "query", "max_queries": 1000}`.

    Returns:
      The attack. It takes labels, a `Misclassification`, or a `TargetedMisclassification` of one class as criterion.

    Raises:
      ModuleNotFoundError: if Foolbox is not installed.
      TypeError: for settings that are arguments of this function or of the call.
      ValueError: for arguments out of range; when called, for a criterion of another kind or several target classes, a
        model without `data_format`, and as `lft_jax.universal_perturbation`.

    Examples:
      With Foolbox installed::

        fmodel = foolbox.PyTorchModel(module, bounds=(0, 1))
        attack = lft_jax.interop.foolbox_attack()
        raw, clipped, success = attack(fmodel, images, labels, epsilons=[4 / 255, 8 / 255])

    References:
      Rauber et al. 2017, Foolbox, arXiv 1707.04131.
    """
    with required("foolbox", "foolbox"):
        import foolbox  # noqa: F401

    base.check_name("norm", norm, NORMS)
    base.check_at_least("steps", steps, 1)
    if channels is not None:
        base.check_name("channels", channels, ("first", "last"))
    taken = {"norm", "epsilon", "constraint", "steps", "batch_size", "target", "shape"}
    wrong = sorted(taken & set(settings or {}))
    if wrong:
        raise TypeError(f"settings: {', '.join(wrong)} cannot be set here; see the arguments and the criterion.")
    return _foolbox_class()(norm, steps, channels, batch_size, dict(settings or {}))


@functools.cache
def _foolbox_class():
    """The class of attacks, which derives from one of Foolbox."""
    import eagerpy as ep
    import foolbox
    from foolbox.attacks.base import FixedEpsilonAttack, get_criterion

    class LearnedUniversalPerturbation(FixedEpsilonAttack):
        """See `lft_jax.interop.foolbox_attack`."""

        def __init__(self, norm, steps, channels, batch_size, settings):
            self.norm, self.steps, self.channels = norm, steps, channels
            self.batch_size, self.settings, self.results = batch_size, settings, {}

        @property
        def distance(self):
            return foolbox.distances.linf if self.norm == "linf" else foolbox.distances.l2

        def run(self, model, inputs, criterion, *, epsilon, **kwargs):
            """The inputs with one perturbation made from all of them."""
            if kwargs:
                raise TypeError(f"the attack takes no {', '.join(sorted(kwargs))}; see lft_jax.interop.foolbox_attack.")
            x, restore = ep.astensor_(inputs)
            labels, target = _goal(get_criterion(criterion))
            layout = _layout(model, self.channels)
            result = universal_perturbation(
                _classifier(model, x, layout, self.batch_size),
                layout.ours(x.numpy()),
                labels,
                norm=self.norm,
                epsilon=epsilon / layout.width,
                target=target,
                steps=self.steps,
                **{"progress": False, **self.settings},
            )
            self.results[epsilon] = result
            noise = ep.from_numpy(x, layout.difference(result.perturbation[None])).astype(x.dtype)
            return restore(ep.clip(x + noise, *model.bounds))

        def __repr__(self):
            return f"LearnedUniversalPerturbation(norm={self.norm!r}, steps={self.steps}, settings={self.settings})"

    def _goal(criterion):
        """The labels and the target class of a criterion."""
        if isinstance(criterion, foolbox.criteria.Misclassification):
            return criterion.labels.numpy(), None
        if isinstance(criterion, foolbox.criteria.TargetedMisclassification):
            targets = np.unique(criterion.target_classes.numpy())
            if len(targets) == 1:
                return None, int(targets[0])
            raise ValueError(f"criterion: a universal perturbation has one target class, got {targets.tolist()}.")
        raise ValueError(
            "criterion must be labels, a Misclassification or a TargetedMisclassification, got "
            f"{type(criterion).__name__}."
        )

    return LearnedUniversalPerturbation


def _layout(model, channels):
    if channels is None:
        given = getattr(model, "data_format", None)
        if given not in _FORMATS:
            raise ValueError(f"channels: the model has no data_format, got {given!r}; pass channels='first' or 'last'.")
        channels = _FORMATS[given]
    return Layout(channels, float(model.bounds.lower), float(model.bounds.upper)).check()


def _classifier(model, like, layout, batch_size):
    """The model as a classifier, on tensors like the given one."""
    import eagerpy as ep

    def tensor(images):
        return ep.from_numpy(like, layout.theirs(images)).astype(like.dtype)

    def values(images):
        return model(tensor(images)).numpy()

    def pull_back(images):
        x = tensor(images)

        def vjp(cotangent):
            weights = ep.from_numpy(like, np.array(cotangent, np.float32)).astype(like.dtype)
            _, found = ep.value_and_grad(lambda x: (model(x) * weights).sum(), x)
            return layout.gradient(found.numpy())

        return values(images), vjp

    numpy = isinstance(like, ep.NumPyTensor)
    return host_classifier(HostModel(values, None if numpy else pull_back), batch_size=batch_size)
