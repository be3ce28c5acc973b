r"""Meta-trains a fine-tuner on stored victims, which may differ in architecture, image size and source.

All of them share one set of meta-parameters:

  python -m experiments.meta_train --workdir=runs/lft \
    --victims=runs/victims/digits_small_cnn_0,runs/victims/mnist_5k_lenet_0 --epsilon=digits=0.25,mnist_5k=0.3

Run it again to resume. Exit codes: 0 success; 1 error; 130 Ctrl-C; 143 SIGTERM, once the meta-step is done and saved.
However a run ends, it loses at most the meta-steps since its last checkpoint.

Train victims with experiments.train_victim. `--preset=uap_linf` repeats the meta-training of the shipped rule.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from experiments import common, config
from lft_jax import evaluation, learners, meta, pretrained, tasks
from lft_jax.base import Learner, check_name
from lft_jax.cli import provenance
from lft_jax.evaluation import baselines, comparison
from lft_jax.meta import run
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation
from lft_jax.optimizers import rules, sampling

#: Learners of an initialization, which need victims of one image shape.
CONGRUOUS = ("maml", "sign_maml", "reptile", "meta_sgd", "joint")
#: Learners of an update rule.
RULE_LEARNERS = ("lft", "l2o", "adaptive_lft", "joint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.PlaceFlags, config.MetaStepFlags, config.TaskFlags, config.LearnerFlags, config.RunFlags):
    """Command-line flags, from `experiments.config`."""


#: Flags that do not change the numbers of a run, so that it may continue with others.
WHERE = ("workdir", *(field.name for field in dataclasses.fields(config.PlaceFlags)))


def tasks_of(flags: Config) -> common.TaskConfig:
    """The tasks that the flags describe."""
    names = {field.name for field in dataclasses.fields(common.TaskConfig)} - {"epsilon", "start"}
    epsilon = config.pairs("epsilon", flags.epsilon)
    return common.TaskConfig(epsilon=epsilon, start=flags.task_start, **{name: getattr(flags, name) for name in names})


def learner_of(flags: Config) -> Learner:
    """The learner that the flags describe."""
    check_name("learner", flags.learner, config.LEARNERS)
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


def rule_of(flags: Config) -> rules.UpdateRule:
    """The update rule that the flags describe."""
    check_name("rule", flags.rule, rules.RULES)
    if flags.rule == "spectral_lstm":
        return rules.spectral_lstm(flags.hidden, step=flags.base_step, decay=flags.base_decay, tau=flags.tau)
    options: dict[str, Any] = {"features": flags.features} if flags.features else {}
    if flags.output_scale is not None:
        options["output_scale"] = flags.output_scale
    if check_name("base_update", flags.base_update, config.BASE_UPDATES) == "none":
        options["base_update"] = None
    else:
        options["base_update"] = rules.MomentumUpdate(flags.base_step, flags.base_decay)
    return rules.RULES[flags.rule](flags.hidden, flags.layers, **options)


def families_of(flags: Config, split: str) -> list[tasks.UapFamily]:
    """One family of tasks for each victim."""
    return [common.family_of(path, split, tasks_of(flags), flags.data_dir) for path in flags.victims]


def meta_optimizer_of(flags: Config) -> optax.GradientTransformation:
    """The meta-optimizer that the flags describe."""
    return meta.clipped_adam(flags.meta_learning_rate, flags.meta_steps)


def check(flags: Config) -> None:
    """Raises a ValueError for flags that have no effect or contradict each other, and for a run that learns nothing."""
    _check_effect(flags)
    _check_losses(flags)
    _check_schedule(flags)


def _check_effect(flags):
    """Raises a ValueError for a flag that differs from its default and has no effect."""
    learned, es = flags.learner in RULE_LEARNERS, flags.meta_gradient != "backprop"
    spectral = flags.rule == "spectral_lstm"
    windows = flags.meta_gradient in ("pes", "truncated_es")
    idle = {
        ("rule", "features", "hidden", "layers", "base_update", "output_scale"): (not learned, "learns no update rule"),
        ("features", "layers", "base_update", "output_scale"): (spectral, "has features and layers of its own"),
        ("tau",): (not spectral, "has no tau, without --rule=spectral_lstm"),
        ("augment",): (flags.proxies, "uses proxies instead"),
        ("waves", "patterns"): (flags.waves > 0 and flags.patterns > 0, "searches for one start"),
        ("base_step", "base_decay"): (not learned or flags.base_update == "none", "has no base update"),
        ("adaptation_steps", "adaptation_rate"): (flags.learner != "adaptive_lft", "does not adapt its weights"),
        ("inner_step",): (learned, "fine-tunes by its own rule"),
        ("step_weights", "window", "second_order"): (flags.learner == "reptile", "uses no derivative of an unroll"),
        ("second_order",): (flags.learner == "sign_maml", "steps along a sign, whose derivative is 0"),
        ("es_pairs", "es_sigma"): (not es, "does not use evolution strategies, without --meta_gradient=es"),
        ("es_window",): (not windows, "has no windows, without --meta_gradient=pes or truncated_es"),
        ("curriculum",): (windows, f"has short windows already, with --meta_gradient={flags.meta_gradient}"),
        ("imitation_steps",): (not learned, "learns no update rule"),
        ("imitation_step", "imitation_decay"): (
            not flags.imitation_steps,
            "imitates nothing, without --imitation_steps",
        ),
        ("sampler",): (flags.learner not in ("lft", "l2o"), "has no sampler of directions"),
        ("resolution", "basis", "smoothing", "per_example", "sampler"): (
            not flags.num_directions,
            "uses exact gradients, without --num_directions",
        ),
        ("basis",): (flags.resolution is None, "has no subspace of directions, without --resolution"),
        ("beta",): (flags.loss != "cross_entropy", "minimises no cross-entropy of query images"),
        ("kappa",): ("hinge" not in (flags.loss, flags.support_loss), "minimises no hinge"),
        ("epsilon",): (flags.penalty is not None, "has a penalty instead of a ball"),
    }
    for names, (applies, reason) in idle.items():
        for name in names if applies else ():
            if getattr(flags, name) != Config.__dataclass_fields__[name].default:
                raise ValueError(f"{name}: {flags.learner} {reason}; leave it out.")


def _check_losses(flags):
    if "update" in flags.features:
        raise ValueError("features: update is a feature of samplers (--sampler), not of rules.")
    if flags.learner == "adaptive_lft" and (flags.meta_gradient != "backprop" or flags.num_directions):
        name = "num_directions" if flags.meta_gradient == "backprop" else "meta_gradient"
        raise ValueError(f"{name}: adaptive_lft differentiates the loss of the support images; leave it out.")


def _check_schedule(flags):
    windows = flags.meta_gradient in ("pes", "truncated_es")
    if windows and (flags.es_window is None or flags.es_window < 1 or flags.num_steps % flags.es_window):
        raise ValueError(
            f"es_window: {flags.meta_gradient} needs a window that divides num_steps = {flags.num_steps}, "
            f"got {flags.es_window}."
        )
    if windows and flags.step_weights == "final" and flags.es_window < flags.num_steps:
        raise ValueError("step_weights: with final, all windows except the last have no loss; choose other weights.")
    if flags.curriculum:
        ascending = all(a < b for a, b in itertools.pairwise((0, *flags.curriculum)))
        if not ascending or flags.curriculum[-1] != flags.num_steps or len(flags.curriculum) > flags.meta_steps:
            raise ValueError(
                f"curriculum: expected at most meta_steps = {flags.meta_steps} increasing numbers from at least 1 to "
                f"num_steps = {flags.num_steps}, got {flags.curriculum}."
            )
    if not 0 <= flags.imitation_steps < flags.meta_steps:
        raise ValueError(
            f"imitation_steps: expected fewer than meta_steps = {flags.meta_steps}, got {flags.imitation_steps}."
        )
    if flags.imitation_steps and flags.base_update == "momentum":
        own, teachers = (flags.base_step, flags.base_decay), (flags.imitation_step, flags.imitation_decay)
        if own == teachers:
            raise ValueError(
                f"imitation_steps: the base update (step, decay) = {own} equals the update to imitate; choose "
                "--base_update=none, or other settings."
            )
    initializes = flags.learner in ("maml", "sign_maml", "meta_sgd")
    cut = flags.window is not None and flags.window < flags.num_steps
    if initializes and flags.step_weights == "final" and cut:
        raise ValueError(
            f"window: the loss of the last of {flags.num_steps} steps, truncated to {flags.window} steps, has no "
            f"gradient for the initialization of {flags.learner}; choose other step weights, or a longer window."
        )


def meta_gradient_of(flags: Config) -> EvolutionStrategies | PersistentEvolutionStrategies | None:
    """The evolution strategies that the flags describe; None for backpropagation."""
    if check_name("meta_gradient", flags.meta_gradient, config.META_GRADIENTS) == "backprop":
        return None
    for name in ("second_order", "window"):
        if getattr(flags, name):
            raise ValueError(f"{name}: evolution strategies use no derivatives; leave it out.")
    if flags.meta_gradient == "es":
        return EvolutionStrategies(flags.es_pairs, flags.es_sigma)
    accumulate = flags.meta_gradient == "pes"
    return PersistentEvolutionStrategies(flags.es_window, flags.es_pairs, flags.es_sigma, accumulate)


def curriculum_of(flags: Config) -> list[tuple[int, int]]:
    """Pairs (fine-tuning steps, meta-steps) that precede the meta-steps with `num_steps` fine-tuning steps."""
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
    """The mesh of devices that share the tasks; None for one device."""
    if flags.meta_gradient != "backprop":
        if flags.devices > 1 or jax.process_count() > 1:
            raise ValueError(
                f"meta_gradient: {flags.meta_gradient} runs on one device in one process; leave out devices and "
                "coordinator."
            )
        return None
    count = flags.devices or max(n for n in range(1, jax.device_count() + 1) if flags.tasks_per_family % n == 0)
    if count < jax.device_count() and jax.process_count() > 1:
        raise ValueError(
            f"tasks_per_family: {flags.tasks_per_family} tasks cannot be divided evenly among the "
            f"{jax.device_count()} devices of {jax.process_count()} processes; choose a multiple."
        )
    return None if count == 1 else meta.task_mesh(count)


#: Names of flags in runs and cards of version 0.1, with their present names.
RENAMED = {
    "start": "base_update",
    "start_step": "base_step",
    "start_decay": "base_decay",
    "queries": "query_shots",
    "weights": "step_weights",
}


#: Flags of version 0.2 that are gone, with the values that stand for their absence.
REMOVED = {"second_loss": (None, "none")}


def present_flags(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration under the present names; flags that it lacks have their value from before they existed.

    Raises:
      ValueError: for a flag that is gone, unless it was not used.
    """
    for name, absent in REMOVED.items():
        if name in stored and stored[name] not in absent:
            raise ValueError(f"{name}: only version 0.2 has this flag, got {stored[name]!r}; meta-train without it.")
    stored = {name: value for name, value in stored.items() if name not in REMOVED}
    fields = dataclasses.fields(Config)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING and f.name not in WHERE}
    return {**defaults, "augment": False, **{RENAMED.get(name, name): value for name, value in stored.items()}}


def flags_of(stored: Mapping[str, Any], workdir: str = "") -> Config:
    """The flags in the configuration of a run or the card of a rule."""
    stored = present_flags(stored)
    lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
    return Config(**{**stored, **lists, "workdir": workdir})


def load_learned(name: str) -> tuple[Config, comparison.Learned]:
    """Flags, learner and meta-parameters of a run (by its folder) or of a shipped rule (by its name)."""
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
    """Runs or resumes the meta-training that the flags describe.

    Raises:
      MetaTrainingStopped: for SIGTERM, in the main thread; the run is saved.
    """
    check(flags)
    if flags.coordinator is not None:
        address = None if flags.coordinator == "auto" else flags.coordinator
        jax.distributed.initialize(address, flags.num_processes, flags.process_id)
    learner = learner_of(flags)
    stored = {name: value for name, value in dataclasses.asdict(flags).items() if name not in WHERE}
    main = threading.current_thread() is threading.main_thread()
    with run.stop_on_sigterm() if main else contextlib.nullcontext() as stop:
        try:
            state = run.train(
                trainer_of(flags, learner),
                jax.random.key(flags.seed),
                flags.workdir,
                config=stored,
                upgrade=present_flags,
                num_meta_steps=flags.meta_steps,
                checkpoint_every=flags.checkpoint_every,
                validate=_validation(flags, learner) if flags.validation_tasks else None,
                stop=stop,
            )
        except run.MetaTrainingStopped as stopped:
            print(stopped, file=sys.stderr)
            raise
    path = Path(flags.workdir) / "rule.safetensors"
    # A rule that is there already was stored by the call that made it, and its card describes that call. A rule with a
    # sampler is not stored, since `universal_perturbation` takes no sampler.
    alone = flags.learner in ("lft", "l2o") and not flags.sampler
    if alone and jax.process_index() == 0 and not path.exists():
        card = {**provenance.describe([flags.seed]), "meta_training": stored}
        _store_rule(path, state.params, rule_of(flags), card)
    return state


def _store_rule(path, params, rule, card):
    """Stores a rule: its card first, so that one with weights is complete whenever the process is killed."""
    scratch = path.with_name(f".{path.stem}.partial")  # `run.train` deletes one that is left
    pretrained.save_rule(scratch / path.name, params, rule, card)
    for suffix in (".json", path.suffix):
        os.replace((scratch / path.name).with_suffix(suffix), path.with_suffix(suffix))
    shutil.rmtree(scratch)


def trainer_of(flags: Config, learner: Learner) -> meta.MetaTrainer:
    """The trainer that the flags describe."""
    remat = config.REMAT[check_name("remat", flags.remat, config.REMAT)]
    return meta.meta_trainer(
        learner,
        families_of(flags, "train"),
        num_steps=flags.num_steps,
        tasks_per_family=flags.tasks_per_family,
        families_per_step=flags.families_per_step,
        max_family_norm=flags.max_family_norm,
        meta_optimizer=meta_optimizer_of(flags),
        unroll=meta.Unroll(flags.step_weights, flags.window, remat, flags.memory),
        meta_gradient=meta_gradient_of(flags),
        stages=meta.Stages(curriculum_of(flags), imitation_of(flags)),
        mesh=mesh_of(flags),
    )


def _validation(flags, learner):
    """A function `params -> {name: number}`: the ASR on meta-validation tasks of all victims."""
    families = families_of(flags, "validation")
    keys = jax.random.split(jax.random.key(flags.seed), flags.validation_tasks)

    def validate(params):
        options = {"num_steps": flags.num_steps, "at": (flags.num_steps,)}
        asr = [float(evaluation.evaluate(learner, params, f, keys, **options)["asr"].mean()) for f in families]
        return {"validation_asr": sum(asr) / len(asr), "validation_asr_by_victim": asr}

    return validate


if __name__ == "__main__":
    config.main(Config, meta_train, presets=config.PRESETS, renamed=RENAMED)
