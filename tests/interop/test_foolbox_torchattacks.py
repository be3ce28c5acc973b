"""Our attack in Foolbox and in Torchattacks."""

import jax
import numpy as np
import pytest

import lft_jax
from lft_jax import interop
from lft_jax.optimizers import hand_designed
from tests.interop.toys import SETTINGS, module

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.frameworks, pytest.mark.standard_promotion]
# scipy's namespaces, as the packages import them
DEPRECATED = "ignore:Please import .* from the `scipy.ndimage` namespace:DeprecationWarning"


def data(count=8):
    images = np.random.default_rng(0).uniform(0.1, 0.9, (count, 6, 5, 3)).astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return images, tensor, module()(tensor).argmax(1)


def reference(epsilon, images, labels, model=None, steps=4, **options):
    model = lft_jax.models.from_torch(module()) if model is None else model
    options = {**SETTINGS, **options}
    found = lft_jax.universal_perturbation(
        model, images, labels, epsilon=epsilon, steps=steps, progress=False, **options
    ).perturbation
    return torch.from_numpy(np.array(found.transpose(2, 0, 1)))[None]


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox")


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1)])
def test_foolbox_returns_raw_clipped_and_success_of_the_attack_on_the_model_itself(foolbox, low, high):
    images, tensor, labels = data()
    fmodel = foolbox.PyTorchModel(module(), bounds=(low, high), device="cpu", preprocessing={"mean": 0.25, "std": 0.5})
    inputs = low + (high - low) * tensor
    labels = fmodel(inputs).argmax(1)
    attack, radii = interop.foolbox_attack(steps=4, settings=SETTINGS), [0.1 * (high - low), 0.25 * (high - low)]
    assert isinstance(attack, foolbox.Attack)
    raw, clipped, success = attack(fmodel, inputs, labels, epsilons=radii)
    model = lft_jax.models.from_torch(module(), mean=0.25, std=0.5, input_range=(low, high))
    for k, epsilon in enumerate((0.1, 0.25)):
        theta = reference(epsilon, images, labels.numpy(), model)
        torch.testing.assert_close(raw[k], torch.clip(inputs + (high - low) * theta, low, high), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clipped[k], raw[k], atol=1e-5, rtol=1e-5)
        assert torch.equal(success[k], fmodel(clipped[k]).argmax(1) != labels)
        assert attack.results[radii[k]].constraint.epsilon == pytest.approx(epsilon)
    one = attack(fmodel, inputs, foolbox.criteria.Misclassification(labels), epsilons=radii[0])
    torch.testing.assert_close(one[0], raw[0])
    assert one[2].shape == (8,) and "steps=4" in repr(attack)


@pytest.mark.filterwarnings(DEPRECATED)
def test_foolbox_targets_l2_balls_and_models_without_gradients(foolbox):
    images, tensor, _ = data()
    fmodel = foolbox.PyTorchModel(module(), bounds=(0, 1), device="cpu")
    target = foolbox.criteria.TargetedMisclassification(torch.full((8,), 2))
    settings = {**SETTINGS, "optimizer": hand_designed.normalized_gradient(0.5)}
    attack = interop.foolbox_attack(norm="l2", steps=4, settings=settings)
    _, clipped, success = attack(fmodel, tensor, target, epsilons=1.5)
    theta = reference(1.5, images, None, norm="l2", target=2, **{"optimizer": settings["optimizer"]})
    torch.testing.assert_close(clipped, torch.clip(tensor + theta, 0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(success, fmodel(clipped).argmax(1) == 2)

    weights = np.random.default_rng(0).normal(size=(90, 4))
    numpy_model = foolbox.NumPyModel(lambda x: x.reshape(len(x), -1) @ weights, bounds=(0, 1))
    labels = numpy_model(images).argmax(1)
    attack = interop.foolbox_attack(channels="last", settings={"max_queries": 200})
    _, clipped, success = attack(numpy_model, images, labels, epsilons=0.3)
    assert clipped.shape == images.shape and success.dtype == bool
    assert attack.results[0.3].oracle == "query" and attack.results[0.3].queries <= 200


@pytest.mark.filterwarnings(DEPRECATED)
def test_foolbox_calls_that_do_not_fit_are_refused(foolbox):
    _, tensor, labels = data()
    fmodel = foolbox.PyTorchModel(module(), bounds=(0, 1), device="cpu")
    attack = interop.foolbox_attack(steps=1, settings=SETTINGS)
    several = foolbox.criteria.TargetedMisclassification(torch.arange(8) % 3)
    with pytest.raises(ValueError, match=r"criterion: a universal perturbation has one target class, got \[0, 1, 2\]"):
        attack(fmodel, tensor, several, epsilons=0.1)
    with pytest.raises(TypeError, match="the attack takes no mask"):
        attack(fmodel, tensor, labels, epsilons=0.1, mask=None)
    with pytest.raises(ValueError, match="channels: the model has no data_format"):
        attack(foolbox.NumPyModel(lambda x: x, bounds=(0, 1)), tensor.numpy(), labels.numpy(), epsilons=0.1)
    with pytest.raises(ValueError, match="norm: unknown name 'l1'"):
        interop.foolbox_attack(norm="l1")
    with pytest.raises(TypeError, match="settings: target cannot be set here"):
        interop.foolbox_attack(settings={"target": 1})


def test_torchattacks_returns_the_images_of_the_attack_on_the_model_itself(capsys):
    torchattacks = pytest.importorskip("torchattacks")
    images, tensor, labels = data()
    attack = interop.torchattacks_attack(module(), eps=0.25, steps=4, settings=SETTINGS)
    assert isinstance(attack, torchattacks.attack.Attack) and attack.result is None
    theta = reference(0.25, images, labels.numpy())
    expected = torch.clip(tensor + theta, 0, 1)
    torch.testing.assert_close(attack(tensor, labels), expected, atol=1e-5, rtol=1e-5)
    assert attack.result.constraint.epsilon == 0.25 and "eps=0.25" in repr(attack)
    key = jax.random.key(1)
    net = module()
    other = interop.torchattacks_attack(net, eps=0.25, steps=4, settings={**SETTINGS, "key": key})
    multi = torchattacks.MultiAttack([torchattacks.VANILA(net), other])
    assert multi(tensor, labels).shape == tensor.shape
    with pytest.raises(ValueError, match="norm: unknown name 'linf'"):
        interop.torchattacks_attack(module(), norm="linf")
    with pytest.raises(TypeError, match="settings: epsilon cannot be set here"):
        interop.torchattacks_attack(module(), settings={"epsilon": 1})


def test_torchattacks_with_normalized_images():
    pytest.importorskip("torchattacks")
    images, tensor, _ = data()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    attack = interop.torchattacks_attack(module(), eps=0.25, steps=4, settings=SETTINGS)
    attack.set_normalization_used(mean, std)
    normalized = (tensor - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(1, 3, 1, 1)
    labels = module()(normalized).argmax(1)
    model = lft_jax.models.from_torch(module(), mean=mean, std=std)
    theta = reference(0.25, images, labels.numpy(), model)
    found = attack.inverse_normalize(attack(normalized, labels))
    torch.testing.assert_close(found, torch.clip(tensor + theta, 0, 1), atol=1e-4, rtol=1e-4)
