"""Flags of a meta-training run, in groups, and its presets. Also exports what defines the flags of other programs.

`experiments.meta_train.Config` inherits the groups, so that its flags stay flat: `--hidden=20`, `config.hidden`.
"""

import dataclasses

from lft_jax.cli.config import main, option, pairs, required, tune_process
from lft_jax.meta.outer_loss import STEP_WEIGHTS
from lft_jax.optimizers import rules
from lft_jax.optimizers.features import FEATURES
from lft_jax.oracles.directions import BASES

__all__ = [
    "PRESETS",
    "LearnerFlags",
    "MetaStepFlags",
    "PlaceFlags",
    "RunFlags",
    "TaskFlags",
    "main",
    "option",
    "pairs",
    "required",
    "tune_process",
]

LEARNERS = ("lft", "l2o", "adaptive_lft", "maml", "sign_maml", "reptile", "meta_sgd", "joint")
BASE_UPDATES = ("momentum", "none")
META_GRADIENTS = ("backprop", "es", "pes", "truncated_es")
REMAT = {"auto": None, "always": True, "never": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Identity of the run: victims, folder, seed."""

    victims: tuple[str, ...] = required("Folders of the victims to meta-train on; one family of tasks per victim.")
    workdir: str = required("Folder of the run: configuration, checkpoints, metrics. Resumed if it exists.")
    seed: int = option(0, "Seed of the run.")
    checkpoint_every: int = option(100, "Meta-steps between checkpoints, and between validations.")
    validation_tasks: int = option(20, "Meta-validation tasks per victim; 0 for none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerFlags:
    """The learner: what is meta-learned."""

    learner: str = option(
        "lft",
        "What is learned: an update rule on query images (lft) or on support images (l2o), a rule whose weights first "
        "adapt to the support images of a task (adaptive_lft), an initialization (maml and reptile, fine-tuned by PGD; "
        "sign_maml, by sign steps whatever the norm), an initialization with a learning rate per pixel (meta_sgd), or "
        "an initialization and an update rule (joint). There is no anil, since a perturbation has no last layer.",
        LEARNERS,
    )
    rule: str = option("spatial_lstm", "Update rule (lft, l2o, joint).", tuple(rules.RULES))
    features: tuple[str, ...] = option((), f"Features of the rule; its defaults if empty. Of {', '.join(FEATURES)}.")
    hidden: int = option(20, "Units of each LSTM layer.")
    layers: int = option(1, "LSTM layers.")
    base_update: str = option(
        "momentum",
        "Hand-designed update that the output of the rule is added to: momentum, along the sign of the gradient's "
        "momentum; or none.",
        BASE_UPDATES,
    )
    base_step: float = option(0.8, "Step of the base update, in units of epsilon, below 1.")
    base_decay: float = option(0.5, "Momentum of the base update.")
    output_scale: float | None = option(None, "Factor on the output of the rule; its default if not given.")
    tau: float = option(0.3, "Shape of a step of spectral_lstm: along the sign if small, along the gradient if large.")
    inner_step: float = option(
        0.2, "Step of the PGD of maml, sign_maml and reptile, in units of epsilon; first learning rate of meta_sgd."
    )
    adaptation_steps: int = option(5, "Steps by which adaptive_lft adapts its weights to the support set.")
    adaptation_rate: float = option(1e-2, "Learning rate of these steps.")
    sampler: bool = option(
        False, "Also learn the deviation of the random directions, per coordinate (QueryRNN of ZO-L2L; lft, l2o)."
    )
    second_order: bool = option(False, "Differentiate through the inner gradients too.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """The tasks: their size, the bound of a perturbation, the gradients, the losses and the start."""

    ways: int = option(10, "Classes of a task.")
    shots: int = option(1, "Support images per class.")
    query_shots: int = option(1, "Query images per class.")
    norm: str = option("linf", "Norm of the ball (linf, l2) or of the penalty (l1, l2).", ("linf", "l2", "l1"))
    epsilon: tuple[str, ...] = option((), "Radius per source, as source=radius,...; defaults for other sources.")
    penalty: float | None = option(None, "Weight of the norm in the loss, instead of a ball.")
    num_directions: int = option(
        0, "Random directions per zeroth-order gradient estimate (central differences); 0 for exact gradients."
    )
    resolution: int | None = option(
        None, "Directions lie in a subspace of this many dimensions along each side; no subspace if not given."
    )
    basis: str = option("tiles", "Basis of that subspace: constant on tiles, or low frequencies (dct).", BASES)
    smoothing: float = option(0.01, "Length of the finite differences, in units of the image range.")
    per_example: bool = option(False, "Use different directions for each support image, at the same number of queries.")
    loss: str = option(
        "cross_entropy", "Loss on the query images, which meta-training minimises.", ("hinge", "cross_entropy")
    )
    support_loss: str = option("cross_entropy", "Loss on the support images.", ("hinge", "cross_entropy"))
    kappa: float = option(0.0, "Hinge margin, in logits (kappa of Carlini & Wagner).")
    beta: float = option(12.0, "Bound on the cross-entropy of a query image, in nats.")
    task_start: str = option("zeros", "Initial perturbation of a task.", ("zeros", "random"))
    waves: int = option(0, "Evaluations per support image, 2 or more, that search plane waves for a start; 0 for none.")
    patterns: int = option(
        0, "Evaluations per image, 2 or more, that search tiles and waves for a start, instead of --waves; 0 for none."
    )
    augment: bool = option(True, "Augment the support images by shifts, mixing and noise, re-sampled in each step.")
    proxies: bool = option(
        False, "In each step use 30 images made from parts of the support images instead of --augment."
    )
    radius_factor: float = option(
        1.0, "Draw the radius of each task, log-uniform between the radius divided by this factor and multiplied by it."
    )
    images: int | None = option(None, "First images of each source, of which tasks are drawn; all if not given.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaStepFlags:
    """The unroll, the outer loss and its gradient, the meta-optimizer."""

    num_steps: int = option(20, "Fine-tuning steps of a task (K).")
    step_weights: str = option("uniform", "Weights of the steps in the outer loss.", tuple(STEP_WEIGHTS))
    tasks_per_family: int = option(1, "Tasks per victim and meta-step.")
    families_per_step: int | None = option(None, "Victims of a meta-step, which take turns; all if not given.")
    max_family_norm: float | None = option(
        None, "l2 norm that the meta-gradient of each victim is clipped to; no limit if not given."
    )
    meta_steps: int = option(1000, "Number of meta-steps.")
    meta_learning_rate: float = option(1e-2, "Peak learning rate of the meta-optimizer, Adam.")
    window: int | None = option(None, "Steps of truncated backpropagation; the whole unroll if not given.")
    meta_gradient: str = option(
        "backprop",
        "Backpropagation, or evolution strategies (es), which need no derivative of the outer loss and run on one "
        "device. With --num_directions no victim is then differentiated. Persistent ones (pes) make a meta-step from "
        "every --es_window steps of a task; truncated_es does so with a bias, for comparison.",
        META_GRADIENTS,
    )
    es_pairs: int = option(16, "Antithetic pairs of perturbed meta-parameters per victim and meta-step.")
    es_sigma: float = option(0.01, "Standard deviation of these perturbations.")
    es_window: int | None = option(None, "Fine-tuning steps per meta-step of pes, truncated_es; divides --num_steps.")
    curriculum: tuple[int, ...] = option(
        (), "Increasing numbers of fine-tuning steps, the last --num_steps, each for an equal share of the meta-steps."
    )
    imitation_steps: int = option(
        0, "First meta-steps, in which the rule is trained by backpropagation to imitate momentum PGD."
    )
    imitation_step: float = option(0.8, "Step of that PGD, in units of epsilon.")
    imitation_decay: float = option(0.5, "Momentum of that PGD.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceFlags:
    """Machine and devices. They do not change the numbers, so a run may continue elsewhere."""

    data_dir: str | None = option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")
    remat: str = option(
        "auto",
        "Whether to recompute steps in the backward pass instead of storing them; auto: if one task needs it to fit.",
        tuple(REMAT),
    )
    memory: float = option(512.0, "MiB that a device may store for a backward pass.")
    devices: int = option(0, "Devices that share the tasks; 0: as many as divide --tasks_per_family.")
    coordinator: str | None = option(
        None, "host:port of the first of several processes, or auto to ask the cluster (SLURM, TPU, Open MPI)."
    )
    num_processes: int | None = option(None, "Number of processes, with --coordinator=host:port.")
    process_id: int | None = option(None, "Number of this process, from 0.")


_VICTIMS = tuple(
    f"victims/{source}_{name}"
    for source in ("mnist", "cifar10")
    for name in (*(f"small_cnn_{seed}" for seed in range(4)), "lenet_4", "lenet_5")
)
_SHIPPED = {"victims": _VICTIMS, "meta_steps": 150, "validation_tasks": 0}
# Networks of the kinds that users have, with batch norm and residual connections, from three sources.
_DEEP_VICTIMS = (
    "public/efficientnet_lite2",
    *(f"victims/{name}" for name in ("cifar10_resnet20_0", "mnist_resnet20_0", "cifar10_mobilenet_0")),
    *(f"victims/{name}" for name in ("cifar10_resnet14_0", "mnist_mobilenet_0", "cifar10_vit_0")),
    *(f"victims/{name}" for name in ("cifar10_resnet20_adversarial_0", "mnist_small_cnn_0")),
    *(f"victims/{name}" for name in ("cifar10_mobilenet_1", "cifar10_small_cnn_0")),
)
#: Settings by which the shipped rules were meta-trained (except their seeds): `--preset=uap_linf --workdir=...`.
PRESETS = {
    "spatial_linf": _SHIPPED,
    # Radii from half to twice the customary ones, starts among patterns, and few steps, which are the costly part. The
    # rule is shipped with three times this step (docs/decisions/026-longer-steps.md).
    "uap_linf": {
        "victims": _DEEP_VICTIMS,
        "rule": "spectral_lstm",
        "hidden": 8,
        "base_decay": 0.9,
        "epsilon": ("cifar10=0.0314", "mnist=0.2", "imagenet_sample=0.0392"),
        "radius_factor": 2.0,
        "images": 5000,
        "proxies": True,
        "patterns": 25,
        "query_shots": 4,
        "beta": 5.0,
        "num_steps": 12,
        "step_weights": "few",
        "families_per_step": 2,
        "max_family_norm": 1.0,
        "meta_steps": 110,
        "meta_learning_rate": 5e-3,
        "checkpoint_every": 10,
        "validation_tasks": 0,
    },
    "uap_l2": {**_SHIPPED, "norm": "l2"},
    # The tasks of arXiv 2009.13714: two classes, two images per class, hinge, a penalty on the l1 norm. Margin, base
    # step and step weights were chosen on meta-validation victims: without a margin the norm outweighs success.
    "uap_l1": {
        **_SHIPPED,
        "meta_steps": 120,
        "ways": 2,
        "shots": 2,
        "query_shots": 5,
        "norm": "l1",
        "penalty": 0.01,
        "loss": "hinge",
        "support_loss": "hinge",
        "kappa": 5.0,
        "step_weights": "linear",
        "base_step": 0.3,
    },
    # Chosen on meta-validation victims. The hinge, since with the cross-entropy a single victim that is fooled with
    # high confidence outweighs all others. A small base step, since large ones undo the wave.
    "uap_linf_query": {
        **_SHIPPED,
        "meta_steps": 75,
        "meta_learning_rate": 3e-3,
        "loss": "hinge",
        "num_directions": 6,
        "per_example": True,
        "resolution": 16,
        "smoothing": 0.05,
        "waves": 160,
        "base_step": 0.1,
        "base_decay": 0.9,
    },
}
