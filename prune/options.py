"""Options of a method as people type them."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterable

from prune.errors import ConfigError


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
