r"""A learned distribution of the patterns that attacks begin from, against the uniform one, at equal evaluations.

  python -m experiments.studies.starts

Random patterns are tried on victims for meta-training, at several radii. The distribution of frequencies, of the
relation of the channels and of the periods of tiles is the one whose best of some draws is expected to fool most, over
all victims. Which of these are learned, and how far they may be from uniform, is chosen by leaving victims out. Then
attacks begin from both: success after the search alone, and after the steps of the default attack, on images for
choosing. The results file keeps what is finished, and another run may add models or draws.
"""

import dataclasses
import itertools
import operator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from experiments import common, config
from experiments.cells import Cells
from experiments.rows import opened, row_of
from experiments.studies import _patterns, attacked, public, public_models
from experiments.studies._patterns import UNIFORM, LearnedSearch, PatternDistribution, Pool, success_of
from lft_jax import models
from lft_jax.attack.universal import LOSS, SEARCH
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import provenance
from lft_jax.data import load_source, unit_range
from lft_jax.tasks import AttackRecipe, Proxies, patterns
from lft_jax.tasks.perturbation import perturb
from lft_jax.victims import load_victim

STARTS = ("uniform", "learned")
#: Which parts of a distribution are the learned ones.
PARTS = {
    "frequencies": ("frequencies",),
    "relations": ("relations",),
    "periods": ("periods",),
    "frequencies and relations": ("frequencies", "relations"),
    "all": ("frequencies", "relations", "periods"),
}
_ADDED = ("models", "draws", "workdir", "output", "data_dir")  # another run may have others


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    victims: tuple[str, ...] = config.option(
        (
            *(f"victims/cifar10_small_cnn_{seed}" for seed in range(4)),
            *(f"victims/cifar10_{name}" for name in ("lenet_4", "lenet_5", "mobilenet_0", "mobilenet_1", "resnet14_0")),
            *(f"victims/cifar10_{name}" for name in ("resnet20_0", "resnet20_1", "resnet20_adversarial_0", "vit_0")),
            *(f"victims/mnist_small_cnn_{seed}" for seed in range(4)),
            *(f"victims/mnist_{name}" for name in ("lenet_4", "lenet_5", "mobilenet_0", "resnet20_0", "vit_0")),
            "public/efficientnet_lite2",
        ),
        "Victims of the meta-training: folders, or public/NAME.",
    )
    radii: tuple[float, ...] = config.option((0.7, 1.0, 1.4), "Radii, in units of the customary one.")
    patterns: int = config.option(320, "Random patterns at each radius.")
    searched: int = config.option(12, "Images that a pattern is chosen by.")
    judged: int = config.option(28, "Images that it is judged on.")
    penalties: tuple[float, ...] = config.option((0.1, 0.3, 1.0), "Weights of the divergence to choose from.")
    models: tuple[str, ...] = config.option(
        (
            *("resnet20", "cifar10_small_cnn_100", "mnist_small_cnn_100", "cifar10_lenet_101", "mobilenet025"),
            *("cifar10_small_cnn_1000", "mnist_small_cnn_1000"),
        ),
        "Models to attack, on images for choosing.",
    )
    steps: int = config.option(20, "Fine-tuning steps (K) after the search.")
    images: int = config.option(10, "Support images.")
    draws: int = config.option(10, "Draws of the support images; half as many on ImageNet.")
    queries: int = config.option(1000, "Query images; 0 for all.")
    workdir: str = config.option("runs/starts", "Folder for what patterns did.")
    output: str = config.option("results/public/starts.json", "Results file.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


class _Victim(NamedTuple):
    """A victim, the customary radius, and the images of its meta-training, of which there may be none."""

    model: models.Classifier
    source: str
    epsilon: float
    images: np.ndarray | None = None
    labels: np.ndarray | None = None


def _victim(path, data_dir, *, images=True):
    if path.startswith(common.PUBLIC):
        name = path.removeprefix(common.PUBLIC)
        found = public_models.MODELS[check_name("victims: public", name, public_models.MODELS)]
        if found.role != "training":
            raise ValueError(f"victims: {path} is a model for {found.role}, expected one for training.")
        victim = _Victim(public_models.load(name), found.source, found.epsilon)
        data = public_models.load_images(found.source, "training", data_dir=data_dir)[:2] if images else ()
    else:
        stored = load_victim(path)
        source = stored.card["source"]
        victim = _Victim(models.from_function(stored.logits_fn), source, attacked.EPSILON[source])
        data = load_source(source, "train", data_dir=data_dir)[1:3] if images else ()
    return _Victim(*victim[:3], *data)


def try_patterns(path: str, flags: Config) -> dict[str, np.ndarray]:
    """What random patterns do to a victim: the leaves of a `Pool` by name. Patterns are the same for all victims.

    On large images, which take long, there is one radius, and fewer images by far.
    """
    victim = _victim(path, flags.data_dir)
    large = victim.images.shape[1] > 64
    radii, few, judged = ((1.0,), 8, 8) if large else (flags.radii, flags.searched, flags.judged)
    images = unit_range(jnp.asarray(victim.images[: few + judged]))
    labels, function = jnp.asarray(victim.labels[: few + judged], jnp.int32), victim.model.traced()

    @jax.jit
    def outcome(pattern, scale):
        logits = function(perturb(images, scale * patterns._image(pattern, images.shape[1:])))
        loss = jnp.mean(LOSS(logits[:few], labels[:few]))
        return loss, jnp.mean((jnp.argmax(logits[few:], -1) != labels[few:]).astype(jnp.float32))

    rows = []
    for number, radius in enumerate(radii):
        drawn, pool = draw_pool(jax.random.key(number), flags.patterns, images.shape[3])
        scale = jnp.float32(radius * victim.epsilon)
        found = [outcome(jax.tree.map(operator.itemgetter(i), drawn), scale) for i in range(flags.patterns)]
        rows.append(Pool(*pool, *np.asarray(jax.device_get(found), np.float32).T))
    jax.clear_caches()
    return Pool(*map(np.stack, zip(*rows, strict=True)))._asdict()


def draw_pool(key: jax.Array, number: int, channels: int) -> tuple[Any, tuple[np.ndarray, ...]]:
    """Random patterns of `_patterns.BROAD`, drawn as colours, and their kinds, relations and bins."""
    counts = _patterns.apportioned(np.asarray(_patterns.BROAD.periods), number)
    kinds = np.repeat(np.arange(len(counts)), counts)
    key_cells, key_waves = jax.random.split(key)
    side = max(_patterns.PERIODS)
    waves = _patterns.BROAD.waves(key_waves, number, max(channels, 3))
    cells = jax.random.rademacher(key_cells, (number, side, side, max(channels, 3)), jnp.float32)
    period = jnp.asarray(np.asarray(_patterns.PERIODS)[kinds], jnp.int32)
    drawn = patterns._Pattern(period, cells[..., :channels], waves.frequency, waves.phase[:, :channels])
    wave = kinds == 0
    relations = np.where(wave & (channels > 1), waves.relations, -1)
    return drawn, (kinds, relations, np.where(wave, waves.bins, -1))


def pools_of(flags: Config) -> list[Pool]:
    """The pools of all victims, from the working folder as far as it has them."""
    settings = {name: getattr(flags, name) for name in ("radii", "patterns", "searched", "judged")}
    cells = Cells(Path(flags.workdir, "pools"), settings)
    found = []
    for path in flags.victims:
        pool = Pool(**cells.get(path, try_patterns, path, flags))
        spread = f"{100 * np.mean(pool.success):.0f} on average, {100 * np.max(pool.success):.0f} at most"
        print(f"{path}: patterns fool {spread}", flush=True)
        found.append(Pool(*(np.broadcast_to(leaf, (len(flags.radii), leaf.shape[1])) for leaf in pool)))
    return found


def shared_ranks(pools: list[Pool], sources: list[str]) -> list[dict[str, Any]]:
    """Mean rank correlation of the losses of two victims over patterns at the middle radius, by pair of sources."""
    middle = len(pools[0].losses) // 2
    losses, wave = np.stack([pool.losses[middle] for pool in pools]), pools[0].kinds[middle] == 0
    found = []
    for kind, chosen in {"waves": wave, "tiles": ~wave}.items():
        ranks = stats.rankdata(losses[:, chosen], axis=1)
        table = np.corrcoef(ranks)
        for pair in itertools.combinations_with_replacement(sorted(set(sources)), 2):
            pairs = [
                table[i, j]
                for i, j in itertools.combinations(range(len(pools)), 2)
                if tuple(sorted((sources[i], sources[j]))) == pair
            ]
            if pairs:
                found.append({"patterns": kind, "sources": list(pair), "correlation": float(np.mean(pairs))})
    return found


def validation(pools: list[Pool], draws: int, penalty: float) -> dict[str, list[float]]:
    """Gain over the uniform start of distributions that are fitted without the victim: for each victim, by `PARTS`.

    All victims saw the same patterns. So one half of them is fitted to and the other one judged on, in turn.
    """
    halves = [[Pool(*(leaf[:, k::2] for leaf in pool)) for pool in pools] for k in (0, 1)]
    gains = {name: [] for name in PARTS}
    for left_out in range(len(pools)):
        found = []
        for fitted, judged in (halves, halves[::-1]):
            learned = _patterns.fit(fitted[:left_out] + fitted[left_out + 1 :], draws, penalty)
            tried = (UNIFORM, *(with_parts(learned, name) for name in PARTS))
            found.append([success_of(of, judged[left_out], draws) for of in tried])
        uniform, *others = np.mean(found, 0)
        for name, success in zip(PARTS, others, strict=True):
            gains[name].append(float(success - uniform))
    return gains


def with_parts(learned: PatternDistribution, name: str) -> PatternDistribution:
    """The uniform distribution with some parts of another one; see `PARTS`."""
    return dataclasses.replace(UNIFORM, **{part: getattr(learned, part) for part in PARTS[name]})


def learn(flags: Config) -> dict[str, Any]:
    """Meta-trains a distribution: the results of that, among them the `distribution` as its fields."""
    pools, draws = pools_of(flags), SEARCH.tiles + SEARCH.waves
    sources = [_victim(path, flags.data_dir, images=False).source for path in flags.victims]
    tried = []
    for penalty in flags.penalties:
        for name, gains in validation(pools, draws, penalty).items():
            by_source = {of: [] for of in sources}
            for gain, of in zip(gains, sources, strict=True):
                by_source[of].append(gain)
            of_sources = {of: float(np.mean(values)) for of, values in by_source.items()}
            tried.append({"penalty": penalty, "parts": name, "gain": float(np.mean(gains)), "source_gain": of_sources})
            tried[-1]["victim_gain"] = gains
            shown = ", ".join(f"{of} {100 * gain:+.1f}" for of, gain in of_sources.items())
            print(f"penalty {penalty}, {name}: {shown}", flush=True)
    best = max(tried, key=lambda row: row["gain"])
    learned = with_parts(_patterns.fit(pools, draws, best["penalty"]), best["parts"])
    chosen = {name: best[name] for name in ("penalty", "parts")}
    found = {"sources": sources, "ranks": shared_ranks(pools, sources), "validation": tried, "chosen": chosen}
    return found | {"distribution": dataclasses.asdict(learned)}


def methods(distribution: PatternDistribution, steps: int) -> dict[tuple[str, int], public.Attack]:
    """The attacks that are compared, by start and steps: a search alone (0 steps), and the default attack."""
    learned = LearnedSearch.of(distribution, SEARCH.tiles + SEARCH.waves, SEARCH.refinements)
    found = {}
    for start, search in zip(STARTS, (SEARCH, learned), strict=True):
        recipe = AttackRecipe(augmentation=Proxies(), search=search)
        found[start, 0] = public.Attack(optax.set_to_zero(), recipe)
        found[start, steps] = public.Attack("uap-linf", recipe)
    return found


def measure(flags: Config) -> dict[str, Any]:
    """Meta-trains the distribution and measures what the results file lacks; returns the results."""
    for name in ("patterns", "searched", "judged", "steps", "images", "draws"):
        check_at_least(name, getattr(flags, name), 1)
    described = {name: value for name, value in dataclasses.asdict(flags).items() if name not in _ADDED}
    path = Path(flags.output)
    results = opened(path, described)
    results["provenance"] = provenance.describe(range(flags.draws))
    if "distribution" not in results:
        results |= learn(flags)
        provenance.write_json(path, results)
    distribution = PatternDistribution.from_dict(results["distribution"])
    for name in flags.models:
        victim = attacked.victim(name, split="choosing", queries=flags.queries, data_dir=flags.data_dir)
        draws = -(-flags.draws // 2) if victim.about["source"] == "imagenet_sample" else flags.draws
        for (start, steps), method in methods(distribution, flags.steps).items():
            row = row_of(results["rows"], {"model": name, "start": start, "steps": steps})
            for draw in range(len(row["draw_asr"]), draws):
                rates = public.attack(victim, method, max(steps, 1), flags.images, draw)
                row["draw_asr"].append(rates["asr"])
                row["evaluations"] = rates["evaluations"]
                provenance.write_json(path, results)
        jax.clear_caches()  # as in the study of public models
        results["models"] = summary(results["rows"])
        for found in results["models"]:
            if found["model"] == name:
                gain = f"{100 * found['difference']:+.1f} ± {100 * (found['interval'] or 0):.1f}"
                print(f"{name}, {found['steps']} steps: {100 * found['uniform']:.1f}, {gain}", flush=True)
    provenance.write_json(path, results)
    return results


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and number of steps, the success from both starts, and their difference paired by draw."""
    found = []
    for model, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        cell = {"model": model, "steps": steps}
        of = {row["start"]: row for row in rows if cell.items() <= row.items() and row["draw_asr"]}
        if set(of) == set(STARTS):
            pairs = zip(*(of[start]["draw_asr"] for start in STARTS), strict=False)  # of the draws that both have
            uniform, learned = np.asarray(list(pairs)).T
            mean, interval = public.mean_interval((learned - uniform).tolist())
            cell |= {"draws": len(uniform)}
            cell |= {start: float(np.mean(values)) for start, values in zip(STARTS, (uniform, learned), strict=True)}
            cell |= {"difference": mean, "interval": interval}
            found.append(cell | {"evaluations": {start: of[start]["evaluations"] for start in STARTS}})
    return found


if __name__ == "__main__":
    config.main(Config, measure)
