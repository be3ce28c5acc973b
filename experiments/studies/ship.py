r"""Copies the rule of a meta-training run into the package, with a card of its results and its failures.

  python -m experiments.studies.ship --run=runs/studies/hard/lft_mnist+cifar10_0 --name=uap-linf \
    --results=results/hard/mnist.json,results/hard/cifar10.json --fails="..."

The card has the contents of the run's card, the rows of the results files for the run's learner (over all seeds) and
for tuned PGD, and metrics on a few small tasks, which a test repeats.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from experiments import common, config, meta_train
from lft_jax import evaluation, learners, pretrained
from lft_jax.victims import load_victim

_SHOWN = ("source", "victim", "method", "at", "asr", "asr_interval", "difference_to_tuned_pgd", "seeds", "seed_asr")
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    run: str = config.required("Folder of the meta-training run.")
    name: str = config.required("Name of the rule in the package.")
    fails: str = config.required("Settings in which the rule fails, in a sentence or two.")
    results: tuple[str, ...] = config.option((), "Results files of experiments.evaluate that include the run.")


def ship(flags: Config) -> None:
    """Writes the rule and its card."""
    run = Path(flags.run)
    params, rule = pretrained.load_pretrained(str(run / "rule.safetensors"))
    card = pretrained.pretrained_card(str(run / "rule.safetensors"))
    learner, rows = card["meta_training"]["learner"], []
    sources = sorted({load_victim(_ROOT / victim).card["source"] for victim in card["meta_training"]["victims"]})
    names = ("pgd", learner, f"{learner} ({' + '.join(sources)})")
    for path in flags.results:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        rows += [{"file": path, **{name: row[name] for name in _SHOWN}} for row in found if row["method"] in names]
    card |= {"meta_test": rows, "check": check(params, rule, card), "where_it_fails": flags.fails}
    path = Path(pretrained.__file__).parent / f"{flags.name}.safetensors"
    pretrained.save_rule(path, params, rule, card)
    print(f"wrote {path}: {card['check']}")


def check(params: Any, rule: Any, card: dict[str, Any]) -> dict[str, float]:
    """Mean ASR and norms on 20 digits tasks, K = 10, with the losses and the bound of the meta-training."""
    flags = dataclasses.replace(meta_train.flags_of(card["meta_training"]), epsilon=())
    victim = load_victim(_ROOT / "victims" / "digits_small_cnn_1000")
    tasks = dataclasses.replace(meta_train.tasks_of(flags), query_shots=5)
    family = common.make_family(victim, "test", tasks)
    keys = jax.random.split(jax.random.key(0), 20)
    metrics = evaluation.evaluate(learners.lft(rule), params, family, keys, num_steps=10, at=(10,))
    return {name: round(float(metrics[name].mean()), 4) for name in ("asr", "l1", "l2", "linf")}


if __name__ == "__main__":
    config.main(Config, ship)
