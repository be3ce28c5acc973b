"""Deprecated keywords, accepted for one version with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

#: `(old keywords, other keywords) -> all keywords in their present form`.
Converter = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def old_keywords(convert: Converter, **now: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for functions that accept deprecated keywords: warns, then calls with the converted keywords.

    Args:
      convert: converts the old keywords that were given.
      **now: old keyword -> what to write instead, for the warning.

    Raises:
      TypeError: when called with an old keyword together with the keyword that holds it now.
    """

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            old = {name: kwargs.pop(name) for name in now if name in kwargs}
            if not old:
                return function(*args, **kwargs)
            for name in old:
                present = now[name].partition("=")[0]
                if present in kwargs and not isinstance(kwargs[present], str):  # oracle="query" takes its settings
                    raise TypeError(f"{function.__name__}: give {name}= or {present}=, not both.")
                message = f"{function.__name__}: {name}= is deprecated, write {now[name]} instead."
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **convert(old, kwargs))

        return wrapped

    return decorate


def renamed(**now: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`old_keywords` for keywords that only changed their name: `old="new"`."""

    def convert(old, kwargs):
        return {**kwargs, **{now[name]: value for name, value in old.items()}}

    return old_keywords(convert, **{name: f"{new}=" for name, new in now.items()})
