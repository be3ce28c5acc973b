"""Frameworks of models are imported where they are needed."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def required(name: str, extra: str, hint: str = "") -> Iterator[None]:
    """Around `import name`: where the package is missing, the error says which extra of `lft_jax` has it.

    Args:
      name: the package that is imported.
      extra: the extra in setup.py.
      hint: what to do where the package is there, but another one that it imports is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        advice = hint if hint and missing != name else f"pip install 'lft_jax[{extra}]'"
        raise ModuleNotFoundError(f"{missing} is not installed: {advice}.", name=missing) from error
