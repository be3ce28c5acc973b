"""Numbers of a small run, to compare machines' precisions, versions of Python and JAX, and two runs of one seed.

    python -m tests.trust.golden --output=tests/trust/golden.json

A rule is meta-trained, evaluated, and attacks a model, as does a shipped rule. What draws random numbers of the dtype
of its data is under "drawn", which single and double precision do not share.
"""

import argparse
import dataclasses
import sys

import tests.conftest  # noqa: F401  (flags of XLA, strict promotion of dtypes)

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import (
    AttackRecipe,
    Augmentation,
    Episode,
    UapFamily,
    coordinate_lstm,
    learned_fine_tuner,
    learners,
    meta_trainer,
    uap_family,
    universal_perturbation,
)
from lft_jax.cli import provenance
from lft_jax.evaluation import evaluate
from lft_jax.meta import clipped_adam

KEY = jax.random.key(7)
RULE = coordinate_lstm(2, 1, features=("raw", "momentum"), output_scale=0.05)
LFT = learners.lft(RULE)
PLAIN = AttackRecipe(augmentation=None)
CHANGED = AttackRecipe(augmentation=Augmentation(), start="random")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed(UapFamily):
    """Tasks that all have the same images."""

    def sample(self, key):
        del key
        return Episode(self.batch(jnp.arange(3, dtype=jnp.int32)), self.batch(jnp.arange(3, 9, dtype=jnp.int32)))


def victim(weights, images):
    return jnp.tanh(images.reshape(len(images), -1) @ weights[0]) @ weights[1]


def values(dtype) -> dict:
    """The numbers, in this dtype; float64 needs `jax.enable_x64`."""
    with jax.numpy_dtype_promotion("standard"):  # for Adam of optax
        return _values(dtype)


def _values(dtype):
    rng = np.random.default_rng(0)
    weights, pool = [rng.normal(size=shape) for shape in ((16, 8), (8, 3))], rng.uniform(0.2, 0.8, (200, 4, 4, 1))
    predicted = np.argmax(np.tanh(pool.reshape(200, 16) @ weights[0]) @ weights[1], 1)
    rows = np.stack([np.flatnonzero(predicted == c)[:4] for c in range(3)], 1).ravel()  # that are right when clean
    images, labels = pool[rows].astype(dtype), predicted[rows]
    model = jax.tree_util.Partial(victim, [jnp.asarray(x, dtype) for x in weights])
    drawn = uap_family(images, labels, model, ways=2, query_shots=2, epsilon=0.1, loss="cross_entropy", recipe=CHANGED)
    fixed = Fixed(**{f.name: getattr(drawn, f.name) for f in dataclasses.fields(drawn)}).with_recipe(
        augmentation=None, start="zeros"
    )
    found = {"fixed": _run(fixed, PLAIN, dtype), "drawn": _run(drawn, CHANGED, dtype)}
    result = universal_perturbation(model, images, labels, epsilon=0.1, steps=3, recipe=PLAIN, progress=False)
    return {**found, "shipped": _described(result)}


def _run(family, recipe, dtype):
    """Two meta-steps, an evaluation and an attack."""
    trainer = meta_trainer(LFT, [family], num_steps=3, tasks_per_family=2, meta_optimizer=clipped_adam(0.01, 10))
    state, metrics = trainer.init(KEY), []
    for _ in range(2):
        state, found = trainer.step(state)
        metrics += [found["loss"], found["grad_norm"]]
    evaluated = evaluate(LFT, state.params, family, jax.random.split(KEY, 2), num_steps=3, at=(1, 3))
    options = {"epsilon": 0.1, "steps": 2, "recipe": recipe, "key": KEY, "progress": False}
    result = universal_perturbation(
        family.logits_fn,
        np.asarray(family.images),
        np.asarray(family.labels),
        optimizer=learned_fine_tuner(state.params, RULE),
        **options,
    )
    return {
        "meta": _numbers(metrics),
        "weights": [_numbers(leaf) for leaf in jax.tree.leaves(state.params)],
        "evaluation": {name: _numbers(found) for name, found in evaluated.items()},
        "attack": _described(result),
    }


def _described(result):
    """All of a result but its time."""
    history = {name: _numbers(column) for name, column in result.history.items()}
    return {"perturbation": _numbers(result.perturbation), "history": history, "queries": result.queries}


def _numbers(array):
    return np.asarray(array, np.float64).ravel().tolist()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.trust.golden", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", required=True, help="JSON file for the numbers")
    parser.add_argument("--single", action="store_true", help="in single precision only")
    given = parser.parse_args(arguments)
    content = {"float32": values(np.float32)}
    if not given.single:
        with jax.enable_x64(True):
            content["float64"] = values(np.float64)
        content["provenance"] = provenance.describe([7])
    provenance.write_json(given.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
