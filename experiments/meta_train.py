r"""Meta-trains a fine-tuner on stored victims, which may differ in architecture, image size and source.

One set of meta-parameters for all of them:

  python -m experiments.meta_train --workdir=runs/lft \
    --victims=runs/victims/digits_small_cnn_0,runs/victims/mnist_5k_lenet_0 --epsilon=digits=0.25,mnist_5k=0.3

Run it again to resume. Make victims with experiments.train_victim.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from experiments import common, config
from lft_jax import evaluation, learners, meta, pretrained, tasks
from lft_jax.base import Learner, check_name
from lft_jax.evaluation import baselines, comparison
from lft_jax.meta import run
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation
from lft_jax.meta.outer_loss import STEP_WEIGHTS
from lft_jax.optimizers import rules, sampling
from lft_jax.optimizers.features import FEATURES
from lft_jax.oracles.directions import BASES
from lft_jax.victims import load_victim

LEARNERS = ("lft", "l2o", "adaptive_lft", "maml", "sign_maml", "reptile", "meta_sgd", "joint")
#: Those that learn an initialization and so need victims of one image shape.
CONGRUOUS = ("maml", "sign_maml", "reptile", "meta_sgd", "joint")
#: Those that learn an update rule.
RULE_LEARNERS = ("lft", "l2o", "adaptive_lft", "joint")
META_GRADIENTS = ("backprop", "es", "pes", "truncated_es")
REMAT = {"auto": None, "always": True, "never": False}


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    victims: tuple[str, ...] = config.required("Folders of the victims to meta-train on, a family of tasks each.")
    workdir: str = config.required("Folder of the run: configuration, checkpoints, metrics. Resumed if it exists.")
    learner: str = config.option(
        "lft",
        "What is learned: an update rule on query images (lft) or support images (l2o), one whose weights first adapt "
        "to the task's support images (adaptive_lft), an initialization (maml and reptile, fine-tuned by PGD, and "
        "sign_maml, by sign steps whatever the norm), one with a learning rate for each pixel (meta_sgd), or an "
        "initialization and an update rule (joint). A perturbation has no head, so anil is not among them.",
        LEARNERS,
    )
    rule: str = config.option("spatial_lstm", "Update rule (lft, l2o, joint).", tuple(rules.RULES))
    features: tuple[str, ...] = config.option(
        (), f"What the rule sees; its default if empty. Of {', '.join(FEATURES)}."
    )
    hidden: int = config.option(20, "Units of each LSTM layer.")
    layers: int = config.option(1, "LSTM layers.")
    start: str = config.option(
        "momentum",
        "Hand-made update that the rule's output is added to. momentum: along the sign of the gradient's momentum; "
        "gradient: along the momentum itself, in units of the first gradient's root mean square; none.",
        ("momentum", "gradient", "none"),
    )
    start_step: float = config.option(0.8, "Step of that update, in units of epsilon: below 1 along the sign.")
    start_decay: float = config.option(0.5, "Momentum of that update.")
    output_scale: float | None = config.option(None, "Factor on the rule's output; the rule's default if not given.")
    inner_step: float = config.option(
        0.2, "Step of the PGD of maml, sign_maml and reptile, in units of epsilon; first learning rate of meta_sgd."
    )
    adaptation_steps: int = config.option(5, "Steps that the weights of adaptive_lft take on a task's support loss.")
    adaptation_rate: float = config.option(1e-2, "Learning rate of those.")
    ways: int = config.option(10, "Classes of a task.")
    shots: int = config.option(1, "Support images a class.")
    queries: int = config.option(1, "Query images a class.")
    norm: str = config.option("linf", "Norm of the ball (linf, l2) or of the penalty (l1, l2).", ("linf", "l2", "l1"))
    epsilon: tuple[str, ...] = config.option((), "Radius by source, as source=radius,...; sources have defaults.")
    penalty: float | None = config.option(None, "Weight of the norm in the loss, instead of a ball.")
    num_directions: int = config.option(
        0, "Random directions, each tried both ways, of the zeroth-order gradients that fine-tune; 0: exact gradients."
    )
    resolution: int | None = config.option(
        None, "Those directions lie in a subspace, of so many dimensions along each side; in no subspace if not given."
    )
    basis: str = config.option("tiles", "That subspace: constant on tiles, or low frequencies (dct).", BASES)
    smoothing: float = config.option(0.01, "How far those directions are tried, in units of the image range.")
    per_example: bool = config.option(
        False, "Each support image tries directions of its own, which costs no more queries."
    )
    sampler: bool = config.option(
        False, "Learn too how those directions are spread over the coordinates (ZO-L2L's QueryRNN; lft, l2o)."
    )
    loss: str = config.option(
        "cross_entropy", "Loss of the query images, what meta-training minimises.", ("hinge", "cross_entropy")
    )
    support_loss: str = config.option("cross_entropy", "Loss of the support images.", ("hinge", "cross_entropy"))
    second_loss: str = config.option(
        "none",
        "Loss that is added to it, and whose gradient a rule also sees alone (its feature `second`): what pulls all "
        "images to the class that they are nearest to (dominant), or another one, or none.",
        ("dominant", "hinge", "cross_entropy", "none"),
    )
    kappa: float = config.option(0.0, "How far the hinge wants the margin beyond 0, in logits (C&W's confidence).")
    task_start: str = config.option("zeros", "Where a task's perturbation starts.", ("zeros", "random"))
    waves: int = config.option(
        0, "Evaluations of the support images, 2 or more, that search plane waves for a better start; 0 for none."
    )
    augment: bool = config.option(True, "Shift the support images, mix them and add noise, anew in each step.")
    num_steps: int = config.option(20, "Fine-tuning steps of a task (K).")
    weights: str = config.option("uniform", "Weights of the steps in the outer loss.", tuple(STEP_WEIGHTS))
    tasks_per_family: int = config.option(1, "Tasks of each victim in a meta-step.")
    meta_steps: int = config.option(1000, "Meta-steps.")
    meta_learning_rate: float = config.option(1e-2, "Peak learning rate of the meta-optimizer, Adam.")
    seed: int = config.option(0, "Seed of the run.")
    window: int | None = config.option(
        None, "Steps that the meta-gradient goes back at most (truncated backpropagation); all if not given."
    )
    meta_gradient: str = config.option(
        "backprop",
        "Backpropagation through the steps, or evolution strategies (es), on one device, which need no derivative of "
        "the outer loss: with --num_directions no victim is ever differentiated. Persistent ones (pes) make a "
        "meta-step of every --es_window steps of an episode; truncated_es does so with a bias, to compare with.",
        META_GRADIENTS,
    )
    es_pairs: int = config.option(16, "Pairs of mirrored changes that es tries in a meta-step, for each victim.")
    es_sigma: float = config.option(0.01, "Size of those changes, in units of the meta-parameters.")
    es_window: int | None = config.option(None, "Steps of a meta-step of pes and truncated_es; divides --num_steps.")
    curriculum: tuple[int, ...] = config.option(
        (), "Ascending numbers of fine-tuning steps, the last --num_steps, for equal shares of the meta-steps."
    )
    imitation_steps: int = config.option(
        0, "First meta-steps, by backpropagation, in which the rule imitates momentum PGD instead of lowering the loss."
    )
    imitation_step: float = config.option(0.8, "Step of that PGD, in units of epsilon.")
    imitation_decay: float = config.option(0.5, "Momentum of that PGD.")
    second_order: bool = config.option(False, "Differentiate through the inner gradients too.")
    remat: str = config.option(
        "auto",
        "Whether to compute steps again instead of storing them; auto: if one task needs it to fit.",
        tuple(REMAT),
    )
    memory: float = config.option(512.0, "MiB that a device may store for a backward pass.")
    checkpoint_every: int = config.option(100, "Meta-steps between checkpoints, and validations.")
    validation_tasks: int = config.option(20, "Meta-validation tasks of each victim; 0 for none.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")
    devices: int = config.option(0, "Devices that share the tasks; 0: as many as divide --tasks_per_family.")
    coordinator: str | None = config.option(
        None, "host:port of the first of several processes, or auto where the cluster tells (SLURM, TPU, Open MPI)."
    )
    num_processes: int | None = config.option(None, "Processes in all, with --coordinator=host:port.")
    process_id: int | None = config.option(None, "Which of them this is, from 0.")


#: Flags that say where a run is made, not which: it may go on elsewhere.
WHERE = ("workdir", "data_dir", "remat", "memory", "devices", "coordinator", "num_processes", "process_id")


def tasks_of(flags: Config) -> common.TaskConfig:
    """The tasks that the flags describe."""
    names = {field.name for field in dataclasses.fields(common.TaskConfig)} - {"epsilon", "start"}
    epsilon = config.pairs("epsilon", flags.epsilon)
    return common.TaskConfig(epsilon=epsilon, start=flags.task_start, **{name: getattr(flags, name) for name in names})


def learner_of(flags: Config) -> Learner:
    """The learner that the flags describe."""
    check_name("learner", flags.learner, LEARNERS)
    if flags.learner in ("maml", "reptile"):
        inner = baselines.make_baselines(flags.norm)["pgd"].learner.optimizer({"step": flags.inner_step})
        if flags.learner == "maml":
            return learners.maml(inner, second_order=flags.second_order)
        return learners.reptile(inner)
    if flags.learner == "sign_maml":
        return learners.sign_maml(flags.inner_step)
    if flags.learner == "meta_sgd":
        return learners.meta_sgd(flags.inner_step, second_order=flags.second_order)
    if flags.learner == "adaptive_lft":
        return learners.adaptive_lft(
            rule_of(flags),
            steps=flags.adaptation_steps,
            learning_rate=flags.adaptation_rate,
            second_order=flags.second_order,
        )
    options = {"sampler": sampling.QUERY_RNN} if flags.sampler else {}
    return getattr(learners, flags.learner)(rule_of(flags), second_order=flags.second_order, **options)


def rule_of(flags: Config) -> rules.Rule:
    """The update rule that the flags describe."""
    check_name("rule", flags.rule, rules.RULES)
    options: dict[str, Any] = {"features": flags.features} if flags.features else {}
    if flags.output_scale is not None:
        options["output_scale"] = flags.output_scale
    if flags.start == "none":
        options["start"] = None
    else:
        along = "gradient" if flags.start == "gradient" else "sign"
        options["start"] = rules.MomentumUpdate(flags.start_step, flags.start_decay, along)
    return rules.RULES[flags.rule](flags.hidden, flags.layers, **options)


def families_of(flags: Config, split: str) -> list[tasks.UapFamily]:
    """One family of tasks for each victim."""
    return [common.make_family(load_victim(path), split, tasks_of(flags), flags.data_dir) for path in flags.victims]


def meta_optimizer_of(flags: Config) -> optax.GradientTransformation:
    """The meta-optimizer that the flags describe."""
    return meta.clipped_adam(flags.meta_learning_rate, flags.meta_steps)


def check(flags: Config) -> None:
    """Raises a ValueError for a flag that what is asked for has no use for, and a choice that learns nothing."""
    learned, es = flags.learner in RULE_LEARNERS, flags.meta_gradient != "backprop"
    windows = flags.meta_gradient in ("pes", "truncated_es")
    starts = flags.learner in ("maml", "sign_maml", "meta_sgd")
    useless = {
        ("rule", "features", "hidden", "layers", "start", "output_scale"): (not learned, "learns no update rule"),
        ("start_step", "start_decay"): (not learned or flags.start == "none", "has no hand-made update to add to"),
        ("adaptation_steps", "adaptation_rate"): (flags.learner != "adaptive_lft", "does not adapt its weights"),
        ("inner_step",): (learned, "fine-tunes by its own rule"),
        ("weights", "window", "second_order"): (flags.learner == "reptile", "differentiates nothing"),
        ("second_order",): (flags.learner == "sign_maml", "steps along a sign, whose derivative is 0"),
        ("es_pairs", "es_sigma"): (not es, "does not use evolution strategies, without --meta_gradient=es"),
        ("es_window",): (not windows, "has no windows, without --meta_gradient=pes or truncated_es"),
        ("curriculum",): (windows, f"has windows for short unrolls, with --meta_gradient={flags.meta_gradient}"),
        ("imitation_steps",): (not learned, "learns no update rule"),
        ("imitation_step", "imitation_decay"): (not flags.imitation_steps, "imitates nothing, without imitation_steps"),
        ("sampler",): (flags.learner not in ("lft", "l2o"), "has no sampler of directions"),
        ("resolution", "basis", "smoothing", "per_example", "sampler"): (
            not flags.num_directions,
            "is given exact gradients, without --num_directions",
        ),
        ("basis",): (flags.resolution is None, "has no subspace of directions, without --resolution"),
        ("second_loss",): (flags.num_directions > 0, "is given estimates of one loss, by --num_directions"),
        ("kappa",): ("hinge" not in (flags.loss, flags.support_loss, flags.second_loss), "minimises no hinge"),
        ("epsilon",): (flags.penalty is not None, "is given a penalty instead of a ball"),
    }
    for names, (applies, reason) in useless.items():
        for name in names if applies else ():
            if getattr(flags, name) != Config.__dataclass_fields__[name].default:
                raise ValueError(f"{name}: {flags.learner} {reason}; leave it out.")
    if "update" in flags.features:
        raise ValueError("features: update is what a sampler sees (--sampler); a rule makes it.")
    if flags.second_loss == flags.support_loss:
        raise ValueError(f"second_loss: {flags.second_loss} is the support loss already; choose another, or none.")
    if "second" in flags.features and flags.second_loss == "none":
        raise ValueError("features: second is the gradient of a second loss, and there is none; see --second_loss.")
    if flags.learner == "adaptive_lft" and (es or flags.num_directions):
        name = "meta_gradient" if es else "num_directions"
        raise ValueError(f"{name}: adaptive_lft differentiates the loss of the support images; leave it out.")
    if windows and (flags.es_window is None or flags.es_window < 1 or flags.num_steps % flags.es_window):
        raise ValueError(
            f"es_window: {flags.meta_gradient} needs one that divides num_steps = {flags.num_steps}, "
            f"got {flags.es_window}."
        )
    if windows and flags.weights == "final" and flags.es_window < flags.num_steps:
        raise ValueError("weights: the last step's alone leave all windows but the last without a loss; choose others.")
    if flags.curriculum:
        ascending = all(a < b for a, b in itertools.pairwise((0, *flags.curriculum)))
        if not ascending or flags.curriculum[-1] != flags.num_steps or len(flags.curriculum) > flags.meta_steps:
            raise ValueError(
                f"curriculum: expected at most meta_steps = {flags.meta_steps} numbers that ascend from at least 1 to "
                f"num_steps = {flags.num_steps}, got {flags.curriculum}."
            )
    if not 0 <= flags.imitation_steps < flags.meta_steps:
        raise ValueError(
            f"imitation_steps: expected fewer than meta_steps = {flags.meta_steps}, got {flags.imitation_steps}."
        )
    if flags.imitation_steps and flags.start == "momentum":
        own, teachers = (flags.start_step, flags.start_decay), (flags.imitation_step, flags.imitation_decay)
        if own == teachers:
            raise ValueError(
                f"imitation_steps: {flags.learner} starts from the very update (step, decay) = {own} that it is to "
                "imitate; choose --start=none, or other settings."
            )
    if starts and flags.weights == "final" and flags.window is not None and flags.window < flags.num_steps:
        raise ValueError(
            f"window: the last of {flags.num_steps} steps alone, cut off after {flags.window}, tells {flags.learner} "
            "nothing about where to start; choose other weights, or a longer window."
        )


def estimator_of(flags: Config) -> EvolutionStrategies | PersistentEvolutionStrategies | None:
    """The estimator of meta-gradients that the flags describe; None for backpropagation."""
    if check_name("meta_gradient", flags.meta_gradient, META_GRADIENTS) == "backprop":
        return None
    for name in ("second_order", "window"):
        if getattr(flags, name):
            raise ValueError(f"{name}: evolution strategies differentiate nothing; leave it out.")
    if flags.meta_gradient == "es":
        return EvolutionStrategies(flags.es_pairs, flags.es_sigma)
    accumulate = flags.meta_gradient == "pes"
    return PersistentEvolutionStrategies(flags.es_window, flags.es_pairs, flags.es_sigma, accumulate)


def curriculum_of(flags: Config) -> list[tuple[int, int]]:
    """Pairs of fine-tuning steps and meta-steps that come before the meta-steps of `num_steps`."""
    ends = [i * flags.meta_steps // len(flags.curriculum) for i in range(len(flags.curriculum))]
    return [
        (steps, end - begin) for steps, (begin, end) in zip(flags.curriculum, itertools.pairwise(ends), strict=False)
    ]


def imitation_of(flags: Config) -> Imitation | None:
    """The imitation that the flags describe."""
    if not flags.imitation_steps:
        return None
    pgd = baselines.make_baselines(flags.norm)["momentum_pgd"].learner
    teacher = pgd.optimizer({"step": flags.imitation_step, "decay": flags.imitation_decay})
    return Imitation(teacher, flags.imitation_steps)


def mesh_of(flags: Config) -> jax.sharding.Mesh | None:
    """The devices that share the tasks, or None for one."""
    if flags.meta_gradient != "backprop":
        if flags.devices > 1 or jax.process_count() > 1:
            raise ValueError(
                f"meta_gradient: {flags.meta_gradient} runs on one device of one process; leave devices and "
                "coordinator out."
            )
        return None
    count = flags.devices or max(n for n in range(1, jax.device_count() + 1) if flags.tasks_per_family % n == 0)
    if count < jax.device_count() and jax.process_count() > 1:
        raise ValueError(
            f"tasks_per_family: {flags.tasks_per_family} tasks cannot be shared evenly by the {jax.device_count()} "
            f"devices of {jax.process_count()} processes; make it a multiple."
        )
    return None if count == 1 else meta.task_mesh(count)


def _absent():
    """What a flag meant before there was one, for runs that were made then."""
    fields = dataclasses.fields(Config)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING and f.name not in WHERE}
    return {**defaults, "augment": False}


def flags_of(stored: Mapping[str, Any], workdir: str = "") -> Config:
    """The flags that a run's configuration or a rule's card holds."""
    stored = {**_absent(), **stored}
    lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
    return Config(**{**stored, **lists, "workdir": workdir})


def load_learned(name: str) -> tuple[Config, comparison.Learned]:
    """A run by its folder, or a rule that ships by its name: its flags, its learner and its meta-parameters."""
    if name in pretrained.list_pretrained():
        params, rule = pretrained.load_pretrained(name)
        flags = flags_of(pretrained.pretrained_card(name)["meta_training"], name)
        return flags, comparison.Learned(getattr(learners, flags.learner)(rule), [params])
    flags = None

    def like(stored):
        nonlocal flags
        flags = flags_of(stored, name)
        families = families_of(flags, "train")[:1] if flags.learner in CONGRUOUS else ()
        return meta.init_state(learner_of(flags), families, meta_optimizer_of(flags), jax.random.key(0))

    state, _ = run.load_run(name, like)
    return flags, comparison.Learned(learner_of(flags), [state.params])


def meta_train(flags: Config) -> meta.MetaState:
    """Runs, or resumes, the meta-training that the flags describe."""
    check(flags)
    if flags.coordinator is not None:
        address = None if flags.coordinator == "auto" else flags.coordinator
        jax.distributed.initialize(address, flags.num_processes, flags.process_id)
    learner = learner_of(flags)
    trainer = meta.meta_trainer(
        learner,
        families_of(flags, "train"),
        num_steps=flags.num_steps,
        tasks_per_family=flags.tasks_per_family,
        meta_optimizer=meta_optimizer_of(flags),
        weights=flags.weights,
        window=flags.window,
        estimator=estimator_of(flags),
        curriculum=curriculum_of(flags),
        imitation=imitation_of(flags),
        remat=REMAT[check_name("remat", flags.remat, REMAT)],
        memory_mib=flags.memory,
        mesh=mesh_of(flags),
    )
    families = families_of(flags, "validation") if flags.validation_tasks else []
    keys = jax.random.split(jax.random.key(flags.seed), max(flags.validation_tasks, 1))

    def validate(params):
        options = {"num_steps": flags.num_steps, "at": (flags.num_steps,)}
        asr = [float(evaluation.evaluate(learner, params, f, keys, **options)["asr"].mean()) for f in families]
        return {"validation_asr": sum(asr) / len(asr), "validation_asr_by_victim": asr}

    stored = {name: value for name, value in dataclasses.asdict(flags).items() if name not in WHERE}
    state = run.meta_train(
        trainer,
        jax.random.key(flags.seed),
        flags.workdir,
        config=stored,
        absent=_absent(),
        num_meta_steps=flags.meta_steps,
        checkpoint_every=flags.checkpoint_every,
        validate=validate if families else None,
    )
    path = Path(flags.workdir) / "rule.safetensors"
    # One that is there is of this run, when it ended: its card says how it was made, and this call made nothing.
    # A rule that samples is of no use without its sampler, for which the front door has no place.
    alone = flags.learner in ("lft", "l2o") and not flags.sampler
    if alone and jax.process_index() == 0 and not path.exists():
        card = {**common.provenance([flags.seed]), "meta_training": stored}
        pretrained.save_rule(path, state.params, rule_of(flags), card)
    return state


if __name__ == "__main__":
    config.main(Config, meta_train)
