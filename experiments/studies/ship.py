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
from experiments.studies import public_models
from lft_jax import evaluation, learners, pretrained
from lft_jax.optimizers.spectral import SpectralRule
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
    public: tuple[str, ...] = config.option((), "Results files of experiments.studies.public that include the rule.")
    step: float | None = config.option(None, "First step of a spectral rule, if not that of its meta-training.")


def ship(flags: Config) -> None:
    """Writes the rule and its card."""
    run = Path(flags.run)
    params, rule = pretrained.load_pretrained(str(run / "rule.safetensors"))
    card = pretrained.pretrained_card(str(run / "rule.safetensors"))
    if flags.step is not None:
        if not isinstance(rule, SpectralRule):
            raise ValueError(f"--step: only a spectral rule has a step of its own, {flags.run} holds {rule}.")
        card |= {"step": {"meta_training": rule.step, "shipped": flags.step}}
        rule = dataclasses.replace(rule, step=flags.step)
    learner, rows = card["meta_training"]["learner"], []
    sources = sorted({_source(victim) for victim in card["meta_training"]["victims"]})
    names = ("pgd", learner, f"{learner} ({' + '.join(sources)})")
    for path in flags.results:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        rows += [{"file": path, **{name: row[name] for name in _SHOWN}} for row in found if row["method"] in names]
    public = [row for path in flags.public for row in _public_rows(path, flags.name)]
    card |= {"meta_test": rows, "public_models": public, "check": check(params, rule, card)}
    card |= {"where_it_fails": flags.fails}
    path = Path(pretrained.__file__).parent / f"{flags.name}.safetensors"
    pretrained.save_rule(path, params, rule, card)
    print(f"wrote {path}: {card['check']}")


def _source(victim):
    if victim.startswith(common.PUBLIC):
        return public_models.MODELS[victim.removeprefix(common.PUBLIC)].source
    return load_victim(_ROOT / victim).card["source"]


def _public_rows(path, name):
    """What a results file of public models has of the rule, and of the best of the other methods."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    about = {"file": path, **{key: found["about"][key] for key in ("model", "role", "epsilon")}}
    shown = ("method", "steps", "images", "asr", "asr_interval", "evaluations")
    own = [row for row in found["rows"] if row["method"] == name]
    for row in own:
        rows = [r for r in found["rows"] if all(r[k] == row[k] for k in ("steps", "images"))]
        others = [r for r in rows if not r["method"].startswith(name)]
        best = max(others, key=lambda r: r["asr"], default=None)
        for chosen in (row, best):
            if chosen is not None:
                yield {**about, **{key: chosen.get(key) for key in shown}, "draws": len(chosen["draw_asr"])}


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
