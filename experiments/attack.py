r"""Makes a universal perturbation for one stored victim from a few images, as .npy and .png.

  python -m experiments.attack --victim=runs/victims/mnist_5k_small_cnn_100 --output=runs/uap --optimizer=uap-linf

The optimizer is a pretrained rule, the .safetensors file of a meta-training run, or a hand-designed baseline.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

import lft_jax
from experiments import common, config
from experiments.report import figures
from lft_jax.attack import ORACLES
from lft_jax.base import check_at_least, check_name
from lft_jax.data import class_table, load_source
from lft_jax.evaluation import baselines
from lft_jax.tasks.perturbation import LOSSES
from lft_jax.victims import load_victim


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    victim: str = config.required("Folder of the victim (experiments.train_victim).")
    output: str = config.required("Where to write, without suffix: OUTPUT.npy, OUTPUT.png and OUTPUT.json.")
    optimizer: str = config.option(
        "uap-linf", "A pretrained rule, a .safetensors file of one, or a baseline: pgd, momentum_pgd, adam, uap_sgd."
    )
    shots: int = config.option(1, "Images a class to make the perturbation from.")
    norm: str = config.option("linf", "Norm of the ball (linf, l2) or of the penalty (l1, l2).", ("linf", "l2", "l1"))
    epsilon: float | None = config.option(None, "Radius of the ball, in units of the image range; has defaults.")
    penalty: float | None = config.option(None, "Weight of the norm in the loss, instead of a ball.")
    loss: str = config.option("cross_entropy", "Loss that is minimised.", LOSSES)
    second_loss: str = config.option(
        "stored",
        "Loss that is added to it (exact gradients only), none, or what the rule was meta-trained with (stored).",
        ("stored", "none", *LOSSES),
    )
    target: int | None = config.option(None, "Class that images should be taken for; any wrong one if not given.")
    steps: int = config.option(20, "Fine-tuning steps.")
    oracle: str = config.option("gradient", "Exact gradients, or queries only.", ORACLES)
    waves: int = config.option(
        0, "Evaluations of the images, 2 or more, that search plane waves for a start; 0 for none."
    )
    max_queries: int | None = config.option(None, "Image evaluations at most.")
    seed: int = config.option(0, "Chooses the images, and the directions of a query oracle.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def attack(flags: Config) -> dict:
    """Runs the attack that the flags describe and writes its files; returns what went into the .json."""
    victim = load_victim(flags.victim)
    name = victim.card["source"]
    train, test = (load_source(name, split, data_dir=flags.data_dir) for split in ("validation", "test"))
    epsilon = flags.epsilon
    if epsilon is None and flags.penalty is None:
        epsilon = common.default_epsilon(flags.norm, name)
    rows = _few(train, flags.shots, flags.seed)
    result = lft_jax.universal_perturbation(
        victim.logits_fn,
        train.images[rows],
        train.labels[rows],
        epsilon=epsilon,
        norm=flags.norm,
        penalty=flags.penalty,
        steps=flags.steps,
        optimizer=_optimizer(flags),
        oracle=flags.oracle,
        loss=lft_jax.AttackLoss(flags.loss, target=flags.target),
        second_loss=None if flags.second_loss == "none" else flags.second_loss,
        waves=lft_jax.WaveSearch.within(flags.waves) if flags.waves else None,
        max_queries=flags.max_queries,
        key=jax.random.key(flags.seed),
        callback=lambda entry: print(
            f"step {entry['step']:3d}  loss {entry['loss']:8.4f}  support ASR {entry['asr']:.2f}  "
            f"queries {entry['queries']}"
        ),
    )
    theta = result.perturbation
    asr = lft_jax.attack_success_rate(victim.logits_fn, test.images, test.labels, theta, target=flags.target)
    print(f"attack success rate on {len(test.labels)} unseen test images: {asr:.3f}")
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    np.save(output.with_name(output.name + ".npy"), theta)
    figures.attack(victim.logits_fn, test, {flags.optimizer: theta}, output.with_name(output.name + ".png"))
    results = {
        "flags": {key: value for key, value in dataclasses.asdict(flags).items() if key != "data_dir"},
        "epsilon": epsilon,
        "test_asr": asr,
        "history": {key: values.tolist() for key, values in result.history.items()},
        "provenance": common.provenance([flags.seed]),
    }
    common.write_json(output.with_name(output.name + ".json"), results)
    return results


def _few(source, shots, seed):
    check_at_least("shots", shots, 1)
    table, counts = class_table(source.labels, source.num_classes)
    if shots > counts.min():
        raise ValueError(f"shots: {shots} images a class were asked for, but a class has only {counts.min()}.")
    random = np.random.default_rng(seed)
    return np.concatenate([random.choice(row[:n], shots, replace=False) for row, n in zip(table, counts, strict=True)])


def _optimizer(flags: Config) -> str | optax.GradientTransformation:
    table = baselines.make_baselines(flags.norm)
    if flags.optimizer in table:
        return table[flags.optimizer].learner.optimizer(table[flags.optimizer].default.params)
    if not flags.optimizer.endswith(".safetensors"):
        check_name("optimizer", flags.optimizer, [*lft_jax.list_pretrained(), *table])
    return flags.optimizer


if __name__ == "__main__":
    config.main(Config, attack)
