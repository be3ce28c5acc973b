"""The steps of a `PatternAttack`: a race in the first one, changes of its winner in all, a comparison in the last."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax._bounded import BoundedJit
from lft_jax._present import present
from lft_jax.attack._run import Run
from lft_jax.attack._start import fold_in
from lft_jax.attack._steps import Problem
from lft_jax.attack.result import Paused
from lft_jax.models import Classifier
from lft_jax.models.classifier import HostModel, host_classifier
from lft_jax.oracles import ZerothOrder
from lft_jax.tasks.pattern_attack import Found, PatternAttack, race_evaluations
from lft_jax.tasks.perturbation import Constraint
from lft_jax.tasks.proxies import Proxies
from lft_jax.tasks.recipe import AttackRecipe, resolved_loss
from lft_jax.tasks.uap import attack_metrics

_CALL = 50  # images in one call of the model
_WORTH = 4  # evaluations for changes, for each one of the comparison at the end
_PROXIES = Proxies()  # that the winner of the race and the pattern at the end are compared on
_KEY_END = 2**32 - 3  # folded into the key of a run, for these


def pattern_attack(
    oracle: str | ZerothOrder | PatternAttack,
    estimator: ZerothOrder | None,
    optimizer: Any,
    recipe: AttackRecipe | None,
    constraint: Constraint,
) -> PatternAttack | None:
    """The attack in pattern space that an oracle stands for; None for steps along gradients or estimates of them."""
    plain, ball = recipe is None and isinstance(optimizer, str) and optimizer == "uap-linf", constraint.penalty is None
    if not isinstance(oracle, PatternAttack) and oracle != "decision":
        named = estimator is not None and not isinstance(oracle, ZerothOrder)
        return PatternAttack() if named and plain and ball else None
    if not (plain and ball):
        wrong = f"optimizer={optimizer!r} and recipe={recipe!r}" if ball else f"a penalty of {constraint.penalty!r}"
        raise ValueError(
            "oracle: patterns of full contrast are searched in a ball, without an optimizer and without a recipe; got "
            f"{wrong} with oracle={oracle!r}."
        )
    return oracle.check() if isinstance(oracle, PatternAttack) else PatternAttack(decision=True)


def chosen_images(attack: PatternAttack, evaluations: int, available: int, key: jax.Array) -> np.ndarray:
    """The numbers of the support images that an attack uses, in their order."""
    count = attack.images(evaluations, available)
    return np.sort(np.asarray(jax.random.permutation(key, available))[:count])


def as_optimizer(attack: PatternAttack, problem: Problem) -> optax.GradientTransformation:
    """What a run that stopped is compared with: the state of an attack."""
    count, classes = problem.clean.shape

    def init(params: Any) -> Any:
        return attack.start(params.shape, count, classes)

    return optax.GradientTransformation(init, optax.identity().update)  # only its state is compared


class Attacker:
    """An attack on a model.

    Attributes:
      attack: its settings.
      classifier: the model; with `attack.decision`, `decided(model)`.
      problem: constants of the run.
      evaluations: of the model on one image in all, those of the clean images included.
      steps: K, equal shares of the changes; the first one has the race.
      limit: largest number of evaluations, or None.
    """

    def __init__(self, attack, classifier, problem, evaluations, steps, limit):
        self.attack, self.problem, self.evaluations, self.steps, self.limit = attack, problem, evaluations, steps, limit
        self.labels, self.target = np.asarray(problem.batch.labels), resolved_loss(problem.recipe).target
        self.images, self.call = np.asarray(problem.batch.images), _called_quickly(classifier, problem.batch.images)
        scale = np.asarray(problem.constraint.scale(problem.batch.images[0]))
        self.size = np.full(self.images.shape[1:], scale, self.images.dtype)

    def take_steps(
        self,
        key: jax.Array,
        run: Run,
        start: Any,
        report: Callable[[dict[str, float]], object],
        callback: Callable[[dict[str, float]], bool | None] | None,
    ) -> None:
        """Runs the attack, or goes on with it.

        Args:
          key: PRNG key of the run.
          run: takes the perturbations.
          start: None for a race; a perturbation `[H, W, C]` to change; or the `Paused` of a run that stopped.
          report, callback: called with each entry of the history, and `step`; the run ends if `callback` returns True.
        """
        count, given, done = len(self.labels), None, 0
        found = self.attack.start(self.size.shape, *self.problem.clean.shape)
        left, repeated = self.evaluations - count, 0
        if isinstance(start, Paused):
            # The clean images were evaluated again.
            self.size, found, done, repeated = np.abs(np.asarray(start.theta)), start.state, start.done, count
        elif start is not None:
            given, self.size = np.asarray(start), np.abs(np.asarray(start))
            if not self.size.any():
                raise ValueError(
                    "start must not be 0 everywhere where only signs of its coordinates change, as by queries without "
                    "an optimizer; leave it out for a race of patterns."
                )
        winner = start.start if isinstance(start, Paused) else None
        race = start is None or winner is not None
        rounds = self.attack.rounds(left, count) if race else [(1, count)]  # that of a given start
        before = count + race_evaluations(rounds)
        reserved = self._reserved(self.evaluations - before) if race else 0
        changes, last = max(1, self.evaluations - before - reserved), self.limit or self.evaluations + repeated
        queries = int(run.history[-1]["queries"]) + repeated if done else before
        for k in range(done, self.steps):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(fold_in(key, k))).ravel())
            if k == 0:
                found = self._first(given, rounds, rng, functools.partial(self._see, run))
                winner = found.pattern * self.size if race else None
            end = before + repeated + changes * (k + 1) // self.steps
            try:
                while queries < end and queries + count + reserved <= last:
                    progress = (queries - repeated - before) / changes
                    found, spent = self.attack.changed(found, self.ask, self.labels, rng, progress, self.target)
                    queries += spent
            except BaseException:
                theta, entry = self._measured(found)
                run.see(theta, entry["asr"], entry["loss"])  # with the changes of this step that were kept
                raise
            theta, entry = self._measured(found)
            outcome = theta
            if reserved and k == self.steps - 1:
                run.see(theta, entry["asr"], entry["loss"])  # should the model fail now
                outcome, entry, spent = self._better(winner, theta, entry, fold_in(key, _KEY_END))
                queries += spent
            run.add(Paused(theta, found, k + 1, winner), {**entry, "queries": queries}, outcome)
            report({"step": k + 1, **run.history[-1]})
            if callback is not None and callback({"step": k + 1, **run.history[-1]}):
                break

    def ask(self, patterns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The logits `[B, R, classes]` of some images with patterns `[B, H, W, C]`."""
        pairs = np.asarray([(pattern, row) for pattern in range(len(patterns)) for row in rows])
        parts = []
        for first in range(0, len(pairs), _CALL):
            which, of = pairs[first : first + _CALL].T
            parts.append(self.call(np.clip(self.images[of] + self.size[None] * patterns[which], 0, 1)))
        logits = np.concatenate(parts)
        return logits.reshape(len(patterns), len(rows), logits.shape[-1])

    def _reserved(self, changes):
        """Evaluations of the comparison at the end, where there are enough for changes; else 0."""
        compared = _PROXIES.jigsaws(self.size.shape) + 2 * _PROXIES.size + len(self.labels)
        return compared if changes >= _WORTH * compared else 0

    def _better(self, winner, theta, entry, key):
        """The winner of the race unless `theta` has a lower loss on new proxies; its entry; the evaluations."""
        if np.array_equal(winner, theta):
            return theta, entry, 0
        images, sources = _proxies(self.problem, key)
        images, whole = np.asarray(images), len(sources)
        jigsaws = np.argmax(self.call(images[whole:]), -1) if whole < len(images) else []
        labels = np.concatenate([self.labels[np.asarray(sources)], jigsaws]).astype(self.labels.dtype)
        at_winner, at_theta = (
            np.mean(self.attack.losses(self.call(np.clip(images + x, 0, 1)), labels, self.target))
            for x in (np.asarray(winner), np.asarray(theta))
        )
        spent = len(images) - whole + 2 * len(images)
        if not at_theta >= at_winner:
            return theta, entry, spent
        pattern = np.where(winner < 0, -1, 1).astype(np.float32)
        logits = self.ask(pattern[None], np.arange(len(self.labels)))[0]
        start = self.attack.start(self.size.shape, *self.problem.clean.shape)
        return *self._measured(start._replace(pattern=pattern, logits=logits)), spent + len(self.labels)

    def _see(self, run, pattern, share, loss):
        """Keeps a pattern of the race: one that was tried on more images is better, and the end of a step is best."""
        run.see(pattern * self.size, share - 2, loss)

    def _measured(self, found):
        """The perturbation `[H, W, C]` of a pattern, and its entry of the history without the queries."""
        theta = jnp.asarray(found.pattern * self.size)
        metrics = jax.device_get(_metrics(self.problem, jnp.asarray(found.logits), theta))
        return theta, {name: float(value) for name, value in metrics.items()}

    def _first(self, given, rounds, rng, watch) -> Found:
        """The winner of the race, or what is known of a given start."""
        if given is None:
            return self.attack.raced(self.ask, self.labels, self.size.shape, rng, rounds, self.target, watch)
        # Changes flip signs, of coordinates that stay as large as they are.
        found = self.attack.start(given.shape, *self.problem.clean.shape, rng)
        pattern = np.where(given < 0, -1, 1).astype(np.float32)
        logits = self.ask(pattern[None], np.arange(len(self.labels)))[0]
        loss = np.float32(np.mean(self.attack.losses(logits, self.labels, self.target)))
        return found._replace(pattern=pattern, logits=logits, loss=loss)


@jax.jit
def _proxies(problem, key):
    images = problem.batch.images
    return _PROXIES(images, key, scale=problem.constraint.scale(images[0]))


@jax.jit
def _metrics(problem, logits, theta):
    loss = resolved_loss(problem.recipe)
    return attack_metrics(problem.clean, logits, problem.batch.labels, theta, loss, problem.constraint)


def _called_quickly(classifier, x):
    """The model as a function of at most `_CALL` NumPy images; a JAX function is compiled for numbers of few sizes."""
    if classifier.host is not None:  # which is asked for no image more
        return lambda batch: np.asarray(classifier(jnp.asarray(batch)))
    function = present(classifier.traced(), x)

    def call(batch):
        size = len(x) if len(batch) <= len(x) <= _CALL else _CALL
        padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
        return np.asarray(_called(function, padded))[: len(batch)]

    return call


@BoundedJit
def _called(function, images):
    return function(images)


def decided(classifier: Classifier, x: jax.Array) -> Classifier:
    """The model without its scores: 1 at the largest one of an image, -1 elsewhere.

    Args:
      classifier: the model.
      x: `[n, H, W, C]`, images of an attack.
    """
    call = _called_quickly(classifier, x)

    def values(images):
        scores = np.concatenate([call(images[first : first + _CALL]) for first in range(0, len(images), _CALL)])
        return 2 * np.eye(scores.shape[-1], dtype=np.float32)[np.argmax(scores, -1)] - 1

    return host_classifier(HostModel(values, pads=False), num_classes=classifier.num_classes)
