r"""Learns the tile that attacks on large images begin from, and what it does to other models before any step.

  python -m experiments.studies.tile --ship

A long attack on a public model for meta-training, with its images for meta-training, along gradients averaged over
translations by the period: what it finds repeats, so that one period of it is a start for images of any size. It is
judged on the query images of the models that settings are chosen on. The results file keeps the rows of other periods
and numbers of steps. `--ship` writes the tile into the package, with a card.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

import lft_jax
from experiments import config
from experiments.rows import opened
from experiments.studies import attacked, public, public_models
from lft_jax._files import save_arrays
from lft_jax.base import check_at_least, check_name
from lft_jax.cli import provenance
from lft_jax.optimizers import hand_designed, periodic
from lft_jax.pretrained import load_fine_tuner
from lft_jax.tasks import tile as tiles

#: What learns it, on gradients averaged over translations: first step in units of epsilon, momentum, last step.
OPTIMIZERS = {
    "sign": hand_designed.projected_gradient(0.4, 0.9, 0.02),
    "normalized": hand_designed.normalized_gradient(2.4, 0.9, 0.05),
    "uap-linf": load_fine_tuner("uap-linf"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    model: str = config.option("efficientnet_lite2", "Public model for meta-training, which the tile is learned on.")
    period: int = config.option(tiles.SIDE, "Pixels after which the perturbation repeats.")
    optimizer: str = config.option("normalized", "Whose steps learn it.", tuple(OPTIMIZERS))
    steps: int = config.option(100, "Steps of the attack that learns it.")
    seed: int = config.option(0, "Seed of the proxies.")
    judged: tuple[str, ...] = config.option(("efficientnet_lite1", "mobilenet025"), "Models that it is judged on.")
    queries: int = config.option(0, "Query images; 0 for all.")
    ship: bool = config.option(False, "Write the tile into the package.")
    output: str = config.option("results/public/tile.json", "Results file.")


def learn(flags: Config) -> None:
    """Learns a tile, judges it, adds a row for each model to the results file, and ships it if asked to."""
    found = public_models.MODELS[check_name("model", flags.model, public_models.MODELS)]
    if found.role != "training":
        raise ValueError(f"model: {flags.model} is for {found.role}, expected a model for training.")
    check_at_least("period", flags.period, 1)
    if flags.ship and flags.period != tiles.SIDE:
        raise ValueError(f"period: a tile that ships has {tiles.SIDE} pixels, got {flags.period}.")
    described = provenance.describe([flags.seed])
    victims = {name: attacked.victim(name, queries=flags.queries) for name in (flags.model, *flags.judged)}
    images = public_models.load_images(found.source, found.role)
    optimizer = optax.chain(periodic(flags.period), OPTIMIZERS[flags.optimizer])
    ball = {"norm": "linf", "epsilon": found.epsilon, "key": jax.random.key(flags.seed)}
    options = {"steps": flags.steps, "optimizer": optimizer, "recipe": public.PROXIES, "progress": False}
    model = victims[flags.model].model
    result = lft_jax.universal_perturbation(model, images.support, images.support_labels, **ball, **options)
    results = opened(flags.output, {"queries": flags.queries})
    about = {"learned_on": flags.model, "images": len(images.support)}
    about |= {name: getattr(flags, name) for name in ("optimizer", "period", "steps", "seed")}
    rows = []
    for name, victim in victims.items():
        rates = victim.rates(result.perturbation)
        rows.append({**about, "model": name, "role": victim.about["role"], "epsilon": found.epsilon, **rates})
        print(f"{name}: {100 * rates['asr']:.1f}", flush=True)
    kept = [row for row in results["rows"] if not about.items() <= row.items()]
    results |= {"rows": [*kept, *({**row, "commit": described["commit"]} for row in rows)], "provenance": described}
    provenance.write_json(flags.output, results)
    if flags.ship:
        tile = np.float32(result.perturbation[: tiles.SIDE, : tiles.SIDE] / found.epsilon)
        save_arrays(tiles.PATH, {"tile": tile})
        provenance.write_json(tiles.PATH.with_suffix(".json"), {**described, **about, "without_steps": rows})
    print(f"wrote {Path(flags.output)}")


if __name__ == "__main__":
    config.main(Config, learn)
