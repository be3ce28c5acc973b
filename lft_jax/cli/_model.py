"""The model that `--model` names: a file, or package.module:function."""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lft_jax import models
from lft_jax.cli._exits import described

#: Flags that say what stands between images in [0, 1] and the model, by the argument of an adapter.
FLAGS = {
    "mean": "--mean",
    "std": "--std",
    "channels": "--channels",
    "input_range": "--input_range",
    "output": "--model_output",
}
#: Adapters of files, by their suffix.
FILES = {".keras": "from_keras", ".h5": "from_keras", ".onnx": "from_onnx"}


def load_model(name: str, options: Mapping[str, Any]) -> Any:
    """The model of a file, or what a function returns, as a model that can be attacked.

    Args:
      name: a file of Keras (`.keras`, `.h5`; read with the JAX backend unless KERAS_BACKEND names another) or ONNX
        (`.onnx`); or "package.module:function", whose module is looked for in the current directory too.
      options: arguments of an adapter of `lft_jax.models`, those that were given.

    Returns:
      A `Classifier`, or a function of images `[N, H, W, C]` in [0, 1]. A torch.nn.Module and a Keras model are wrapped
      by their adapter, a function by `from_function` if there are options.

    Raises:
      FileNotFoundError: for a name that ends as a file does and is none.
      ModuleNotFoundError: if the framework of the file is not installed.
      ValueError: for another form of name, a module that cannot be imported, a function that is not there, needs
        arguments or raises an error, and for options with a `Classifier`, which has its own.
      TypeError: for what is not callable, and for another kind of model.
    """
    adapter = FILES.get(Path(name).suffix.lower())
    if adapter is not None:
        if not Path(name).is_file():
            raise FileNotFoundError(f"--model: there is no file {name!r}.")
        os.environ.setdefault("KERAS_BACKEND", "jax")  # has no effect if keras is imported already
        return getattr(models, adapter)(name, **options)
    function = _function(name)
    try:
        model = function()
    except Exception as error:
        raise ValueError(f"--model={name}: the function raised {described(error)}.") from error
    if model is None:
        raise TypeError(f"--model={name}: the function returned None, expected a model; does it end with return?")
    if isinstance(model, models.Classifier):
        if options:
            given = ", ".join(FLAGS[option] for option in options)
            raise ValueError(f"--model={name} returned a Classifier, which has its own settings; leave out {given}.")
        return model
    if _is_a(model, "keras", "Model"):  # before torch: with torch as its backend it is a torch.nn.Module as well
        return models.from_keras(model, **options)
    if _is_a(model, "torch", "nn.Module"):
        return models.from_torch(model, **options)
    try:
        models.as_classifier(model)
    except TypeError as error:
        raise TypeError(f"--model={name}: {error} Return that from the function.") from error
    return models.from_function(model, **options) if options else model


def _function(name):
    """The function without arguments that is named."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and all(part.isidentifier() for text in (module_name, attribute) for part in text.split("."))):
        raise ValueError(f"--model: expected package.module:function or a file ({', '.join(FILES)}), got {name!r}.")
    module = _module(name, module_name)
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [key for key, value in vars(module).items() if _is_function_of(module, value)]
            hint = f"it has {', '.join(there[:8])}" if there else "it has no function"
            raise ValueError(f"--model={name}: module {module_name!r} has no {attribute!r}; {hint}.")
        found = getattr(found, part)
    advice = f"name a function without arguments that returns it: def load(): return {attribute}"
    if isinstance(found, models.Classifier) or _is_a(found, "torch", "nn.Module") or _is_a(found, "keras", "Model"):
        raise TypeError(f"--model={name}: {attribute!r} is of type {type(found).__name__}, a model itself; {advice}.")
    if not callable(found):
        raise TypeError(f"--model={name}: {attribute!r} is of type {type(found).__name__}, not callable; {advice}.")
    needed = _needed(found)
    if needed:
        raise ValueError(f"--model={name}: {attribute!r} needs the arguments {', '.join(needed)}; {advice}.")
    return found


def _module(name, module_name):
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)  # as `python -m` does
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"--model={name}: there is no module {error.name!r} in the current directory or installed; run in the "
                "folder that has it, or set PYTHONPATH."
            ) from error
        keras = error.name == "tensorflow" and "keras" in {name.partition(".")[0] for name in sys.modules}
        hint = " (keras does, unless KERAS_BACKEND is jax or torch before it is imported)" if keras else ""
        raise ValueError(
            f"--model={name}: module {module_name!r} imports {error.name!r}, which is not installed{hint}."
        ) from error
    except Exception as error:
        raise ValueError(f"--model={name}: importing {module_name!r} raised {described(error)}.") from error


def _is_function_of(module, value):
    return inspect.isfunction(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")


def _needed(function):
    """Names of the arguments without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some built-in functions
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _is_a(value, package, kind):
    """Whether a value is of a class of a package; without importing it."""
    found: Any = sys.modules.get(package)
    for part in kind.split("."):
        found = getattr(found, part, None)
    return found is not None and isinstance(value, found)
