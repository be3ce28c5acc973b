"""Command-line flags from a frozen dataclass, the configuration of a program.

Flags are defined when a program runs, not when its module is imported, so that one process can import several programs.
"""

import ctypes
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from absl import app, flags, logging

from lft_jax.data._cache import user_folder


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a configuration, with its default, its help text and its permitted values (any if None)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def required(help: str) -> Any:
    """A field of a configuration that has no default."""
    return dataclasses.field(metadata={"help": help, "choices": None})


#: Characters of the name of a flag, at most.
LONGEST_NAME = 100
#: Named settings of a program: `{preset: {field: value}}`.
Presets = Mapping[str, Mapping[str, Any]]


def main(
    config_type: type,
    run: Callable[[Any], Any],
    *,
    presets: Presets | None = None,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Defines the flags of `config_type`, parses the command line, and calls `run` with the configuration.

    Args:
      config_type: a frozen dataclass whose fields are made by `option` and `required`.
      run: the program. If it raises a ValueError, TypeError, OSError or ModuleNotFoundError, the process exits with a
        one-line message.
      presets: settings that `--preset=NAME` selects. Other flags override them.
      renamed: old names of flags, which still work.
    """
    presets = presets or {}
    try:
        check_names(sys.argv[1:])
    except ValueError as error:
        raise SystemExit(str(error)) from error
    tune_process()
    define_flags(config_type, flags.FLAGS, presets)
    for old, new in (renamed or {}).items():
        flags.DEFINE_alias(old, new)
    flags.DEFINE_string(
        "compilation_cache",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", str(user_folder() / "compiled")),
        "Folder of the compilation cache; empty for no cache. JAX_COMPILATION_CACHE_DIR, where set, is the default.",
    )

    # --help shows the docstring of the program's module and only the flags that are defined here.
    names = [field.name for field in dataclasses.fields(config_type)] + ["preset"] * bool(presets)
    for name in (*names, "compilation_cache"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    program = sys.modules["__main__"]
    program.__doc__ = program.__doc__ or sys.modules[config_type.__module__].__doc__

    def from_flags(argv):
        jax.config.update("jax_compilation_cache_dir", flags.FLAGS.compilation_cache or None)
        logging.set_verbosity(logging.WARNING)  # TFDS and orbax log a lot at INFO
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
        for old, new in (renamed or {}).items():  # absl does not say that a flag was given by its alias
            flags.FLAGS[new].present += flags.FLAGS[old].present
        try:
            run(read_flags(config_type, flags.FLAGS, presets))
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error

    app.run(from_flags)


def check_names(arguments: Sequence[str]) -> None:
    """Raises a ValueError for an argument whose name is no flag's: absl would look for similar ones without end."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if argument.startswith("-") and len(name) > LONGEST_NAME:
            raise ValueError(f"unknown flag of {len(name)} characters, {name[:40]!r}...")


def tune_process() -> None:
    """Makes meta-training on a CPU faster. Call it before JAX is used."""
    if jax.__version_info__ < (0, 12):  # they use YNNPACK for convolutions, which is up to 2x slower
        os.environ["XLA_FLAGS"] = f"--xla_cpu_experimental_ynn_fusion_type= {os.environ.get('XLA_FLAGS', '')}"
    if sys.platform == "linux":
        # Make glibc keep freed memory. Returning it to the system takes a sixth of the time of a meta-step.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # some C libraries lack it
        if mallopt:
            m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
            for parameter, value in ((m_trim_threshold, 2**31 - 1), (m_mmap_max, 0), (m_arena_max, 1)):
                mallopt(parameter, value)


def define_flags(config_type: type, values: flags.FlagValues, presets: Presets | None = None) -> None:
    """Defines one flag per field of a configuration, and `--preset` if there are presets."""
    presets = presets or {}
    if presets:
        help = "Named settings, which other flags override: " + ", ".join(presets) + "."
        flags.DEFINE_enum("preset", None, list(presets), help, flag_values=values)
    for field in dataclasses.fields(config_type):
        name, help, default = field.name, field.metadata["help"], cast(Any, field.default)
        kind = _kind(config_type, field)
        if field.metadata["choices"]:
            flags.DEFINE_enum(name, default, field.metadata["choices"], help, flag_values=values)
        elif kind is bool:
            flags.DEFINE_bool(name, default, help, flag_values=values)
        elif kind is int:
            flags.DEFINE_integer(name, default, help, flag_values=values)
        elif kind is float:
            flags.DEFINE_float(name, default, help, flag_values=values)
        elif typing.get_origin(kind) is tuple:
            text = None if default is dataclasses.MISSING else ",".join(map(str, default))
            flags.DEFINE_list(name, text, help, flag_values=values)
        else:
            flags.DEFINE_string(name, None if default is dataclasses.MISSING else default, help, flag_values=values)
        if default is dataclasses.MISSING and not any(name in preset for preset in presets.values()):
            flags.mark_flag_as_required(name, flag_values=values)


def read_flags(config_type: type, values: flags.FlagValues, presets: Presets | None = None) -> Any:
    """Returns the configuration that the parsed flags describe.

    Raises:
      ValueError: if entries of a list have the wrong type, or neither a flag nor a preset sets a required field.
    """
    chosen = presets[values["preset"].value] if presets and values["preset"].value else {}
    given = {}
    for field in dataclasses.fields(config_type):
        if field.name in chosen and not values[field.name].present:
            given[field.name] = chosen[field.name]
            continue
        value, kind = values[field.name].value, _kind(config_type, field)
        if value is None and field.default is dataclasses.MISSING:
            raise ValueError(f"--{field.name} is required, unless a --preset sets it.")
        if typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            try:
                value = tuple(element(part) for part in value or ())
            except ValueError:
                raise ValueError(f"--{field.name}: expected a list of {element.__name__}, got {value}.") from None
        given[field.name] = value
    return config_type(**given)


def pairs(argument: str, entries: Sequence[str]) -> dict[str, float]:
    """Maps `("digits=0.2", ...)` to `{"digits": 0.2, ...}`; a ValueError names the argument."""
    found = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"{argument}: expected name=number, got {entry!r}.") from None
    return found


def _kind(config_type, field):
    kind = typing.get_type_hints(config_type)[field.name]
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(argument for argument in typing.get_args(kind) if argument is not type(None))
    return kind
