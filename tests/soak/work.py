"""What the soak does: attacks on models that come and go, and meta-training with checkpoints."""

import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import lft_jax
from lft_jax import evaluation, learners, models
from lft_jax.meta.run import train
from lft_jax.optimizers import coordinate_lstm

SHAPES = ((6, 6, 1), (6, 6, 3), (8, 8, 1))
WIDTHS = (3, 4, 5, 6, 8)
CLASSES, IMAGES, EPSILON = 3, 6, 0.1
PLAIN = lft_jax.AttackRecipe(augmentation=None)
#: What attacks take turns in: kinds of models, and of attacks. Each closure, object and shape has its own program;
#: models of flax share programs.
TURNS = (
    ("closure", "steps"),
    ("flax", "steps"),
    ("host", "patterns"),
    ("closure", "new optimizer"),
    ("wide", "steps"),
    ("closure", "patterns"),
    ("nnx", "steps"),
    ("host", "zeroth order"),
    ("flax", "rule"),
    ("closure", "steps"),
    ("host", "decision"),
    ("object", "steps"),
    ("flax", "new optimizer"),
    ("host", "steps"),
    ("closure", "patterns"),
    ("flax", "steps"),
    ("wide", "patterns"),
    ("nnx", "rule"),
    ("object", "patterns"),
    ("closure", "steps"),
)


class Net(nn.Module):
    """Two dense layers."""

    width: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, name="Dense_0")(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES, name="Dense_1")(x)


class Object:
    """The same, with its weights as attributes."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, x):
        return _logits(self.weights, x, jnp)


class Host(Object):
    """The same on NumPy arrays, with gradients."""

    def __call__(self, x):
        return _logits(self.weights, x, np)

    def pull_back(self, x):
        first, second = self.weights
        hidden = np.tanh(x.reshape(len(x), -1) @ first)

        def vjp(cotangent):
            return (((cotangent @ second.T) * (1 - hidden**2)) @ first.T).reshape(x.shape).astype(np.float32)

        return hidden @ second, vjp


def _logits(weights, x, numpy):
    return numpy.tanh(x.reshape(len(x), -1) @ weights[0]) @ weights[1]


class Soak:
    """The work of a soak.

    Attributes:
      models: weak references to what was attacked, meta-trained against or evaluated.
    """

    def __init__(self, workdir: Path, seed: int):
        self.workdir, self.rng = workdir, np.random.default_rng(seed)
        self.number, self.meta_steps, self.models = 0, 0, []
        self.images = {shape: self.rng.uniform(0.2, 0.8, (IMAGES, *shape)).astype(np.float32) for shape in SHAPES}
        self.tx, self.rule = optax.sgd(0.1), learners.lft(coordinate_lstm(2, 1, features="raw"))
        self.descent, self.trainer = learners.fixed("sgd", optax.sgd), None

    def alive(self) -> int:
        """How many models are still in memory."""
        self.models = [reference for reference in self.models if reference() is not None]
        return len(self.models)

    def attack(self) -> None:
        """One attack on a new model, by turns, which is deleted."""
        kind, how = TURNS[self.number % len(TURNS)]
        shape = SHAPES[self.number // len(TURNS) % len(SHAPES)]
        self.number += 1
        model, images = self._model(kind, shape), self.images[shape]
        options = {
            "steps": {"optimizer": self.tx, "recipe": PLAIN},
            "new optimizer": {"optimizer": optax.sgd(0.05), "recipe": PLAIN},
            "rule": {"optimizer": "uap-l1", "recipe": PLAIN},
            "patterns": {"oracle": "query", "max_queries": 300},
            "decision": {"oracle": "decision", "max_queries": 300},
            "zeroth order": {"optimizer": self.tx, "oracle": lft_jax.ZerothOrder(2, per_example=True)},
        }[how]
        options |= {"epsilon": EPSILON, "steps": 2, "progress": False, "key": jax.random.key(self.number)}
        result = lft_jax.universal_perturbation(model, images, **options)
        labels = np.asarray(model(images)).argmax(-1)
        lft_jax.attack_success_rate(model, images, labels, result.perturbation)

    def evaluate(self) -> None:
        """Fine-tunes and measures on one task of a new victim, whose weights are arguments, as those of stored ones."""
        keys = jax.random.split(jax.random.key(self.number), 1)
        family = self._family(jax.tree_util.Partial(_stored, self._model("object", SHAPES[0]).weights))
        evaluation.evaluate(self.descent, {"learning_rate": 0.1}, family, keys, num_steps=1, at=(1,))

    def train(self) -> None:
        """Two meta-steps of the run, with a checkpoint each; a restart of it."""
        if self.trainer is None:
            self.renew()
        self.meta_steps += 2
        options = {"num_meta_steps": self.meta_steps, "checkpoint_every": 1, "progress": False}
        train(self.trainer, jax.random.key(0), self.workdir, config={"program": "soak"}, **options)

    def renew(self) -> None:
        """Another victim to meta-train against."""
        options = {"num_steps": 2, "tasks_per_family": 2, "meta_optimizer": optax.adam(1e-3)}
        self.trainer = lft_jax.meta_trainer(self.rule, [self._family(self._model("object", SHAPES[0]))], **options)

    def _family(self, victim):
        images = self.rng.uniform(0.2, 0.8, (12, *SHAPES[0])).astype(np.float32)
        options = {"ways": 2, "query_shots": 1, "epsilon": EPSILON}
        return lft_jax.uap_family(images, np.arange(12) % CLASSES, victim, **options)

    def _width(self):
        """By turns too, so that all widths have met all shapes after 300 attacks, the warm-up."""
        return WIDTHS[self.number // (len(TURNS) * len(SHAPES)) % len(WIDTHS)]

    def _model(self, kind, shape):
        """A new model, of which a weak reference is kept."""
        size, width = int(np.prod(shape)), self._width() if kind == "wide" else 4
        weights = [self.rng.normal(size=sides).astype(np.float32) for sides in ((size, width), (width, CLASSES))]
        if kind in ("closure", "wide"):
            model = watched = lambda x: _logits(weights, x, jnp)
        elif kind == "object":
            model = watched = Object(weights)
        elif kind == "host":
            watched = Host(weights)
            model = models.host_classifier(models.HostModel(watched, watched.pull_back))
        elif kind == "flax":
            layers = {f"Dense_{i}": {"kernel": w, "bias": np.zeros(w.shape[1], w.dtype)} for i, w in enumerate(weights)}
            model = watched = models.from_flax(Net(width), {"params": layers})
        else:
            watched = nnx.Linear(size, CLASSES, rngs=nnx.Rngs(self.number))
            model = models.from_nnx(nnx.Sequential(_flat, watched))
        self.models.append(weakref.ref(watched))
        return model


def _stored(weights, x):
    return _logits(weights, x, jnp)


def _flat(x):
    return x.reshape(len(x), -1)
