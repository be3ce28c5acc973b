"""Console scripts: `lft-attack`, `lft-audit`.

How the pieces compose::

    `config`      frozen dataclass --> absl flags, presets --> an instance of the dataclass
    `_model`      package.module:function --> a model, by the adapter of its framework
    `_own`        flags of a model and of images of one's own, which both scripts share
    `_images`     .npz file or folder (`_folder`) --> images to attack from, unseen images to measure on
    `attack`      model, a few images --universal_perturbation--> .npy, .png, .json (lft-attack)
    `audit`       model, images --lft_jax.audit--> a page, .json, .npy, JUnit XML (lft-audit)
    `_measure`    perturbation, unseen images --> rates, with each image evaluated once
    `_exits`      errors --> exit codes, one line each
    `provenance`  command, commit, versions and device, for results files
    `picture`     perturbations and perturbed images, drawn by matplotlib

Flags are defined when a script runs, not when a module is imported. Nothing else in `lft_jax` imports absl's flags.
"""

__all__ = []
