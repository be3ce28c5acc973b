"""`from_torch` against torch itself, and on a public ResNet-20; run by `make test-frameworks`."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lft_jax
from lft_jax.data import load_source

pytestmark = [pytest.mark.frameworks, pytest.mark.standard_promotion]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARED = Path(os.environ.get("LFT_SHARED_DIR", ""))


def small(dropout=0.5):
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers)


def images(count=6):
    return np.random.default_rng(0).uniform(size=(count, 8, 8, 3)).astype(np.float32)


def torch_gradient(module, x, cotangent):
    import torch

    module.eval()
    inputs = torch.from_numpy(x).requires_grad_(True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    logits = module((inputs.permute(0, 3, 1, 2) - mean) / std)
    (found,) = torch.autograd.grad(logits, inputs, torch.from_numpy(cotangent))
    return logits.detach().numpy(), found.numpy()


@pytest.mark.parametrize("jitted", [False, True])
def test_logits_and_gradients_are_those_of_torch(jitted):
    module, x = small(), images()
    cotangent = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    expected, gradient = torch_gradient(module, x, cotangent)
    module.train()
    model = lft_jax.models.from_torch(module, mean=MEAN, std=STD)

    def scored(z):
        logits = model(z)
        return jnp.sum(logits * cotangent), logits

    compute = jax.grad(scored, has_aux=True)
    found, logits = (jax.jit(compute) if jitted else compute)(jnp.asarray(x))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5)
    assert all(m.training for m in module.modules())  # its own modes again
    assert all(p.grad is None for p in module.parameters())


def test_modes_come_back_after_an_error():
    module = small()
    module[1].eval()
    model = lft_jax.models.from_torch(module)
    with pytest.raises(RuntimeError):
        model(np.zeros((2, 3, 3, 3), np.float32))
    assert module[0].training and not module[1].training


def test_an_eager_gradient_takes_one_forward_pass():
    calls = []
    module = small()
    module.register_forward_hook(lambda *_: calls.append(1))
    model = lft_jax.models.from_torch(module)
    jax.grad(lambda z: jnp.sum(model(z) ** 2))(jnp.asarray(images()))
    assert len(calls) == 1


def test_an_attack_is_that_of_the_same_jax_function():
    """The steps run eagerly, with the gradients of torch; a linear model is easily written in both."""
    from torch import nn

    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    weight, bias = (p.detach().numpy() for p in module[1].parameters())

    def same(x):
        return jnp.moveaxis(x, -1, 1).reshape(len(x), -1) @ weight.T + bias[None]

    x = np.random.default_rng(2).uniform(0.2, 0.8, (6, 4, 4, 3)).astype(np.float32)
    labels = np.asarray(same(x)).argmax(1)
    found, expected = (
        lft_jax.universal_perturbation(m, x, labels, epsilon=0.1, steps=5)
        for m in (lft_jax.models.from_torch(module), same)
    )
    np.testing.assert_allclose(found.perturbation, expected.perturbation, atol=1e-5)
    np.testing.assert_array_equal(found.history["queries"], expected.history["queries"])


def test_tasks_against_a_module_have_the_meta_gradients_of_the_same_jax_function():
    """Under vmap and scan, where the module is called back."""
    from torch import nn

    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    weight, bias = (p.detach().numpy() for p in module[1].parameters())

    def same(x):
        return jnp.moveaxis(x, -1, 1).reshape(len(x), -1) @ weight.T + bias[None]

    x = np.random.default_rng(3).uniform(0.2, 0.8, (30, 4, 4, 3)).astype(np.float32)
    labels = np.asarray(same(x)).argmax(1)
    options = {"num_steps": 2, "tasks_per_family": 2, "meta_optimizer": lft_jax.clipped_adam(1e-2, 10)}
    norms = []
    for model in (lft_jax.models.from_torch(module), same):
        family = lft_jax.uap_family(x, labels, model, ways=2, query_shots=2, epsilon=0.1, loss="cross_entropy")
        trainer = lft_jax.meta_trainer(lft_jax.learners.lft(lft_jax.coordinate_lstm(4, 1)), [family], **options)
        norms.append(trainer.step(trainer.init(jax.random.key(0)))[1]["grad_norm"])
    assert norms[1] > 0
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        lft_jax.models.from_torch(small)


@pytest.mark.skipif("LFT_SHARED_DIR" not in os.environ, reason="LFT_SHARED_DIR is not set")
def test_a_public_resnet_has_its_accuracy_and_is_attacked():
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.widens = inputs != outputs

        def forward(self, x):
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            if self.widens:
                quarter = y.shape[1] // 4
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            return functional.relu(x + y)

    class ResNet20(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            for number, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
                blocks = [Block(inputs, outputs, 2 if inputs != outputs else 1)]
                blocks += [Block(outputs, outputs, 1) for _ in range(2)]
                setattr(self, f"layer{number}", nn.Sequential(*blocks))
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
            return self.linear(x.mean((2, 3)))

    module = ResNet20()
    module.load_state_dict(load_file(SHARED / "models" / "cifar10_resnet20.safetensors"))
    model = lft_jax.models.from_torch(module, mean=MEAN, std=STD)
    test, train = load_source("cifar10", "test"), load_source("cifar10", "train")
    x, labels = test.images[:2000] / np.float32(255), test.labels[:2000]
    right = [np.argmax(np.asarray(model(x[i : i + 500])), 1) == labels[i : i + 500] for i in range(0, 2000, 500)]
    assert abs(np.mean(right) - 0.9175) < 1e-3
    few = np.unique(train.labels, return_index=True)[1]
    result = lft_jax.universal_perturbation(model, train.images[few], train.labels[few], epsilon=8 / 255)
    rate = lft_jax.attack_success_rate(model, test.images[:1000], test.labels[:1000], result.perturbation)
    assert 0.2 < rate < 0.9
    assert np.abs(result.perturbation).max() <= 8 / 255 + 1e-6
    del torch


def test_a_part_that_is_checkpointed_runs_again_in_evaluation_mode():
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = small()

        def forward(self, x):
            return checkpoint(self.module, x, use_reentrant=False)

    module, x = Checkpointed(), images()
    cotangent = np.ones((6, 5), np.float32)
    _, expected = torch_gradient(module, x, cotangent)
    module.train()
    mean = module.module[1].running_mean.clone()
    model = lft_jax.models.from_torch(module, mean=MEAN, std=STD)
    found = jax.grad(lambda z: jnp.sum(model(z)))(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (module.module[1].running_mean == mean).all()
    assert all(m.training for m in module.modules())


def test_a_tensor_that_the_module_keeps_may_be_used_in_a_gradient():
    import torch
    from torch import nn

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(192, 5), None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.linspace(1, 2, 192)
            return self.linear(x.flatten(1) * self.scale)

    model = lft_jax.models.from_torch(Keeps())
    assert model(images()).shape == (6, 5)
    assert np.any(jax.grad(lambda z: jnp.sum(model(z)))(jnp.asarray(images())))


def test_a_module_whose_output_is_detached_has_no_gradients():
    from torch import nn

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = small()

        def forward(self, x):
            return self.module(x).detach()

    model = lft_jax.models.from_torch(Detached())
    with pytest.raises(ValueError, match=r"module has no gradients: .* Pass oracle='query'"):
        lft_jax.universal_perturbation(model, images(), epsilon=0.1, steps=1)
    assert lft_jax.universal_perturbation(model, images(), epsilon=0.1, steps=1, oracle="query").queries <= 6 * 22
