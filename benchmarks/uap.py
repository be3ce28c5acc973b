r"""Universal perturbations: `lft_jax.universal_perturbation` against the Adversarial Robustness Toolbox (ART).

python -m benchmarks.uap --output=results/bench_uap.json

One LeNet, the same weights in JAX and in PyTorch; the same images, ball and test images for all. A better learned
fine-tuner is compared with `--optimizer=PATH`.
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
from lft_jax.tasks.uap import PLAIN
from lft_jax.victims import load_victim

try:
    from benchmarks import art_uap
except ModuleNotFoundError:  # a smoke run does without
    art_uap = None

STEPS = 20
SEED = 1001  # of the victim: the attack's rule has not seen it


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    output: str = config.option("results/bench_uap.json", "Results file.")
    victim: str = config.option("runs/victims/mnist_5k_lenet_1001", "Stored LeNet to attack; trained if missing.")
    optimizer: str = config.option("uap-linf", "Learned fine-tuner: a pretrained one's name or a file.")
    epsilon: float = config.option(0.3, "Radius of the linf ball.")
    images: tuple[int, ...] = config.option((10, 100, 1000), "Images that a perturbation is made from.")
    draws: tuple[int, ...] = config.option((3, 1, 1), "Draws of so many images, for each of --images.")
    limit: float = config.option(30.0, "Seconds after which a run of ART is given up.")
    smoke: bool = config.option(False, "Tiny, on a machine that need not be quiet: whether it runs at all.")


AUGMENTED = lft_jax.AttackRecipe()


def ours(victim, optimizer, epsilon, steps, recipe=PLAIN):
    """`(images, labels) -> (perturbation, forward, backward)`, image evaluations, by `universal_perturbation`."""

    def attack(images, labels):
        result = lft_jax.universal_perturbation(
            victim.logits_fn,
            images,
            labels,
            epsilon=epsilon,
            steps=steps,
            optimizer=optimizer,
            recipe=recipe,
        )
        return result.perturbation, int(result.history["queries"][-1]), steps * len(labels)

    return attack


def contestants(victim, flags: Config) -> dict:
    """By name, what makes a perturbation from images and labels."""
    steps = 2 if flags.smoke else STEPS
    uap_sgd = baselines.projected_gradient(**baselines.make_baselines("linf")["uap_sgd"].default.params)
    found = {
        f"LFT ({flags.optimizer}), {steps} steps": ours(victim, flags.optimizer, flags.epsilon, steps, AUGMENTED),
        f"UAP-SGD, {steps} steps": ours(victim, uap_sgd, flags.epsilon, steps),
        f"UAP-SGD, augmented, {steps} steps": ours(victim, uap_sgd, flags.epsilon, steps, AUGMENTED),
        f"UAP-SGD, {10 * steps} steps": ours(victim, uap_sgd, flags.epsilon, 10 * steps),
    }
    return found | (art_uap.contestants(victim, flags.epsilon, STEPS, flags.limit) if art_uap else {})


def bench(flags: Config) -> dict:
    """Runs the benchmark and writes its results."""
    if not (flags.smoke or art_uap):
        raise ModuleNotFoundError("ART is missing: pip install -r benchmarks/requirements.txt, or use make bench.")
    if len(flags.images) != len(flags.draws):
        raise ValueError(f"draws must be as many as images, {len(flags.images)}, got {len(flags.draws)}.")
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
        for name in list(attacks)[:3]:  # the calls that compile: more steps are the same program, and PyTorch has none
            first[name] = _timed(attacks[name], train, rows[0])[0]
        for draw in rows:  # in turn
            for name, attack in attacks.items():
                if runs[name] and runs[name][-1]["asr"] is None:
                    continue  # given up on another draw already
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
                f"({row['time_over_lft']:.1f} x the LFT's), {row['forward']:.0f} forward and {row['backward']:.0f} back"
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
    """The mean over draws and half its 95% interval: None where a run was given up, or there is one draw only."""
    if None in values:
        return {"asr": None, "asr_interval": None}
    interval = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"asr": statistics.mean(values), "asr_interval": interval}


if __name__ == "__main__":
    config.main(Config, bench)
