r"""Finds one perturbation that makes a classifier err on many images, from a few: a universal perturbation.

Your own model, images of yours:
  lft-attack --model=package.module:function --images=FOLDER --epsilon=8/255 --output=runs/uap
Without images (those of --images, if any, are only measured on):
  lft-attack --model=package.module:function --shape=224,224,3 --epsilon=10/255 --output=runs/uap
One of the stored victims, on its own images:
  lft-attack --victim=victims/mnist_small_cnn_1000 --output=runs/uap

The model is a file of Keras (.keras, .h5) or ONNX (.onnx), or a function without arguments returns it: a function of
images [N, H, W, C] in [0, 1] that returns logits, a Classifier of lft_jax.models, a torch.nn.Module or a Keras model.
For all but a Classifier, --mean, --std, --channels, --input_range and --model_output say what the model expects and
returns.

Images are an .npz file with the array images (and labels, test_images, test_labels, if there are any), or a folder of
pictures. Labels of a folder are the numbers of sub-folders (0, 1, ... or 3_cat), or in labels.csv (file,label). Without
labels, the model's own predictions are the labels. The rates are measured on the images that were not chosen.

Written are OUTPUT.npy (the perturbation), OUTPUT.json (rates, history, flags, provenance) and, with the extra plots,
OUTPUT.png (images before and after).

Exit codes: 0 success; 1 unexpected error, with a traceback; 2 wrong flags, images or model; 3 an error, Ctrl-C or
SIGTERM ended the run and the best perturbation so far is written, with "complete": false; 130 Ctrl-C and 143 SIGTERM
before there was one.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from lft_jax.attack import ORACLES, UniversalPerturbation, universal_perturbation
from lft_jax.base import check_name
from lft_jax.cli import _exits, config, provenance
from lft_jax.cli._images import Images, choose, load_images, unseen
from lft_jax.cli._measure import Remembered, predictions, rates
from lft_jax.cli._own import OwnFlags, check_own, own_model, radius
from lft_jax.data import load_source
from lft_jax.evaluation import make_baselines
from lft_jax.interop import load_perturbation
from lft_jax.pretrained import list_pretrained
from lft_jax.tasks import AttackLoss, AttackRecipe, Constraint, WaveSearch
from lft_jax.tasks.perturbation import LOSSES
from lft_jax.victims import default_epsilon, load_victim


@dataclasses.dataclass(frozen=True)
class Config(OwnFlags):
    """Command-line flags."""

    output: str = config.required("Where to write, without suffix: OUTPUT.npy, OUTPUT.png and OUTPUT.json.")
    model: str | None = config.option(
        None, "Your model: a .keras, .h5 or .onnx file, or package.module:function, which returns it."
    )
    images: str | None = config.option(None, "Images for --model: an .npz file or a folder of pictures.")
    shape: tuple[int, ...] = config.option(
        (), "Attack without images: H,W,C of the model's images. Default: that of the model, if known and no --images."
    )
    victim: str | None = config.option(None, "Instead of --model: folder of a victim (experiments.train_victim).")
    shots: int | None = config.option(None, "Images to attack from: so many of each class, at random. Default: 1.")
    num_images: int | None = config.option(
        None, "Images to attack from, at random, instead of --shots. Default without labels: 10."
    )
    num_test: int | None = config.option(None, "Largest number of unseen images to measure on; all if not given.")
    optimizer: str = config.option(
        "uap-linf", "Pretrained rule, .safetensors file of a rule, or baseline: pgd, momentum_pgd, adam, uap_sgd."
    )
    norm: str = config.option("linf", "Norm of the ball (linf, l2) or of the penalty (l1, l2).", ("linf", "l2", "l1"))
    epsilon: str | None = config.option(
        None, "Radius of the ball, in units of the image range: 0.03 or 8/255. Victims have defaults."
    )
    penalty: float | None = config.option(None, "Weight of the norm in the loss, instead of a ball.")
    loss: str = config.option("cross_entropy", "Loss that is minimised.", LOSSES)
    target: int | None = config.option(None, "Target class; any wrong class if not given.")
    steps: int = config.option(20, "Fine-tuning steps.")
    oracle: str = config.option(
        "auto", "Exact gradients, or queries only. auto: gradients where the model has them.", ORACLES
    )
    waves: int = config.option(0, "Evaluations per image, 2 or more, that search plane waves for a start; 0 for none.")
    start: str | None = config.option(
        None, "Perturbation to begin with (.npy, .pt, .png), such as the OUTPUT.npy of a run that ended early."
    )
    max_queries: int | None = config.option(None, "Maximum number of image evaluations of the attack.")
    batch_size: int | None = config.option(None, "Largest number of images in one call of the model.")
    seed: int = config.option(0, "Seed of the choice of images and of the random directions.")
    data_dir: str | None = config.option(None, "For --victim: folder of TFDS data; TFDS_DATA_DIR if not given.")


#: Flags that need --model.
OWN = ("images", "mean", "std", "channels", "input_range", "model_output", "image_size", "image_channels")


def attack(flags: Config) -> dict[str, Any]:
    """Runs the attack, writes its files and returns the contents of the .json file.

    Raises:
      EndedEarly: if an error, or KeyboardInterrupt, as which SIGTERM counts, ended the run and what it had found is
        written.
      ValueError: for flags, images or models that do not fit.
    """
    _check(flags)
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model, images, test, source = _victim(flags) if flags.victim else _own(flags)
    constraint = _constraint(flags, source)
    support, rest = _parts(flags, model, images, test)

    given = {name: value for name, value in dataclasses.asdict(flags).items() if name != "data_dir"}
    results: dict[str, Any] = {
        "complete": True,
        "flags": {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        "epsilon": constraint.epsilon,
        "support": None,
        "unseen": None,
    }
    asked, result = Remembered(model), None
    try:
        result = universal_perturbation(
            model,
            *(support or (None, None)),
            shape=flags.shape or None,
            constraint=constraint,
            target=flags.target,
            steps=flags.steps,
            optimizer=_optimizer(flags),
            oracle=flags.oracle,
            recipe=_recipe(flags),
            start=_start(flags),
            max_queries=flags.max_queries,
            batch_size=flags.batch_size,
            key=jax.random.key(flags.seed),
            progress=_report,
        )
        for name, part in (("support", support), ("unseen", rest)):
            if part is not None:
                results[name] = rates(asked, *part, result.perturbation, flags.target, flags.batch_size)
    except BaseException as error:
        partial = result or getattr(error, "partial", None)
        if partial is None:
            raise
        _write(output, partial, results | {"complete": False, "error": _exits.described(error)}, flags.seed)
        raise _exits.EndedEarly(_ended(error, partial, output)) from error
    results = _write(output, result, results, flags.seed)
    print(result)
    if support is not None:
        _print_rates("images attacked from", results["support"])
    _print_rates("unseen images", results["unseen"])
    shown = rest or support
    drawn = f", {output}.png" if shown is not None and _draw(asked, shown, result, output) else ""
    print(f"written: {output}.npy, {output}.json{drawn}")
    return results


def _check(flags):
    if (flags.model is None) == (flags.victim is None):
        raise ValueError(
            f"expected --model=package.module:function or --victim=folder, one of them, got --model={flags.model} and "
            f"--victim={flags.victim}."
        )
    if flags.victim is not None:
        given = [f"--{name}" for name in OWN if getattr(flags, name) not in (None, ())]
        if given:
            raise ValueError(f"{', '.join(given)}: for --model only; --victim has its own images and settings.")
        return
    if flags.data_dir is not None:
        raise ValueError("--data_dir is for --victim only; leave it out with --model.")
    if flags.epsilon is None and flags.penalty is None:
        raise ValueError("--epsilon: expected a radius for --model, such as 8/255, got none.")
    check_own(flags)


def _own(flags):
    """The model, the images or None, the test images that are given apart, and no name of a source."""
    images, test = None, None
    if flags.images is not None:
        images, test = load_images(flags.images, flags.image_size, flags.image_channels)
    return own_model(flags.model, flags), images, test, None


def _victim(flags):
    victim = load_victim(flags.victim)
    name = victim.card["source"]
    train, test = (load_source(name, split, data_dir=flags.data_dir) for split in ("validation", "test"))
    return victim.logits_fn, *(Images.of_arrays(part.images, part.labels) for part in (train, test)), name


#: Images `[N, H, W, C]` and their labels, if they have any.
_Part = tuple[np.ndarray, np.ndarray | None]


def _parts(flags, model, images, test) -> tuple[_Part | None, _Part | None]:
    """Images and labels to attack from, and those to measure on; None for either if there are none."""
    free = bool(flags.shape) or images is None
    if free and (flags.shots is not None or flags.num_images is not None):
        raise ValueError("--shots and --num_images: for attacks from --images, and without --shape, only.")
    if images is None:
        known = flags.shape or getattr(model, "input_shape", None) or (None,)
        if None in known:
            raise ValueError(
                "--images: expected an .npz file or a folder of pictures for --model, got none; an attack without "
                "images needs --shape=H,W,C, since the input_shape of the model is unknown."
            )
        print("attacks without images; there are none to measure on")
        return None, None
    rows = np.zeros(0, int) if free else choose(images, flags.shots, flags.num_images, flags.seed)
    support = None if free else images.part(rows)
    test, test_rows = unseen(images, test, rows, flags.num_test, flags.seed)
    rest = test.part(test_rows) if len(test_rows) else None
    if free and rest is not None and rest[0].shape[1:] != flags.shape:
        raise ValueError(f"--shape: expected that of the images, {rest[0].shape[1:]}, got {flags.shape}.")
    number = "without" if free else f"from {len(rows)}"
    print(f"attacks {number} images; {len(test_rows)} unseen images to measure on")
    return support, rest


def _report(entry: Mapping[str, float]) -> None:
    line = f"step {entry['step']:3d}  loss {entry['loss']:8.4f}  support ASR {entry['asr']:.2f}"
    print(f"{line}  queries {entry['queries']}", flush=True)


def _write(output: Path, result: UniversalPerturbation, results: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Writes the perturbation and the results, to which it adds the history, and returns them."""
    result.save(output.with_name(output.name + ".npy"))
    history = {key: values.tolist() for key, values in result.history.items()}
    full = {
        **results,
        "test_asr": results["unseen"] and results["unseen"]["asr"],
        "oracle": result.oracle,
        "steps_done": len(history.get("loss", ())),
        "queries": result.queries,
        "seconds": round(result.seconds, 3),
        "history": history,
        "provenance": provenance.describe([seed]),
    }
    provenance.write_json(output.with_name(output.name + ".json"), full)
    return full


def _ended(error, partial, output):
    done = f"{len(partial.history.get('loss', ()))} of {partial.steps} steps"
    return (
        f"ended early, after {done}: {_exits.described(error)}\n"
        f"the best perturbation so far is in {output}.npy; --start={output}.npy begins with it"
    )


def _print_rates(where, found):
    if found is None:
        print("no unseen images are left: nothing was measured on unseen images")
        return
    shown = {"clean accuracy": "clean_accuracy", "success (ASR)": "asr", "fooling rate": "fooling_rate"}
    said = [f"{name} {found[key]:.3f}" for name, key in shown.items() if found[key] is not None]
    print(f"on {found['images']} {where}: {', '.join(said)}")


def _draw(model, part, result, output):
    """Draws some images before and after; returns whether it could."""
    try:
        from lft_jax.cli.picture import MOST, before_and_after
    except ModuleNotFoundError as error:  # matplotlib is an extra
        print(f"no picture: {error}; pip install 'lft_jax[plots]'")
        return False
    images, labels = part
    if labels is None:
        few = np.arange(min(MOST, len(images)))
    else:
        few = np.sort(np.unique(labels, return_index=True)[1][:MOST])
    images, theta = images[few], result.perturbation
    before, after = predictions(model, images), predictions(model, images, theta)
    path = output.with_name(output.name + ".png")
    before_and_after(images, theta, before, after, path, None if labels is None else labels[few])
    return True


def _constraint(flags, source):
    epsilon = None if flags.epsilon is None else radius("--epsilon", flags.epsilon)
    if flags.penalty is None and epsilon is None:
        epsilon = default_epsilon(flags.norm, source)
    return Constraint(flags.norm, epsilon, flags.penalty)


def _recipe(flags):
    if (flags.loss, flags.waves) == ("cross_entropy", 0):
        return None  # the defaults of universal_perturbation, which knows whether there are gradients
    return AttackRecipe(
        loss=AttackLoss(flags.loss, target=flags.target),
        search=WaveSearch.within(flags.waves) if flags.waves else None,
    )


def _start(flags):
    if flags.start is None:
        return None
    try:
        return load_perturbation(flags.start).astype(np.float32)
    except (OSError, ValueError) as error:
        expected = "an .npy, .pt or .png file of a perturbation"
        raise ValueError(f"--start: expected {expected}, got {flags.start!r} ({error}).") from error


def _optimizer(flags: Config) -> str | optax.GradientTransformation:
    table = make_baselines(flags.norm)
    if flags.optimizer in table:
        return table[flags.optimizer].learner.optimizer(table[flags.optimizer].default.params)
    if not flags.optimizer.endswith(".safetensors"):
        check_name("optimizer", flags.optimizer, [*list_pretrained(), *table])
    return flags.optimizer


def main() -> None:
    """The console script `lft-attack`."""
    _exits.main(Config, attack)


if __name__ == "__main__":
    main()
