"""Finds a universal perturbation of a model: `lft-attack`, from a checkout (see `lft_jax.cli.attack`).

python -m experiments.attack --victim=victims/mnist_small_cnn_1000 --output=runs/uap
python -m experiments.attack --model=package.module:function --images=FOLDER --epsilon=8/255 --output=runs/uap

Exit codes: 0 success; 1 unexpected error; 2 wrong flags, images or model; 3 ended early, partial result written; 130
Ctrl-C and 143 SIGTERM before there was one.
"""

from lft_jax.cli.attack import Config, attack, main

__all__ = ["Config", "attack", "main"]

if __name__ == "__main__":
    main()
