"""The space `prune tune` searches: which options of a method, over which ranges."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence

from prune.config import PrunerConfig
from prune.errors import ConfigError, PruneError
from prune.evals.grid import fitted
from prune.method import option_names
from prune.options import hints_of, parse_options
from prune.registry import method_class

LAYERS = ("layer", "layers")  # options that count decoder layers


class TuneError(PruneError):
    """The search cannot be run, or has found nothing."""


def search_space(
    name: str, layers: int, fixed: Mapping[str, object] | None = None, given: Mapping[str, tuple] | None = None
) -> dict[str, tuple]:
    """Which options of a method are searched, and where: (lowest, highest) of two numbers, else a tuple of choices.

    Those the method declares in its class attribute `search`, such as `{"alpha": (-1.0, 1.0), "layers.0": (1, 12)}`;
    without one, every option whose default is a number, or a tuple of numbers, around its default (see `around`), every
    `Literal`, and the two or three decoder layers it cuts at by default, each as far as half-way to the next.
    "layers.0" is the first entry of the tuple `layers`.

    Args:
        name: of the method.
        layers: of the decoder; declared and generic ranges of `layer` and `layers` end before them.
        fixed: options that are not searched.
        given: ranges that replace others, or come in addition.

    Raises:
        UnknownMethodError: no such method.
        ConfigError: no such option, an option both fixed and given, a range that does not fit its option, or nothing
            to search.
    """
    cls, fixed, given = method_class(name), dict(fixed or {}), dict(given or {})
    hints = hints_of(cls)
    known = option_names(cls)
    for key in (*fixed, *given):
        if (option := key.partition(".")[0]) not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{name} has no option {option!r}.{hint} Its options are: {', '.join(known) or 'none'}")
    if clash := sorted({key for key in given if key.partition(".")[0] in fixed}):
        raise ConfigError(f"{', '.join(clash)}: give a range or a fixed value, not both")
    given = {key: fit(key, where, hints[key.partition(".")[0]]) for key, where in given.items()}
    default = PrunerConfig(name, fitted(name, layers) | fixed).build()

    space = {}
    for key, where in (getattr(cls, "search", None) or generic(default, known, hints, layers)).items():
        option = key.partition(".")[0]
        if option in fixed or option in given or key in given:
            continue
        if option in LAYERS and all(type(bound) is int for bound in where):
            where = tuple(min(bound, layers - 1) for bound in where)
        space[key] = where
    space = {**{key: where for key, where in space.items() if key.partition(".")[0] not in given}, **given}
    for key in space:  # parts of a tuple that has no default come from the first on
        option, dot, place = key.partition(".")
        there = len(getattr(default, option) or ()) if dot else 0
        if dot and not (place.isdigit() and all(f"{option}.{i}" in space for i in range(there, int(place)))):
            raise ConfigError(f"{key}: number the entries of {option} from 0, without gaps")
    if not space:
        raise ConfigError(
            f"{name} has no option left to search; give --range KEY=LOW:HIGH. Its options are: "
            f"{', '.join(known) or 'none'}"
        )
    return space


def generic(default, known: Sequence[str], hints: Mapping[str, object], layers: int) -> dict[str, tuple]:
    """Ranges of all numeric options around the values of a method object, of the decoder layers it cuts at, and the
    choices of `Literal`s."""
    found: dict[str, tuple] = {}
    for name in known:
        value = getattr(default, name)
        if name == "layers" and value is None:
            found |= between([site.layer for site in default.sites(layers) if site.kind == "decoder"], layers)
            continue
        parts = {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
        if typing.get_origin(hints[name]) is typing.Literal:
            found[name] = typing.get_args(hints[name])
        elif name != "seed" and all(type(part) in (int, float) for part in parts.values()):
            found |= {key: (1, 10**6) if name in LAYERS else around(part) for key, part in parts.items()}
    return found


def between(cuts: Sequence[int], layers: int) -> dict[str, tuple]:
    """Ranges of two or three decoder layers that ascend whatever is drawn from them."""
    if not 2 <= len(cuts) <= 3:
        return {}
    ends = [*((a + b) // 2 for a, b in zip(cuts, cuts[1:])), layers - 1]
    starts = [1, *(end + 1 for end in ends)]
    return {f"layers.{i}": (start, end) for i, (start, end) in enumerate(zip(starts, ends))}


def around(value: float) -> tuple[float, float]:
    """Where to search a number whose default is `value`, which may well be off by a factor of four.

    Counts: 1 to 4 times it; shares from 0.1 on: 0 to 1; small ones: a tenth to ten times; others: a quarter to 4 times.
    """
    if isinstance(value, int):
        return (1, 4 * value) if value > 0 else (0, 4) if value == 0 else (4 * value, 0)
    if 0.1 <= value <= 1 or value == 0:
        return (0.0, 1.0)
    if 0 < value < 0.1:
        return (value / 10, value * 10)
    return (value / 4, 4 * value) if value > 0 else (4 * value, value / 4)


def parse_ranges(pairs: Sequence[str]) -> dict[str, tuple]:
    """Ranges from texts such as `alpha=0:1`, `layers.0=1:8`, and choices such as `metric=keys,features`.

    Raises:
        ConfigError: a text is not of that form.
    """
    ranges = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        parts = text.split(":") if ":" in text else text.split(",")
        values = tuple(parse_options([f"x={part.strip()}"])["x"] for part in parts)
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in values)
        if not (key.strip() and equals and all(part.strip() for part in parts)):
            raise ConfigError(f"range {pair!r}: write KEY=LOW:HIGH, such as alpha=0:1, or choices, such as metric=a,b")
        if ":" in text and not (numbers and len(values) == 2 and values[0] <= values[1]):
            raise ConfigError(f"range {pair!r}: LOW:HIGH wants two numbers, the lower one first")
        if "," in text and numbers and len(values) == 2:
            raise ConfigError(f"range {pair!r}: write {key}={values[0]}:{values[1]} for a range of numbers")
        ranges[key.strip().replace("-", "_")] = values
    return ranges


def kinds(hint: object, entries: bool = False) -> set:
    """The plain types an annotation allows; with `entries`, those of the entries of its tuples."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(kinds(one, entries) for one in inner))
    if origin is tuple:
        return set().union(*(kinds(one) for one in inner if one is not ...)) if entries else set()
    if entries:
        return set()
    return {type(value) for value in inner} if origin is typing.Literal else {hint}


def fit(key: str, where: tuple, hint: object) -> tuple:
    """A range in the type of its option: 0:1 for a float is 0.0 to 1.0.

    Raises:
        ConfigError: the option cannot hold it.
    """
    option, dot, _ = key.partition(".")
    allowed = kinds(hint, entries=bool(dot))
    if not allowed - {types.NoneType}:
        raise ConfigError(f"{option} has no entries; write {option}=..." if dot else f"write {key}.0=..., {key}.1=...")
    if float in allowed and int not in allowed and all(type(value) in (int, float) for value in where):
        return tuple(map(float, where))
    if not {type(value) for value in where} <= allowed:
        wanted = ", ".join(sorted(getattr(kind, "__name__", str(kind)) for kind in allowed))
        raise ConfigError(f"range {key}={':'.join(map(str, where))}: the option holds {wanted}")
    return where


def is_interval(where: tuple) -> bool:
    return len(where) == 2 and all(type(bound) in (int, float) for bound in where)


def with_params(options: Mapping[str, object], params: Mapping[str, object]) -> dict[str, object]:
    """The options with those of a trial put in; "layers.0" is the first entry of a tuple."""
    found = dict(options)
    for key in sorted(params, key=lambda key: (key.partition(".")[0], int(key.partition(".")[2] or 0))):
        option, dot, place = key.partition(".")
        if dot:
            entries = list(found[option] or ())
            entries[int(place) : int(place) + 1] = [params[key]]
            found[option] = tuple(entries)
        else:
            found[option] = params[key]
    return found


def entry(options: Mapping[str, object], key: str) -> object:
    """The value of a searched option, or of an entry of one; None if there is none."""
    option, dot, place = key.partition(".")
    value = options[option]
    if dot:
        value = value[int(place)] if value is not None and int(place) < len(value) else None
    return value


def distribution(where: tuple):
    """optuna's form of a range. Intervals of floats that span a factor of ten or more are searched by logarithm."""
    from optuna import distributions

    if not is_interval(where):
        return distributions.CategoricalDistribution(where)
    low, high = where
    if type(low) is int and type(high) is int:
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=low > 0 and high / low >= 10)
