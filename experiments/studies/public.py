r"""Measures universal attacks on public models, from few images: success on unseen images, evaluations and time.

  python -m experiments.studies.public --model=resnet20 --methods=uap-linf,pgd-plain --steps=5,20 --images=1,10,50

Settings are chosen on the models of `experiments.studies.public_models.MODELS` whose role is "choosing"; nothing is
chosen on those whose role is "test", nor on stored victims with seeds from 1000. A cell is one method with one number
of steps and of support images, on several draws of the support images. All methods have the same draws, a larger number
of images has the smaller ones among it, and all cells are judged on the same query images. The results file keeps what
is finished: a run goes on where another one stopped, and adds methods, steps, images or draws. `--again` repeats
methods after a change of their code.

`--grid=sga` measures all settings of a family of `experiments.studies.literature`, which `--methods=` also takes one by
one, by their names. The frozen setting of a family is the one with the best mean over the choosing models; the tuned
one is the best on images of `--split=choosing` of the attacked model itself. `--ceiling` adds the best of many long
runs on all support images. `--picture` draws the perturbations of methods on the first draw.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import lft_jax
from experiments import config
from experiments.rows import row_of
from experiments.studies import attacked, literature
from experiments.studies.attacked import Victim, classes
from experiments.studies.literature import Found, Problem
from lft_jax.attack.universal import SYNTHETIC_IMAGES
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import provenance
from lft_jax.data import ImageSource, unit_range
from lft_jax.optimizers import hand_designed, periodic, periodic_descent
from lft_jax.tasks import AttackLoss, AttackRecipe, Augmentation, PatternSearch, Proxies, synthetic_images
from lft_jax.tasks.perturbation import perturb

#: Pixels of a side of the corner of a perturbation that is drawn where no images may be.
CORNER = 64
#: What runs a method.
Method = Callable[[Problem], Found]

PLAIN = AttackRecipe(augmentation=None)
SHIFTS = AttackRecipe(augmentation=Augmentation(mix=0.0, noise=0.0))
PROXIES = AttackRecipe(augmentation=Proxies())
PATTERNS = AttackRecipe(augmentation=Proxies(), search=PatternSearch())
#: Momentum sign steps: step, momentum and final step.
_SIGN = hand_designed.projected_gradient(0.4, 0.9, 0.1)


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack of this package, as a method: keywords of `lft_jax.universal_perturbation`."""

    optimizer: str | optax.GradientTransformation = "uap-linf"
    recipe: AttackRecipe | None = None

    def __call__(self, problem: Problem) -> Found:
        """Runs the attack. Its evaluations include those of its history: clean images, and perturbed ones a step."""
        options = {"optimizer": self.optimizer, "recipe": self.recipe, "steps": problem.steps, "progress": False}
        ball = {"norm": "linf", "epsilon": problem.epsilon, "key": jax.random.key(problem.draw)}
        data = (problem.images, problem.labels)
        if problem.synthetic:  # it makes its own
            data, options["shape"] = (None,), problem.images.shape[1:]
        found = lft_jax.universal_perturbation(problem.model, *data, **ball, **options)
        return Found(found.perturbation, found.queries, found.seconds)


def _of_period(period):
    """Momentum steps along the gradient's mean over translations, on the proxies of this package."""
    return optax.chain(periodic(period), hand_designed.projected_gradient(0.8, 0.9, 0.1))


#: `{name without commas: method}`. Their settings are the same for all models.
METHODS: dict[str, Method] = {
    "uap-linf": Attack(),
    "uap-linf-zeros": Attack(recipe=PROXIES),
    "spatial-linf-augmented": Attack("spatial-linf", AttackRecipe()),
    "pgd-augmented": Attack(_SIGN, AttackRecipe()),
    "spatial-linf-plain": Attack("spatial-linf", PLAIN),
    "spatial-linf-shifts": Attack("spatial-linf", SHIFTS),
    "spatial-linf-patterns": Attack("spatial-linf", PATTERNS),
    "spatial-linf-proxies": Attack("spatial-linf", PROXIES),
    "pgd-plain": Attack(_SIGN, PLAIN),
    "pgd-proxies": Attack(_SIGN, PROXIES),
    "periodic-4-proxies": Attack(_of_period(4), PROXIES),
    "periodic-8-proxies": Attack(_of_period(8), PROXIES),
    "pgd-shifts": Attack(_SIGN, SHIFTS),
    "periods": Attack(periodic_descent(), PROXIES),
    "periods-patterns": Attack(periodic_descent(), PATTERNS),
    "patterns": Attack(optax.set_to_zero(), PATTERNS),
    **literature.frozen(),
}

_SYNTHETIC = 7  # folded into the key of a draw, for synthetic images
_COLUMNS = tuple(f"draw_{name}" for name in ("asr", "fooling_rate", "evaluations", "seconds"))
_CEILING = "ceiling"  # its name for --again
_TARGETS, _BATCH = 10, 100  # of the runs for the ceiling: target classes, images in a step


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    model: str = config.option("resnet20", "Public model to attack, or a stored victim, by its folder in victims/.")
    methods: tuple[str, ...] = config.option(tuple(METHODS), "Methods; may be empty.")
    grid: tuple[str, ...] = config.option((), "Families of which all settings are measured.")
    steps: tuple[int, ...] = config.option((20,), "Numbers of steps (K).")
    images: tuple[int, ...] = config.option((10,), "Numbers of support images; 0 for synthetic images only.")
    draws: int = config.option(0, "Draws of the support images; 0 for 10 on ImageNet and 20 on others.")
    queries: int = config.option(0, "Query images; 0 for all.")
    split: str = config.option(
        "own",
        "Images of which role: that of the model, or another one, to tune baselines.",
        ("own", "choosing", "test"),
    )
    reference: str = config.option("uap-linf", "Method that all others are compared to, paired by draw.")
    ceiling: bool = config.option(False, "Search for the ceiling too: long runs on all support images.")
    ceiling_steps: int = config.option(300, "Steps of each of these runs.")
    picture: tuple[str, ...] = config.option((), "Methods whose perturbations are drawn, beside the results file.")
    again: tuple[str, ...] = config.option(
        (), "Methods or families to measure again if the results file has them; or ceiling."
    )
    output: str | None = config.option(None, "Results file; results/public/MODEL.json if not given.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")
    smoke: bool = config.option(False, "Smoke test: digits_small_cnn_1000 instead of --model.")


def measure(flags: Config) -> None:
    """Measures what the results file lacks, and writes it after each draw."""
    methods = _chosen_methods(flags)
    pictured = {name: _method(name, "picture") for name in flags.picture}
    for numbers, least in ((flags.steps, 1), (flags.images, 0)):
        for number in numbers:
            check_at_least("steps and images", number, least)
    check_at_least("ceiling_steps", flags.ceiling_steps, 1)
    name = "digits_small_cnn_1000" if flags.smoke else flags.model
    victim = attacked.victim(name, split=flags.split, queries=flags.queries, data_dir=flags.data_dir)
    for count in flags.images:
        if count > len(victim.images.support):
            raise ValueError(f"images must be at most {len(victim.images.support)}, the support images, got {count}.")
    draws = flags.draws or (10 if victim.about["source"] == "imagenet_sample" else 20)
    path = Path(flags.output or f"results/public/{victim.about['model']}.json")
    results = _results(path, victim, flags, draws)

    def write():
        _summarise(results["rows"], flags.reference)
        provenance.write_json(path, results)

    for name, method in methods.items():
        for count, steps in itertools.product(flags.images, flags.steps):
            row = row_of(results["rows"], {"method": name, "steps": steps, "images": count}, _COLUMNS)
            for draw in range(len(row["draw_asr"]), draws):
                for key, value in attack(victim, method, steps, count, draw).items():
                    row[f"draw_{key}"].append(value)
                row |= {name: results["provenance"][name] for name in ("commit", "device")}
                write()
            spread = f" ± {100 * row['asr_interval']:.1f}" if row.get("asr_interval") else ""
            print(
                f"{victim.about['model']}: {name}, {steps} steps, {count} images: {100 * row['asr']:.1f}{spread}, "
                f"{row['evaluations']:.0f} evaluations, {row['seconds']:.2f} s",
                flush=True,
            )
        if isinstance(method, Attack):  # no other method uses its programs, and XLA crashes with too many in a process
            jax.clear_caches()
    if flags.ceiling:
        ceiling(victim, results[_CEILING], flags.ceiling_steps, write)
    if pictured:
        draw_picture(victim, pictured, flags.steps[-1], flags.images[-1], path)
        results["picture"] = list(pictured)
    write()
    print(f"wrote {path}")


def attack(victim: Victim, method: Method, steps: int, count: int, draw: int) -> dict[str, float]:
    """One run of a method on one draw of the support images, judged on the query images."""
    found = run(victim, method, steps, count, draw)
    return victim.rates(found.perturbation) | {"evaluations": found.evaluations, "seconds": round(found.seconds, 4)}


def run(victim: Victim, method: Method, steps: int, count: int, draw: int) -> Found:
    """One run of a method on one draw of the support images, or on as many synthetic ones as a data-free attack has."""
    epsilon = victim.about["epsilon"]
    if not count:
        key, shape = jax.random.fold_in(jax.random.key(draw), _SYNTHETIC), victim.images.query.shape[1:]
        images = np.uint8(255 * synthetic_images(key, SYNTHETIC_IMAGES, shape) + 0.5)
        labels = classes(victim.model, images, np.zeros(shape, np.float32)).astype(np.int32)
        return method(Problem(victim.model, images, labels, epsilon, steps, draw, synthetic=True))
    rows = support_order(victim.images.support_labels, draw)[:count]
    images, labels = victim.images.support[rows], victim.images.support_labels[rows]
    return method(Problem(victim.model, images, labels, epsilon, steps, draw))


def draw_picture(victim: Victim, methods: dict[str, Method], steps: int, count: int, path: Path) -> None:
    """Draws the perturbations of methods on the first draw as `NAME_perturbations.png`.

    Beside them are query images with the classes that the model predicts. Of ImageNet, whose images may not be handed
    on, only the corners of the perturbations are drawn, magnified.
    """
    from lft_jax.cli.picture import attack_picture

    found = {name: run(victim, method, steps, count, 0).perturbation for name, method in methods.items()}
    path = path.with_name(f"{path.stem}_perturbations.png")
    if victim.about["source"] == "imagenet_sample":
        draw_corners(found, path)
        return
    images, labels = victim.images.query, victim.images.query_labels
    right = np.flatnonzero(victim.clean == labels)
    source = ImageSource(victim.about["source"], images[right], labels[right], int(labels.max()) + 1)
    attack_picture(victim.model, source, found, path, num_images=4)


def draw_corners(perturbations: dict[str, np.ndarray], path: Path) -> None:
    """Draws the upper left `CORNER` x `CORNER` pixels of perturbations `[H, W, C]`, a panel each."""
    from lft_jax.cli.picture import plt, save, show

    columns = min(4, len(perturbations))
    lines = -(-len(perturbations) // columns)
    size = (2.1 * columns, 2.3 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    limit = max(float(np.abs(theta).max()) for theta in perturbations.values()) or 1.0
    for axis in axes.flat[len(perturbations) :]:
        axis.axis("off")
    for axis, (name, theta) in zip(axes.flat, perturbations.items(), strict=False):
        show(axis, theta[:CORNER, :CORNER] / (2 * limit) + 0.5)
        axis.set_title(name, fontsize=9)
    save(figure, path)


def support_order(labels: np.ndarray, draw: int) -> np.ndarray:
    """A random order of images `[N]`, in which every class comes once before any comes again."""
    rng = np.random.default_rng(draw)
    order, ranks = rng.permutation(len(labels)), np.empty(len(labels), int)
    shuffled, classes = labels[order], rng.permutation(int(labels.max()) + 1)
    for label in np.unique(labels):
        at = shuffled == label
        ranks[at] = np.arange(np.sum(at))
    return order[np.lexsort((classes[shuffled], ranks))]


def ceiling(victim: Victim, found: dict[str, Any], num_steps: int, write: Callable[[], None]) -> None:
    """The best of several runs of momentum sign steps on minibatches of all support images; the query images judge it.

    One run for each loss and start, and one for each of the classes that most images go to after the best of these. The
    support images choose among the runs. Those in `found["runs"]` are kept.
    """
    support, epsilon = victim.images.support, victim.about["epsilon"]
    shape, size = support.shape[1:], min(_BATCH, len(support))
    signs = np.random.default_rng(0).choice([-epsilon, epsilon], (8, 8, shape[2])).astype(np.float32)
    rows, columns = (np.arange(side) * 8 // side for side in shape[:2])
    starts = {"zeros": np.zeros(shape, np.float32), "tiles": signs[rows][:, columns]}
    runs = found.setdefault("runs", [])

    def run(loss, start):
        about = {"loss": loss.kind, "target": loss.target, "start": start, "steps": num_steps}
        if any(about == {name: kept[name] for name in about} for kept in runs):
            return
        began = time.monotonic()
        theta = _long_run(victim, loss, starts[start], num_steps, size)
        after, labels = classes(victim.model, support, theta), victim.images.support_labels
        counts = np.bincount(after)
        rates = {"support_error": float(np.mean(after != labels)), **victim.rates(theta)}
        rates["dominant"] = np.argsort(-counts, kind="stable")[: min(_TARGETS, np.sum(counts > 0))].tolist()
        runs.append({**about, **rates, "seconds": round(time.monotonic() - began, 2)})
        best = max(runs, key=lambda kept: kept["support_error"])
        found.update({name: best[name] for name in ("asr", "fooling_rate", "loss", "target", "start")})
        found["evaluations"] = 2 * size * sum(kept["steps"] for kept in runs)
        write()
        print(f"{victim.about['model']}: ceiling, {about}: {100 * rates['asr']:.1f}", flush=True)

    for kind, start in itertools.product(("cross_entropy", "hinge"), starts):
        run(AttackLoss(kind), start)
    untargeted = [kept for kept in runs if kept["target"] is None]
    for target in max(untargeted, key=lambda kept: kept["support_error"])["dominant"]:
        run(AttackLoss("cross_entropy", target=target), "zeros")


_LONG_STEPS = optax.with_extra_args_support(hand_designed.projected_gradient(0.2, 0.9, 0.0))


def _long_run(victim, loss, theta, num_steps, size):
    images, labels = jnp.asarray(victim.images.support), jnp.asarray(victim.images.support_labels)
    theta, function, epsilon = jnp.asarray(theta), victim.model.traced(), victim.about["epsilon"]
    state = _LONG_STEPS.init(theta)
    for k, key in enumerate(jax.random.split(jax.random.key(0), num_steps)):
        rows = jax.random.randint(key, (size,), 0, len(labels))
        batch = images[rows], labels[rows]
        theta, state = _long_step(function, loss, *batch, theta, state, epsilon, jnp.float32(k / num_steps))
    return np.asarray(theta)


@jax.jit
def _long_step(function, loss, images, labels, theta, state, epsilon, progress):
    def objective(theta):
        return jnp.mean(loss(function(perturb(unit_range(images), theta)), labels))

    updates, state = _LONG_STEPS.update(jax.grad(objective)(theta), state, theta, scale=epsilon, progress=progress)
    return jnp.clip(theta + updates, -epsilon, epsilon), state


def _chosen_methods(flags: Config) -> dict[str, Method]:
    """The methods to measure, by name; a ValueError for unknown ones."""
    chosen = {name: _method(name, "methods") for name in flags.methods}
    return chosen | {name: method for family in flags.grid for name, method in literature.settings(family).items()}


def _method(name: str, argument: str) -> Method:
    """A method of the table, or a setting of a family by its name."""
    family = name.partition(" ")[0]
    if name != family and family in literature.FAMILIES:
        return literature.settings(family)[check_name(argument, name, literature.settings(family))]
    return METHODS[check_name(argument, name, METHODS)]


def _results(path: Path, victim: Victim, flags: Config, draws: int) -> dict[str, Any]:
    """The results file as it was, less what is measured again, or a new one."""
    results: dict[str, Any] = {"rows": [], _CEILING: {}}
    if path.is_file():
        results |= json.loads(path.read_text(encoding="utf-8"))
        if results["about"] != victim.about:
            raise ValueError(f"output: {path} has results of {results['about']}, expected {victim.about}.")
    right = victim.clean == victim.images.query_labels
    results |= {"about": victim.about, "clean_accuracy": float(np.mean(right))}
    results["provenance"] = provenance.describe(range(draws))
    again = set(flags.again)
    results["rows"] = [row for row in results["rows"] if again.isdisjoint((row["method"], row["method"].split()[0]))]
    if _CEILING in flags.again:
        results[_CEILING] = {}
    return results


def _summarise(rows: list[dict[str, Any]], reference: str) -> None:
    """Means over draws, their 95% intervals, and differences to the reference in the draws that both have."""
    rivals = {(row["steps"], row["images"]): row["draw_asr"] for row in rows if row["method"] == reference}
    for row in rows:
        for name in ("asr", "fooling_rate"):
            row[name], row[f"{name}_interval"] = mean_interval(row[f"draw_{name}"])
        row["evaluations"] = float(np.mean(row["draw_evaluations"]))
        row["seconds"] = float(np.median(row["draw_seconds"]))  # the first one compiles
        row.pop("difference", None)
        rival = rivals.get((row["steps"], row["images"]))
        if rival and row["method"] != reference:
            mean, width = mean_interval([a - b for a, b in zip(row["draw_asr"], rival, strict=False)])
            row["difference"] = {"to": reference, "asr": mean, "interval": width}


def mean_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95% interval, by Student's t since draws are few; None for one value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None
    return mean, float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))


if __name__ == "__main__":
    config.main(Config, measure)
