"""Universal attacks of the literature, and simple ones, on the same proxies and with the same budget as ours.

A `Descent` is a method with its settings. In each of K steps it draws the `lft_jax.tasks.Proxies` of our own attacks
and differentiates its loss once on each of them; it starts from zeros, or from what a `PatternSearch` finds. A method
without steps searches for a pattern with as many evaluations as K steps take. `FAMILIES` has the grid of each method:
all settings of a grid share a few compiled programs.

  python -m experiments.studies.literature --results=results/public/grid/resnet20.json --number=5

prints the best settings of each grid by the mean success rate over results files that `public --grid` wrote.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import config
from lft_jax import models
from lft_jax.attack.universal import TILED
from lft_jax.base import check_at_least, check_name
from lft_jax.data import unit_range
from lft_jax.optimizers import hand_designed, periodic
from lft_jax.tasks import AttackLoss, AttackRecipe, Constraint, PatternSearch, Proxies
from lft_jax.tasks.perturbation import Batch, perturb
from lft_jax.tasks.recipe import initial_perturbation, search_queries, searched_in_turns

PROXIES = Proxies()
DIRECTIONS = ("sign", "normalized", "adam", "none")
_STATIC = {"static": True}


class Problem(NamedTuple):
    """One run of a method.

    Attributes:
      model: the classifier.
      images: `[N, H, W, C]` uint8, the support images.
      labels: `[N]` int32.
      epsilon: radius of the linf ball.
      steps: K, at least 1.
      draw: seed of the run.
      synthetic: whether the images are synthetic, since there are no others, with the classes that the model predicts.
    """

    model: models.Classifier
    images: np.ndarray
    labels: np.ndarray
    epsilon: float
    steps: int
    draw: int
    synthetic: bool = False


class Found(NamedTuple):
    """What a method found.

    Attributes:
      perturbation: `[H, W, C]`, in the ball.
      evaluations: of the model, on one image each.
      seconds: that the run took.
    """

    perturbation: np.ndarray
    evaluations: int
    seconds: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CosineLoss:
    """The cosine similarity of the logits of an image with and without the perturbation.

    Examples:
      >>> CosineLoss()(jnp.asarray([[3.0, 4.0]]), jnp.asarray([[4.0, 3.0]])).round(4).tolist()
      [0.96]

    References:
      Zhang et al. 2021, Data-free universal adversarial perturbation and black-box attack, ICCV.
    """

    def __call__(self, logits: Float[Array, "N classes"], clean: Float[Array, "N classes"]) -> Float[Array, " N"]:
        """`[N]`, of the logits of perturbed and of clean images."""
        return optax.losses.cosine_similarity(logits, clean, epsilon=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Descent:
    """A method and its settings. Called with a `Problem`, it runs, and returns what it `Found`.

    Attributes:
      loss: what is minimized on the proxies.
      direction: "sign" (of the momentum), "normalized" (the momentum divided by its root mean square), "adam", or
        "none" for no steps.
      step: first step size, in units of epsilon.
      decay: of the momentum, or of Adam's first moment.
      final: last step size relative to the first.
      batches: small batches that the proxies of a step are divided into, in a random order. There is an update for
        each of them, so that a gradient is of `30 / batches` images.
      aggregated: whether these updates are undone, and one along the mean of their gradients made instead (SGA). They
        are plain sign steps then.
      period: gradients are averaged over translations by multiples of this number of pixels; 0 for no average.
      search: what is searched for a start; None for `start`. Without steps, its numbers are shares of the budget.
      start: that of an `AttackRecipe`.
    """

    loss: AttackLoss | CosineLoss = dataclasses.field(default_factory=lambda: AttackLoss("cross_entropy"))
    direction: str = dataclasses.field(default="sign", metadata=_STATIC)
    step: float = 0.4
    decay: float = 0.0
    final: float = 1.0
    batches: int = dataclasses.field(default=1, metadata=_STATIC)
    aggregated: bool = dataclasses.field(default=False, metadata=_STATIC)
    period: int = dataclasses.field(default=0, metadata=_STATIC)
    search: PatternSearch | None = dataclasses.field(default=None, metadata=_STATIC)
    start: str = dataclasses.field(default="zeros", metadata=_STATIC)

    def __call__(self, problem: Problem) -> Found:
        """Runs the method.

        Raises:
          ValueError: for an unknown direction, numbers of steps or of batches below 1, or batches of unequal size.
        """
        check_name("direction", self.direction, DIRECTIONS)
        check_at_least("steps", problem.steps, 1)
        check_at_least("batches", self.batches, 1)
        if PROXIES.size % self.batches:
            raise ValueError(f"batches must divide the {PROXIES.size} proxies of a step, got {self.batches}.")
        shape, steps = problem.images.shape, problem.steps
        method = self
        evaluations = steps * self._of_step(shape)
        if self.direction == "none":
            assert self.search is not None
            method = dataclasses.replace(self, search=within(self.search, evaluations, shape))
            steps = evaluations = 0
        if method.search is not None:
            evaluations += search_queries(method._recipe(), shape)
        began = time.monotonic()
        theta = np.asarray(method._run(problem, steps))
        return Found(theta, evaluations, time.monotonic() - began)

    def _run(self, problem, steps):
        """The perturbation `[H, W, C]` after all steps.

        Passes of the model are programs of their own, which all methods share; one of everything would take each method
        longer to compile than to run.
        """
        images, labels = unit_range(jnp.asarray(problem.images)), jnp.asarray(problem.labels, jnp.int32)
        method = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if isinstance(x, float) else None), self)
        inner = dataclasses.replace(method, direction="sign", decay=jnp.float32(0), period=0, aggregated=False)
        support, function = Batch(images, labels), problem.model.traced()
        epsilon, constraint = jnp.float32(problem.epsilon), Constraint("linf", problem.epsilon)
        key_search, key_steps = jax.random.split(jax.random.key(problem.draw))
        theta = initial_perturbation(self.start, constraint, images.shape[1:], images.dtype, key_search)
        if self.search is not None:
            logits, recipe = functools.partial(_logits, function), self._recipe()

            def ask(program, *args):
                return program(logits, *args)

            theta = searched_in_turns(ask, support, recipe, constraint, theta, key_search)
        state = method._optimizer().init(theta) if steps else None
        for k, key in enumerate(jax.random.split(key_steps, steps) if steps else ()):
            size, ahead, grads = (epsilon, jnp.float32(k / steps)), theta, []
            for images, targets in zip(*self._batches(function, support, key, epsilon), strict=True):
                grads.append(_gradient(function, method.loss, images, targets, ahead))
                if self.aggregated:
                    ahead, _ = _updated(inner, ahead, inner._optimizer().init(ahead), grads[-1], *size)
                else:
                    ahead, state = _updated(method, ahead, state, grads[-1], *size)
            if self.aggregated:
                ahead, state = _updated(method, theta, state, jnp.mean(jnp.stack(grads), 0), *size)
            theta = ahead
        return theta

    def _batches(self, function, support, key, epsilon):
        """The proxies of a step and their targets, `[batches, size, ...]`: labels, or logits without perturbation.

        A whole image has its label, a jigsaw the one that the model predicts.
        """
        key_proxies, key_order = jax.random.split(key)
        images, sources = _proxies(support.images, key_proxies, epsilon)
        if self._is_cosine:
            targets = _logits(function, images)
        else:
            targets = support.labels[sources]
            if len(sources) < len(images):
                predicted = jnp.argmax(_logits(function, images[len(sources) :]), -1)
                targets = jnp.concatenate([targets, predicted.astype(jnp.int32)])
        if self.batches > 1:
            order = jax.random.permutation(key_order, PROXIES.size)
            images, targets = images[order], targets[order]
        return jax.tree.map(lambda x: x.reshape(self.batches, -1, *x.shape[1:]), (images, targets))

    def _of_step(self, shape):
        """Evaluations in a step: a gradient for each proxy, and the logits without perturbation that are needed."""
        return PROXIES.size + (PROXIES.size if self._is_cosine else PROXIES.jigsaws(shape[1:]))

    @property
    def _is_cosine(self):
        return isinstance(self.loss, CosineLoss)

    def _recipe(self):
        """Of the search, which has no images without perturbation to compare with."""
        loss = AttackLoss("cross_entropy") if isinstance(self.loss, CosineLoss) else self.loss
        return AttackRecipe(loss=loss, augmentation=PROXIES, search=self.search)

    def _optimizer(self):
        if self.direction == "adam":
            return hand_designed.adam(self.step, self.decay, self.final)
        steps = {"sign": hand_designed.projected_gradient, "normalized": hand_designed.normalized_gradient}
        parts = [periodic(self.period)] if self.period else []
        if self.aggregated:  # the momentum of this method is of gradients of equal size
            parts.append(optax.stateless(_of_equal_size))
        return optax.chain(*parts, steps[self.direction](self.step, self.decay, self.final))


def within(shares: PatternSearch, evaluations: int, shape: tuple[int, ...]) -> PatternSearch:
    """The search with these shares of tiles, waves and refinements that takes as many evaluations on the proxies.

    Args:
      shares: numbers of tiles, waves and refinements, up to a factor.
      evaluations: of the model, on one image each.
      shape: `(N, H, W, C)` of the support images.

    Examples:
      >>> within(PatternSearch(tiles=1, waves=0, refinements=1), 1000, (10, 32, 32, 3))
      PatternSearch(tiles=41, waves=0, refinements=40, periods=(2,), step=0.01)
    """
    recipes = [AttackRecipe(augmentation=PROXIES, search=PatternSearch(n, waves=0, refinements=0)) for n in (1, 2)]
    one, two = (search_queries(recipe, shape) for recipe in recipes)
    count = 1 + (evaluations - one) // (two - one)
    names = ("tiles", "waves", "refinements")
    parts = np.asarray([getattr(shares, name) for name in names])
    found = parts * count // np.sum(parts)
    found[np.argmax(parts > 0)] += count - np.sum(found)
    return dataclasses.replace(shares, **dict(zip(names, found.tolist(), strict=True)))


def _of_equal_size(updates, params=None):
    """Divides by the mean absolute value."""
    del params
    return jax.tree.map(lambda g: g / jnp.maximum(jnp.mean(jnp.abs(g)), 1e-30), updates)


@jax.jit
def _logits(function, images):
    return function(images)


@jax.jit
def _proxies(images, key, epsilon):
    return PROXIES(images, key, scale=epsilon)


@jax.jit
def _gradient(function, loss, images, targets, theta):
    return jax.grad(lambda theta: jnp.mean(loss(function(perturb(images, theta)), targets)))(theta)


@jax.jit
def _updated(method, theta, state, grads, epsilon, progress):
    """The next perturbation, in the ball, and the next state of the optimizer."""
    optimizer = optax.with_extra_args_support(method._optimizer())
    updates, state = optimizer.update(grads, state, theta, scale=epsilon, progress=progress)
    return jnp.clip(theta + updates, -epsilon, epsilon), state


_ENTROPY, _MARGIN = AttackLoss("cross_entropy"), AttackLoss("hinge", kappa=10.0)
_LOSSES = (_ENTROPY, _MARGIN)
_FINALS = (1.0, 0.1)


def _grid(base=Descent(), **values) -> tuple[Descent, ...]:
    combinations = itertools.product(*values.values())
    return tuple(dataclasses.replace(base, **dict(zip(values, each, strict=True))) for each in combinations)


def _searches(**kinds) -> tuple[Descent, ...]:
    shares = [PatternSearch(**kinds, refinements=refinements) for refinements in (0, 1, 3, 7)]
    losses = (*_LOSSES, AttackLoss("hinge"), AttackLoss("hinge", kappa=5.0), AttackLoss("dominant"))
    return _grid(Descent(direction="none"), search=shares, loss=losses)


_STEPS = {"step": (0.2, 0.4, 0.8, 1.6), "final": _FINALS}
_MOMENTUM = {**_STEPS, "decay": (0.5, 0.9)}

#: `{family: all of its settings}`, at least 20 of each.
#:
#: UAP-SGD: Shafahi et al. 2020, Universal adversarial training, arXiv 1811.11304, Algorithm 2 and section 4. SGA: Liu
#: et al. 2023, Enhancing generalization of universal adversarial perturbation through gradient aggregation, arXiv
#: 2308.06015, Algorithm 1. DF-UAP: Zhang et al. 2020, Understanding adversarial examples from the mutual influence of
#: images and perturbations, arXiv 2007.06189, section 6. Cosine-UAP: see `CosineLoss`.
FAMILIES: dict[str, tuple[Descent, ...]] = {
    "uap-sgd": _grid(**_STEPS, batches=(1, 3), direction=("sign", "normalized")),
    "sga": _grid(
        Descent(loss=AttackLoss("cross_entropy", beta=9.0), aggregated=True),
        **_STEPS,
        decay=(0.0, 0.9),
        batches=(3, 6),
    ),
    "df-uap": _grid(Descent(loss=_MARGIN, direction="adam"), **_MOMENTUM, batches=(1, 3)),
    "cosine-uap": _grid(Descent(loss=CosineLoss(), direction="adam"), **_MOMENTUM, batches=(1, 3)),
    "sign": _grid(**_MOMENTUM, loss=_LOSSES),
    "adam": _grid(Descent(direction="adam"), **_MOMENTUM, loss=_LOSSES),
    **{f"periodic-{period}": _grid(Descent(period=period), **_MOMENTUM, loss=_LOSSES) for period in (2, 4, 8, 16)},
    "tile": _searches(tiles=1, waves=0),
    "wave": _searches(tiles=0, waves=1),
}


#: `{family: its frozen setting}`, for all models: the best mean success rate over the choosing models, ResNet-20 and
#: MobileNet, in 20 steps from ten images. Of each grid, a part was measured, on one draw of the first model, and the
#: best of these on up to three draws of both: `results/public/grid/`, read by `best`.
FROZEN = {
    "uap-sgd": "uap-sgd direction=normalized step=0.4 final=0.1 batches=3",
    "sga": "sga step=0.8 decay=0.9 final=0.1 batches=3",
    "df-uap": "df-uap step=1.6 decay=0.5 final=0.1 batches=1",
    "cosine-uap": "cosine-uap step=0.8 decay=0.5 final=0.1 batches=1",
    "sign": "sign loss=cross_entropy step=0.8 decay=0.9 final=1",
    "adam": "adam loss=cross_entropy step=1.6 decay=0.5 final=0.1",
    "periodic-2": "periodic-2 loss=cross_entropy step=0.8 decay=0.9 final=0.1",
    "periodic-4": "periodic-4 loss=cross_entropy step=0.8 decay=0.9 final=0.1",
    "periodic-8": "periodic-8 loss=cross_entropy step=0.8 decay=0.9 final=0.1",
    "periodic-16": "periodic-16 loss=cross_entropy step=1.6 decay=0.9 final=0.1",
    "tile": "tile loss=dominant search=1:0:7",
    "wave": "wave loss=cross_entropy search=0:1:3",
}


def frozen() -> dict[str, Descent]:
    """The frozen setting of each family, and the same from other starts.

    With `-patterns` at the end of its name from the best pattern, with `-from-tile` from the learned tile, with steps
    that are as much shorter as those of our attack.
    """
    found = {family: settings(family)[name] for family, name in FROZEN.items()}
    stepping = {family: method for family, method in found.items() if method.direction != "none"}
    from_patterns = {f"{name}-patterns": dataclasses.replace(m, search=PatternSearch()) for name, m in stepping.items()}
    from_tile = {
        f"{name}-from-tile": dataclasses.replace(method, start="tile", step=TILED.step_scale * method.step)
        for name, method in stepping.items()
    }
    return found | from_patterns | from_tile


def name_of(family: str, method: Descent) -> str:
    """The name of a setting, without commas: the family and what its grid varies."""
    words = [family]
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if len({getattr(each, field.name) for each in FAMILIES[family]}) > 1:
            words.append(f"{field.name}={_shown(value)}")
    return " ".join(words)


def _shown(value):
    if isinstance(value, AttackLoss):
        return f"{value.kind}:{value.kappa:g}" if value.kind == "hinge" else value.kind
    if isinstance(value, PatternSearch):
        return f"{value.tiles}:{value.waves}:{value.refinements}"
    return value if isinstance(value, str) else f"{value:g}"


def settings(family: str) -> dict[str, Descent]:
    """All settings of a family, by name; a ValueError for an unknown family."""
    check_name("grid", family, FAMILIES)
    return {name_of(family, method): method for method in FAMILIES[family]}


def best(files: Sequence[Mapping[str, Any]], family: str, least: int = 1) -> list[tuple[str, float]]:
    """Settings of a family with the mean over results files of their success rates, best first.

    Args:
      files: results of `experiments.studies.public`, one for each model. Settings that one of them lacks are left out.
      family: one of `FAMILIES`.
      least: draws that a setting needs in each file.
    """
    rates = [
        {row["method"]: row["asr"] for row in results["rows"] if len(row["draw_asr"]) >= least} for results in files
    ]
    names = [name for name in settings(family) if all(name in each for each in rates)]
    means = [(name, float(np.mean([each[name] for each in rates]))) for name in names]
    return sorted(means, key=lambda found: -found[1])


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    results: tuple[str, ...] = config.option((), "Results files of `public --grid`, one for each model.")
    number: int = config.option(1, "Settings of each family to print.")
    draws: int = config.option(1, "Draws that a setting needs in each file.")


def show(flags: Config) -> None:
    """Prints the best settings of each family: mean success rate and name."""
    files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in flags.results]
    if not files:
        raise ValueError("results: expected at least one results file, got none.")
    for family in FAMILIES:
        for name, mean in best(files, family, flags.draws)[: flags.number]:
            print(f"{100 * mean:.2f}\t{name}")


if __name__ == "__main__":
    config.main(Config, show)
