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
from lft_jax.tasks import Proxies


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


def passes(module: Any, images: np.ndarray, batches: int, forwards: int) -> Callable[[], object]:
    """So many gradients of a batch of images, and forward passes of as many images, in PyTorch alone."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    labels = torch.arange(len(x)) % 10

    def run():
        for _ in range(batches):
            inputs = x.clone().requires_grad_(True)
            torch.autograd.grad(torch.nn.functional.cross_entropy(module(inputs), labels), inputs)
        with torch.inference_mode():
            for start in range(0, forwards, len(x)):
                module(x[: min(len(x), forwards - start)])

    return run


def measure(name: str, flags: Config) -> dict[str, Any]:
    """Times of attacks, and of the passes that they ask of the module, and their ratios."""
    build, side = MODULES[name]
    module = build().eval().requires_grad_(False)
    images = np.random.default_rng(0).uniform(size=(10, side, side, 3)).astype(np.float32)
    model = lft_jax.models.from_torch(module)
    signs = optax.chain(optax.trace(0.9), optax.scale_by_sign(), optax.scale(-1 / 255))
    whole = lft_jax.AttackRecipe()  # whose steps see the images themselves, changed
    attacks = {"signs": (signs, whole), "uap-linf": ("uap-linf", whole), "default": ("uap-linf", None)}
    programs, of = {}, {}
    for label, (optimizer, recipe) in attacks.items():
        options = {"epsilon": 8 / 255, "steps": flags.steps, "optimizer": optimizer, "key": jax.random.key(0)}
        options |= {"recipe": recipe, "progress": False}
        programs[label] = lambda options=options: lft_jax.universal_perturbation(model, images, **options)
        queries = programs[label]().queries
        batch = images if recipe else np.repeat(images, Proxies().size // len(images), 0)
        of[label] = f"module: {queries} evaluations"
        programs[of[label]] = passes(module, batch, flags.steps, queries - flags.steps * len(batch))
    times = timing.alternate(programs, flags.repeats)
    for label in attacks:
        times[label]["ratio"] = times[label]["seconds"] / times[of[label]]["seconds"]
        print(f"{name}: {label}: {times[label]['seconds']:.3f} s, {times[label]['ratio']:.3f} x {of[label]}")
    return times


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
