r"""Compares meta-learned fine-tuners with tuned baselines on unseen tasks. Writes results, a table and figures.

  python -m experiments.evaluate --learned=runs/lft,runs/l2o --output=results/compare.json \
    --victims=runs/victims/digits_small_cnn_9,runs/victims/mnist_5k_lenet_9

Victims that a learned method was meta-trained on are marked as seen. Runs that differ only in --seed become one row.
Baselines are tuned on meta-validation tasks of each victim.

Killed, the same command goes on: victims that were finished are in OUTPUT.unfinished until the results are complete.
"""

import dataclasses
import functools
from pathlib import Path

import jax

from experiments import common, config, meta_train
from experiments.cells import Cells
from experiments.report import figures, tables
from experiments.studies import public_models
from lft_jax.cli import provenance
from lft_jax.cli.picture import attack_picture
from lft_jax.data import load_source
from lft_jax.evaluation import comparison
from lft_jax.victims import default_epsilon, load_victim


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    learned: tuple[str, ...] = config.required(
        "Folders of meta-training runs (experiments.meta_train), or names of pretrained rules such as uap-linf."
    )
    victims: tuple[str, ...] = config.required("Folders of the victims to attack.")
    output: str = config.required("Results file to write (.json). The table and the figures are put beside it.")
    at: tuple[int, ...] = config.option(tuple(range(1, 21)), "Fine-tuning steps to evaluate after; the last one is K.")
    num_tasks: int = config.option(100, "Meta-test tasks.")
    num_validation: int = config.option(50, "Meta-validation tasks on which the baselines are tuned.")
    methods: tuple[str, ...] = config.option(comparison.Protocol.methods, "Hand-designed baselines to tune.")
    transfer: bool = config.option(
        True, "Also compare a UAP of the meta-training victims of the same source (transfer)."
    )
    oracle_steps: int = config.option(300, "Steps of each run that optimizes the full-data UAP.")
    oracle_targeted: bool = config.option(False, "Also optimize the full-data UAP for each target class.")
    shots: int | None = config.option(None, "Support images per class; as in meta-training if not given.")
    query_shots: int = config.option(5, "Query images per class.")
    epsilon: tuple[str, ...] = config.option(
        (), "Radii that differ from those of meta-training, as source=radius,...; not with a penalty."
    )
    task_seed: int = config.option(0, "Seed of the tasks.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


#: `--preset=study`: how the studies on real images are judged.
PRESETS = {
    "study": {
        "at": (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20),
        "num_tasks": 100,
        "num_validation": 10,
        "oracle_steps": 200,
        "oracle_targeted": True,
    }
}


def evaluate(flags: Config) -> dict:
    """Runs the comparison, writes its files and returns the results."""
    if not flags.learned or not flags.victims:
        raise ValueError("learned, victims: expected at least one folder of each.")
    runs = [meta_train.load_learned(workdir) for workdir in flags.learned]
    seen = {Path(path).resolve() for of, _ in runs for path in of.victims}
    tasks_config = meta_train.tasks_of(runs[0][0])
    for of, _ in runs[1:]:
        if _comparison_key(of, flags.at[-1]) != _comparison_key(runs[0][0], flags.at[-1]):
            raise ValueError(
                f"learned: {of.workdir} was meta-trained on other tasks, or with another number of evaluations, than "
                f"{runs[0][0].workdir}."
            )
    radii = config.pairs("epsilon", flags.epsilon)
    sources = dict.fromkeys(load_victim(path).card["source"] for path in flags.victims)
    if tasks_config.penalty is None:
        radii = {**tasks_config.epsilon, **radii}
        # With the defaults, so that the results file has all radii.
        radii = {s: radii[s] if s in radii else default_epsilon(tasks_config.norm, s) for s in sources} | radii
    elif radii:
        raise ValueError(f"epsilon: the runs were meta-trained with a penalty instead of a ball; leave out {radii}.")
    shots = tasks_config.shots if flags.shots is None else flags.shots
    tasks_config = dataclasses.replace(tasks_config, shots=shots, query_shots=flags.query_shots, epsilon=radii)
    protocol = comparison.Protocol(
        num_steps=flags.at[-1],
        at=flags.at,
        num_tasks=flags.num_tasks,
        num_validation=flags.num_validation,
        methods=flags.methods,
        oracle_steps=flags.oracle_steps,
        oracle_targeted=flags.oracle_targeted,
        seed=flags.task_seed,
    )
    output, rows = Path(flags.output), []
    described = {"tasks": dataclasses.asdict(tasks_config), "protocol": dataclasses.asdict(protocol)}
    described |= {
        "meta_training": [{k: v for k, v in dataclasses.asdict(of).items() if k != "data_dir"} for of, _ in runs]
    }
    victims = {path: load_victim(path).card for path in flags.victims}
    params = [jax.tree.leaves(params) for _, learned in runs for params in learned.params]
    cells = Cells(output, {**described, "victims": victims, "transfer": flags.transfer, "params": params})
    origin = cells.provenance([of.seed for of, _ in runs])  # now, since the checkout may change during the run
    for path in flags.victims:
        target = common.make_target(path, Path(path).resolve() in seen, tasks_config, flags.data_dir)
        learned = _methods(runs, target.source)
        transfer = _transfer_families(runs, target.source, tasks_config, flags) if flags.transfer else []
        compare = functools.partial(comparison.compare, transfer_from=transfer, report=print)
        new, perturbations = cells.get(path, compare, target, learned, protocol)
        rows += new
        name = f"{output.stem}_{target.victim}.png"
        test = load_source(target.source, "test", data_dir=flags.data_dir)
        attack_picture(target.test.logits_fn, test, perturbations, output.with_name(name))
        # After each victim, so that an interrupted run keeps its rows.
        results = _write(output, {**described, "rows": rows, "provenance": origin}, tasks_config.penalty is not None)
    cells.finish()
    print("\n" + tables.comparison_table(rows, tasks_config.penalty is not None))
    print(f"wrote {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")
    return results


def _comparison_key(run, steps):
    """Equal for runs that may be compared: the tasks, and the evaluations spent on waves and directions together."""
    tasks = meta_train.tasks_of(run)
    spent = tasks.waves + 2 * steps * tasks.num_directions
    return dataclasses.replace(tasks, waves=0, num_directions=min(tasks.num_directions, 1)), spent


def _write(output, results, penalty):
    provenance.write_json(output, results)
    output.with_suffix(".md").write_text(tables.comparison_table(results["rows"], penalty), encoding="utf-8")
    figures.asr_against_step(results["rows"], output.with_suffix(".png"))
    return results


def _methods(runs, source):
    """The learned methods that can attack a source: all update rules, and initializations for that source."""
    usable = []
    for flags, learned in runs:
        sources = tuple(sorted({_source(path) for path in flags.victims}))
        if flags.learner not in meta_train.CONGRUOUS or source in sources:
            usable.append((flags, sources, learned))
    grouped: dict[str, tuple[dict, comparison.Learned]] = {}
    for flags, sources, learned in usable:
        alone = len({of for other, of, _ in usable if other.learner == flags.learner}) == 1
        name = flags.learner if alone else f"{flags.learner} ({' + '.join(sources)})"
        settings = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("seed", *meta_train.WHERE)}
        waves, estimator = common.search_and_estimator(meta_train.tasks_of(flags))
        own = functools.partial(_with_queries, waves=waves, estimator=estimator)
        first, method = grouped.setdefault(name, (settings, comparison.Learned(learned.learner, [], own)))
        if different := [k for k in settings if settings[k] != first[k]]:
            raise ValueError(f"learned: runs of {name} may differ only in their seed, not in {', '.join(different)}.")
        method.params.extend(learned.params)
    return {name: method for name, (_, method) in grouped.items()}


def _with_queries(family, waves, estimator):
    """The family with the search and the estimator of a run."""
    return dataclasses.replace(family.with_recipe(search=waves), estimator=estimator)


def _transfer_families(runs, source, tasks_config, flags):
    paths = dict.fromkeys(path for of, _ in runs for path in of.victims if _source(path) == source)
    return [common.family_of(path, "train", tasks_config, flags.data_dir) for path in paths]


def _source(path):
    """The image source of a victim of meta-training, which may be a public model."""
    if path.startswith(common.PUBLIC):
        return public_models.MODELS[path.removeprefix(common.PUBLIC)].source
    return load_victim(path).card["source"]


if __name__ == "__main__":
    config.main(Config, evaluate, presets=PRESETS, renamed={"queries": "query_shots"})
