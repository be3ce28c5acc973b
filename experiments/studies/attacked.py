"""What the studies of public models attack: a classifier, its images and its radius."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import public_models
from lft_jax import models
from lft_jax.base import check_at_least, check_name
from lft_jax.data import load_source, unit_range
from lft_jax.tasks.perturbation import perturb
from lft_jax.victims import load_victim

#: Folder of the stored victims.
FOLDER = Path(__file__).parents[2] / "victims"
#: Radii of linf balls for the stored victims, as in the studies of `experiments.studies.study`.
EPSILON = {"mnist": 0.2, "cifar10": 0.06, "digits": 0.25}
_TEST_SEED = 1000  # stored victims with this seed or a larger one are for tests


class Victim(NamedTuple):
    """What is attacked.

    Attributes:
      about: model, role, source, epsilon, split, numbers of query and support images: what a results file is of.
      model: the classifier.
      images: support and query images.
      clean: `[N]`, the classes that the model predicts for the query images.
    """

    about: dict[str, Any]
    model: models.Classifier
    images: public_models.PublicImages
    clean: np.ndarray

    def rates(self, theta: np.ndarray) -> dict[str, float]:
        """Success rate (of the query images that are right when clean) and fooling rate of a perturbation."""
        attacked, labels = classes(self.model, self.images.query, theta), self.images.query_labels
        right = self.clean == labels
        return {
            "asr": float(np.mean(attacked[right] != labels[right])),
            "fooling_rate": float(np.mean(attacked != self.clean)),
        }


def victim(name: str, *, split: str = "own", queries: int = 0, data_dir: str | None = None) -> Victim:
    """A public model or a stored victim, and the images that it is attacked on.

    Args:
      name: of `public_models.MODELS`, or of a folder in victims/. The images of such a one are halves of the test split
        of its source, or for those that settings are chosen on, of the validation split.
      split: "own", or the role of a public model whose images are taken. For a stored victim "own" or "choosing",
        which is halves of the validation split.
      queries: number of query images; 0 for all.
      data_dir: folder of TFDS data sets; TFDS_DATA_DIR if None.

    Raises:
      ValueError: for unknown names or splits, or a negative number.
    """
    check_at_least("queries", queries, 0)
    stored = sorted(path.name for path in FOLDER.glob("*") if path.is_dir())
    check_name("model", name, (*public_models.MODELS, *stored))
    if name in public_models.MODELS:
        found = public_models.MODELS[name]
        role, source, epsilon, model = found.role, found.source, found.epsilon, public_models.load(name)
        split = role if split == "own" else split
        images = public_models.load_images(source, split, data_dir=data_dir)
    else:
        check_name("split", split, ("own", "choosing"))
        own = load_victim(FOLDER / name)
        source, model = own.card["source"], models.from_function(own.logits_fn)
        role, epsilon = "test" if own.card["seed"] >= _TEST_SEED else "choosing", EPSILON[source]
        of_test = split == "own" and (role == "test" or source == "digits")
        split = "test" if of_test else "validation"
        data = load_source(source, split, data_dir=data_dir)
        half = len(data.labels) // 2
        images = public_models.PublicImages(
            data.images[half:], data.labels[half:], data.images[:half], data.labels[:half]
        )
    count = min(queries or len(images.query), len(images.query))
    images = images._replace(query=images.query[:count], query_labels=images.query_labels[:count])
    about = {"model": name, "role": role, "source": source, "norm": "linf", "epsilon": epsilon, "queries": count}
    about |= {"support": len(images.support), "split": split}
    return Victim(about, model, images, classes(model, images.query, np.zeros(images.query.shape[1:], np.float32)))


def classes(model: models.Classifier, images: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The classes `[N]` that the model predicts for perturbed images."""
    size, function = 250 if images.shape[1] <= 64 else 50, model.traced()
    parts = [images[first : first + size] for first in range(0, len(images), size)]
    return np.concatenate([np.asarray(_predicted(function, part, theta)) for part in parts])


@jax.jit
def _predicted(function, images, theta):
    return jnp.argmax(function(perturb(unit_range(images), theta)), -1)
