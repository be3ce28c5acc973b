r"""Audits a classifier: many universal perturbations from few images, and a page that says what they found.

  lft-audit --model=model.h5 --input_range=0,255 --model_output=probabilities --data=images.npz --out=DIR
  lft-audit --model=package.module:function --data=images.npz --out=DIR
  lft-audit --model=package.module:function --data=FOLDER --image_size=224 --epsilons=4/255,8/255 --out=DIR

The model is a file of Keras (.keras, .h5) or ONNX (.onnx), or a function without arguments returns it: a function of
images [N, H, W, C] in [0, 1] that returns logits, a Classifier of lft_jax.models, a torch.nn.Module or a Keras model.
For all but a Classifier, --mean, --std, --channels, --input_range and --model_output say what the model expects and
returns. A model without gradients, as of ONNX, is attacked by queries only.

Data are an .npz file with the array images (and labels and class_names, if there are any; test_images and test_labels
are used instead of images and labels where they exist), or a folder of pictures, whose labels are the numbers of
sub-folders (0, 1, ... or 3_cat), or in labels.csv (file,label). Use images that the model was not trained on, 200 or
more. Without labels, the model's own predictions are the labels.

Written are DIR/index.html (one page that needs no other file), report.json (what is behind every number),
perturbation.npy (that of the verdict), junit.xml, and runs/ (each run). Interrupted, the same command goes on.

Exit codes: 0 success; 1 unexpected error, with a traceback; 2 wrong flags, images or model; 3 the lower bound of the
success rate is above --fail_above; 130 Ctrl-C and 143 SIGTERM, finished runs are kept.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lft_jax.auditing import METHODS, AuditBudget, AuditReport, audit, stratified_rows
from lft_jax.base import check_name
from lft_jax.cli import _exits, config, provenance
from lft_jax.cli._images import Images, load_images
from lft_jax.cli._own import OwnFlags, check_own, own_model, radius

_BUDGET = AuditBudget()


@dataclasses.dataclass(frozen=True)
class Config(OwnFlags):
    """Command-line flags."""

    model: str = config.required(
        "Your model: a .keras, .h5 or .onnx file, or package.module:function, which returns it."
    )
    data: str = config.required("Images: an .npz file or a folder of pictures.")
    out: str = config.required("Folder to write into. Finished runs that are there are used again.")
    epsilons: tuple[str, ...] = config.option(
        ("2/255", "4/255", "8/255"), "Radii of linf balls, in units of the image range; the verdict is on the largest."
    )
    l2_epsilons: tuple[str, ...] = config.option(
        (), "Radii of l2 balls; none: no attacks in them. Default: those of patterns of full contrast at --epsilons."
    )
    methods: tuple[str, ...] = config.option(_BUDGET.methods, f"Attacks to run, out of {', '.join(METHODS)}.")
    support_images: tuple[int, ...] = config.option(
        _BUDGET.support_images, "Numbers of images to attack from, increasing."
    )
    steps: tuple[int, ...] = config.option(_BUDGET.steps, "Numbers of steps of attacks with gradients, increasing.")
    queries: tuple[int, ...] = config.option(
        _BUDGET.queries, "Evaluations that attacks by queries may make, increasing."
    )
    draws: int = config.option(_BUDGET.draws, "Draws of the support images, each attacked from on its own.")
    query_images: int = config.option(_BUDGET.query_images, "Largest number of unseen images to judge on.")
    fail_above: float | None = config.option(
        None, "Exit with code 3 if the lower bound of the success rate is above this, in [0, 1)."
    )
    batch_size: int | None = config.option(None, "Largest number of images in one call of the model.")
    seed: int = config.option(0, "Seed of the split, of the draws and of the attacks.")


def run(flags: Config) -> AuditReport:
    """Runs the audit, writes its files and returns its report.

    Raises:
      LimitExceeded: if the lower bound of the success rate is above `fail_above`; all is written.
      Kept: for KeyboardInterrupt, as which SIGTERM counts; finished runs are kept.
      ValueError: for flags, images or models that do not fit.
    """
    check_own(flags)
    if flags.fail_above is not None and not 0 <= flags.fail_above < 1:
        raise ValueError(f"--fail_above: expected a number of at least 0 and below 1, got {flags.fail_above}.")
    for name in flags.methods:
        check_name("--methods", name, METHODS)
    budget = AuditBudget(
        flags.support_images, flags.steps, flags.queries, flags.draws, flags.query_images, tuple(flags.methods)
    ).check()
    epsilons = [radius("--epsilons", text) for text in flags.epsilons]
    given, test = load_images(flags.data, flags.image_size, flags.image_channels, "--data")
    images = given if test is None else test
    model = own_model(flags.model, flags)
    part, labels, rows = _read(images, budget, flags.seed)
    try:
        report = audit(
            model,
            part,
            labels,
            epsilons=epsilons,
            l2_epsilons=_l2(flags.l2_epsilons),
            budget=budget,
            class_names=_names(images, labels),
            image_names=None if images.files is None else [images.files[row] for row in rows],
            batch_size=flags.batch_size,
            seed=flags.seed,
            output=flags.out,
            about=_about(flags, images, len(rows)),
        )
    except KeyboardInterrupt as stop:
        said = f"interrupted; finished runs are in {flags.out}, the same command goes on"
        raise _exits.Kept(said, stop) from stop
    report.save(flags.out, fail_above=flags.fail_above)
    print(report)
    print(f"written: {Path(flags.out) / 'index.html'}, report.json, perturbation.npy, junit.xml, runs/")
    low = report.interval[0]
    lost = report.results["failures"]
    if flags.fail_above is not None and lost:
        raise _exits.LimitExceeded(f"{len(lost)} attacks failed, so that the success rate may be higher; see the page")
    if flags.fail_above is not None and low > flags.fail_above:
        raise _exits.LimitExceeded(f"success rate: its lower bound {low:.3f} is above --fail_above={flags.fail_above}")
    return report


def _read(images: Images, budget: AuditBudget, seed: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """As many images as an audit can use, stratified if there are labels; their labels and row numbers."""
    most = budget.query_images + 4 * (2 * budget.support_images[-1] + 200)
    labels = np.zeros(images.count, np.int32) if images.labels is None else images.labels
    rows = np.sort(stratified_rows(labels, most, seed))
    return *images.part(rows), rows


def _names(images, labels):
    """Names of all classes, where some have names: numbers for the others."""
    if not images.class_names:
        return None
    last = max([*images.class_names, *([] if labels is None else labels.tolist())])
    return [images.class_names.get(label, "") for label in range(last + 1)]


def _l2(texts):
    if not texts:
        return None
    return [] if tuple(texts) == ("none",) else [radius("--l2_epsilons", text) for text in texts]


def _about(flags: Config, images: Images, used: int) -> dict[str, str]:
    """What the page says of model, data and program."""
    found = provenance.describe([flags.seed])
    data = flags.data if used == images.count else f"{flags.data} ({used} of {images.count} images)"
    model = Path(flags.model).name if Path(flags.model).is_file() else flags.model
    about: dict[str, Any] = {"model": model, "data": data, "command": found["command"], "commit": found["commit"]}
    return about


def main() -> None:
    """The console script `lft-audit`."""
    _exits.main(Config, run)


if __name__ == "__main__":
    main()
