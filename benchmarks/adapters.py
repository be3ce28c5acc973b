r"""Times an attack on a PyTorch module through `lft_jax.models.from_torch` against the module's own passes.

python -m benchmarks.adapters --module=efficientnet_lite0 --output=results/bench_adapters.json
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lft_jax
from benchmarks import timing
from experiments import config
from lft_jax.cli import provenance


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_adapters.json", "Results file.")
    modules: str = config.option("resnet20,efficientnet_lite0", "Modules, separated by commas.")
    repeats: int = config.option(7, "Runs of each program, in turn; the result is their median.")
    steps: int = config.option(20, "Steps of an attack.")
    smoke: bool = config.option(False, "Smoke test: one small module, without the check for other load.")


def resnet20() -> Any:
    """The CIFAR-10 ResNet-20 of akamaster/pytorch_resnet_cifar10, with random weights: time does not depend on them."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.stride = 1 if inputs == outputs else 2
            self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

        def forward(self, x):
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            if self.stride == 2:
                quarter = y.shape[1] // 4
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            return functional.relu(x + y)

    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def small() -> Any:
    """A module for smoke tests."""
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 of efficientnet-lite-pytorch, with random weights."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0")


MODULES: dict[str, tuple[Callable[[], Any], int]] = {
    "resnet20": (resnet20, 32),
    "efficientnet_lite0": (efficientnet_lite0, 224),
    "small": (small, 16),
}


def passes(module: Any, images: np.ndarray, steps: int) -> Callable[[], object]:
    """What an attack asks of the module, in PyTorch alone: clean images; per step forward, backward and forward."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    labels = torch.arange(len(x)) % 10

    def run():
        with torch.inference_mode():
            module(x)
        for _ in range(steps):
            inputs = x.clone().requires_grad_(True)
            torch.autograd.grad(torch.nn.functional.cross_entropy(module(inputs), labels), inputs)
            with torch.inference_mode():
                module(x)

    return run


def measure(name: str, flags: Config) -> dict[str, Any]:
    """Times of an attack and of the module's own passes, and their ratios."""
    build, side = MODULES[name]
    module = build().eval().requires_grad_(False)
    images = np.random.default_rng(0).uniform(size=(10, side, side, 3)).astype(np.float32)
    model = lft_jax.models.from_torch(module)
    signs = optax.chain(optax.trace(0.9), optax.scale_by_sign(), optax.scale(-1 / 255))
    programs = {"module": passes(module, images, flags.steps)}
    for label, optimizer in {"signs": signs, "uap-linf": "uap-linf"}.items():
        options = {"epsilon": 8 / 255, "steps": flags.steps, "optimizer": optimizer, "key": jax.random.key(0)}
        options["recipe"] = lft_jax.AttackRecipe()  # whose steps see the images themselves, changed
        programs[label] = lambda options=options: lft_jax.universal_perturbation(
            model, images, progress=False, **options
        )
    times = timing.alternate(programs, flags.repeats)
    own = times["module"]["seconds"]
    for label, found in times.items():
        print(f"{name}: {label}: {found['seconds']:.3f} s, {found['seconds'] / own:.3f} x its own passes")
    return {label: {**found, "ratio": found["seconds"] / own} for label, found in times.items()}


def bench(flags: Config) -> dict[str, Any]:
    """Runs the benchmark and writes its results."""
    load = None if flags.smoke else timing.require_quiet()
    names = ["small"] if flags.smoke else flags.modules.split(",")
    found = {name: measure(name, flags) for name in names}
    results = {"provenance": provenance.describe([0]), "load_of_others": load, "modules": found}
    provenance.write_json(Path(flags.output), results)
    return results


if __name__ == "__main__":
    config.main(Config, bench)
