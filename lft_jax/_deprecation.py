"""Deprecated keywords, accepted for one version with a warning."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

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


def renamed_fields(**now: str) -> Callable[[type[T]], type[T]]:
    """Decorator for dataclasses with renamed fields, `old="new"`: the constructor, `dataclasses.replace` and attributes
    accept the old names with a warning.

    Raises:
      TypeError: when constructed with an old name together with the new one.
    """

    def decorate(cls):
        init, fields = cls.__init__, {field.name for field in dataclasses.fields(cls)}

        @functools.wraps(init)
        def wrapped(self, *args, **kwargs):
            replaced = fields <= kwargs.keys()  # `dataclasses.replace` passes all fields, also those not given to it
            for old in [name for name in kwargs if name in now]:
                if now[old] in kwargs and not replaced:
                    raise TypeError(f"{cls.__name__}: give {old}= or {now[old]}=, not both.")
                _warn_renamed(cls, old, now[old])
                kwargs[now[old]] = kwargs.pop(old)
            init(self, *args, **kwargs)

        cls.__init__ = wrapped
        for old, new in now.items():
            setattr(cls, old, property(functools.partial(_read_renamed, old=old, new=new)))
        return cls

    return decorate


def _read_renamed(self, old, new):
    _warn_renamed(type(self), old, new)
    return getattr(self, new)


def _warn_renamed(cls, old, new):
    message = f"{cls.__name__}: {old} is deprecated, write {new} instead."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
