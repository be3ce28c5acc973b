"""Meta-training: learners, outer losses, meta-gradients, the meta-step, and runs on disk.

How the pieces compose::

    key --run_task--> one fine-tuned task --outer_losses--> loss after each step      `outer_loss`
    outer losses --backpropagation | evolution strategies--> meta-gradient            `_gradients`, `evolution`
    (Learner, families) --meta_trainer--> init, step                                  `learners`, `trainer`,
                                                                                      `stages`, `mesh`
    MetaTrainer --run.train--> checkpoints, metrics, exact resume                     `run`, `checkpoints`, `_log`

`imitation` trains a rule to imitate another optimizer in the first meta-steps, and `theory` measures the gap between
the meta-gradients of LFT and L2O. `run` and `checkpoints` are not imported here: they load orbax and tensorboardX.
"""

from lft_jax.meta import learners
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation
from lft_jax.meta.mesh import task_mesh
from lft_jax.meta.outer_loss import Unroll, run_task, step_weights
from lft_jax.meta.stages import Stages
from lft_jax.meta.trainer import MetaState, MetaTrainer, clipped_adam, init_state, meta_trainer

__all__ = [
    "EvolutionStrategies",
    "Imitation",
    "MetaState",
    "MetaTrainer",
    "PersistentEvolutionStrategies",
    "Stages",
    "Unroll",
    "clipped_adam",
    "init_state",
    "learners",
    "meta_trainer",
    "run_task",
    "step_weights",
    "task_mesh",
]
