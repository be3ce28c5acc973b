"""Console scripts: `lft-attack`.

How the pieces compose::

    `config`      frozen dataclass --> absl flags, presets --> an instance of the dataclass
    `attack`      stored victim, a few images --universal_perturbation--> .npy, .png, .json (lft-attack)
    `provenance`  command, commit, versions and device, for results files
    `picture`     perturbations and perturbed images, drawn by matplotlib

Flags are defined when a script runs, not when a module is imported. Nothing else in `lft_jax` imports absl's flags.
"""

__all__ = []
