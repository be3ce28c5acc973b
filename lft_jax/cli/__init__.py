"""Console scripts: `lft-attack`.

How the pieces compose::

    frozen dataclass --config.main--> absl flags, presets --> the same dataclass, read back     `config`
    lft-attack: stored victim, a few of its images --universal_perturbation--> .npy, .png, .json  `attack`
    command, commit, versions, device --> what every results file says about itself             `provenance`

Flags are defined when a script runs, not when a module is imported. Nothing else in `lft_jax` imports absl's flags.
"""

__all__ = []
