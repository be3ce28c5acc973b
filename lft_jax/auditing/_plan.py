"""What an audit runs: attacks, radii, numbers of images, steps, evaluations and draws."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from lft_jax.base import check_at_least, check_name
from lft_jax.optimizers import periodic_descent, projected_gradient
from lft_jax.tasks import AttackRecipe, PatternAttack, Proxies


@dataclasses.dataclass(frozen=True)
class Method:
    """An attack with frozen settings.

    Attributes:
      title: what the page calls it.
      norm: of the ball.
      gradients: whether it differentiates the model; else it only evaluates it.
      learned: whether it is a shipped rule.
      about: one sentence on the page.
      counted: whether it is part of the series of numbers of support images, each of which compiles a step.
    """

    title: str
    norm: str
    gradients: bool
    learned: bool
    about: str
    counted: bool = True


_RULE = "Shipped rule, learned on other models."
_DESCENT = "Hand-designed: momentum along the gradient's mean over translations, on the default proxies."
_PATTERNS = "Queries only: a race of random tiles and plane waves, then changes of the best one."

METHODS: dict[str, Method] = {
    "uap-linf": Method("uap-linf", "linf", True, True, _RULE),
    "periodic": Method("periodic descent", "linf", True, False, _DESCENT),
    "momentum": Method(
        "momentum signs", "linf", True, False, "Hand-designed: momentum sign steps, on the default proxies.", False
    ),
    "patterns": Method("patterns, by queries", "linf", False, False, _PATTERNS),
    "uap-l2": Method("uap-l2", "l2", True, True, _RULE),
    "periodic-l2": Method("periodic descent", "l2", True, False, _DESCENT),
    "patterns-l2": Method("patterns, by queries", "l2", False, False, _PATTERNS),
    "spatial-linf": Method("spatial-linf", "linf", True, True, "Shipped rule on pixels, learned on other models."),
}
#: Methods of an audit, unless others are asked for.
DEFAULT = ("uap-linf", "periodic", "momentum", "patterns", "uap-l2", "periodic-l2", "patterns-l2")


@functools.cache
def options(name: str) -> dict[str, Any]:
    """Keywords of `universal_perturbation` for a method. Cached, since a new optimizer would be compiled again."""
    norm, proxies = METHODS[name].norm, AttackRecipe(augmentation=Proxies())
    if name in ("periodic", "periodic-l2"):
        return {"optimizer": periodic_descent(norm=norm), "recipe": proxies, "oracle": "gradient"}
    if name == "momentum":
        return {"optimizer": projected_gradient(0.4, 0.9, 0.1), "recipe": proxies, "oracle": "gradient"}
    if name in ("patterns", "patterns-l2"):
        return {"oracle": "query"}
    return {"optimizer": name, "oracle": "gradient"}


@dataclasses.dataclass(frozen=True)
class AuditBudget:
    """How much an audit tries.

    Of the three series `support_images`, `steps` and `queries`, the last value but one (the only one, if it is alone)
    is the standard: radii are compared at the standard, and each series is run at the largest radius with the other two
    at theirs.

    Attributes:
      support_images: numbers of images to attack from, increasing. At most a quarter of all images can be support
        images; larger numbers become that.
      steps: numbers of fine-tuning steps of attacks with gradients, increasing.
      queries: evaluations of the model on one image that attacks by queries may make, increasing, at least 2.
      draws: draws of the support images, each attacked from on its own.
      query_images: largest number of images that the attacks are judged on.
      methods: names of attacks, out of `lft_jax.auditing.METHODS`.

    Examples:
      >>> AuditBudget().standard(support=50)
      {'images': 10, 'steps': 20, 'queries': 500}
      >>> AuditBudget(steps=(20,)).check().steps
      (20,)
    """

    support_images: tuple[int, ...] = (1, 5, 10, 50)
    steps: tuple[int, ...] = (5, 20, 60)
    queries: tuple[int, ...] = (100, 500, 2000)
    draws: int = 3
    query_images: int = 1000
    methods: tuple[str, ...] = DEFAULT

    def standard(self, support: int) -> dict[str, int]:
        """The standard numbers of `images`, `steps` and `queries`, where there are so many support images."""
        return {
            "images": _standard(_counts(self, support)),
            "steps": _standard(self.steps),
            "queries": _standard(self.queries),
        }

    def check(self) -> "AuditBudget":
        """Returns itself.

        Raises:
          ValueError: for a series that is empty or not increasing, numbers below 1, or unknown methods.
        """
        for name, least in (("support_images", 1), ("steps", 1), ("queries", 2)):
            series = getattr(self, name)
            if not series or list(series) != sorted(set(series)):
                raise ValueError(f"{name} must be increasing numbers, at least one, got {series!r}.")
            check_at_least(name, series[0], least)
        check_at_least("draws", self.draws, 1)
        check_at_least("query_images", self.query_images, 1)
        if not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, got none.")
        for name in self.methods:
            check_name("methods", name, METHODS)
        return self


def _standard(series: Sequence[int]) -> int:
    return series[-2] if len(series) > 1 else series[0]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of one attack.

    Attributes:
      method: its name.
      epsilon: radius of the ball, in units of the image range.
      images: number of support images.
      size: number of fine-tuning steps, or of evaluations for an attack by queries.
      draw: number of the draw of the support images.
      target: the class that images should end in, or None.
    """

    method: str
    epsilon: float
    images: int
    size: int
    draw: int
    target: int | None = None

    @property
    def norm(self) -> str:
        """Of the ball."""
        return METHODS[self.method].norm

    @property
    def gradients(self) -> bool:
        """Whether the attack has gradients."""
        return METHODS[self.method].gradients

    @property
    def evaluations(self) -> float:
        """About how many evaluations of the model it costs; one with its gradient is three."""
        if not self.gradients:
            return self.size
        # Hand-designed ones begin from zeros, and learned ones search for a start, or have a tile for large images.
        return 808 * METHODS[self.method].learned + 130 * self.size

    @property
    def program(self) -> tuple[Any, ...]:
        """What the runs that share compiled programs have in common."""
        return (self.method, self.images, self.target)

    @property
    def name(self) -> str:
        """For files: letters, digits, `.`, `-` and `_`."""
        unit = "steps" if self.gradients else "queries"
        name = f"{self.method}_{self.norm}-{self.epsilon:.4g}_{self.images}images_{self.size}{unit}_draw{self.draw}"
        return name if self.target is None else f"{name}_target{self.target}"

    @property
    def title(self) -> str:
        """For people."""
        ball = f"{self.norm} {radius(self.epsilon, self.norm)}"
        return f"{METHODS[self.method].title}, {ball}, {self.effort}"

    @property
    def effort(self) -> str:
        """Numbers of images and of steps or evaluations, and the target, for people."""
        unit = "steps" if self.gradients else "evaluations"
        of = "1 image" if self.images == 1 else f"{self.images} images"
        goal = "" if self.target is None else f", towards class {self.target}"
        return f"{of}, {self.size} {unit}{goal}"


def radius(epsilon: float, norm: str = "linf") -> str:
    """A radius as text: to three digits, or that of a linf ball in 255ths where these are whole.

    Examples:
      >>> radius(8 / 255), radius(0.25), radius(0.8, "l2")
      ('8/255', '0.25', '0.8')
    """
    levels = 255 * epsilon
    whole = round(levels)
    if norm == "linf" and 1 <= whole < 255 and math.isclose(levels, whole, rel_tol=1e-6):
        return f"{whole}/255"
    return f"{epsilon:.3g}"


def make_plan(
    budget: AuditBudget, epsilons: dict[str, tuple[float, ...]], support: int, differentiable: bool
) -> list[Cell]:
    """All untargeted runs, ordered so that those that share a compiled step follow each other.

    Radii of both norms at the standard; the series of images, steps and queries at the largest radius, in linf balls if
    any of its methods has them.

    Args:
      budget: what to try.
      epsilons: radii of each norm, increasing.
      support: number of support images that there are.
      differentiable: whether the model has gradients.
    """
    counts = _counts(budget, support)
    names = [n for n in budget.methods if (differentiable or not METHODS[n].gradients) and epsilons[METHODS[n].norm]]
    main = "linf" if any(METHODS[name].norm == "linf" for name in names) else "l2"
    cells: dict[Cell, None] = {}
    for name in names:
        series = budget.steps if METHODS[name].gradients else budget.queries
        radii, size, images = epsilons[METHODS[name].norm], _standard(series), _standard(counts)
        wanted = [(epsilon, images, size) for epsilon in reversed(radii)]
        if METHODS[name].norm == main:
            wanted += [(radii[-1], images, other) for other in series]
            wanted += [(radii[-1], other, size) for other in counts if METHODS[name].counted]
        for epsilon, count, number in wanted:
            if not METHODS[name].gradients:  # a search uses no more images than its evaluations are enough for
                count = PatternAttack().images(number, count)
            # All support images are one draw.
            for draw in range(budget.draws if count < support else 1):
                cells[Cell(name, epsilon, count, number, draw)] = None
    programs = list(dict.fromkeys(cell.program for cell in cells))
    return sorted(cells, key=lambda cell: programs.index(cell.program))


def _counts(budget: AuditBudget, support: int) -> tuple[int, ...]:
    return tuple(sorted({min(count, support) for count in budget.support_images}))
