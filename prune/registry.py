"""Names -> methods: registration, lookup with the closest name, wildcard listing, third-party entry points."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, wraps
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from pkgutil import iter_modules

from prune.errors import ConfigError, UnknownMethodError
from prune.method import Method, Reducer, Scorer, Site, option_names, options_of
from prune.options import as_tuples, check_types
from prune.tokens import SIGNALS

ENTRY_POINT_GROUP = "prune.methods"
_REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method available by its `name`.

    The class must be a dataclass (its fields are the options) and a subclass of `Scorer`, `Reducer` or `Method`, all
    fields with defaults, with a lower-case `name` nobody else uses and only known `signals`. From then
    on its constructor refuses options of a wrong type.

    Raises:
        ConfigError: one of these does not hold; nothing is registered.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"@register wants a subclass of Scorer, Reducer or Method, got {cls!r}")
    name = cls.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"{cls.__name__}.name is {name!r}: use lower-case letters, digits and _")
    if not is_dataclass(cls) or "__dataclass_fields__" not in vars(cls):
        raise ConfigError(f"{cls.__name__} must be a dataclass: put @dataclass under @register")
    taken = _REGISTRY.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another")
    if unknown := set(cls.signals) - set(SIGNALS):
        raise ConfigError(f"{cls.__name__} declares unknown signals {sorted(unknown)}; known are {', '.join(SIGNALS)}")
    for base, rung in ((Scorer, "score"), (Reducer, "reduce"), (Method, "plan")):
        if issubclass(cls, base):
            if getattr(cls, rung) is getattr(base, rung):
                raise ConfigError(f"{cls.__name__} does not implement {rung}")
            break
    try:
        cls()
    except TypeError as error:
        raise ConfigError(f"every option of {cls.__name__} needs a default: {error}") from None
    cls.__init__ = _checked(cls.__init__)  # type: ignore[method-assign]
    _REGISTRY[name] = cls
    return cls


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a dataclass behind a check of its options' types; sequences are made tuples."""
    known = signature(init)

    @wraps(init)
    def checked(self, *values, **options):
        given = known.bind(self, *values, **options)
        for name in [*given.arguments][1:]:
            given.arguments[name] = as_tuples(given.arguments[name])
        check_types(type(self), given.arguments)
        init(*given.args, **given.kwargs)

    return checked


@lru_cache(maxsize=1)
def _load() -> None:
    """Import the built-in methods and the entry points, once."""
    reducers = import_module("prune.reducers")
    for module in iter_modules(reducers.__path__):
        import_module(f"prune.reducers.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
            if getattr(loaded, "name", None) not in _REGISTRY:
                register(loaded)
        except Exception as error:  # a broken plug-in must not take the others down
            warnings.warn(f"entry point {entry.name} = {entry.value} was skipped: {error}", stacklevel=3)


def method_class(name: str) -> type[Method]:
    """The registered class of this name.

    Raises:
        UnknownMethodError: lists the closest and all names.
    """
    _load()
    if isinstance(name, str) and name in _REGISTRY:
        return _REGISTRY[name]
    close = difflib.get_close_matches(str(name).lower(), _REGISTRY, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise UnknownMethodError(f"unknown method {name!r}.{hint} Known methods: {', '.join(sorted(_REGISTRY))}")


def get_method(name: str, **options) -> Method:
    """A method object from its name and options (its dataclass fields).

    Raises:
        UnknownMethodError: no such name.
        ConfigError: an option does not exist (the message lists those that do), or has a wrong type or an impossible
            value.
    """
    cls = method_class(name)
    known = option_names(cls)
    if unknown := [key for key in options if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{name} has no option {', '.join(map(repr, unknown))}.{hint} Its options are: {', '.join(known) or 'none'}"
        )
    return cls(**options)


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table `prune list` prints."""

    name: str
    title: str
    arxiv: str
    where: str
    signals: tuple[str, ...]
    merges: bool
    adaptive: bool
    needs_question: bool
    positions: str
    options: dict[str, object]


def signals_of(method: Method) -> tuple[str, ...]:
    """All signals a method reads; those of the vision encoder as "tower:<kind>"."""
    return tuple(dict.fromkeys([*method.signals, *(f"tower:{spec.kind}" for spec in method.tower.values())]))


def acts_at(sites: Sequence[Site]) -> str:
    """Sites in a few words: `projected + decoder:2`, `decoder:8,16,24`, `decoder:5...31` for more than four layers."""
    layers: dict[str, list[int]] = {}
    for site in dict.fromkeys(sites):
        layers.setdefault(site.kind, []).append(site.layer)
    words = []
    for kind, found in layers.items():
        numbers = ",".join(map(str, found)) if len(found) <= 4 else f"{found[0]}...{found[-1]}"
        words.append(kind if kind == "projected" else f"{kind}:{numbers}")
    return " + ".join(words)


def method_info(name: str) -> MethodInfo:
    """What a method is and needs, with its default options."""
    cls = method_class(name)
    method = cls()
    return MethodInfo(
        name=name,
        title=cls.title,
        arxiv=cls.arxiv,
        where=acts_at(method.sites()),
        signals=signals_of(method),
        merges=cls.merges,
        adaptive=cls.adaptive,
        needs_question=cls.needs_question,
        positions=cls.positions,
        options=options_of(method),
    )


def list_methods(
    pattern: str = "*",
    *,
    where: str | None = None,
    needs_question: bool | None = None,
    merges: bool | None = None,
    adaptive: bool | None = None,
    signals: set[str] | None = None,
) -> list[str]:
    """Sorted names of the methods that fit.

    Args:
        pattern: wildcard over names, such as `"*prune*"`.
        where: site kind the method acts at with its default options: "vision", "projected", "decoder" or "block".
        needs_question, merges, adaptive: keep the methods with this property.
        signals: keep the methods that need none but these signals; those of the vision encoder are called
            "tower:cls_attention" and so on.
    """
    _load()
    if not isinstance(pattern, str):
        raise ConfigError(f"pattern={pattern!r:.80} must be a wildcard over names, such as '*prune*'")
    if where not in (None, *Site.KINDS):
        raise ConfigError(f"where={where!r:.80} must be one of {', '.join(Site.KINDS)}")
    infos = (method_info(name) for name in sorted(_REGISTRY) if fnmatchcase(name, pattern))
    return [
        info.name
        for info in infos
        if (where is None or where in re.split(r"[ +:]+", info.where))
        and (needs_question is None or info.needs_question == needs_question)
        and (merges is None or info.merges == merges)
        and (adaptive is None or info.adaptive == adaptive)
        and (signals is None or set(info.signals) <= set(signals))
    ]
