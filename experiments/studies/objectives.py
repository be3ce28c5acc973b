r"""The shipped rule, meta-trained on query images (LFT), on support images (L2O), or not at all: success on new models.

  python -m experiments.studies.objectives

LFT and L2O differ in the images on which the outer loss is measured, and in nothing else: victims, tasks, starts,
meta-steps and seeds are the same. Both fine-tune on proxies, which are other images at each step, so the support images
of a step differ from those of the next one too. "untrained" is the rule with its initial weights. All are used as
`universal_perturbation` uses a rule. Runs in --workdir are resumed, and the results file keeps what is finished.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import config, meta_train
from experiments.rows import opened, row_of
from experiments.studies import attacked, public
from lft_jax import pretrained
from lft_jax.base import check_at_least
from lft_jax.cli import provenance

LEARNERS = ("lft", "l2o", "untrained")
_WHERE = ("workdir", "output", "data_dir")


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    models: tuple[str, ...] = config.option(
        ("resnet32", "cifar10_small_cnn_1000", "mnist_small_cnn_1000", "digits_small_cnn_1000"),
        "Public models, or folders in victims/.",
    )
    victims: tuple[str, ...] = config.option(
        tuple(f"victims/{name}" for name in ("cifar10_resnet14_0", "cifar10_mobilenet_0"))
        + tuple(f"victims/{name}" for name in ("cifar10_small_cnn_0", "mnist_small_cnn_0")),
        "Victims of the meta-training: four of those of the shipped rule.",
    )
    seeds: int = config.option(3, "Number of meta-training seeds, from 0.")
    meta_steps: int = config.option(config.PRESETS["uap_linf"]["meta_steps"], "Meta-steps of a run.")
    steps: int = config.option(20, "Fine-tuning steps (K).")
    images: int = config.option(10, "Support images.")
    draws: int = config.option(10, "Draws of the support images.")
    queries: int = config.option(1000, "Query images; 0 for all.")
    workdir: str = config.option("runs/objectives", "Folder for the meta-training runs.")
    output: str = config.option("results/public/objectives.json", "Results file.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def measure(flags: Config) -> dict[str, Any]:
    """Meta-trains what is missing, measures what the results file lacks, and returns the results."""
    for name in ("seeds", "meta_steps", "steps", "images", "draws"):
        check_at_least(name, getattr(flags, name), 1)
    described = {
        name: value
        for name, value in dataclasses.asdict(flags).items()
        if name not in ("workdir", "output", "data_dir")
    }
    path = Path(flags.output)
    results = opened(path, described)
    rules = {(name, seed): _rule(name, seed, flags) for name in LEARNERS for seed in range(flags.seeds)}
    results["provenance"] = provenance.describe(range(flags.seeds))
    for model in flags.models:
        victim = attacked.victim(model, queries=flags.queries, data_dir=flags.data_dir)
        for (name, seed), rule in rules.items():
            row = row_of(results["rows"], {"model": model, "learner": name, "seed": seed})
            for draw in range(len(row["draw_asr"]), flags.draws):
                rates = public.attack(victim, public.Attack(str(rule)), flags.steps, flags.images, draw)
                row["draw_asr"].append(rates["asr"])
                row["evaluations"] = rates["evaluations"]
                provenance.write_json(path, results)
            jax.clear_caches()  # as in the study of public models
            print(f"{model}: {name}, seed {seed}: {100 * np.mean(row['draw_asr']):.1f}", flush=True)
    results["models"] = [summary(results["rows"], model) for model in flags.models]
    provenance.write_json(path, results)
    return results


def summary(rows: list[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Success on a model: the mean of each learner with each seed, and differences paired by draw, over seeds."""
    asr = {
        name: np.asarray([row["draw_asr"] for row in rows if (row["model"], row["learner"]) == (model, name)])
        for name in LEARNERS
    }
    found: dict[str, Any] = {"model": model}
    for name, values in asr.items():
        found[name] = dict(zip(("asr", "interval"), public.mean_interval(values.mean(0).tolist()), strict=True))
        found[name]["seed_asr"] = values.mean(1).tolist()
    for name in LEARNERS[1:]:
        differences = asr["lft"] - asr[name]
        paired = public.mean_interval(differences.mean(0).tolist())
        found[f"lft minus {name}"] = dict(zip(("asr", "interval"), paired, strict=True))
        found[f"lft minus {name}"]["seed_asr"] = differences.mean(1).tolist()
    return found


def _rule(name, seed, flags):
    """The file of a rule, which is made if there is none."""
    preset = config.PRESETS["uap_linf"] | {"victims": flags.victims, "meta_steps": flags.meta_steps}
    preset["epsilon"] = tuple(entry for entry in preset["epsilon"] if not entry.startswith("imagenet"))
    workdir = Path(flags.workdir, f"{name}_{seed}")
    learner = "l2o" if name == "l2o" else "lft"
    settings = meta_train.Config(**preset, learner=learner, seed=seed, workdir=str(workdir), data_dir=flags.data_dir)
    path = workdir / "rule.safetensors"
    if name != "untrained":
        meta_train.meta_train(settings)
        jax.clear_caches()
    elif not path.is_file():
        rule = meta_train.rule_of(settings)
        pretrained.save_rule(path, rule.init(jax.random.key(seed)), rule, {})
    return path


if __name__ == "__main__":
    config.main(Config, measure)
