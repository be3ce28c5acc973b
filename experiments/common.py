"""Code shared by the programs: task families of stored victims, short meta-training runs, means with intervals."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies import public_models
from lft_jax import evaluation, meta, oracles, tasks
from lft_jax.base import Learner, PyTree, TaskFamily, check_name
from lft_jax.data import ImageSource, load_source
from lft_jax.evaluation import comparison
from lft_jax.meta import checkpoints
from lft_jax.victims import Victim, default_epsilon, load_victim

_DIRECTIONS = ("num_directions", "resolution", "basis", "smoothing", "per_example")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The tasks of a run, for victims of any source.

    Attributes:
      ways, shots, query_shots: see `lft_jax.uap_family`.
      norm: "linf" or "l2" (balls), "l1" or "l2" (penalties).
      epsilon: radius per source; sources without an entry use `lft_jax.victims.DEFAULT_EPSILON`.
      penalty: weight of the norm in the loss, instead of a ball; or None.
      num_directions: random directions per zeroth-order estimate; 0 for exact gradients.
      resolution, basis: subspace of these directions, see `lft_jax.oracles.zeroth_order`.
      smoothing: length of the finite differences, in units of the image range.
      per_example: whether each support image has its own directions.
      loss: loss on the query images.
      support_loss: loss on the support images.
      kappa: hinge margin of both losses, in logits.
      beta: bound on the cross-entropy of a query image, in nats.
      start: initial perturbation, "zeros" or "random".
      waves: evaluations per support image that search for a better start (`lft_jax.tasks.WaveSearch`), a quarter of
        them on new waves; 0 for no search.
      augment: whether the support images are augmented, re-sampled in each step (`lft_jax.Augmentation`).
      proxies: whether each step has new images made from parts of the support images instead (`lft_jax.Proxies`).
      patterns: evaluations per proxy or support image that search tiles and waves for a better start
        (`lft_jax.PatternSearch`); 0 for no search.
      radius_factor: see `lft_jax.uap_family`.
      images: the first images of each source, of which tasks are drawn; None for all.
    """

    ways: int = 10
    shots: int = 1
    query_shots: int = 5
    norm: str = "linf"
    epsilon: Mapping[str, float] = dataclasses.field(default_factory=dict)
    penalty: float | None = None
    num_directions: int = 0
    resolution: int | None = None
    basis: str = "tiles"
    smoothing: float = 1e-2
    per_example: bool = False
    loss: str = "cross_entropy"
    support_loss: str = "cross_entropy"
    kappa: float = 0.0
    beta: float = 12.0
    start: str = "zeros"
    waves: int = 0
    augment: bool = True
    proxies: bool = False
    patterns: int = 0
    radius_factor: float = 1.0
    images: int | None = None


def search_and_estimator(
    config: TaskConfig,
) -> tuple[tasks.WaveSearch | tasks.PatternSearch | None, oracles.ZerothOrder | None]:
    """The search for a start and the gradient estimator: how tasks spend their queries."""
    search = tasks.WaveSearch.within(config.waves) if config.waves else None
    if config.patterns:
        search = tasks.PatternSearch.within(config.patterns)
    if not config.num_directions:
        return search, None
    return search, oracles.ZerothOrder(**{name: getattr(config, name) for name in _DIRECTIONS})


#: What the paths of victims begin with that are a public model: `public/efficientnet_lite2`.
PUBLIC = "public/"
_GROUPED = 10  # ImageNet images of a group, which takes the place of a class: there is one image of each class


def family_of(path: str, split: str, config: TaskConfig, data_dir: str | None = None) -> tasks.UapFamily:
    """The UAP tasks of a stored victim, by its folder, or of a public model on its images for meta-training."""
    if not path.startswith(PUBLIC):
        return make_family(load_victim(path), split, config, data_dir)
    name = path.removeprefix(PUBLIC)
    check_name("victims: public", name, public_models.MODELS)
    source = public_models.MODELS[name].source
    if split != "train":
        raise ValueError(f"victims: {path} has images for meta-training only, got split {split!r}.")
    images, labels, *_ = public_models.load_images(source, "training", data_dir=data_dir)
    groups = np.arange(len(labels)) // _GROUPED
    family = _family(public_models.load(name), ImageSource(source, images, groups, int(groups.max()) + 1), config)
    return dataclasses.replace(family, labels=jnp.asarray(labels, jnp.int32))


def make_family(victim: Victim, split: str, config: TaskConfig, data_dir: str | None = None) -> tasks.UapFamily:
    """The UAP tasks of a stored victim, with images of one split of its source."""
    return _family(victim.logits_fn, load_source(victim.card["source"], split, data_dir=data_dir), config)


def _family(model, source, config):
    search, estimator = search_and_estimator(config)
    augmentation = tasks.Proxies() if config.proxies else tasks.Augmentation() if config.augment else None

    return tasks.uap_family(
        source.images[: config.images],
        source.labels[: config.images],
        model,
        ways=config.ways,
        shots=config.shots,
        query_shots=config.query_shots,
        constraint=_constraint(config, source.name),
        loss=tasks.AttackLoss(config.loss, kappa=config.kappa, beta=config.beta),
        recipe=tasks.AttackRecipe(
            loss=tasks.AttackLoss(config.support_loss, kappa=config.kappa),
            augmentation=augmentation,
            start=config.start,
            search=search,
        ),
        estimator=estimator,
        radius_factor=config.radius_factor,
    )


def _constraint(config, source):
    if config.penalty is None:
        radius = config.epsilon[source] if source in config.epsilon else default_epsilon(config.norm, source)
        return tasks.Constraint(config.norm, radius)
    if config.epsilon:
        raise ValueError(
            f"penalty: expected a penalty or radii, not both; got {config.penalty} and {dict(config.epsilon)}."
        )
    return tasks.Constraint(config.norm, penalty=config.penalty)


def make_target(path: str, seen: bool, config: TaskConfig, data_dir: str | None = None) -> comparison.Target:
    """A stored victim and its tasks as a target of `lft_jax.evaluation.comparison`."""
    victim = load_victim(path)
    families = [make_family(victim, split, config, data_dir) for split in ("train", "validation", "test")]
    return comparison.Target(victim.card["source"], Path(path).name, seen, *families)


def meta_training(
    make_learner: Callable[..., Learner],
    families: Sequence[TaskFamily],
    *,
    num_steps: int,
    tasks_per_family: int,
    rate: float,
    scanned: int = 100,
    workdir: str | os.PathLike[str] | None = None,
) -> Callable[..., PyTree]:
    """Meta-training that runs many meta-steps per call and cannot be resumed.

    It is for meta-steps that take less time than a Python call.

    Args:
      make_learner: maps keyword arguments (which may be traced) to a learner.
      families: as for `lft_jax.meta_trainer`.
      num_steps: fine-tuning steps (K).
      tasks_per_family: tasks per family and meta-step.
      rate: learning rate of the meta-optimizer, Adam.
      scanned: meta-steps per call.
      workdir: folder where finished meta-parameters are stored. If it has those of a call, they are loaded instead.

    Returns:
      `train(seed, meta_steps, **settings) -> params`. It is compiled once for all settings of the learner.
    """
    families, meta_optimizer = tuple(families), optax.adam(rate)

    def trainer_of(families, settings):
        options = {"num_steps": num_steps, "tasks_per_family": tasks_per_family, "meta_optimizer": meta_optimizer}
        return meta.meta_trainer(make_learner(**settings), families, **options)

    @jax.jit
    def many(families, settings, state):
        trainer = trainer_of(families, settings)
        return jax.lax.scan(lambda state, _: (trainer.step(state)[0], None), state, length=scanned)[0]

    def train(seed, meta_steps, **settings):
        state = trainer_of(families, settings).init(jax.random.key(seed))
        described = {"steps": meta_steps, "of": tasks_per_family, "inner": num_steps, "rate": rate, **settings}
        kept = workdir and Path(workdir, "_".join(f"{k}_{v}" for k, v in {"seed": seed, **described}.items()))
        if kept and kept.is_dir():
            print(f"found {kept}", flush=True)
            return checkpoints.load_tree(kept, state.params)
        for _ in range(-(-meta_steps // scanned)):
            state = many(families, settings, state)
        print(f"meta-trained {make_learner(**settings).name}, seed {seed}: {int(state.step)} meta-steps", flush=True)
        if kept:
            checkpoints.save_tree(kept, state.params)
        return state.params

    return train


def with_settings(make_learner: Callable[..., Learner]) -> Learner:
    """A learner whose settings are among its parameters, `{"settings": ..., "learned": ...}`.

    One compiled program then evaluates all settings. It cannot be meta-trained.
    """

    def init(key, families):
        raise ValueError("this learner can only be evaluated, not meta-trained.")

    return Learner(
        name="",
        init=init,
        optimizer=lambda params: make_learner(**params["settings"]).optimizer(params["learned"]),
        start=lambda params, family, key: make_learner(**params["settings"]).start(params["learned"], family, key),
    )


def task_keys(num_tasks: int, *, tuning: bool = False) -> jax.Array:
    """Keys `[num_tasks]` of the tasks that all methods are judged on, or of those for tuning."""
    # Far from the seeds of meta-training, so that no keys are used twice.
    return jax.random.split(jax.random.key(2**31 - (1 if tuning else 2)), num_tasks)


def judged(
    learner: Learner,
    params: Sequence[PyTree],
    family: TaskFamily,
    metric: str,
    *,
    num_steps: int,
    num_tasks: int,
    tuning: bool = False,
    at_once: int = 100,
) -> np.ndarray:
    """A metric on each task's query set after each step, for each of the given meta-parameters.

    All methods have the same tasks. Tasks for tuning are different ones. `at_once` tasks run at a time; if it divides
    `num_tasks`, one compiled program is enough.

    Returns:
      `[P, T, K]`: sets of meta-parameters, tasks, steps.
    """
    keys = task_keys(num_tasks, tuning=tuning)
    parts = np.split(np.arange(num_tasks), range(at_once, num_tasks, at_once))
    options = {"num_steps": num_steps, "at": tuple(range(1, num_steps + 1)), "batch_size": at_once}

    def values(params):
        return np.concatenate([evaluation.evaluate(learner, params, family, keys[p], **options)[metric] for p in parts])

    return np.stack([values(p) for p in params])


def best_of(
    learner: Learner, params: Sequence[PyTree], family: TaskFamily, metric: str, *, largest: bool, **options: Any
) -> int:
    """Index of the meta-parameters with the best mean after the last step, on the tasks for tuning.

    Options are those of `judged`.
    """
    scores = judged(learner, params, family, metric, tuning=True, **options)[:, :, -1].mean(1)
    scores = np.where(np.isfinite(scores), scores, -np.inf if largest else np.inf)  # never a rate that diverges
    return int(np.argmax(scores) if largest else np.argmin(scores))


def curve_row(metric: str, values: np.ndarray, rivals: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means and 95% intervals over tasks, of values `[T, K]` and of their final differences to `rivals`.

    Differences are paired by task. Mean and interval are None where a task has a value that is not finite; `diverged`
    is the share of such tasks.
    """
    means, widths = zip(*(_finite_interval(column) for column in values.T), strict=True)
    differences = {
        f"difference_to_{name}": _finite_interval(values[:, -1] - other[:, -1]) for name, other in rivals.items()
    }
    diverged = np.mean(~np.isfinite(values), axis=0).tolist()
    return {metric: means, f"{metric}_interval": widths, "diverged": diverged, **differences}


def _finite_interval(values):
    return evaluation.mean_interval(values) if np.all(np.isfinite(values)) else (None, None)
