"""The reference work W1: one meta-step of an LFT against a frozen LeNet on 28x28x1 images, hinge loss, linf ball.

Images and weights of the LeNet are random, since the speed does not depend on them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lft_jax
from lft_jax import oracles
from lft_jax.meta.outer_loss import outer_losses
from lft_jax.tasks import UapFamily
from lft_jax.tasks.perturbation import AttackLoss
from lft_jax.tasks.recipe import constrained_oracle
from lft_jax.victims import apply_function, build_model

EPSILON = 0.3
KAPPA = 50.0  # so large that no image of a random LeNet reaches the margin
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Work:
    """Sizes of the work.

    Attributes:
      tasks: tasks per meta-step, each with 10 support and 10 query images.
      num_steps: fine-tuning steps (K).
      side: height and width of an image.
      hidden, layers: size of the rule.
      clip: whether perturbed images are clipped to [0, 1].
    """

    tasks: int = 8
    num_steps: int = 20
    side: int = 28
    hidden: int = 20
    layers: int = 2
    clip: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unclipped(UapFamily):
    """UAP tasks whose perturbed images are not clipped to [0, 1], so that the first layer is linear in theta."""

    def oracle(self, support):
        def attack(_):
            def losses(theta):
                return self.recipe.loss(self.logits_fn(support.images + theta), support.labels)

            return oracles.per_example_gradient(losses, num_examples=len(support.labels))

        return constrained_oracle(attack, self.constraint, support.images)

    def loss(self, theta, data):
        return jnp.mean(self.objective(self.logits_fn(data.images + theta[None]), data.labels))


def lenet_variables(side: int, seed: int = 0) -> dict:
    """Random weights of the library's LeNet."""
    images = jnp.zeros((1, side, side, 1), jnp.float32)
    return build_model("lenet", CLASSES).init(jax.random.key(seed), images)


def make_family(work: Work, variables: dict, dtype=np.float32) -> UapFamily:
    """UAP tasks of 400 random images and 10 classes, with one support and one query image per class."""
    generator = np.random.default_rng(0)
    images = generator.uniform(size=(400, work.side, work.side, 1)).astype(dtype)
    labels = np.arange(400) % CLASSES
    logits_fn = functools.partial(apply_function("lenet", CLASSES), variables)
    loss = AttackLoss("hinge", KAPPA)
    family = lft_jax.uap_family(
        images, labels, logits_fn, ways=CLASSES, shots=1, query_shots=1, epsilon=EPSILON, loss=loss
    )
    if work.clip:
        return family
    return Unclipped(**{field.name: getattr(family, field.name) for field in dataclasses.fields(family)})


def make_rule(work: Work) -> lft_jax.Rule:
    """The rule of arXiv 2009.13714."""
    return lft_jax.coordinate_lstm(work.hidden, work.layers)


def ours(work: Work, family: UapFamily, **options):
    """A function that makes one meta-step of the library, blocks until ready and returns the state.

    Options are those of `lft_jax.meta_trainer`.
    """
    trainer = lft_jax.meta_trainer(
        lft_jax.learners.lft(make_rule(work)),
        [family],
        num_steps=work.num_steps,
        tasks_per_family=work.tasks,
        meta_optimizer=optax.adam(1e-3),
        **options,
    )
    state = trainer.init(jax.random.key(0))

    def run():
        nonlocal state
        state, _ = trainer.step(state)
        return jax.block_until_ready(state)

    return run


def our_gradient(work: Work, family: UapFamily, params, keys):
    """The library's query loss, summed over steps, mean over tasks, and its meta-gradient."""
    learner = lft_jax.learners.lft(make_rule(work))

    def total(params):
        losses = outer_losses(learner, params, family, keys, num_steps=work.num_steps, steps=np.arange(work.num_steps))
        return jnp.sum(jnp.mean(losses, 0))

    return jax.jit(jax.value_and_grad(total))(params)
