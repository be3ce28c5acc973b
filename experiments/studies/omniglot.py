r"""Few-shot classification of handwritten characters: the Omniglot experiment of MAML, on Omniglot's small sets.

  python -m experiments.studies.omniglot

Needs `LFT_SHARED_DIR`, the folder of `omniglot_small/`. The experiment is that of `experiments.studies.classification`:
5 ways, 1 and 5 shots, MAML's strided network with a quarter of its filters. As in arXiv 1703.03400, section 5.2 and
appendix A.1, characters rotated by quarter turns are more classes for meta-training, and MAML is meta-trained with one
inner step and judged after three. Meta-training uses the first small set, tests the second one, whose characters
meta-training does not have.

Methods are also judged on tasks of characters that they were meta-trained on, and on characters held out of the same
alphabets; one MAML after several numbers of meta-steps. Nearest centroids of pixels, which learn nothing, say how
difficult each of these sets is.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, config
from experiments.report import omniglot as report
from experiments.studies import classification
from lft_jax import evaluation
from lft_jax.base import PyTree
from lft_jax.cli import provenance
from lft_jax.tasks import ClassificationFamily
from lft_jax.tasks.perturbation import Batch


@dataclasses.dataclass(frozen=True)
class Config(classification.Config):
    """Command-line flags."""

    output: str = config.option("results/omniglot.json", "Results file. The figure is put beside it.")
    congruous: str = config.option(
        "omniglot_small:28:conv4_strided:16", "Tasks of all learners, as source:size:architecture[:width]."
    )
    incongruous: tuple[str, ...] = config.option(
        (
            "omniglot_small:28:conv4_strided:16",
            "omniglot_small:14:conv4:16",
            "omniglot_small:28:linear",
            "digits:8:mlp:32",
        ),
        "Tasks that one LFT is meta-trained on together, in the same form.",
    )
    initializations: tuple[str, ...] = config.option(
        ("maml", "first_order_maml", "anil", "meta_sgd", "reptile", "joint"), "Learners of an initialization."
    )
    ways: int = config.option(5, "Classes of a task.")
    shots: tuple[int, ...] = config.option((1, 5), "Support images per class; all is done for each number.")
    num_steps: int = config.option(3, "Fine-tuning steps (K).")
    maml_steps: int = config.option(1, "Fine-tuning steps of MAML, its variants, ANIL and Meta-SGD in meta-training.")
    meta_steps: int = config.option(1000, "Meta-steps per learner.")
    rule_meta_steps: int = config.option(200, "Meta-steps of learners with an update rule (lft, joint).")
    num_tasks: int = config.option(600, "Test tasks per family.")
    familiar_tasks: int = config.option(
        50, "Tasks of meta-training classes, and validation tasks, that congruous learners are judged on too; 0: none."
    )
    workdir: str | None = config.option(
        "runs/omniglot", "Folder for meta-trained parameters. Those that it has are not trained again."
    )


#: Meta-steps after which one MAML is judged, with the first seed and 1 image per character.
LENGTHS = (250, 1000, 4000)


def omniglot(flags: Config) -> dict[str, Any]:
    """Runs the experiment, writes its files and returns the results."""
    results = classification.begun(flags)
    if "centroids" not in results:
        results["centroids"] = [centroid_row(shots, flags) for shots in flags.shots]
        provenance.write_json(flags.output, results)
    if "lengths" not in results:
        results["lengths"] = [length_row(length, flags) for length in LENGTHS]
        provenance.write_json(flags.output, results)
    results = classification.measured(flags)
    report.draw(results, Path(flags.output).with_suffix(".png"))
    return results


def length_row(meta_steps: int, flags: Config) -> dict[str, Any]:
    """Accuracy of MAML by the number of meta-steps, at its customary inner learning rate."""
    rate, flags = np.float32(0.4), dataclasses.replace(flags, meta_steps=meta_steps)  # the rate of appendix A.1
    families = classification.make_families(flags.congruous, 1, flags)
    make_learner = classification.INITIALIZATIONS["maml"][0]
    train = classification.trainer("maml", make_learner, {flags.congruous: families.train}, flags)
    params = [{"settings": {"rate": rate}, "learned": train(flags.seeds[0], rate=rate)}]
    row: dict[str, Any] = {"shots": 1, "meta_steps": meta_steps, "setting": {"rate": 0.4}}
    for kind in ("test", "familiar", "validation"):
        options = params, getattr(families, kind), flags.num_tasks, flags
        found = classification.accuracy(classification.evaluator("maml"), *options)
        row[f"{kind}_accuracy"] = evaluation.mean_interval(found[0, :, -1])
    return row


def centroid_row(shots: int, flags: Config) -> dict[str, Any]:
    """Accuracy of nearest centroids of pixels on characters of test, of meta-training and for tuning."""
    families = classification.make_families(flags.congruous, shots, flags)
    row: dict[str, Any] = {"shots": shots}
    for kind in ("test", "familiar", "validation"):
        accuracies = _centroid_accuracies(getattr(families, kind), common.task_keys(flags.num_tasks))
        row[f"{kind}_accuracy"] = evaluation.mean_interval(accuracies)
    return row


@jax.jit
def _centroid_accuracies(family: ClassificationFamily, keys):
    """Accuracy `[T]` of nearest class centroids of pixels, on the tasks that fine-tuning has with these keys."""

    def accuracy(key):
        support, query = family.sample(jax.random.split(key, 3)[0])
        return family.metrics(nearest_centroid(support, family.size.ways), query)["accuracy"]

    return jax.lax.map(accuracy, keys, batch_size=25)


def nearest_centroid(support: Batch, ways: int) -> PyTree:
    """Weights of the linear network that predicts the class with the nearest mean image.

    Args:
      support: `[N, H, W, C]` images, N / ways of each class.
      ways: number of classes.

    Returns:
      The weights, in the form of `lft_jax.tasks.classification`: logits are `x @ c - |c|^2 / 2`, which differ from
      `-|x - c|^2 / 2` by a number that is equal for all classes c.
    """
    pixels = support.images.reshape(len(support.labels), -1)
    members = jax.nn.one_hot(support.labels, ways, axis=0, dtype=pixels.dtype)
    centroids = members @ pixels / jnp.sum(members, 1, keepdims=True)
    return {"body": [], "head": {"weight": centroids.T, "bias": -jnp.sum(centroids**2, 1) / 2}}


if __name__ == "__main__":
    config.main(Config, omniglot)
