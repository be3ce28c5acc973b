"""What a run has found so far, what it is worth, and what is shown of it."""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax.attack.result import Paused, UniversalPerturbation
from lft_jax.models import Classifier


class Counter:
    """Counts the images that a model outside of JAX is asked for, also in a step that an error ends."""

    def __init__(self):
        self.images = 0

    def counting(self, classifier: Classifier) -> Classifier:
        """The classifier, counted if it is a host model."""
        if classifier.host is None:
            return classifier

        def counted(function):
            def call(images):
                self.images += len(images)
                return function(images)

            return call

        host = classifier.host
        pull_back = None if host.pull_back is None else counted(host.pull_back)
        return dataclasses.replace(
            classifier, host=dataclasses.replace(host, values=counted(host.values), pull_back=pull_back)
        )


class Run:
    """What a run has found so far."""

    def __init__(self, problem, oracle, steps, labelled, synthetic, began, counter):
        self.fields = {"constraint": problem.constraint, "oracle": oracle, "steps": steps}
        self.fields |= {"labelled": labelled, "synthetic": synthetic}
        self.began, self.counter = began, counter
        self.shown = np.asarray(problem.shown.labels), np.asarray(problem.clean)
        self.history: list[dict[str, float]] = []
        self.best: tuple[tuple[float, float], Any] | None = None
        self.paused: Paused | None = None
        self.outcome: Any = None

    def add(self, paused: Paused, entry: dict[str, float], outcome: Any) -> None:
        """Takes the end of a step, unless it is NaN, and the perturbation `[H, W, C]` that its entry is of."""
        if not np.isfinite(entry["linf"]):
            raise ValueError(
                f"model: its gradient is NaN or infinite in step {paused.done} of {self.fields['steps']}. Usual: "
                "the derivative of a square root, norm, logarithm or power at 0, float16 that overflows, division by "
                "a standard deviation of 0. With oracle='query' only its values are used."
            )
        if not np.isfinite(entry["loss"]):
            raise ValueError(
                f"model returns NaN or infinite logits for perturbed images in step {paused.done} of "
                f"{self.fields['steps']}. Usual causes: float16 that overflows, a logarithm or square root of a number "
                "that is not above 0."
            )
        self.history.append(entry)
        self.paused, self.outcome = paused, outcome
        self.see(outcome, entry["asr"], entry["loss"])

    def resume(self, stopped: UniversalPerturbation, images: Any, tx: optax.GradientTransformation) -> Paused:
        """Takes over a run that stopped, and returns where.

        Raises:
          ValueError: if it cannot go on with these images `[N, H, W, C]` and this model, optimizer, constraint and
            number of steps.
        """
        paused, steps = stopped.paused, self.fields["steps"]
        assert paused is not None
        if paused.theta.shape != images.shape[1:]:
            raise ValueError(f"start must be of images {images.shape[1:]}, got a result {paused.theta.shape}.")
        if stopped.constraint != self.fields["constraint"]:
            raise ValueError(
                f"start is a result that stopped within {stopped.constraint}, not {self.fields['constraint']}; pass "
                "its norm and epsilon or penalty, or start=result.perturbation to start again."
            )
        if not (paused.shown is None or _alike(paused.shown, self.shown)):
            raise ValueError(
                "start is a result that stopped with another model, other images, labels or key: the clean images have "
                "other logits now. Pass the same, or start=result.perturbation to start again."
            )
        if paused.done >= steps:
            raise ValueError(
                f"steps must be above {paused.done}, those that start has done, got {steps}; to start again from its "
                "perturbation, pass start=result.perturbation."
            )
        expected, given = (
            jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)
            for tree in (jax.eval_shape(tx.init, paused.theta), paused.state)
        )
        if expected != given:
            raise ValueError(
                "start is a result that stopped with another optimizer; pass that one, or start=result.perturbation to "
                "start again."
            )
        self.history, self.paused = entries(stopped.history), paused
        self.counter.images += stopped.queries
        merits = [(entry["asr"], -entry["loss"]) for entry in self.history]
        last = np.array_equal(stopped.perturbation, paused.theta)
        self.best = (merits[-1] if last else max(merits)), stopped.perturbation
        kept = paused.start is not None and np.array_equal(stopped.perturbation, paused.start)
        self.outcome = paused.start if kept else paused.theta
        return paused

    def see(self, theta: Any, asr: float, loss: float) -> None:
        """Keeps the best perturbation."""
        merit = (asr, -loss)
        if self.best is None or merit > self.best[0]:
            self.best = merit, theta

    @contextlib.contextmanager
    def keeping(self):
        """Hangs what was found to an exception that ends the run."""
        try:
            yield
        except BaseException as error:
            if self.best is not None:
                partial = self.result(self.best[1])
                error.__dict__["partial"] = partial
                done = len(self.history)
                error.add_note(
                    f"universal_perturbation stopped after {done} of {self.fields['steps']} steps and "
                    f"{partial.queries} evaluations of the model on one image. The best perturbation so far is "
                    "error.partial; to go on, pass start=error.partial."
                )
            raise

    def result(self, best: Any = None) -> UniversalPerturbation:
        """The result; with `best`, that perturbation instead of the last one."""
        names = self.history[0] if self.history else ()
        columns = {name: np.asarray([entry[name] for entry in self.history]) for name in names}
        last = self.outcome if self.paused else best
        counted = max(self.counter.images, int(columns["queries"][-1]) if self.history else 0)
        paused = self.paused
        if paused is not None:
            paused = paused._replace(shown=self.shown) if paused.done < self.fields["steps"] else None
        return UniversalPerturbation(
            np.asarray(last if best is None else best),
            columns,
            queries=counted,
            seconds=time.monotonic() - self.began,
            paused=paused,
            **self.fields,
        )


@contextlib.contextmanager
def reporter(progress, steps):
    """Calls `progress` after each step, or shows a bar if the terminal can."""
    if callable(progress):
        yield progress
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc="universal perturbation", disable=None if progress else True) as bar:

        def report(entry):
            bar.set_postfix({"ASR": f"{entry['asr']:.2f}", "loss": f"{entry['loss']:.3g}"}, refresh=False)
            bar.update(entry["step"] - bar.n)

        yield report


def _alike(before, now):
    """Whether labels are the same, and logits up to rounding."""
    (labels, logits), (labels_now, logits_now) = before, now
    if not np.array_equal(labels, labels_now) or logits.shape != logits_now.shape:
        return False
    return np.allclose(logits, logits_now, rtol=0, atol=1e-3 * float(np.abs(logits_now).max()))


def entries(history):
    """The steps of a history of columns."""
    return [dict(zip(history, row, strict=True)) for row in zip(*(v.tolist() for v in history.values()), strict=True)]
