"""What the first meta-steps of a run do differently: a curriculum, imitation."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation


@dataclasses.dataclass(frozen=True)
class Stages:
    """Stages at the beginning of a run: a curriculum of unroll lengths, and imitation.

    Attributes:
      curriculum: `((steps, meta_steps), ...)`: the first `meta_steps` meta-steps fine-tune for `steps` steps, and so
        on; afterwards for K. `steps` must be ascending. An update rule sees its progress through the shorter unroll.
        Programs for all lengths are compiled at the first meta-step.
      imitation: for the first meta-steps, imitation of another optimizer, for learners of update rules. These
        meta-steps always use backpropagation and uniform step weights. None for no imitation.

    References:
      Chen et al. 2020, Training stronger baselines for learning to optimize, arXiv 2010.09089.

    Examples:
      >>> Stages(curriculum=((5, 100), (10, 100))).curriculum[0]
      (5, 100)
    """

    curriculum: Sequence[tuple[int, int]] = ()
    imitation: Imitation | None = None


class Stage(NamedTuple):
    """Meta-steps with the same settings.

    Attributes:
      first: index of the first of them.
      num_steps: fine-tuning steps K.
      imitation: what is imitated, or None.
      windows: meta-steps per episode, above 1 only with persistent evolution strategies.
    """

    first: int
    num_steps: int
    imitation: Imitation | None
    windows: int


def stages_of(
    num_steps: int,
    stages: Stages,
    meta_gradient: EvolutionStrategies | PersistentEvolutionStrategies | None,
) -> list[Stage]:
    """The stages of a run, in order."""
    curriculum, imitation = stages.curriculum, stages.imitation
    lengths = [*(length for length, _ in curriculum), num_steps]
    for number, (length, meta_steps) in enumerate(curriculum):
        if not 1 <= length < lengths[number + 1] or not meta_steps >= 1:
            raise ValueError(
                "curriculum must be pairs (steps, meta_steps), both at least 1, with steps ascending to num_steps = "
                f"{num_steps}, got {tuple(curriculum)}."
            )
    begins = np.cumsum([0, *(meta_steps for _, meta_steps in curriculum)])
    imitated = imitation.meta_steps if imitation else 0
    found = []
    for first in sorted({*begins.tolist(), imitated}):
        length = lengths[np.searchsorted(begins, first, side="right") - 1]
        windows = 1
        if isinstance(meta_gradient, PersistentEvolutionStrategies) and first >= imitated:
            windows = length // meta_gradient.window
        found.append(Stage(first, length, imitation if first < imitated else None, windows))
    return found
