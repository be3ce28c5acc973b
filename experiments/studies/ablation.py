r"""Ablation: removes or adds one part of the fine-tuner at a time and attacks validation victims.

  python -m experiments.studies.ablation --variants="base,no start"
  python -m experiments.studies.ablation --study=query

Victims and images are those of meta-validation, so that no choice depends on the unseen victims of the studies. A
variant has the settings of a study except for its own, and the study's radii. All variants are compared with the first
one, at the same number of queries, paired by task and averaged over --seeds. Runs are kept in --workdir and not
repeated; nor is, if the program is killed, what was evaluated before.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, config, meta_train
from experiments.cells import Cells
from experiments.studies import study, victims
from lft_jax import evaluation, tasks
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import provenance
from lft_jax.victims import load_victim

_SEEN = ("momentum", "spread", "constraint", "progress", "context")

# Without a base update, meta_train accepts only the default values of its settings.
_PAPERS_RULE = {"rule": "coordinate_lstm", "layers": 2, "base_update": "none", "base_step": 0.8, "base_decay": 0.5}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Differences of a variant from its study.

    Attributes:
      flags: flags of experiments.meta_train.
      judged: flags that change only at test time. The variant is then not meta-trained; it uses the meta-parameters of
        the first variant, and `flags` and `per_source` are empty.
      per_source: meta-training victims per source; all if None.
    """

    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    judged: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_source: int | None = None


#: `{study: {name: variant}}`.
VARIANTS: dict[str, dict[str, Variant]] = {
    "hard": {
        "base": Variant(),
        "no spread": Variant({"features": tuple(f for f in _SEEN if f != "spread")}),
        "no context": Variant({"features": tuple(f for f in _SEEN if f != "context")}),
        "no progress": Variant({"features": tuple(f for f in _SEEN if f != "progress")}),
        "no constraint": Variant({"features": tuple(f for f in _SEEN if f != "constraint")}),
        "log_sign for momenta": Variant({"features": ("log_sign", *(f for f in _SEEN if f != "momentum"))}),
        "no augmentation": Variant({"augment": False}),
        "one victim a source": Variant(per_source=1),
        "coordinatewise": Variant({"rule": "coordinate_lstm", "features": _SEEN, "output_scale": 1.0}),
        "no start": Variant({"base_update": "none"}),
        "no features but momenta": Variant({"features": ("momentum",)}),
        "momenta and context": Variant({"features": ("momentum", "context")}),
        "momenta alone": Variant(
            {"rule": "coordinate_lstm", "features": ("momentum",), "output_scale": 1.0, "base_update": "none"}
        ),
        "the paper's rule": Variant(
            {**_PAPERS_RULE, "augment": False, "loss": "hinge", "support_loss": "hinge"},
        ),
        "learned on support images": Variant({"learner": "l2o"}),
        "learned on support images without augmentation": Variant({"augment": False, "learner": "l2o"}),
        "twenty times the meta-steps": Variant({"meta_steps": 20 * study.STUDIES["hard"].meta["meta_steps"]}),
    },
    "query": {
        "base": Variant(),
        "no waves": Variant({"waves": 0, "num_directions": 10, "base_step": 0.8, "base_decay": 0.5}),
        "shared directions": Variant({"per_example": False}),
        "no tiles": Variant({"resolution": None}),
        "small smoothing": Variant({"smoothing": 0.01}),
        "no augmentation": Variant({"augment": False}),
        "1 direction at test time": Variant(judged={"num_directions": 1, "num_steps": 120}),
        "5 directions at test time": Variant(judged={"num_directions": 5, "num_steps": 24}),
        "20 directions at test time": Variant(judged={"num_directions": 20, "num_steps": 6}),
        "60% of the queries to search": Variant(judged={"waves": 240, "num_directions": 4}),
        "80% of the queries to search": Variant(judged={"waves": 320, "num_directions": 2}),
        "90% of the queries to search": Variant(judged={"waves": 360, "num_directions": 1}),
        "the paper's rule with log_sign": Variant({**_PAPERS_RULE, "features": ("log_sign",)}),
        "the paper's rule with raw": Variant({**_PAPERS_RULE, "features": ("raw",)}),
        "the paper's rule with adam": Variant({**_PAPERS_RULE, "features": ("adam",)}),
        "learned directions": Variant({"sampler": True}),
        "learned on support images": Variant({"learner": "l2o"}),
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    study: str = config.option("hard", "Study that the variants belong to.", tuple(VARIANTS))
    variants: tuple[str, ...] = config.option(
        (), "Names of the variants, the first one being the reference; all if empty."
    )
    sources: tuple[str, ...] = config.option(("mnist", "cifar10"), "Image sources.")
    architectures: tuple[str, ...] = config.option((), "Architectures of the meta-training victims; all if empty.")
    meta_steps: int | None = config.option(
        None, "Meta-steps of variants that do not set them; those of the study if not given."
    )
    seeds: int = config.option(3, "Number of meta-training seeds per variant, from 0.")
    num_tasks: int = config.option(50, "Validation tasks per victim.")
    at: tuple[int, ...] = config.option(
        (1, 2, 5, 10, 20), "Fine-tuning steps to evaluate after; the last one is K, unless a variant sets it."
    )
    victims: str = config.option("victims", "Folder of the victims that experiments.studies.victims trains.")
    workdir: str = config.option("runs/ablation", "Folder for the meta-training runs.")
    output: str | None = config.option(None, "Results file; results/ablation_STUDY.json if not given.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


def ablate(flags: Config) -> None:
    """Meta-trains the variants that are missing and compares all."""
    known = VARIANTS[check_name("study", flags.study, VARIANTS)]
    check_at_least("seeds", flags.seeds, 1)
    trained = {recipe.architecture for s in flags.sources for recipe in victims.RECIPES[s] if recipe.role == "train"}
    for architecture in flags.architectures:
        check_name("architectures", architecture, sorted(trained))
    names = flags.variants or tuple(known)
    for name in names:
        check_name("variants", name, known)
    if known[names[0]].judged:
        raise ValueError(f"variants: {names[0]!r} is not meta-trained, so it cannot be the reference.")
    output = flags.output or f"results/ablation_{flags.study}.json"
    described = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("data_dir", "workdir", "output")}
    cells = Cells(output, {"flags": described, "variants": [dataclasses.asdict(known[name]) for name in names]})
    origin, rows, first, reference = cells.provenance(list(range(flags.seeds))), [], None, {}
    for name in names:
        print(f"{name}", flush=True)
        if not known[name].judged:
            runs = [_settings(name, known[name], seed, flags) for seed in range(flags.seeds)]
            params = [meta_train.meta_train(run).params for run in runs]
            settings = runs[0]
            first = first or (settings, params)
        else:
            settings, params = dataclasses.replace(first[0], **known[name].judged), first[1]
        at = (*(k for k in flags.at if k < settings.num_steps), settings.num_steps)
        learner = meta_train.learner_of(settings)
        for victim, family in _families(settings, flags).items():
            asr, queries = cells.get(f"{name}, {victim}", _asr, learner, params, family, flags.num_tasks, at)
            rows.append(_row(name, victim, at, asr, reference.setdefault(victim, asr[..., -1])))
            rows[-1]["queries"] = queries
            if rows[-1]["queries"] != rows[0]["queries"]:
                raise ValueError(
                    f"at: after {at[-1]} steps {name!r} has made {rows[-1]['queries']:.0f} queries, {names[0]!r} "
                    f"{rows[0]['queries']:.0f}; expected equal numbers."
                )
            print(f"  {victim}: " + ", ".join(f"{mean:.3f}" for mean in rows[-1]["asr"]), flush=True)
        described |= {"meta_steps": first[0].meta_steps, "epsilon": _epsilon(flags)}
        provenance.write_json(output, {"provenance": origin, "flags": described, "rows": rows})
    cells.finish()
    print(f"wrote {output}")


def _asr(learner, params, family, num_tasks, at):
    """ASR `[seeds, tasks, steps]`, and the mean number of queries after the last step."""
    keys = jax.random.split(jax.random.key(0), num_tasks)
    found = [evaluation.evaluate(learner, of, family, keys, num_steps=at[-1], at=at) for of in params]
    return np.asarray([seed["asr"] for seed in found], np.float64), float(np.mean(found[0]["queries"][:, -1]))


def _settings(name: str, variant: Variant, seed: int, flags: Config) -> meta_train.Config:
    trained = [victims.paths(s, "train", flags.victims, flags.architectures) for s in flags.sources]
    given = {} if flags.meta_steps is None else {"meta_steps": flags.meta_steps}
    changes = {"num_steps": flags.at[-1], **given, **variant.flags}
    return meta_train.Config(
        victims=tuple(path for paths in trained for path in paths[: variant.per_source]),
        workdir=str(Path(flags.workdir, flags.study, f"{name.replace(' ', '_')}_{seed}".replace("'", ""))),
        seed=seed,
        data_dir=flags.data_dir,
        **{**study.STUDIES[flags.study].meta, **study.STUDIES[flags.study].rule, **changes},
    )


def _families(settings: meta_train.Config, flags: Config) -> dict[str, tasks.UapFamily]:
    """Tasks of the validation victims with the settings of a variant, by name of the victim."""
    radii = config.pairs("epsilon", _epsilon(flags))
    seen = dataclasses.replace(meta_train.tasks_of(settings), query_shots=5, epsilon=radii)
    paths = [path for s in flags.sources for path in victims.paths(s, "validation", flags.victims)]
    return {Path(p).name: common.make_family(load_victim(p), "validation", seen, flags.data_dir) for p in paths}


def _epsilon(flags):
    return study.STUDIES[flags.study].protocol.get("epsilon", ())


def _row(name, victim, at, asr, reference):
    """A row of results, from `asr` `[seeds, tasks, steps]` and the final ASR of the first variant `[seeds, tasks]`."""
    means, widths = zip(*(evaluation.mean_interval(column) for column in asr.mean(0).T), strict=True)
    differences = asr[..., -1] - reference
    return {
        "variant": name,
        "victim": victim,
        "at": list(at),
        "asr": list(means),
        "asr_interval": list(widths),
        "difference": list(evaluation.mean_interval(differences.mean(0))),
        "seed_differences": differences.mean(1).tolist(),
    }


if __name__ == "__main__":
    config.main(Config, ablate)
