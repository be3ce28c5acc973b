"""Makes a universal perturbation for one stored victim: `lft-attack`, from a checkout (see `lft_jax.cli.attack`).

python -m experiments.attack --victim=victims/mnist_small_cnn_1000 --output=runs/uap
"""

from lft_jax.cli.attack import Config, attack, main

__all__ = ["Config", "attack", "main"]

if __name__ == "__main__":
    main()
