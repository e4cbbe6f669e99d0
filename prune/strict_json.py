"""JSON that somebody else may have written: what is ambiguous, not finite or too deep is refused."""

from __future__ import annotations

import json
import math
from collections import Counter

from prune.errors import ConfigError

DEPTH = 32  # objects and lists within one another


def parse(data: bytes) -> object:
    """What UTF-8 text in JSON says.

    Raises:
        ConfigError: a number that is not finite, or a key that comes twice.
        ValueError: not UTF-8, or not JSON.
        RecursionError: far too deep.
    """
    text = data.decode("utf-8-sig")
    return json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique)


def check_depth(found: object) -> None:
    """Refuse lists and objects more than `DEPTH` deep, which would overflow a stack somewhere else."""
    level = [found]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list | tuple)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ConfigError(f"nested more than {DEPTH} deep; write it flatter")


def _finite(text: str) -> float:
    """A float from JSON; NaN, Infinity and numbers too large for a float are refused."""
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError(f"{text:.40} is not a finite number; write one")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. A key that comes twice is refused: readers would not agree on which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ConfigError(f"the key {double!r:.80} comes twice; leave one")
    return found
