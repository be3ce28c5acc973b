"""Keywords of earlier versions, accepted for one version with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

#: `(old keywords given, other keywords given) -> all keywords in their present form`.
Converter = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def old_keywords(convert: Converter, **now: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: keywords named in `now` warn that they are deprecated, and are handed to `convert`.

    Args:
      convert: turns the old keywords into present ones.
      **now: old keyword -> what to write instead.
    """

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            old = {name: kwargs.pop(name) for name in now if name in kwargs}
            if not old:
                return function(*args, **kwargs)
            for name in old:
                message = f"{function.__name__}: {name}= is deprecated, write {now[name]} instead."
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **convert(old, kwargs))

        return wrapped

    return decorate


def renamed(**now: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`old_keywords` for keywords that only have another name: `old="new"`."""

    def convert(old, kwargs):
        return {**kwargs, **{now[name]: value for name, value in old.items()}}

    return old_keywords(convert, **{name: f"{new}=" for name, new in now.items()})
