"""Universal adversarial perturbations of a given model, from a few images.

How the modules compose::

    model, images, labels --checks, predictions--> Problem --turns of the search--> start         `universal`, `_start`
    start --K times: oracle, optax update, projection, metrics--> UniversalPerturbation           `universal`, `_steps`
    perturbation --unseen images--> attack_success_rate, fooling_rate                             `rates`

A Python loop runs one compiled turn or step at a time, so that a callback can report and stop, an error keeps what was
found, and the model may be of any framework. On CPU this is also faster than `lax.scan` for models whose convolutions
are slow inside a scan.
"""

from lft_jax.attack.rates import attack_success_rate, fooling_rate
from lft_jax.attack.result import UniversalPerturbation
from lft_jax.attack.universal import HISTORY_IMAGES, ORACLES, QUERY, universal_perturbation

__all__ = [
    "HISTORY_IMAGES",
    "ORACLES",
    "QUERY",
    "UniversalPerturbation",
    "attack_success_rate",
    "fooling_rate",
    "universal_perturbation",
]
