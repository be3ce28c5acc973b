"""Evaluation of fine-tuners on unseen tasks: metrics, tuned baselines, and the comparison table.

How the modules fit together::

    (learner, params, family, keys) --evaluate--> {metric: [tasks, steps]}                     `metrics`
    grid of a hand-designed optimizer --tune on validation tasks--> its best setting           `baselines`, `metrics`
    (target, learned methods, protocol) --compare--> the rows of a table, and perturbations    `comparison`

All methods are given the same tasks. `docs/protocol.md` describes how results are measured.
"""

from lft_jax.evaluation.baselines import Baseline, Setting, make_baselines
from lft_jax.evaluation.comparison import Learned, Protocol, Target, compare
from lft_jax.evaluation.metrics import (
    evaluate,
    evaluate_fixed,
    first_perturbation,
    full_data_uap,
    gap_closed,
    mean_interval,
    steps_to_reach,
    tune,
)

__all__ = [
    "Baseline",
    "Learned",
    "Protocol",
    "Setting",
    "Target",
    "compare",
    "evaluate",
    "evaluate_fixed",
    "first_perturbation",
    "full_data_uap",
    "gap_closed",
    "make_baselines",
    "mean_interval",
    "steps_to_reach",
    "tune",
]
