r"""Times an attack on a PyTorch module through `lft_jax.models.from_torch` against the module's own passes.

And steps along signs against the same loop in PyTorch, and an update of the shipped rule against a gradient.

python -m benchmarks.adapters --modules=efficientnet_lite0 --output=results/bench_adapters.json
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
from benchmarks import overhead, timing
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


def sign_steps(module: Any, images: np.ndarray, steps: int) -> Callable[[], np.ndarray]:
    """The attack "signs" of `measure`, its clean evaluation and its history included, written in PyTorch alone."""
    import torch
    from torch.nn import functional

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def run():
        with torch.inference_mode():
            labels = module(x).argmax(1)
        labels, history = labels.clone(), []
        theta, momentum = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        for _ in range(steps):
            change = theta.clone().requires_grad_(True)
            losses = functional.cross_entropy(module((x + change).clamp(0, 1)), labels, reduction="none")
            (grad,) = torch.autograd.grad(-losses.clamp(max=12.0).mean(), change)
            momentum = grad + 0.9 * momentum
            theta = (theta - momentum.sign() / 255).clamp(-8 / 255, 8 / 255)
            with torch.inference_mode():
                logits = module((x + theta).clamp(0, 1))
                history.append(
                    (
                        float(functional.cross_entropy(logits, labels)),
                        float((logits.argmax(1) != labels).float().mean()),
                    )
                )
        return theta.numpy().transpose(1, 2, 0)

    return run


def measure(name: str, flags: Config) -> dict[str, Any]:
    """Times of attacks, and of the passes that they ask of the module, and their ratios."""
    build, side = MODULES[name]
    module = build().eval().requires_grad_(False)
    images = np.random.default_rng(0).uniform(size=(10, side, side, 3)).astype(np.float32)
    model = lft_jax.models.from_torch(module)
    signs = optax.chain(optax.trace(0.9), optax.scale_by_sign(), optax.scale(-1 / 255))
    whole = lft_jax.AttackRecipe()  # whose steps see the images themselves, changed
    plain = lft_jax.AttackRecipe(augmentation=None)
    attacks = {"signs": (signs, plain), "uap-linf": ("uap-linf", whole), "default": ("uap-linf", None)}
    programs, of = {}, {}
    for label, (optimizer, recipe) in attacks.items():
        options = {"epsilon": 8 / 255, "steps": flags.steps, "optimizer": optimizer, "key": jax.random.key(0)}
        options |= {"recipe": recipe, "progress": False}
        programs[label] = lambda options=options: lft_jax.universal_perturbation(model, images, **options)
        queries = programs[label]().queries
        batch = images if recipe else np.repeat(images, Proxies().size // len(images), 0)
        of[label] = f"module: {queries} evaluations"
        programs[of[label]] = passes(module, batch, flags.steps, queries - flags.steps * len(batch))
    programs["signs, in PyTorch"] = sign_steps(module, images, flags.steps)
    options = {"epsilon": 8 / 255, "steps": 1, "optimizer": signs, "recipe": plain, "progress": False}
    ours = lft_jax.universal_perturbation(model, images, **options).perturbation
    agree = float(np.mean(np.isclose(ours, sign_steps(module, images, 1)(), atol=1e-6)))
    if agree < 0.99:  # rounding decides a few signs, and after some steps many
        raise RuntimeError(f"{name}: only {agree:.0%} of the coordinates are those of the loop in PyTorch.")
    times = timing.alternate(programs, flags.repeats)
    times["signs"]["over_pytorch"] = times["signs"]["seconds"] / times["signs, in PyTorch"]["seconds"]
    times["signs"]["agreement"] = agree
    print(f"{name}: signs: {times['signs']['over_pytorch']:.3f} x the same loop in PyTorch")
    for label in attacks:
        times[label]["ratio"] = times[label]["seconds"] / times[of[label]]["seconds"]
        print(f"{name}: {label}: {times[label]['seconds']:.3f} s, {times[label]['ratio']:.3f} x {of[label]}")
    return times


def update_beside(name: str, repeats: int) -> dict[str, Any]:
    """An update of the shipped rule, and a gradient of ten images of a module, which it would come with."""
    build, side = MODULES[name]
    images = np.random.default_rng(0).uniform(size=(10, side, side, 3)).astype(np.float32)
    gradient = passes(build().eval().requires_grad_(False), images, 1, 0)
    updates = overhead.update(overhead.optimizers()["lft, uap-linf"], (side, side, 3))  # 20 of them
    times = timing.alternate({"update": updates, "gradient": gradient}, repeats)
    share = times["update"]["seconds"] / 20 / times["gradient"]["seconds"]
    milliseconds = 1e3 * times["update"]["seconds"] / 20
    print(f"{name}: an update takes {milliseconds:.2f} ms, {100 * share:.1f}% of a gradient of 10 images")
    return {"milliseconds": milliseconds, "share": share, **times}


def bench(flags: Config) -> dict[str, Any]:
    """Runs the benchmark and writes its results."""
    load = None if flags.smoke else timing.require_quiet()
    names = ["small"] if flags.smoke else flags.modules.split(",")
    results = {"provenance": provenance.describe([0]), "load_of_others": load, "modules": {}}
    for name in names:
        update = update_beside(name, flags.repeats)
        results["modules"][name] = {"update": update, **measure(name, flags)}
    provenance.write_json(Path(flags.output), results)
    return results


if __name__ == "__main__":
    config.main(Config, bench)
