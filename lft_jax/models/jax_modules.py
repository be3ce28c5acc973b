"""Flax and Equinox modules as classifiers, traced and differentiated by JAX.

Each is split into arrays, which are arguments of the `jax.tree_util.Partial` that a `Classifier` holds, and the rest,
which is static and compared by value. So models that differ in their arrays alone share compiled programs.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lft_jax.models._frameworks import required
from lft_jax.models.classifier import Classifier
from lft_jax.models.functions import from_function

#: Arguments of a module's `__call__`, or fields of a flax.linen module, and their values in evaluation mode.
EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
}


def from_flax(
    module: Any,
    variables: Mapping[str, Any],
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "last",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is a `flax.linen.Module` with its variables, in evaluation mode.

    Evaluation mode: fields of the module and arguments of its `__call__` that are named `train`, `training` or
    `is_training` are False; `deterministic`, `use_running_average` and `inference` are True. No collection is mutable.

    Args:
      module: images as described by the other arguments -> its output.
      variables: what `module.init` returns, a mapping from collections: `{"params": ..., "batch_stats": ...}`. Other
        variables of the same shapes need no compilation.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "last" if it takes `[N, H, W, C]`, "first" for `[N, C, H, W]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in what it returns.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier.

    Raises:
      TypeError: for another kind of module.
      ValueError: for variables without "params" and arguments out of range; when called, for an output that is not
        `[N, classes]`.

    Examples:
      >>> from flax import linen as nn
      >>> module = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)])
      >>> images = jax.numpy.ones((2, 8, 8, 3))
      >>> from_flax(module, module.init(jax.random.key(0), images), mean=0.5)(images).shape
      (2, 10)
    """
    from flax import linen

    if not isinstance(module, linen.Module) or not callable(module):
        raise TypeError(
            f"module must be a callable flax.linen.Module, got {_kind(module)}; from_nnx and from_function take others."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"variables must be what module.init returns, a mapping with the collection 'params', got {found}; pass "
            "{'params': ...} if these are the parameters alone."
        )
    fields = {field.name for field in dataclasses.fields(module)} & EVALUATION.keys()
    updates: dict[str, Any] = {name: EVALUATION[name] for name in fields}
    module = module.clone(**updates) if updates else module
    function = jax.tree_util.Partial(_Flax(module, _options(module, without=fields)), dict(variables))
    return from_function(
        function,
        mean=mean,
        std=std,
        channels=channels,
        input_range=input_range,
        output=output,
        batch_size=batch_size,
    )


def from_nnx(
    module: Any,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "last",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is a `flax.nnx.Module` with the weights that it has when it is used.

    Each use copies the variables and puts the copy into evaluation mode, by `module.eval()` and by the arguments that
    `from_flax` names. The module itself keeps its modes and its variables. Weights that changed in place since the
    last use need no compilation.

    Args:
      module: images as described by the other arguments -> its output.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "last" if it takes `[N, H, W, C]`, "first" for `[N, C, H, W]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in what it returns.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier.

    Raises:
      TypeError: for another kind of module.
      ValueError: for arguments out of range; when called, for an output that is not `[N, classes]`.

    Examples:
      >>> from flax import nnx
      >>> module = nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(192, 10, rngs=nnx.Rngs(0)))
      >>> from_nnx(module, mean=0.5)(jax.numpy.ones((2, 8, 8, 3))).shape
      (2, 10)
    """
    from flax import nnx

    if not isinstance(module, nnx.Module) or not callable(module):
        raise TypeError(
            f"module must be a callable flax.nnx.Module, got {_kind(module)}; from_flax and from_function take others."
        )

    def present():
        evaluated = nnx.merge(*nnx.split(module), copy=True)
        evaluated.eval()
        graphdef, state = nnx.split(evaluated)
        return from_function(
            jax.tree_util.Partial(_Nnx(graphdef, _options(module)), nnx.as_pure(state)),
            mean=mean,
            std=std,
            channels=channels,
            input_range=input_range,
            output=output,
        ).function

    return Classifier(present(), batch_size=batch_size, refresh=present)


def from_equinox(
    module: Any,
    *,
    state: Any = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "first",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is an `equinox.Module` of one image, in evaluation mode.

    It is mapped over the images by `jax.vmap`, after `equinox.nn.inference_mode`. The arguments of its `__call__` that
    `from_flax` names have their value of evaluation mode; a required argument `key` gets a fixed key. A module that
    takes all images at once needs `from_function(lambda images: module(images))`.

    Args:
      module: one image `[C, H, W]`, as described by the other arguments -> its output, without an axis of images. Other
        arrays of the same shapes need no compilation.
      state: of a module with state, such as batch statistics: `module(image, state)` returns its output and a new
        state, which is dropped. None for a module without state.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "first" if it takes `[C, H, W]`, "last" for `[H, W, C]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[classes]` or one number for two classes; or a
        key, an index or a function that finds the logits, with an axis of images, in what it returns.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier.

    Raises:
      ModuleNotFoundError: if equinox is not installed.
      TypeError: for another kind of module.
      ValueError: for a module with state but no `state`, and arguments out of range; when called, for an output that
        is not `[N, classes]`.

    Examples:
      With equinox installed::

        model = lft_jax.models.from_equinox(module, state=state, mean=0.5, std=0.25)
        result = lft_jax.universal_perturbation(model, images, labels, epsilon=8 / 255)
    """
    with required("equinox", "equinox"):
        import equinox

    if not isinstance(module, equinox.Module) or not callable(module):
        raise TypeError(f"module must be a callable equinox.Module, got {_kind(module)}; from_function takes others.")
    wants_state = isinstance(module, equinox.nn.StatefulLayer) and module.is_stateful()
    if state is None and (wants_state or "state" in _parameters(module, required=True)):
        raise ValueError(
            "state: module takes a state, got None; pass the one that equinox.nn.make_with_state or training returned."
        )
    evaluated = equinox.nn.inference_mode(module)
    arrays, rest = equinox.partition((evaluated, state), lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    leaves, structure = jax.tree.flatten(rest)
    needs_key = "key" in _parameters(module, required=True)
    return from_function(
        jax.tree_util.Partial(_Equinox(tuple(leaves), structure, _options(module), needs_key), arrays),
        mean=mean,
        std=std,
        channels=channels,
        input_range=input_range,
        output=output,
        batch_size=batch_size,
    )


def _kind(module):
    return f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__


def _parameters(module, required=False):
    """The names of the arguments of a module's `__call__`, or of those without a default alone."""
    parameters = inspect.signature(module.__call__).parameters.values()
    return {p.name for p in parameters if not required or p.default is p.empty}


def _options(module, without=()):
    """The arguments that put a call of the module into evaluation mode, as pairs."""
    return tuple((name, EVALUATION[name]) for name in sorted(_parameters(module) & EVALUATION.keys() - set(without)))


@dataclasses.dataclass(frozen=True)
class _Flax:
    module: Any = dataclasses.field(hash=False)  # one with a list is not hashable
    options: tuple[tuple[str, bool], ...]

    def __call__(self, variables, images):
        return self.module.apply(variables, images, mutable=False, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class _Nnx:
    graphdef: Any
    options: tuple[tuple[str, bool], ...]

    def __call__(self, state, images):
        from flax import nnx

        return nnx.merge(self.graphdef, state)(images, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class _Equinox:
    leaves: tuple[Any, ...] = dataclasses.field(hash=False)  # all but the arrays
    structure: Any
    options: tuple[tuple[str, bool], ...]
    needs_key: bool

    def __call__(self, arrays, images):
        import equinox

        module, state = equinox.combine(arrays, jax.tree.unflatten(self.structure, self.leaves))
        options: dict[str, Any] = dict(self.options)
        if self.needs_key:
            options["key"] = jax.random.PRNGKey(0)

        def of_one(image):
            if state is None:
                return module(image, **options)
            result = module(image, state, **options)
            if not isinstance(result, tuple) or len(result) != 2:
                raise ValueError(
                    f"module must return (output, state) where it gets a state, got {type(result).__name__}; leave out "
                    "state for one that takes none."
                )
            return result[0]

        return jax.vmap(of_one)(images)
