r"""Attacks by queries alone: success on unseen images against the evaluations made, at equal evaluations.

  python -m experiments.studies.public_queries --model=resnet32 --methods=patterns,decision,tiles --draws=20

Models are the public ones of `experiments.studies.public_models`, and stored victims such as `mnist_small_cnn_1000`.
Settings were chosen on models whose role is "choosing", nothing on those whose role is "test". All methods have the
same support images in each draw, and all are judged on the same query images. The results file keeps what is finished:
a run goes on where another one stopped. Methods that do not depend on the budget make one run, whose best perturbation
at each budget is judged; the others make one for each.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lft_jax
from experiments import config
from experiments.studies import _procedural, attacked, public
from lft_jax import models
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import provenance
from lft_jax.optimizers import hand_designed
from lft_jax.tasks import AttackRecipe, WaveSearch, pattern_attack

_CLAMP = 12.0  # nats, as the loss of an attack
_ESTIMATOR = lft_jax.ZerothOrder(num_directions=6, resolution=16, smoothing=0.05, per_example=True)
_STEP = 2 * _ESTIMATOR.num_directions + 1  # evaluations of each image
_SIGN = hand_designed.projected_gradient(0.4, 0.9, 0.1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    model: str = config.option("resnet20", "Public model, or folder in victims/.")
    methods: tuple[str, ...] = config.option((), "Methods; all if empty.")
    budgets: tuple[int, ...] = config.option((50, 100, 200, 500, 1000, 2000, 4000), "Evaluations in all.")
    images: int = config.option(10, "Support images.")
    draws: int = config.option(20, "Draws of the support images.")
    queries: int = config.option(500, "Query images; 0 for all.")
    again: tuple[str, ...] = config.option((), "Methods to measure again if the results file has them.")
    output: str | None = config.option(None, "Results file; results/public/queries_MODEL.json if not given.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


@dataclasses.dataclass(frozen=True)
class Task:
    """The support images of a draw.

    Attributes:
      model: the classifier.
      images, labels: `[n, H, W, C]` uint8 and `[n]`.
      epsilon: radius of the linf ball.
      seed: of the draw.
    """

    model: models.Classifier
    images: np.ndarray
    labels: np.ndarray
    epsilon: float
    seed: int

    def attacked(self, budget: int, **options: Any) -> np.ndarray | None:
        """The perturbation of `universal_perturbation`, or None if the budget is too small."""
        found = lft_jax.universal_perturbation(
            self.model,
            self.images,
            self.labels,
            epsilon=self.epsilon,
            max_queries=budget,
            key=jax.random.key(self.seed),
            progress=False,
            **options,
        )
        assert found.queries <= budget
        return found.perturbation

    def loss(self, theta: np.ndarray) -> float:
        """The clamped cross-entropy of an attack, on all images."""
        images = np.clip(self.images.astype(np.float32) / 255 + theta[None], 0, 1)
        logits = np.asarray(_logits(self.model.traced(), images), np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        entropies = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(self.labels)), self.labels]
        return float(-np.minimum(entropies, _CLAMP).mean())


@jax.jit
def _logits(function, images):
    return function(images)


class Best:
    """The best perturbation of a run after each number of evaluations."""

    def __init__(self, task: Task, budgets: tuple[int, ...]):
        self.task, self.budgets, self.theta = task, budgets, np.zeros(task.images.shape[1:], np.float32)
        self.lowest, self.at = np.inf, {}
        self.spent = len(task.labels)  # the clean images, as in the other attacks

    @property
    def left(self) -> int:
        """Evaluations of all images that are left."""
        return (max(self.budgets) - self.spent) // len(self.task.labels)

    def tries(self, theta: np.ndarray) -> float:
        """The loss of a perturbation, which is kept if it is the best one."""
        loss = self.task.loss(theta)
        self.spent += len(self.task.labels)
        if loss < self.lowest:
            self.lowest, self.theta = loss, theta
        self.at |= {budget: self.theta for budget in self.budgets if budget >= self.spent}
        return loss


def _random(kinds):
    def method(task, budgets):
        best, rng, shape = Best(task, budgets), np.random.default_rng(task.seed), task.images.shape[1:]
        for i in range(best.left):
            best.tries(task.epsilon * pattern_attack.random_pattern(kinds[i % len(kinds)], shape, rng))
        return best.at

    return method


def _procedural_noise(noise, ranges):
    def method(task, budgets):
        budgets = tuple(budget for budget in budgets if budget <= 1000)  # a Gaussian process of few points
        best, shape = Best(task, budgets), task.images.shape[1:]

        def loss(parameters):
            return best.tries(np.broadcast_to(task.epsilon * noise(parameters, shape), shape))

        _procedural.optimised(loss, len(ranges), best.left, np.random.default_rng(task.seed))
        return best.at

    return method


def _simba(basis):
    """SimBA, arXiv 1905.07121: a step along a random direction of a basis, or against it, if the loss falls."""

    def method(task, budgets):
        best, rng, shape = Best(task, budgets), np.random.default_rng(task.seed), task.images.shape[1:]
        theta, lowest = np.zeros(shape, np.float32), np.inf
        while best.left:
            step = basis(rng, shape)
            for sign in (1, -1):
                moved = np.clip(theta + sign * task.epsilon * step, -task.epsilon, task.epsilon)
                if best.left and (loss := best.tries(moved)) < lowest:
                    theta, lowest = moved, loss
                    break
        return best.at

    return method


def _pixel(rng, shape):
    step = np.zeros(shape, np.float32)
    step[tuple(rng.integers(shape))] = 1
    return step


def _cosine(rng, shape):
    """A low frequency of a discrete cosine transform, of one channel."""
    step = np.zeros(shape, np.float32)
    waves = [np.cos(np.pi / side * (np.arange(side) + 0.5) * rng.integers(max(side // 4, 2))) for side in shape[:2]]
    step[..., rng.integers(shape[2])] = np.outer(*waves)
    return step


def _each(options: Callable[[int, int], dict[str, Any] | None]):
    """A method of `universal_perturbation`, whose options depend on the budget and the number of images."""

    def method(task, budgets):
        found = {}
        for budget in budgets:
            if (chosen := options(budget, len(task.labels))) is not None:
                found[budget] = task.attacked(budget, **chosen)
        return found

    return method


def _steps(budget, images, searched=0):
    return (budget - images - searched * images) // (_STEP * images)


def _zeroth_order(budget, images):
    steps = _steps(budget, images)
    recipe = AttackRecipe(augmentation=None)
    return {"optimizer": _SIGN, "oracle": _ESTIMATOR, "recipe": recipe, "steps": steps} if steps else None


def _learned(budget, images):
    searched = int(0.4 * budget / images)  # as in meta-training: 160 of 400
    steps = _steps(budget, images, searched)
    recipe = AttackRecipe(search=WaveSearch.within(max(searched, 2)))
    options = {"optimizer": "uap-linf-query", "oracle": _ESTIMATOR, "recipe": recipe, "steps": steps}
    return options if steps > 0 and searched >= 2 else None


#: `{name: (task, budgets) -> {budget: perturbation}}`.
METHODS: dict[str, Callable[[Task, tuple[int, ...]], dict[int, np.ndarray]]] = {
    "patterns": _each(lambda *_: {"oracle": lft_jax.PatternAttack()}),
    "race": _each(lambda *_: {"oracle": lft_jax.PatternAttack(race=1.0)}),
    "decision": _each(lambda *_: {"oracle": "decision"}),
    "tiles": _random(((2, 1, False),)),
    "waves": _random(((0, 0.5, False), (0, 0.5, True))),
    "perlin": _procedural_noise(_procedural.perlin, _procedural.PERLIN),
    "gabor": _procedural_noise(_procedural.gabor, _procedural.GABOR),
    "simba-pixels": _simba(_pixel),
    "simba-dct": _simba(_cosine),
    "zo-signsgd": _each(_zeroth_order),
    "uap-linf-query": _each(_learned),
}
REFERENCE = "tiles"


def measure(flags: Config) -> None:
    """Measures what the results file lacks, and writes it after each draw."""
    for name, value in (("draws", flags.draws), ("images", flags.images), ("budgets", min(flags.budgets, default=0))):
        check_at_least(name, value, 1)
    names = [check_name("methods", name, METHODS) for name in flags.methods] or list(METHODS)
    victim = attacked.victim(flags.model, queries=flags.queries, data_dir=flags.data_dir)
    path = Path(flags.output or f"results/public/queries_{victim.about['model']}.json")
    results = _results(path, victim, flags)
    rows, support = results["rows"], victim.images
    for name in names:
        for draw in range(flags.draws):
            kept = {row["budget"]: row for row in rows if row["method"] == name}
            wanted = tuple(b for b in flags.budgets if b not in kept or len(kept[b]["draw_asr"]) == draw)
            if not wanted:
                continue
            chosen = public.support_order(support.support_labels, draw)[: flags.images]
            images, labels = support.support[chosen], support.support_labels[chosen]
            task = Task(victim.model, images, labels, victim.about["epsilon"], draw)
            for budget, theta in METHODS[name](task, wanted).items():
                if budget not in kept:
                    kept[budget] = {"method": name, "budget": budget, "images": flags.images, "draw_asr": []}
                    rows.append(kept[budget])
                kept[budget]["draw_asr"].append(victim.rates(theta)["asr"])
                kept[budget]["commit"] = results["provenance"]["commit"]
            summarise(rows)
            provenance.write_json(path, results)
        found = {row["budget"]: f"{100 * row['asr']:.1f}" for row in rows if row["method"] == name}
        print(f"{victim.about['model']}: {name}, {found}", flush=True)
    print(f"wrote {path}")


def _results(path: Path, victim: public.Victim, flags: Config) -> dict[str, Any]:
    """The results file as it was, less what is measured again, or a new one."""
    results: dict[str, Any] = {"rows": []}
    if path.is_file():
        results |= json.loads(path.read_text(encoding="utf-8"))
        if results["about"] != victim.about:
            raise ValueError(f"output: {path} has results of {results['about']}, expected {victim.about}.")
    results |= {"about": victim.about, "clean_accuracy": float(np.mean(victim.clean == victim.images.query_labels))}
    results["provenance"] = provenance.describe(range(flags.draws))
    results["rows"] = [row for row in results["rows"] if row["method"] not in flags.again]
    return results


def summarise(rows: list[dict[str, Any]]) -> None:
    """Means over draws, their 95% intervals, and the paired differences to the reference at equal evaluations."""
    rivals = {row["budget"]: row["draw_asr"] for row in rows if row["method"] == REFERENCE}
    for row in rows:
        row["asr"], row["asr_interval"] = public.mean_interval(row["draw_asr"])
        row.pop("difference", None)
        rival = rivals.get(row["budget"])
        if rival and row["method"] != REFERENCE:
            pairs = [a - b for a, b in zip(row["draw_asr"], rival, strict=False)]
            mean, width = public.mean_interval(pairs)
            row["difference"] = {"to": REFERENCE, "asr": mean, "interval": width, "draws": len(pairs)}


if __name__ == "__main__":
    config.main(Config, measure)
