"""The audit: a plan of attacks on one model, run one after the other, and their report."""

import dataclasses
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Integer, Shaped

from lft_jax.attack import universal_perturbation
from lft_jax.auditing import _findings, _words
from lft_jax.auditing._model import Asked, confidences, has_gradients
from lft_jax.auditing._plan import AuditBudget, Cell, make_plan, options
from lft_jax.auditing._progress import Progress
from lft_jax.auditing._split import Split, split_images, support_order
from lft_jax.auditing._statistics import rate
from lft_jax.auditing._store import Run, Store, digest
from lft_jax.auditing.report import AuditReport
from lft_jax.data import check_images_labels

#: Radii of linf balls, unless others are asked for.
EPSILONS = (2 / 255, 4 / 255, 8 / 255)
#: Images that the model is asked for with noise, and the half-width of that: they tell a stored run of another model.
_PROBES, _NOISE = 8, 0.01


def audit(
    model: Any,
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"] | None = None,
    *,
    epsilons: Sequence[float] = EPSILONS,
    l2_epsilons: Sequence[float] | None = None,
    budget: AuditBudget | None = None,
    class_names: Sequence[str] | None = None,
    image_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    about: Mapping[str, str] | None = None,
    progress: bool | Callable[[dict[str, Any]], object] = True,
) -> AuditReport:
    """Measures how far universal perturbations from few images make a classifier err, by many attacks.

    The images are split at random, stratified by class: a quarter, at most twice the largest number of support images
    of the budget, may be attacked from; 15%, at most 200, choose the strongest attack; the others judge. All attacks
    have the same images. Rates on the judging images have Wilson intervals, which are valid for the strongest attack
    too, since other images chose it.

    Args:
      model: as of `universal_perturbation`: a `Classifier`, or a function of images in [0, 1] that returns logits. One
        without gradients is attacked by queries only, which the report says.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]; at least 20, that the model was not trained on.
      labels: `[N]` integers from 0, the true classes; None for the classes that the model predicts.
      epsilons: radii of linf balls, in units of the image range; the verdict is on the largest.
      l2_epsilons: radii of l2 balls; None for those of patterns of full contrast, `epsilon * sqrt(H * W * C)`; an empty
        sequence for no attacks in l2 balls.
      budget: how much is tried; `AuditBudget()` if None.
      class_names: names of the classes from 0, "" for one without; None for numbers.
      image_names: `[N]` names of the images, such as those of their files; None for their numbers.
      batch_size: largest number of images in one call of the model.
      seed: of the split, the draws of support images, and the attacks.
      output: a folder that keeps finished runs, and that `save` may be called with later. An audit that was interrupted
        goes on there, and one with more to try only runs what is missing, if model, images, labels, split and seed are
        the same. None to keep nothing.
      about: what the report says of the model and the images, by title: `{"model": "ResNet-8", "data": "test.npz"}`.
      progress: whether to print progress with the time left to standard error; or a function that is called with a
        dict: `runs`, `done`, `stored` (those that `output` had), `now` (what is being done), `seconds`, `left`.

    Returns:
      The report: `verdict` in words, `results` behind every number; `save(folder)` writes the page.

    Raises:
      ModuleNotFoundError: without matplotlib or jinja2 (the extra `audit`).
      ValueError: for fewer than 20 images, invalid images, labels, radii, names or budgets, NaN logits of clean images,
        or if no query image is classified correctly.
      Exception: what the model raises for clean images; and what it raises in an attack, if all attacks fail. Failures
        of single attacks are listed in the report.
      KeyboardInterrupt: finished runs are in `output`; the same call goes on from there.

    Warns:
      UserWarning: if the clean accuracy is not above one half: is the model asked as it should be?

    Examples:
      A linear model of two classes, with a budget for a trial::

        budget = lft_jax.AuditBudget(support_images=(1, 5), steps=(5,), queries=(100,), draws=1)
        report = lft_jax.audit(model, images, labels, epsilons=(4 / 255, 8 / 255), budget=budget)
        print(report.verdict)
        report.save("out")  # out/index.html, out/report.json, out/perturbation.npy, out/runs/*.npy

      >>> weights = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
      >>> images = np.random.default_rng(1).uniform(0.3, 0.7, (40, 4, 4, 1)).astype(np.float32)
      >>> model = lambda x: np.reshape(x, (len(x), -1)) @ weights
      >>> budget = AuditBudget(support_images=(5,), queries=(50,), draws=1, methods=("patterns",))
      >>> report = audit(model, images, epsilons=(0.25,), budget=budget, progress=False)
      >>> report.results["split"], 0 <= report.asr <= 1
      ({'support': 10, 'choice': 6, 'query': 24}, True)

    References:
      Moosavi-Dezfooli et al. 2017, arXiv 1610.08401; Zhao et al. 2021, arXiv 2009.13714; on what an evaluation should
      report, Carlini et al. 2019, arXiv 1902.06705.
    """
    _need_extra()
    budget = (budget or AuditBudget()).check()
    images = _checked_images(images)
    radii = {"linf": _radii("epsilons", epsilons, 1.0), "l2": _l2_radii(l2_epsilons, epsilons, images)}
    if not (radii["linf"] or radii["l2"]):
        raise ValueError("epsilons must have at least one radius, got none, and l2_epsilons has none.")
    tracker = Progress(progress)
    tracker.say("clean images")
    differentiable = has_gradients(model, images[:1].shape)
    asked = Asked(model, differentiable, max(images.shape[1:3]), batch_size)
    clean, per_image = _clean_logits(asked, images)
    given = _checked_labels(images, labels, clean)
    _check_names(class_names, image_names, images, clean)
    split = split_images(given, 2 * budget.support_images[-1], budget.query_images, seed)
    accuracy = rate((clean.argmax(-1) == given)[split.query]).as_dict()
    if not accuracy["hits"]:
        raise ValueError("labels: the model classifies no query image as they say, so no success can be measured.")
    if _words.doubtful(accuracy):
        warnings.warn(_words.doubt(accuracy), stacklevel=2)
    with tempfile.TemporaryDirectory() as nowhere:
        data = digest(images, given, *split, seed, differentiable)
        # A model whose input is rounded answers clean images as one whose input is not.
        noise = np.random.default_rng(0).uniform(-_NOISE, _NOISE, images.shape[1:]).astype(np.float32)
        answers = np.concatenate([clean, asked.logits(images[:_PROBES], noise)])
        store = Store(Path(nowhere if output is None else output) / "runs", data, answers)
        problem = _Problem(asked, images, given, clean, split, seed, store, tracker, labels is not None)
        cells = make_plan(budget, radii, len(split.support), differentiable)
        if not cells:
            reason = "there are no radii of their norms" if differentiable else "the model has no gradients"
            raise ValueError(f"budget: none of its methods {budget.methods} can be run: {reason}.")
        problem.run_all(cells, per_image)
        best = _findings.strongest(problem.runs, split, given, clean, radii)
        target, _ = _findings.dominant_class(best, split, given, clean)
        problem.run_more([dataclasses.replace(best.cell, target=target)])
    settings = {
        "epsilons": {norm: list(values) for norm, values in radii.items()},
        "budget": dataclasses.asdict(budget),
        "standard": budget.standard(len(split.support)),
        "seed": seed,
        "batch_size": batch_size,
        "labelled": labels is not None,
        "differentiable": differentiable,
    }
    tracker.say("report")
    return AuditReport(
        results=_findings.describe(
            problem.runs, problem.failures, split, given, clean, settings, dict(about or {}), images.shape[1:]
        )
        | {
            "warnings": problem.all_warnings(),
            "evaluations": asked.evaluations + problem.evaluations_before() + sum(r.evaluations for r in problem.runs),
        },
        runs=tuple(problem.runs),
        examples=_findings.examples(images, given, clean, split, best, image_names),
        class_names=tuple(class_names) if class_names is not None else None,
    )


@dataclasses.dataclass
class _Problem:
    """What is attacked, and what was found so far."""

    asked: Asked
    images: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    split: Split
    seed: int
    store: Store
    tracker: Progress
    labelled: bool
    runs: list[Run] = dataclasses.field(default_factory=list)
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    stored: int = 0

    def run_all(self, cells: Sequence[Cell], per_image: float) -> None:
        """Runs all cells that are not stored."""
        found = {cell: self.store.load(cell) for cell in cells}
        missing = [cell for cell in cells if found[cell] is None]
        self.stored += len(cells) - len(missing)
        self.tracker.plan(missing, len(cells) - len(missing), per_image)
        error = self._run(missing, found)
        self.runs = [run for run in found.values() if run is not None]
        if not self.runs and error is not None:
            raise error

    def run_more(self, cells: Sequence[Cell]) -> None:
        """Runs cells that are added to the plan."""
        found = {cell: self.store.load(cell) for cell in cells}
        missing = [cell for cell in cells if found[cell] is None]
        self.stored += len(cells) - len(missing)
        for cell in missing:
            self.tracker.add(cell)
        self._run(missing, found)
        self.runs += [run for run in found.values() if run is not None]

    def _run(self, cells, found):
        last = None
        for cell in cells:
            self.tracker.say(cell.title)
            began = time.monotonic()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # Of a few support images; the audit itself says it of all.
                warnings.filterwarnings("ignore", "model classifies only")
                try:
                    run = self._attack(cell)
                    said = dict.fromkeys(str(warning.message) for warning in caught)
                    run = dataclasses.replace(run, warnings=tuple(said))
                    self.store.save(run)
                    found[cell] = run
                except Exception as error:  # of the user's model, perhaps
                    said = f"{type(error).__name__}: {error}".splitlines()[0]
                    self.failures.append({"run": cell.title, "error": said})
                    last = error
            for warning in caught:
                self._warn(warning)
            self.tracker.finished(cell, time.monotonic() - began)
        return last

    def _warn(self, warning):
        """Passes each warning on once."""
        said = str(warning.message)
        if said not in self.warnings:
            self.warnings.append(said)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def evaluations_before(self) -> int:
        """Those by which stored runs were judged, before this process."""
        return self.stored * (len(self.split.choice) + len(self.split.query))

    def all_warnings(self) -> list[str]:
        """Those of this process and of stored runs, each once."""
        return list(dict.fromkeys([*(said for run in self.runs for said in run.warnings), *self.warnings]))

    def _attack(self, cell: Cell) -> Run:
        support = self.split.support
        rows = support[support_order(self.labels[support], self.seed, cell.draw)[: cell.images]]
        sizes: dict[str, Any] = {"steps": cell.size} if cell.gradients else {"max_queries": cell.size}
        compiled, steps = self.tracker.compiles(cell), cell.size if cell.gradients else 20

        def report(entry):
            self.tracker.say(cell.title, entry["step"] / steps)

        began = time.process_time()
        result = universal_perturbation(
            self.asked.classifier,
            self.images[rows],
            self.labels[rows] if self.labelled else None,
            norm=cell.norm,
            epsilon=cell.epsilon,
            target=cell.target,
            batch_size=self.asked.classifier.batch_size,
            key=jax.random.fold_in(jax.random.key(self.seed), cell.draw),
            progress=report,
            **sizes,
            **options(cell.method),
        )
        spent, theta = time.process_time() - began, np.asarray(result.perturbation, np.float32)
        judged = np.concatenate([self.split.choice, self.split.query])
        logits = self.asked.logits(self.images[judged], theta)
        if np.isnan(logits).any():
            raise ValueError("model returns NaN logits for perturbed images.")
        return Run(
            cell,
            theta,
            logits.argmax(-1),
            confidences(logits),
            {name: [round(float(v), 5) for v in result.history[name]] for name in ("loss", "asr", "queries")},
            int(result.queries),
            round(result.seconds, 3),
            round(spent, 3),
            compiled,
            _findings.device(),
        )


def _clean_logits(asked, images):
    """The logits of the clean images, and the seconds that an image takes once all is compiled."""
    nothing = np.zeros(images.shape[1:], np.float32)
    asked.logits(images[: min(len(images), asked.batch)], nothing)
    began = time.monotonic()
    clean = asked.logits(images, nothing)
    seconds = (time.monotonic() - began) / len(images)
    bad = np.flatnonzero(~np.isfinite(clean).all(-1))
    if len(bad):
        raise ValueError(f"model returns NaN or infinite logits for {len(bad)} clean images; the first is {bad[0]}.")
    return clean, seconds


def _checked_images(images):
    images = np.asarray(images)
    check_images_labels(images, np.zeros(len(images), np.int32))
    return images if images.dtype == np.uint8 else np.clip(images.astype(np.float32), 0, 1)


def _checked_labels(images, labels, clean):
    if labels is None:
        return clean.argmax(-1).astype(np.int32)
    check_images_labels(images, labels, clean.shape[-1])
    return np.asarray(labels, np.int32)


def _check_names(class_names, image_names, images, clean):
    for name, given, count in (
        ("class_names", class_names, clean.shape[-1]),
        ("image_names", image_names, len(images)),
    ):
        if given is None:
            continue
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise TypeError(f"{name} must be a sequence of strings, got {given!r:.80}.")
        if len(given) > count or (name == "image_names" and len(given) < count):
            raise ValueError(f"{name} must be {count} strings, got {len(given)}.")


def _radii(name, values, most=math.inf):
    radii = tuple(sorted({float(value) for value in values}))
    if not all(0 < value < math.inf and value <= most for value in radii):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be radii above 0{limit}, such as 8 / 255, got {list(values)}.")
    return radii


def _l2_radii(l2_epsilons, epsilons, images):
    if l2_epsilons is not None:
        return _radii("l2_epsilons", l2_epsilons)
    return tuple(float(value) * math.sqrt(math.prod(images.shape[1:])) for value in _radii("epsilons", epsilons, 1.0))


def _need_extra():
    """Before an audit of minutes, not after it."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"An audit needs {error.name}: pip install 'lft_jax[audit]'.") from error
