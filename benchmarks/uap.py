r"""Compares `lft_jax.universal_perturbation` with the Adversarial Robustness Toolbox (ART).

python -m benchmarks.uap --output=results/bench_uap.json

The victim is one LeNet with the same weights in JAX and in PyTorch. All methods have the same images, ball and test
images. `--optimizer=PATH` compares another learned fine-tuner.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import lft_jax
from benchmarks import timing
from experiments import config, train_victim
from lft_jax.cli import provenance
from lft_jax.data import load_source, unit_range
from lft_jax.evaluation import baselines
from lft_jax.tasks import Proxies
from lft_jax.tasks.uap import PLAIN
from lft_jax.victims import load_victim

try:
    from benchmarks import art_uap
except ModuleNotFoundError:  # smoke tests run without it
    art_uap = None

STEPS = 20
SEED = 1001  # of the victim, which the rule was not meta-trained on


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_uap.json", "Results file.")
    victim: str = config.option("runs/victims/mnist_5k_lenet_1001", "Stored LeNet to attack; trained if missing.")
    optimizer: str = config.option("uap-linf", "Learned fine-tuner: name of a pretrained rule or a .safetensors file.")
    epsilon: float = config.option(0.3, "Radius of the linf ball.")
    images: tuple[int, ...] = config.option((10, 100, 1000), "Numbers of images that a perturbation is made from.")
    draws: tuple[int, ...] = config.option((10, 3, 1), "Random choices of the images, for each number in --images.")
    limit: float = config.option(30.0, "Seconds after which an attack by ART is stopped.")
    smoke: bool = config.option(False, "Smoke test: few steps, without the check for other load.")


def ours(victim, optimizer, epsilon, steps, recipe=None):
    """An attack by `universal_perturbation`, as a function `(images, labels) -> (perturbation, forward, backward)`.

    With the recipe that is the default for these images, its search and proxies, if it is None.
    """

    def attack(images, labels):
        result = lft_jax.universal_perturbation(
            victim.logits_fn,
            images,
            labels,
            epsilon=epsilon,
            steps=steps,
            optimizer=optimizer,
            recipe=recipe,
            progress=False,
        )
        size = Proxies().size if recipe is None else len(labels)
        return result.perturbation, result.queries, steps * size

    return attack


def contestants(victim, flags: Config) -> dict:
    """All attacks, `{name: (images, labels) -> (perturbation, forward, backward)}`."""
    steps = 2 if flags.smoke else STEPS
    uap_sgd = baselines.projected_gradient(**baselines.make_baselines("linf")["uap_sgd"].default.params)
    found = {
        f"LFT ({flags.optimizer}), {steps} steps": ours(victim, flags.optimizer, flags.epsilon, steps),
        f"UAP-SGD, {steps} steps": ours(victim, uap_sgd, flags.epsilon, steps, PLAIN),
        f"UAP-SGD with the start and proxies of the LFT, {steps} steps": ours(victim, uap_sgd, flags.epsilon, steps),
        f"UAP-SGD, {10 * steps} steps": ours(victim, uap_sgd, flags.epsilon, 10 * steps, PLAIN),
    }
    return found | (art_uap.contestants(victim, flags.epsilon, STEPS, flags.limit) if art_uap else {})


def bench(flags: Config) -> dict:
    """Runs the benchmark and writes its results."""
    if not (flags.smoke or art_uap):
        raise ModuleNotFoundError("ART is missing: pip install -r benchmarks/requirements.txt, or use make bench.")
    if len(flags.images) != len(flags.draws):
        raise ValueError(f"draws: expected as many numbers as in images, {len(flags.images)}, got {len(flags.draws)}.")
    if not Path(flags.victim, "card.json").exists():
        train_victim.train(train_victim.Config(source="mnist_5k", architecture="lenet", seed=SEED, output=flags.victim))
    victim = load_victim(flags.victim)
    train, test = (load_source(victim.card["source"], split) for split in ("train", "test"))
    load = None if flags.smoke else timing.require_quiet()
    results = {
        "provenance": provenance.describe([0]),
        "load_of_others": load,
        "versions": art_uap.versions() if art_uap else {},
        "victim": victim.card,
        "epsilon": flags.epsilon,
        "sizes": {},
    }
    attacks = contestants(victim, flags)
    for count, draws in zip(flags.images, flags.draws, strict=True):
        rows = [np.random.default_rng(draw).permutation(len(train.labels))[:count] for draw in range(draws)]
        runs = {name: [] for name in attacks}
        first = {}
        for name in list(attacks)[:3]:  # only these compile: more steps use the same program
            first[name] = _timed(attacks[name], train, rows[0])[0]
        for draw in rows:  # in turn
            for name, attack in attacks.items():
                if runs[name] and runs[name][-1]["asr"] is None:
                    continue  # stopped on an earlier draw
                seconds, (perturbation, forward, backward) = _timed(attack, train, draw)
                asr = _success(victim, test, perturbation, flags.epsilon)
                runs[name].append({"asr": asr, "seconds": seconds, "forward": forward, "backward": backward})
        results["sizes"][f"{count}"] = table = {
            name: {
                **{key: statistics.mean(run[key] for run in entries) for key in ("forward", "backward")},
                **_mean_success([run["asr"] for run in entries]),
                "seconds": statistics.median(run["seconds"] for run in entries),
                "first_call_seconds": first.get(name),
                "runs": entries,
            }
            for name, entries in runs.items()
        }
        own = next(iter(table.values()))["seconds"]
        for name, row in table.items():
            row["time_over_lft"] = row["seconds"] / own
            success = "none" if row["asr"] is None else f"{row['asr']:.3f}"
            print(
                f"{count} images: {name}: ASR {success}, {row['seconds']:.2f} s "
                f"({row['time_over_lft']:.1f} x the LFT), {row['forward']:.0f} forward, {row['backward']:.0f} backward"
            )
        provenance.write_json(Path(flags.output), results)
    return results


def _timed(attack, source, rows):
    images = np.asarray(unit_range(jnp.asarray(source.images[rows])))
    began = time.perf_counter()
    result = attack(images, source.labels[rows])
    return time.perf_counter() - began, result


def _success(victim, test, perturbation, epsilon):
    if perturbation is None:
        return None
    assert np.abs(perturbation).max() <= epsilon * (1 + 1e-5)
    return lft_jax.attack_success_rate(victim.logits_fn, test.images, test.labels, perturbation)


def _mean_success(values):
    """Mean over draws and half the width of its 95% interval; None if a run was stopped or for a single draw."""
    if None in values:
        return {"asr": None, "asr_interval": None}
    interval = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"asr": statistics.mean(values), "asr_interval": interval}


if __name__ == "__main__":
    config.main(Config, bench)
