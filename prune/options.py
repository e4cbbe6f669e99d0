"""Options of a method: as people type them, and whether they have the type that the method's dataclass states."""

from __future__ import annotations

import types
import typing
from ast import literal_eval
from collections.abc import Iterable, Mapping
from functools import lru_cache

from prune.errors import ConfigError
from prune.method import Method

LARGEST = 1e18
"""Of numbers: seeds are 64 bits, and what is computed with the others has 32."""

WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    types.NoneType: "None",
}


def parse_options(pairs: Iterable[str]) -> dict[str, object]:
    """Options of a method from `KEY=VALUE` texts; a bare word is a string.

    Raises:
        ConfigError: a text is not of that form.
    """
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.strip()):
            raise ConfigError(f"option {pair!r}: write KEY=VALUE, such as layer=3")
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
            value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        options[key.strip().replace("-", "_")] = value
    return options


def as_tuples(value: object) -> object:
    """Lists and ranges, and those inside them, as tuples: options are written as JSON too, and compared."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple | range) else value


def check_types(cls: type[Method], options: Mapping[str, object]) -> None:
    """Hold options against the annotations of the dataclass, as far as they are plain ones.

    Methods check ranges. 'two' layers, True layers or a step of infinity would fail in the middle of a forward.

    Raises:
        ConfigError: names the option and what it must be.
    """
    hints = hints_of(cls)  # type: ignore[arg-type]  # mypy takes the hash of instances for that of the class
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(f"{cls.name}: {name}={value!r:.80} must be {_words(hints[name])}")


@lru_cache
def hints_of(cls: type) -> dict[str, typing.Any]:
    """The annotations of a class, made once; none if one of them exists for the type checker only."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # whatever evaluating somebody's annotation raises
        return {}


def _fits(value: object, hint: object) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        every = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(every) and all(map(_fits, value, every))
    if origin is typing.Literal:
        return value in inner
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, hint) if hint in (str, bool, types.NoneType) else True


def _words(hint: object) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is tuple:
        return f"a sequence, each {_words(inner[0])}" if inner[1:] == (...,) else f"({', '.join(map(_words, inner))})"
    return WORDS[hint] if hint in WORDS else str(getattr(hint, "__name__", hint))
