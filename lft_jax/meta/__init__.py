"""Meta-training: what is learned, from which outer loss, by which meta-gradient, and how a run is kept on disk.

How the pieces compose::

    key --run_task--> one fine-tuned task --outer_losses--> loss after each step      `outer_loss`
    outer losses --backpropagation | evolution strategies--> meta-gradient            `gradients`, `evolution`
    (Learner, families) --meta_trainer--> init, step                                  `learners`, `trainer`
    MetaTrainer --run.train--> checkpoints, metrics, exact resume                     `run`, `checkpoints`

`imitation` gives a rule a teacher for its first meta-steps, and `theory` measures how far the meta-gradients of LFT
and L2O are apart. `run` and `checkpoints` are imported by name, since they load orbax and TensorBoard's writer.
"""

from lft_jax.meta import learners
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation
from lft_jax.meta.outer_loss import Unroll, run_task, step_weights
from lft_jax.meta.trainer import MetaState, MetaTrainer, Schedule, clipped_adam, init_state, meta_trainer, task_mesh

__all__ = [
    "EvolutionStrategies",
    "Imitation",
    "MetaState",
    "MetaTrainer",
    "PersistentEvolutionStrategies",
    "Schedule",
    "Unroll",
    "clipped_adam",
    "init_state",
    "learners",
    "meta_trainer",
    "run_task",
    "step_weights",
    "task_mesh",
]
