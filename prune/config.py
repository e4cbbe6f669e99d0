"""Saved pruners: a method, its options and its budget in a small JSON file, `pruner_config.json`."""

from __future__ import annotations

import json
import math
import os
import re
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from prune.budget import Budget
from prune.compose import Compose
from prune.errors import BudgetError, ConfigError, PruneError, UnknownMethodError
from prune.method import Method
from prune.registry import get_method, method_class

FILE = "pruner_config.json"
SCHEMA = 1
LIMIT = 2**20  # bytes; a config has a few hundred
POSITIONS = (None, "original", "compact")
_KNOWN = ("schema", "method", "members", "options", "budget", "positions", "families", "metrics", "vit")
_VIT = {"block": int, "restore": bool, "proportional": bool}


@dataclass(frozen=True)
class PrunerConfig:
    """Everything `apply_pruner` needs beside the model. It is data: reading one runs nothing that is in it.

    Args:
        method: a registered name, or "compose".
        options: of the method; those left out take their defaults.
        budget: None if members have budgets of their own, or if `apply_pruner` is to be given one.
        positions: "original", "compact", or None for the method's own.
        families: names of the model families it was made or tuned on (README, "Models"); for the reader.
        metrics: JSON-able, for the reader; `prune tune` writes what it measured.
        vit: arguments of `apply_pruner` for vision transformers, those given: "block", "restore", "proportional".
        members: the methods of a "compose" in order, each with a method, options and maybe a budget.
        extra: keys of the file this version does not know; they are written back as they were.

    Raises:
        ConfigError: a value of the wrong type, an unknown method or option, or something JSON cannot hold (NaN too).
    """

    method: str
    options: dict = field(default_factory=dict)
    budget: Budget | None = None
    positions: str | None = None
    families: tuple[str, ...] = ()
    metrics: dict = field(default_factory=dict)
    members: tuple[PrunerConfig, ...] = ()
    vit: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        for name, kind, wanted in (
            ("method", str, "a name, such as 'dart'"),
            ("options", dict, "an object, such as {'layer': 2}"),
            ("budget", Budget | None, "an object, such as {'keep': 64}"),
            ("families", tuple, "a list of names"),
            ("metrics", dict, "an object"),
            ("members", tuple, "a list of objects, each with a method"),
            ("vit", dict, "an object, such as {'block': 4}"),
            ("extra", dict, "an object"),
        ):
            _check(isinstance(getattr(self, name), kind), name, getattr(self, name), wanted)
        _check(all(isinstance(name, str) for name in self.families), "families", self.families, "a list of names")
        _check(self.positions in POSITIONS, "positions", self.positions, "'original' or 'compact'")
        sound = all(type(value) is _VIT.get(name) for name, value in self.vit.items())
        _check(sound, "vit", self.vit, "an object with block (a number), restore or proportional (true or false)")
        if clash := sorted(set(self.extra) & set(_KNOWN)):
            raise ConfigError(f"extra may not hold {', '.join(clash)}: these keys have a meaning")
        self.build()
        try:
            json.dumps(self.to_dict(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not JSON: {error}; use finite numbers, texts, lists and objects") from None

    # ------------------------------------------------------------------------------------------ method object
    @classmethod
    def of(cls, method: Method, budget: Budget | None = None, **rest) -> PrunerConfig:
        """The config of a method object; `rest` are further fields.

        Raises:
            ConfigError: the method is not registered, or an option of it cannot be saved.
        """
        if type(method) is Compose:
            budgets = method.budgets or [None] * len(method.members)
            members = tuple(cls.of(member, own) for member, own in zip(method.members, budgets))
            return cls("compose", budget=budget, members=members, **rest)
        try:
            known = method_class(method.name)
        except UnknownMethodError:
            known = None
        if type(method) is not known:
            raise ConfigError(f"{type(method).__name__} is not registered, so no file can name it; put @register on it")
        options = {f.name: _tuples(getattr(method, f.name)) for f in fields(method) if f.init}
        return cls(method.name, options, budget, **rest)

    def build(self, options: Mapping[str, object] | None = None, own_budgets: bool = True) -> Method:
        """The method object.

        Args:
            options: replace those of the file.
            own_budgets: False leaves the members' budgets out, so that one budget can be given for all.

        Raises:
            ConfigError: an unknown method, or an unknown or impossible option.
        """
        options = self.options | {name: _tuples(value) for name, value in (options or {}).items()}
        if self.method == "compose":
            return self._compose(options, own_budgets)
        if self.members:
            raise ConfigError(f"{self.method} has no members; the method that has them is 'compose'")
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", self.method):
            raise ConfigError(f"method {self.method!r:.80} is no name of a method; see `prune list`")
        try:
            _check_types(method_class(self.method), options)
            return get_method(self.method, **options)
        except UnknownMethodError as error:
            raise ConfigError(f"{error}; if a package brings it, install that") from None
        except PruneError as error:
            raise ConfigError(f"{error!s:.600}") from None
        except Exception as error:  # a method of somebody else, given what it did not think of
            raise ConfigError(f"{self.method} refuses its options: {type(error).__name__}: {error!s:.300}") from None

    def _compose(self, options: dict, own_budgets: bool) -> Compose:
        if options:
            raise ConfigError(f"options {sorted(options)} belong to the members of a compose, not to itself")
        for member in self.members:
            _check(isinstance(member, PrunerConfig), "members", member, "a list of objects, each with a method")
            if member.positions or member.families or member.metrics or member.vit:
                raise ConfigError("a member has a method, options and a budget; positions and the rest go outside")
        budgets = [member.budget for member in self.members if member.budget is not None]
        if budgets and len(budgets) != len(self.members):
            raise ConfigError("give every member a budget, or none")
        if budgets and self.budget is not None:
            raise ConfigError("the members have budgets of their own; leave out the one outside, or theirs")
        return Compose(
            *(member.build() for member in self.members), budgets=budgets if own_budgets and budgets else None
        )

    # ------------------------------------------------------------------------------------------ dictionaries
    def to_dict(self) -> dict:
        """What the file holds. Keys without a value are left out."""
        return {"schema": SCHEMA, **self._entry()}

    def _entry(self) -> dict:
        entry: dict = {"method": self.method}
        if self.members:
            entry["members"] = [member._entry() for member in self.members]
        else:
            entry["options"] = self.options
        if self.budget is not None:
            given = {name: value for name, value in vars(self.budget).items() if value is not None}
            entry["budget"] = {name: int(value) if name == "keep" else float(value) for name, value in given.items()}
        rest = {"positions": self.positions, "families": list(self.families), "vit": self.vit}
        rest["metrics"] = self.metrics
        return entry | {name: value for name, value in rest.items() if value} | self.extra

    @classmethod
    def from_dict(cls, found: object) -> PrunerConfig:
        """The config a dictionary holds. Unknown keys are kept, with a warning.

        Raises:
            ConfigError: as above, or a newer schema.
        """
        _check(isinstance(found, dict), "the config", found, "a JSON object in {}")
        schema = found.get("schema")
        _check(type(schema) is int and schema >= 1, "schema", schema, f"the version of the format, {SCHEMA}")
        if schema > SCHEMA:
            raise ConfigError(
                f"schema {schema} is newer than this prune reads ({SCHEMA}); upgrade: pip install -U prune-vlm"
            )
        return cls._parse({key: value for key, value in found.items() if key != "schema"})

    @classmethod
    def _parse(cls, found: object) -> PrunerConfig:
        _check(isinstance(found, dict), "a member", found, "an object with a method")
        if "method" not in found:
            raise ConfigError('there is no \'method\'; name one, such as "method": "dart"')
        extra = {key: value for key, value in found.items() if key not in _KNOWN}
        if extra:
            names = ", ".join(f"{key!r:.40}" for key in extra)
            warnings.warn(f"unknown keys of a saved pruner are kept, but do nothing: {names:.400}", stacklevel=5)
        known = {key: value for key, value in found.items() if key in _KNOWN}
        if (budget := known.get("budget")) is not None:
            known["budget"] = _budget(budget)
        if (options := known.get("options")) is not None:
            _check(isinstance(options, dict), "options", options, "an object, such as {'layer': 2}")
            known["options"] = {key: _tuples(value) for key, value in options.items()}
        for key in ("families", "members"):
            if key in known:
                _check(isinstance(known[key], list | tuple), key, known[key], "a list")
                known[key] = tuple(known[key])
        if "members" in known:
            known["members"] = tuple(cls._parse(member) for member in known["members"])
        return cls(**known, extra=extra)

    # ------------------------------------------------------------------------------------------ files
    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `folder/pruner_config.json`, whole or not at all; the folder is made. Returns the file's path.

        Raises:
            ConfigError: it cannot be written, or is larger than `LIMIT`.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if len(text) > LIMIT:
            raise ConfigError(f"the config has {len(text)} bytes, more than {LIMIT}; keep less in metrics")
        target = Path(folder) / FILE
        draft = target.with_name(f".{FILE}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(draft, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, target)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write {target}: {error.strerror}; give another folder") from None
        return target

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> PrunerConfig:
        """Read a folder that `save_pretrained` wrote, or the file in it.

        Raises:
            ConfigError: it is missing, broken, too large, newer, or names what does not exist; says which file.
        """
        file = Path(path).expanduser()
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(f"there is no file {file}; handle.save_pretrained(folder) and `prune tune` write one")
        try:
            with open(file, "rb") as opened:
                data = opened.read(LIMIT + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}; check its permissions") from None
        if len(data) > LIMIT:
            raise ConfigError(f"{file} is larger than {LIMIT} bytes: no saved pruner is; check the path")
        try:
            found = json.loads(data.decode("utf-8-sig"), parse_constant=_finite, parse_float=_finite)
            return cls.from_dict(found)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        except RecursionError:
            raise ConfigError(f"{file}: nested too deeply; write it anew") from None
        except ValueError as error:  # of the decoders: not UTF-8, not JSON
            raise ConfigError(f"{file}: not JSON ({error!s:.200}); write it anew with save_pretrained") from None


def find_config(name: str | os.PathLike) -> PrunerConfig | None:
    """The saved pruner that `name` stands for, or None if it is the name of a registered method, which comes first.

    The one place that knows where saved pruners come from: folders and files. The hub is to be added here.

    Raises:
        UnknownMethodError: a bare word that is neither.
        ConfigError: there is nothing at this path, or no sound config.
    """
    if isinstance(name, str):
        try:
            method_class(name)
            return None
        except UnknownMethodError:
            if not name or not (os.path.exists(name) or re.search(r"[/\\]|^[.~]|\.json$", name)):
                raise
    if not os.path.exists(os.path.expanduser(name)):
        raise ConfigError(
            f"there is no folder or file {str(name)!r:.200}; a saved pruner is a local folder with {FILE} for now, "
            "names of the hub are not looked up yet: download it first"
        )
    return PrunerConfig.from_pretrained(name)


# ------------------------------------------------------------------------------------------------------ checks
def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{name} must be {wanted}, got {value!r:.80}")


def _finite(text: str) -> float:
    """A float from JSON; NaN, Infinity and numbers too large for a float are refused."""
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError(f"{text:.40} is not a finite number; write one")
    return value


def _tuples(value: object) -> object:
    """JSON has lists where options have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _budget(found: object) -> Budget:
    names = [f.name for f in fields(Budget)]
    wanted = f"an object with one of {', '.join(names)}, such as {{'keep': 64}}"
    _check(isinstance(found, dict) and set(found) <= set(names), "budget", found, wanted)
    try:
        return Budget(**found)
    except BudgetError as error:
        raise ConfigError(f"budget: {error}") from None
    except OverflowError:
        raise ConfigError("budget: the number is too large; give the count or share to keep") from None


def _check_types(cls: type[Method], options: Mapping[str, object]) -> None:
    """Hold options against the annotations of the dataclass, as far as they are plain ones.

    Methods check ranges, but few check types: 'two' layers would fail in the middle of a forward.
    """
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # names that exist for the type checker only
        return
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else None
            raise ConfigError(f"{cls.name}: option {name}={value!r:.80} must be {wanted or hints[name]}")


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
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, types.NoneType) else True
