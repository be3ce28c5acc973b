r"""Universal adversarial training: clean accuracy, and success of fresh attacks of several kinds, before and after.

  python -m experiments.studies.defence --source=mnist_5k --audit
  python -m experiments.studies.defence --source=cifar10 --audit

A small CNN is trained, then hardened from its weights: by `lft_jax.defence.harden` with the learned rule inside, and by
its settings that are those of arXiv 1811.11304, one perturbation throughout, moved by sign steps. Two controls have
equally many further epochs: on clean images, and with the searched patterns alone, which no attack moves. Attacks are
made from validation images, and judged on test images. With `--art`, which needs the extra `art`, defences of the
Adversarial Robustness Toolbox that change the images stand before the plain CNN: attacked by the perturbations that are
made on it without them, and by queries through them. With `--audit`, which needs the extra `audit`, the network is
audited before and after the hardening by the learned rule, on test images. The results file keeps what is finished;
weights and the pages of the audits are in `--workdir`.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lft_jax
from experiments import config
from experiments.rows import row_of
from lft_jax import defence, interop, models
from lft_jax.base import check_name
from lft_jax.cli import provenance
from lft_jax.data import ImageSource, load_source
from lft_jax.evaluation.metrics import mean_interval
from lft_jax.optimizers import hand_designed
from lft_jax.victims import Victim, VictimConfig, build_model, load_victim, save_victim, train_victim

ARCHITECTURE = "small_cnn"
#: Radii, and settings of training and of hardening.
RADII = {"digits": 0.25, "mnist_5k": 0.3, "cifar10": 8 / 255}
TRAINING = {
    "digits": {"epochs": 8},
    "mnist_5k": {"epochs": 12, "batch_size": 64, "learning_rate": 3e-3, "augment": "crop"},
    "cifar10": {"epochs": 8, "learning_rate": 4e-3, "augment": "crop_flip"},
}
EPOCHS = {"digits": 60, "mnist_5k": 15, "cifar10": 8}
SIGN = hand_designed.projected_gradient(0.4, 0.9, 0.1)
#: `{name: settings}` of `lft_jax.defence.Hardening`; None for no hardening.
HARDENINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "further clean epochs": {"attack": optax.set_to_zero(), "attack_steps": 2**29, "perturbations": 1, "search": None},
    "patterns alone": {"attack": optax.set_to_zero()},
    "learned": {},
    "learned on periods": {"attack": "uap-linf"},
    "one perturbation": {
        "attack": hand_designed.projected_gradient(0.1),
        "attack_steps": 2**29,
        "perturbations": 1,
        "search": None,
    },
}
#: `{name: settings}` of `lft_jax.universal_perturbation`.
ATTACKS: dict[str, dict[str, Any]] = {
    "uap-linf": {},
    "sign steps": {"optimizer": SIGN, "recipe": lft_jax.AttackRecipe(augmentation=None)},
    "patterns by queries": {"oracle": "query", "max_queries": 1000},
    "sign steps on many images": {
        "optimizer": SIGN,
        "recipe": lft_jax.AttackRecipe(augmentation=None, batch=64),
        "steps": 100,
    },
}
#: Support images of the attack on many images.
MANY = 500
#: Hardenings that are audited, and the radii of that in parts of the radius of the study.
AUDITED, PARTS = ("none", "learned"), (0.5, 1.0)
BUDGET = lft_jax.AuditBudget(draws=1)
NO_PREPROCESSOR = "no preprocessor"
#: `{name: (class in art.defences.preprocessor, settings)}`.
PREPROCESSORS = {
    "FeatureSqueezing, 3 bits": ("FeatureSqueezing", {"bit_depth": 3}),
    "SpatialSmoothing, 3 x 3": ("SpatialSmoothing", {"window_size": 3}),
    "JpegCompression, quality 50": ("JpegCompression", {"quality": 50}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    source: str = config.option("mnist_5k", "Image source.", choices=tuple(RADII))
    hardenings: tuple[str, ...] = config.option((), "Hardenings; all if empty.")
    attacks: tuple[str, ...] = config.option((), "Attacks; all if empty.")
    art: bool = config.option(False, "Also measure preprocessing defences of the Adversarial Robustness Toolbox.")
    audit: bool = config.option(False, "Also audit the network before and after hardening.")
    draws: int = config.option(5, "Draws of the support images of an attack.")
    queries: int = config.option(1000, "Test images that attacks are judged on; 0 for all.")
    output: str | None = config.option(None, "Results file; results/defence/SOURCE.json if not given.")
    workdir: str = config.option("runs/defence", "Folder of the trained weights.")
    data_dir: str | None = config.option(None, "Folder of TFDS data; TFDS_DATA_DIR if not given.")


@dataclasses.dataclass(frozen=True)
class Sources:
    """The splits of an image source."""

    train: ImageSource
    validation: ImageSource
    test: ImageSource


def study(flags: Config) -> dict[str, Any]:
    """Runs the study, writes its file and returns the results."""
    for argument, given, known in (("hardenings", flags.hardenings, HARDENINGS), ("attacks", flags.attacks, ATTACKS)):
        for name in given:
            check_name(argument, name, known)
    sources = Sources(*(load_source(flags.source, s, data_dir=flags.data_dir) for s in ("train", "validation", "test")))
    path = Path(flags.output or f"results/defence/{flags.source}.json")
    results = _results(path, flags)
    count = flags.queries or len(sources.test.labels)
    judges = sources.test._replace(images=sources.test.images[:count], labels=sources.test.labels[:count])
    cells = _cells_of_hardening(flags, sources, results["histories"])
    if flags.art:
        cells = itertools.chain(cells, _cells_of_art(flags, sources))
    for cell, judged, attacked in cells:
        row = row_of(results["rows"], cell)
        if len(row["draw_asr"]) < flags.draws:
            correct = np.argmax(judged(judges.images), -1) == judges.labels
            row["clean_accuracy"] = float(np.mean(correct))
        for draw in range(len(row["draw_asr"]), flags.draws):
            theta = _perturbation(attacked, cell["attack"], sources.validation, draw, flags)
            rate = lft_jax.attack_success_rate(judged, judges.images, judges.labels, theta)
            row["draw_asr"].append(rate)
            row["asr"] = float(np.mean(row["draw_asr"]))
            row["asr_interval"] = mean_interval(row["draw_asr"])[1] if draw else None
            provenance.write_json(path, results)
        found = f"{100 * row['asr']:.1f}%, clean {100 * row['clean_accuracy']:.1f}%"
        print(cell["part"], cell["defence"], cell["attack"], found, sep=", ", flush=True)
    for name in AUDITED if flags.audit else ():
        results["audits"][name] = _audited(name, sources, judges, flags)
        provenance.write_json(path, results)
    return results


def _audited(name, sources, judges, flags):
    """What the audit of the network after a hardening says; its page is in `workdir`."""
    _, model = _hardened(name, sources, flags)
    folder = _folder(name, flags).with_name(f"{_folder(name, flags).name}_audit")
    report = lft_jax.audit(
        model,
        judges.images,
        judges.labels,
        epsilons=[part * RADII[flags.source] for part in PARTS],
        l2_epsilons=(),
        budget=BUDGET,
        output=folder,
        about={"model": f"{ARCHITECTURE}, hardening: {name}", "data": f"{flags.source}, test images"},
    )
    report.save(folder)
    print(report, flush=True)
    found = report.results
    kept = {name: found[name] for name in ("clean_accuracy", "threats", "split", "failures")}
    return {"verdict": found["verdict"]["title"], "runs": len(report.runs), **kept}


def _cells_of_hardening(flags, sources, histories):
    """`(cell, model that is judged, model that is attacked)` of all hardenings and attacks."""
    for name in flags.hardenings or HARDENINGS:
        victim, model = _hardened(name, sources, flags)
        histories[name] = victim.card["history"]
        for attack in flags.attacks or ATTACKS:
            yield {"part": "hardening", "defence": name, "attack": attack}, model, model


def _cells_of_art(flags, sources):
    """The same of all preprocessors: perturbations of the plain model, and attacks by queries through them."""
    _, plain = _hardened("none", sources, flags)
    for name in (NO_PREPROCESSOR, *PREPROCESSORS):
        model = interop.from_art(_art_classifier(plain, name, sources.test))
        for attack, attacked in (("uap-linf", plain), ("patterns by queries", model)):
            yield {"part": "art", "defence": name, "attack": attack}, model, attacked


def _results(path, flags):
    described = {"source": flags.source, "architecture": ARCHITECTURE, "norm": "linf", "epsilon": RADII[flags.source]}
    described |= {"queries": flags.queries, "epochs": EPOCHS[flags.source], "many": MANY}
    settings = defence.Hardening(epsilon=RADII[flags.source])
    described |= {name: getattr(settings, name) for name in ("fraction", "attack_steps", "perturbations")}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["about"] != described:
            raise ValueError(f"output: {path} is of other settings, {found['about']}, not {described}; name another.")
    else:
        found = {"about": described, "histories": {}, "rows": []}
    now = provenance.describe(range(flags.draws))
    made = found.get("provenance", now)
    if now["commit"] not in (made["commit"], *made.get("resumed_at_commits", ())):
        made["resumed_at_commits"] = [*made.get("resumed_at_commits", ()), now["commit"]]
    return {
        "provenance": made,
        **{name: found[name] for name in ("about", "histories", "rows")},
        "audits": found.get("audits", {}),
    }


def _folder(name, flags):
    """Of the weights after a hardening."""
    return Path(flags.workdir, f"{flags.source}_{name.replace(' ', '_')}")


def _hardened(name, sources, flags) -> tuple[Victim, models.Classifier]:
    """The victim after a hardening, trained or loaded, and its classifier."""
    source, module = sources.train, build_model(ARCHITECTURE, sources.train.num_classes)
    folder = _folder(name, flags)
    if (folder / "card.json").exists():
        victim = load_victim(folder)
        return victim, models.from_flax(module, victim.variables)
    settings, history = HARDENINGS[name], {}
    if settings is None:
        variables, _ = train_victim(
            VictimConfig(flags.source, ARCHITECTURE, seed=1000, **TRAINING[flags.source]), source, sources.validation
        )
    else:
        before, _ = _hardened("none", sources, flags)
        found = defence.harden(
            module,
            before.variables,
            source.images,
            source.labels,
            defence.Hardening(epsilon=RADII[flags.source], epochs=EPOCHS[flags.source], **settings),
            optimizer=optax.adam(1e-3),
            key=jax.random.key(0),
        )
        variables = found.variables
        history = {name: np.round(values, 4).tolist() for name, values in found.history.items()}
    card = {"source": flags.source, "architecture": ARCHITECTURE, "num_classes": source.num_classes}
    card |= {"image_shape": list(source.images.shape[1:]), "history": history}
    victim = Victim(variables, card)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_victim(folder, victim)
    return victim, models.from_flax(module, variables)


def _perturbation(model, attack, source, draw, flags):
    """The perturbation of an attack from one image of each class, or from many."""
    rng = np.random.default_rng(draw)
    rows = np.asarray([rng.choice(np.flatnonzero(source.labels == label)) for label in np.unique(source.labels)])
    if "many" in attack:
        rows = rng.permutation(len(source.labels))[:MANY]
    return lft_jax.universal_perturbation(
        model,
        source.images[rows],
        source.labels[rows],
        epsilon=RADII[flags.source],
        key=jax.random.key(draw),
        progress=False,
        **ATTACKS[attack],
    ).perturbation


def _art_classifier(model, name, source):
    """The model as a classifier of the Adversarial Robustness Toolbox, behind a preprocessor."""
    from art.defences import preprocessor
    from art.estimators.classification import BlackBoxClassifier

    shape = source.images.shape[1:]
    defences = None
    if name != NO_PREPROCESSOR:
        kind, settings = PREPROCESSORS[name]
        defences = getattr(preprocessor, kind)(clip_values=(0, 1), **settings)
    predict = jax.jit(lambda images: jax.nn.softmax(model.traced()(images)))
    return BlackBoxClassifier(
        lambda x: np.asarray(predict(x)), shape, source.num_classes, clip_values=(0, 1), preprocessing_defences=defences
    )


if __name__ == "__main__":
    config.main(Config, study)
