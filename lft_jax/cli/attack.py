r"""Makes a universal perturbation for one stored victim from a few images, as .npy, .png and .json.

  lft-attack --victim=victims/mnist_small_cnn_1000 --output=runs/uap --optimizer=uap-linf

The optimizer is a pretrained rule, the .safetensors file of a meta-training run, or a hand-designed baseline.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from lft_jax.attack import ORACLES, attack_success_rate, stored_second_loss, universal_perturbation
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import config, provenance
from lft_jax.data import class_table, load_source
from lft_jax.evaluation import make_baselines
from lft_jax.pretrained import list_pretrained
from lft_jax.tasks import AttackLoss, AttackRecipe, Constraint, WaveSearch
from lft_jax.tasks.perturbation import LOSSES
from lft_jax.victims import default_epsilon, load_victim


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    victim: str = config.required("Folder of the victim (experiments.train_victim).")
    output: str = config.required("Where to write, without suffix: OUTPUT.npy, OUTPUT.png and OUTPUT.json.")
    optimizer: str = config.option(
        "uap-linf", "Pretrained rule, .safetensors file of a rule, or baseline: pgd, momentum_pgd, adam, uap_sgd."
    )
    shots: int = config.option(1, "Images per class.")
    norm: str = config.option("linf", "Norm of the ball (linf, l2) or of the penalty (l1, l2).", ("linf", "l2", "l1"))
    epsilon: float | None = config.option(None, "Radius of the ball, in units of the image range; has defaults.")
    penalty: float | None = config.option(None, "Weight of the norm in the loss, instead of a ball.")
    loss: str = config.option("cross_entropy", "Loss that is minimised.", LOSSES)
    second_loss: str = config.option(
        "stored",
        "Loss that is added to it (exact gradients only). stored: the one that the rule was meta-trained with.",
        ("stored", "none", *LOSSES),
    )
    target: int | None = config.option(None, "Target class; any wrong class if not given.")
    steps: int = config.option(20, "Fine-tuning steps.")
    oracle: str = config.option("gradient", "Exact gradients, or queries only.", ORACLES)
    waves: int = config.option(0, "Evaluations per image, 2 or more, that search plane waves for a start; 0 for none.")
    max_queries: int | None = config.option(None, "Maximum number of image evaluations.")
    seed: int = config.option(0, "Seed of the choice of images and of the random directions.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def attack(flags: Config) -> dict[str, Any]:
    """Runs the attack, writes its files and returns the contents of the .json file."""
    victim = load_victim(flags.victim)
    name = victim.card["source"]
    train, test = (load_source(name, split, data_dir=flags.data_dir) for split in ("validation", "test"))
    constraint = _constraint(flags, name)
    rows = _few(train, flags.shots, flags.seed)
    result = universal_perturbation(
        victim.logits_fn,
        train.images[rows],
        train.labels[rows],
        constraint=constraint,
        steps=flags.steps,
        optimizer=_optimizer(flags),
        oracle=flags.oracle,
        recipe=_recipe(flags),
        max_queries=flags.max_queries,
        key=jax.random.key(flags.seed),
        callback=_report,
    )
    theta = result.perturbation
    asr = attack_success_rate(victim.logits_fn, test.images, test.labels, theta, target=flags.target)
    print(f"attack success rate on {len(test.labels)} unseen test images: {asr:.3f}")
    results = {
        "flags": {key: value for key, value in dataclasses.asdict(flags).items() if key != "data_dir"},
        "epsilon": constraint.epsilon,
        "test_asr": asr,
        "history": {key: values.tolist() for key, values in result.history.items()},
        "provenance": provenance.describe([flags.seed]),
    }
    _write(Path(flags.output), theta, results)
    _draw(victim, test, {flags.optimizer: theta}, Path(flags.output))
    return results


def _report(entry: Mapping[str, float]) -> None:
    line = f"step {entry['step']:3d}  loss {entry['loss']:8.4f}  support ASR {entry['asr']:.2f}"
    print(f"{line}  queries {entry['queries']}")


def _write(output, theta, results):
    output.parent.mkdir(parents=True, exist_ok=True)
    np.save(output.with_name(output.name + ".npy"), theta)
    provenance.write_json(output.with_name(output.name + ".json"), results)


def _draw(victim, source, perturbations, output):
    try:
        from lft_jax.cli.picture import attack_picture
    except ModuleNotFoundError as error:  # matplotlib is an extra
        print(f"no picture: {error}; pip install 'lft_jax[plots]'")
        return
    attack_picture(victim.logits_fn, source, perturbations, output.with_name(output.name + ".png"))


def _constraint(flags, source):
    if flags.penalty is not None:
        return Constraint(flags.norm, flags.epsilon, flags.penalty)
    return Constraint(flags.norm, default_epsilon(flags.norm, source) if flags.epsilon is None else flags.epsilon)


def _recipe(flags):
    gradient = flags.oracle == "gradient"
    second = None if flags.second_loss == "none" else flags.second_loss
    if second == "stored":
        stored = gradient and flags.optimizer not in make_baselines(flags.norm)
        second = stored_second_loss(flags.optimizer, flags.target) if stored else None
    return AttackRecipe(
        loss=AttackLoss(flags.loss, target=flags.target),
        second_loss=second,
        waves=WaveSearch.within(flags.waves) if flags.waves else None,
    )


def _few(source, shots, seed):
    """Row numbers of `shots` random images per class."""
    check_at_least("shots", shots, 1)
    table, counts = class_table(source.labels, source.num_classes)
    if shots > counts.min():
        raise ValueError(f"shots: expected at most {counts.min()}, the images of the smallest class, got {shots}.")
    random = np.random.default_rng(seed)
    return np.concatenate([random.choice(row[:n], shots, replace=False) for row, n in zip(table, counts, strict=True)])


def _optimizer(flags: Config) -> str | optax.GradientTransformation:
    table = make_baselines(flags.norm)
    if flags.optimizer in table:
        return table[flags.optimizer].learner.optimizer(table[flags.optimizer].default.params)
    if not flags.optimizer.endswith(".safetensors"):
        check_name("optimizer", flags.optimizer, [*list_pretrained(), *table])
    return flags.optimizer


def main() -> None:
    """The console script `lft-attack`."""
    config.main(Config, attack)


if __name__ == "__main__":
    main()
