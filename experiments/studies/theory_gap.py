r"""Measures the gap between the meta-gradients of LFT and L2O against the number of support and query images.

  python -m experiments.train_victim --source=mnist_5k --seed=1000
  python -m experiments.studies.theory_gap --victim=runs/victims/mnist_5k_small_cnn_1000

Writes a results file and, beside it, a figure. An exponent of 0.5 means that the gap on one task falls with the square
root of the number of images. Killed, it goes on after the last finished number of images.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from experiments import common, config
from experiments.cells import Cells
from experiments.report import figures
from lft_jax import learners, pretrained
from lft_jax.cli import provenance
from lft_jax.meta import theory
from lft_jax.victims import load_victim

QUANTITIES = ("gaps", "norms", "support_variance", "query_variance")


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    victim: str = config.required("Folder of the victim (experiments.train_victim).")
    output: str = config.option("results/theory_gap.json", "Results file. The figure is put beside it.")
    rule: str = config.option("spatial-linf", "Meta-trained rule: name of a pretrained one or a .safetensors file.")
    shots: tuple[int, ...] = config.option(
        (1, 2, 5, 10, 20, 50, 100), "Numbers of support images per class, and as many query images."
    )
    ways: int = config.option(10, "Classes of a task.")
    num_steps: int = config.option(20, "Fine-tuning steps (K).")
    num_tasks: int = config.option(60, "Tasks per number of images.")
    seed: int = config.option(0, "Seed of the tasks and of the untrained weights.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def measure(flags: Config) -> dict:
    """Runs the measurement, writes its files and returns the results."""
    victim = load_victim(flags.victim)
    trained, rule = pretrained.load_pretrained(flags.rule)
    learner = learners.lft(rule)
    weights = {"untrained": rule.init(jax.random.key(flags.seed)), "meta-trained": trained}
    keys = jax.random.split(jax.random.key(flags.seed), flags.num_tasks)
    cells = Cells(
        flags.output, {**dataclasses.asdict(flags), "victim": victim.card, "params": jax.tree.leaves(trained)}
    )
    results = {
        "provenance": cells.provenance([flags.seed]),
        "victim": victim.card,
        "flags": dataclasses.asdict(flags),
    }
    del results["flags"]["data_dir"]
    rows: dict[str, list[dict]] = {name: [] for name in weights}
    gaps: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    for shots in flags.shots:
        tasks = common.TaskConfig(ways=flags.ways, shots=shots, query_shots=shots, augment=False)
        family = common.make_family(victim, "train", tasks, flags.data_dir)
        for name, params in weights.items():
            found = cells.get(f"{shots} images per class, {name}", _gap, learner, params, family, keys, flags.num_steps)
            found = theory.MetaGradientGap(**found)
            gaps[name].append(found.gaps)
            rows[name].append(
                {
                    "shots": shots,
                    "images": shots * flags.ways,
                    **{quantity: _mean(getattr(found, quantity)) for quantity in QUANTITIES},
                    "mean_gap": float(found.mean_gap),
                    "mean_norm": float(found.mean_norm),
                }
            )
            print(
                f"{shots} images per class, {name}: gap {found.gaps.mean():.3g}, gap of the means {found.mean_gap:.3g}"
            )
        results["rows"] = rows  # after each number, so that an interrupted run keeps its rows
        if len(gaps["untrained"]) > 1:
            results["decay"] = {
                name: theory.fit_decay(flags.shots[: len(g)], np.stack(g))._asdict() for name, g in gaps.items()
            }
        provenance.write_json(flags.output, results)
    for name, decay in results.get("decay", {}).items():
        print(f"{name}: exponent {decay['exponent']:.3f}, 95% interval {decay['low']:.3f} to {decay['high']:.3f}")
    figures.theory_gap(results, Path(flags.output).with_suffix(".png"))
    cells.finish()
    return results


def _gap(learner, params, family, keys, num_steps):
    return theory.meta_gradient_gap(learner, params, family, keys, num_steps=num_steps, batch_size=5)._asdict()


def _mean(values):
    """Mean over tasks and half the width of its 95% interval."""
    spread = float(1.96 * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "interval": spread}


if __name__ == "__main__":
    config.main(Config, measure)
