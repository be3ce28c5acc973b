"""Our attack in the Adversarial Robustness Toolbox, and its estimators here."""

import numpy as np
import pytest

import lft_jax
from lft_jax import interop
from lft_jax.optimizers import hand_designed
from tests.interop.toys import SETTINGS, module

pytest.importorskip("torch")
pytest.importorskip("art")
pytestmark = [pytest.mark.standard_promotion]


def torch_classifier(low=0.0, high=1.0, **options):
    import torch
    from art.estimators.classification import PyTorchClassifier

    options = {"clip_values": (low, high), "device_type": "cpu", **options}
    return PyTorchClassifier(module(), torch.nn.CrossEntropyLoss(), (3, 6, 5), 4, **options)


def images(count=8):
    return np.random.default_rng(0).uniform(0.1, 0.9, (count, 6, 5, 3)).astype(np.float32)


@pytest.mark.frameworks
def test_logits_and_gradients_are_those_of_from_torch():
    import jax

    estimator = torch_classifier(-1.0, 1.0, preprocessing=(np.float32(0.25), np.float32(0.5)))
    # (2 x - 1 - 0.25) / 0.5, in units of the estimator's images
    reference = lft_jax.models.from_torch(module(), mean=0.25, std=0.5, input_range=(-1, 1))
    model, x = interop.from_art(estimator), images()
    assert model.differentiable and model.num_classes == 4
    np.testing.assert_allclose(model(x), reference(x), rtol=1e-4, atol=1e-5)
    weights = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    found, expected = (jax.grad(lambda x, m=m: jax.numpy.sum(m(x) * weights))(x) for m in (model, reference))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.frameworks
def test_a_preprocessor_without_derivatives_counts_as_the_identity():
    import jax
    from art.defences.preprocessor.preprocessor import Preprocessor

    class Rounded(Preprocessor):
        def __call__(self, x, y=None):
            return np.rint(x * 3) / np.float32(3), y

    rounded = torch_classifier(preprocessing_defences=Rounded())
    model, plain, x = interop.from_art(rounded), interop.from_art(torch_classifier()), images()
    levels = np.rint(x * 3) / 3
    np.testing.assert_allclose(model(x), plain(levels), rtol=1e-4, atol=1e-5)
    found = jax.grad(lambda x: jax.numpy.sum(model(x)[:, 0]))(x)
    np.testing.assert_allclose(found, jax.grad(lambda x: jax.numpy.sum(plain(x)[:, 0]))(levels), rtol=1e-4, atol=1e-5)


@pytest.mark.frameworks
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_generate_is_the_attack_on_the_model_itself(low, high):
    estimator, x = torch_classifier(low, high), images()
    theirs = (low + (high - low) * x).transpose(0, 3, 1, 2).astype(np.float32)
    labels = estimator.predict(theirs).argmax(1)
    attack = interop.art_attack(estimator, eps=0.2 * (high - low), max_iter=4, settings=SETTINGS)
    for y in (labels, np.eye(4)[labels], None):
        adversarial = attack.generate(theirs, y)
        model = lft_jax.models.from_torch(module(), input_range=(low, high))
        reference = lft_jax.universal_perturbation(
            model, x, labels if y is not None else None, epsilon=0.2, steps=4, progress=False, **SETTINGS
        )
        expected = (high - low) * reference.perturbation.transpose(2, 0, 1)[None]
        assert attack.noise.shape == (1, 3, 6, 5)
        np.testing.assert_allclose(attack.noise, expected, atol=1e-5)
        np.testing.assert_allclose(adversarial, np.clip(theirs + expected, low, high), atol=1e-5)
        assert attack.fooling_rate == np.mean(estimator.predict(adversarial).argmax(1) != labels)
        assert attack.result.steps == 4


@pytest.mark.frameworks
def test_it_is_an_evasion_attack_with_parameters():
    from art.attacks.attack import EvasionAttack

    attack = interop.art_attack(torch_classifier(), eps=0.1, norm=2, settings=SETTINGS)
    assert isinstance(attack, EvasionAttack)
    assert attack.noise is None and attack.fooling_rate is None and attack.result is None
    attack.set_params(eps=0.5, max_iter=2)
    assert "eps=0.5" in repr(attack) and "max_iter=2" in repr(attack)
    x = images().transpose(0, 3, 1, 2)
    attack.set_params(settings={**SETTINGS, "optimizer": hand_designed.normalized_gradient(1.0)})
    attack.generate(x=x)
    np.testing.assert_allclose(np.linalg.norm(attack.noise), 0.5, rtol=1e-3)
    with pytest.raises(ValueError, match="eps must be a finite number above 0, got -1"):
        attack.set_params(eps=-1)
    with pytest.raises(ValueError, match=r"norm must be numpy\.inf, 'inf' or 2, got 1"):
        interop.art_attack(torch_classifier(), norm=1)
    with pytest.raises(TypeError, match="settings: epsilon, steps cannot be set here"):
        interop.art_attack(torch_classifier(), settings={"steps": 3, "epsilon": 0.1})
    with pytest.raises(TypeError, match="generate takes x and y alone, got mask"):
        attack.generate(x, None, mask=None)


@pytest.mark.frameworks
def test_adversarial_training_of_art_takes_it():
    import torch
    from art.defences.trainer import AdversarialTrainer

    net, x = module(), images(16).transpose(0, 3, 1, 2)
    from art.estimators.classification import PyTorchClassifier

    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    estimator = PyTorchClassifier(
        net, torch.nn.CrossEntropyLoss(), (3, 6, 5), 4, optimizer=optimizer, clip_values=(0, 1), device_type="cpu"
    )
    y = estimator.predict(x).argmax(1)
    before = net[0].weight.detach().clone()
    attack = interop.art_attack(estimator, eps=0.1, max_iter=1, settings=SETTINGS)
    AdversarialTrainer(estimator, attack, ratio=0.5).fit(x, np.eye(4)[y], batch_size=8, nb_epochs=1)
    assert attack.noise is not None and not torch.equal(before, net[0].weight)


@pytest.mark.frameworks
def test_estimators_without_gradients_are_attacked_by_queries():
    from art.estimators.classification import BlackBoxClassifier
    from art.estimators.classification.scikitlearn import SklearnClassifier
    from sklearn.linear_model import LogisticRegression

    x = images(40)
    y = (x.mean((1, 2, 3)) > np.median(x.mean((1, 2, 3)))).astype(int)
    fitted = LogisticRegression(C=100).fit(16 * x.reshape(40, -1), y)
    estimator = SklearnClassifier(fitted, clip_values=(0, 16))
    attack = interop.art_attack(
        estimator, eps=4.8, image_shape=(6, 5, 3), settings={"oracle": "query", "max_queries": 400}
    )
    flat = 16 * x.reshape(40, -1)
    adversarial = attack.generate(flat, y)
    assert adversarial.shape == flat.shape and np.abs(attack.noise).max() == np.float32(4.8)
    assert attack.result.oracle == "query" and attack.fooling_rate > 0.3  # the direction of brightness, at least
    model = interop.from_art(estimator, image_shape=(6, 5, 3))
    assert not model.differentiable
    np.testing.assert_allclose(np.exp(model(x)), fitted.predict_proba(flat), rtol=1e-3, atol=1e-5)

    def labels_alone(images):
        return np.eye(2)[(images.mean((1, 2, 3)) > 0.5).astype(int)]

    box = BlackBoxClassifier(labels_alone, (6, 5, 3), 2, clip_values=(0, 1))
    attack = interop.art_attack(box, eps=0.2, settings={"oracle": "decision", "max_queries": 400})
    attack.generate(x)
    assert attack.result.oracle == "decision" and attack.fooling_rate > 0.3


@pytest.mark.frameworks
def test_estimators_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="estimator must be a classifier of ART, got Sequential"):
        interop.from_art(module())
    with pytest.raises(ValueError, match="its clip_values are None"):
        interop.from_art(torch_classifier(clip_values=None))
    varying = (np.zeros((3, 6, 5), np.float32), np.linspace(1, 2, 90, dtype=np.float32).reshape(3, 6, 5))
    with pytest.raises(ValueError, match="must be two numbers for all features"):
        interop.from_art(torch_classifier(clip_values=varying))
    with pytest.raises(ValueError, match="output: unknown name 'labels'"):
        interop.from_art(torch_classifier(), output="labels")
