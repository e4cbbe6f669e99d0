"""Saved pruners: a method, its options and its budget in a small JSON file, `pruner_config.json`.

An option that may be a network (its annotation names `nn.Module`, as the `scorer` of `index_preserving`) may also be a
folder of weights. That folder is copied beside the file, as `weights/<option>` with a config.json and a
model.safetensors; a file never names a place outside its own folder.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prune import hub
from prune.budget import Budget
from prune.compose import Compose
from prune.errors import BudgetError, ConfigError, PruneError, UnknownMethodError
from prune.method import Method, options_of
from prune.options import as_tuples
from prune.registry import get_method, method_class
from prune.strict_json import DEPTH, check_depth, parse
from prune.weight_folders import WEIGHTS, copy, located, weight_folders, write

FILE = "pruner_config.json"
SCHEMA = 1
LIMIT = 2**20  # bytes; a config has a few hundred
MEMBERS = 16
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
        _check(len(self.members) <= MEMBERS, "members", len(self.members), f"at most {MEMBERS}")
        self.build()
        try:
            json.dumps(self.to_dict(), allow_nan=False)
        except RecursionError:
            raise ConfigError(f"nested more than {DEPTH} deep; write it flatter") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"not JSON: {error!s:.200}; use finite numbers, texts, lists and objects, and for weights the folder "
                "that their save_pretrained wrote"
            ) from None
        check_depth(self.to_dict())

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
        options = {name: as_tuples(value) for name, value in options_of(method).items()}
        return cls(method.name, options, budget, **rest)

    def build(self, options: Mapping[str, object] | None = None, own_budgets: bool = True) -> Method:
        """The method object.

        Args:
            options: replace those of the file.
            own_budgets: False leaves the members' budgets out, so that one budget can be given for all.

        Raises:
            ConfigError: an unknown method, or an unknown or impossible option.
        """
        options = self.options | {name: as_tuples(value) for name, value in (options or {}).items()}
        if self.method == "compose":
            return self._compose(options, own_budgets)
        if self.members:
            raise ConfigError(f"{self.method} has no members; the method that has them is 'compose'")
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", self.method):
            raise ConfigError(f"method {self.method!r:.80} is no name of a method; see `prune list`")
        try:
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
        """What the file holds, but folders of weights have their paths of here. Keys without a value are left out."""
        return {"schema": SCHEMA, **self._entry()}

    def _entry(self, copies: dict[str, str] | None = None, inside: str = "weights") -> dict:
        """The object of this pruner or member. With `copies`, folders of weights are named by their place beside the
        file, and `copies` learns which folder goes there."""
        entry: dict = {"method": self.method}
        if self.members:
            entry["members"] = [member._entry(copies, f"{inside}/{n}") for n, member in enumerate(self.members)]
        else:
            entry["options"] = dict(self.options)
            if copies is not None:
                for name in weight_folders(self.method, self.options):
                    entry["options"][name] = f"{inside}/{name}"
                    copies[f"{inside}/{name}"] = self.options[name]
        if self.budget is not None:
            given = {name: value for name, value in vars(self.budget).items() if value is not None}
            entry["budget"] = {name: int(value) if name == "keep" else float(value) for name, value in given.items()}
        rest = {"positions": self.positions, "families": list(self.families), "vit": self.vit}
        rest["metrics"] = self.metrics
        return entry | {name: value for name, value in rest.items() if value} | self.extra

    @property
    def has_weights(self) -> bool:
        """Whether an option, of a member too, is a folder of weights."""
        return bool(weight_folders(self.method, self.options)) or any(member.has_weights for member in self.members)

    @classmethod
    def from_dict(cls, found: Any, locate: Callable[[str], Path] | None = None) -> PrunerConfig:
        """The config a dictionary holds. Unknown keys are kept, with a warning.

        Args:
            found: the dictionary.
            locate: gives the folder of weights that the dictionary calls by a name such as "weights/scorer", and then
                it may name no other place; None takes the names as paths.

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
        check_depth(found)
        return cls._parse({key: value for key, value in found.items() if key != "schema"}, locate)

    @classmethod
    def _parse(cls, found: Any, locate: Callable[[str], Path] | None) -> PrunerConfig:
        _check(isinstance(found, dict), "a member", found, "an object with a method")
        if "method" not in found:
            raise ConfigError('there is no \'method\'; name one, such as "method": "dart"')
        extra = {key: value for key, value in found.items() if key not in _KNOWN}
        if extra:
            names = ", ".join(f"{key!r:.40}" for key in extra)
            warnings.warn(f"unknown keys of a saved pruner are kept, but do nothing: {names:.400}", stacklevel=6)
        known = {key: value for key, value in found.items() if key in _KNOWN}
        if (budget := known.get("budget")) is not None:
            known["budget"] = _budget(budget)
        if (options := known.get("options")) is not None:
            _check(isinstance(options, dict), "options", options, "an object, such as {'layer': 2}")
            known["options"] = {key: as_tuples(value) for key, value in options.items()}
            if locate is not None:
                known["options"] |= located(known["method"], known["options"], locate)
        for key in ("families", "members"):
            if key in known:
                _check(isinstance(known[key], list | tuple), key, known[key], "a list")
                known[key] = tuple(known[key])
        if "members" in known:
            _check(len(known["members"]) <= MEMBERS, "members", len(known["members"]), f"at most {MEMBERS}")
            known["members"] = tuple(cls._parse(member, locate) for member in known["members"])
        return cls(**known, extra=extra)

    # ------------------------------------------------------------------------------------------ files
    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `folder/pruner_config.json`, whole or not at all, and copy the weights of options before it, to
        `folder/weights/`. The folder is made. Returns the file's path.

        Raises:
            ConfigError: it cannot be written, is larger than `LIMIT`, or weights to copy are missing.
        """
        _check(isinstance(folder, str | os.PathLike), "folder", folder, "a path")
        copies: dict[str, str] = {}
        text = json.dumps({"schema": SCHEMA, **self._entry(copies)}, indent=2, allow_nan=False) + "\n"
        if len(text) > LIMIT:
            raise ConfigError(f"the config has {len(text)} bytes, more than {LIMIT}; keep less in metrics")
        target = Path(folder) / FILE
        for name, source in copies.items():
            for file in WEIGHTS:
                copy(Path(source).expanduser() / file, target.parent / name / file)
        write(target, lambda draft: draft.write_text(text, encoding="utf-8"))
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload pruner",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes and a model card, in one commit; `apply_pruner` reads it.

        A card in the repository that was written by somebody stays as it is; so do other files.

        Args:
            repo_id: "user/repo", or "repo" of whom the token belongs to; made if need be.
            commit_message: of the commit.
            private: whether a new repository is private; None is the owner's default.
            token: None takes the one of `hf auth login`.
            revision: a branch, made if need be; None is main.
            create_pr: whether to open a pull request instead of writing to the branch.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            ConfigError: not logged in, no permission, no network, an impossible name, or as for `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            written = json.loads(self.save_pretrained(folder).read_text(encoding="utf-8"))
            return hub.upload(
                Path(folder),
                repo_id,
                lambda repo: hub.model_card(self, written, repo),
                message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> PrunerConfig:
        """Read a folder that `save_pretrained` wrote, the file in it, or a repository that `push_to_hub` wrote.

        Nothing that is read is executed, and nothing is un-pickled: there is JSON, and weights in safetensors.

        Args:
            name: a folder or file if there is one of this name, else "user/repo".
            revision: branch, tag or commit of the repository; None is main. Refused for folders.
            cache_dir: of downloads; None is that of `huggingface_hub`. These three mean nothing for folders.
            token: for private repositories; None takes the one of `hf auth login`.
            local_files_only: whether to use the cache only; the environment's HF_HUB_OFFLINE=1 does the same.

        Raises:
            ConfigError: it is missing, cannot be reached, is broken, too large or newer, or names what does not exist
                or lies outside; says which file.
        """
        _check(isinstance(name, str | os.PathLike), "name", name, "a path, or user/repo")
        if not os.path.exists(os.path.expanduser(name)):
            if not isinstance(name, str) or not hub.is_repo_id(name):
                raise ConfigError(
                    f"there is no folder or file {str(name)!r:.200}, and it is no name of a repository, such as "
                    "'user/repo'; handle.save_pretrained(folder) writes a folder"
                )
            options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
            file = hub.download(name, FILE, LIMIT, revision=revision, **options)
            options["revision"] = file.parent.name  # the commit, so that all files are of one

            def fetched(folder: str) -> Path:
                for part, limit in WEIGHTS.items():
                    hub.download(name, f"{folder}/{part}", limit, **options)
                return file.parent / folder

            return cls._read(file, fetched, f"{name}: {FILE}")
        if revision is not None:
            raise ConfigError(f"{str(name)!r:.200} is local and has no revisions; leave out revision={revision!r:.80}")
        file = Path(name).expanduser()
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(f"there is no file {file}; handle.save_pretrained(folder) and `prune tune` write one")

        def beside(folder: str) -> Path:
            found = file.parent / folder
            if not found.resolve().is_relative_to(file.parent.resolve()):
                raise ConfigError(f"{folder} is a link to a place outside the folder; copy the weights into it")
            return found

        return cls._read(file, beside, str(file))

    @classmethod
    def _read(cls, file: Path, locate: Callable[[str], Path], label: str) -> PrunerConfig:
        """The config in a file, which messages call by the label."""
        try:
            with open(file, "rb") as opened:
                data = opened.read(LIMIT + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {label}: {error.strerror}; check its permissions") from None
        if len(data) > LIMIT:
            raise ConfigError(f"{label} is larger than {LIMIT} bytes: no saved pruner is; check the path")
        try:
            return cls.from_dict(parse(data), locate)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        except RecursionError:
            raise ConfigError(f"{label}: nested too deeply; write it anew") from None
        except ValueError as error:  # of the decoders: not UTF-8, not JSON
            raise ConfigError(f"{label}: not JSON ({error!s:.200}); write it anew with save_pretrained") from None

    def continuing(self, saved: PrunerConfig) -> PrunerConfig:
        """This config, with what a pruner it comes from has beside the settings: the keys that were unknown, and
        families and metrics if method and budget are still the same."""
        new = self._with_extra(saved)
        if self.build() != saved.build() or self.budget != saved.budget:
            return new
        return replace(new, families=saved.families or self.families, metrics=self.metrics or saved.metrics)

    def _with_extra(self, saved: PrunerConfig) -> PrunerConfig:
        members = tuple(mine._with_extra(old) for mine, old in zip(self.members, saved.members))
        return replace(self, extra=saved.extra, members=members)


def find_config(name: str | os.PathLike, **options) -> PrunerConfig | None:
    """The saved pruner that `name` stands for, or None if it is the name of a registered method, which comes first.

    The one place that knows where saved pruners come from: folders, files and the hub, in this order.

    Args:
        name: of a method, a folder, a file, or a repository.
        **options: of `PrunerConfig.from_pretrained`.

    Raises:
        UnknownMethodError: a bare word that is none of these.
        ConfigError: there is nothing at this path or in this repository, or no sound config.
    """
    if isinstance(name, str):
        try:
            method_class(name)
            return None
        except UnknownMethodError:
            if not name or not (os.path.exists(name) or re.search(r"[/\\]|^[.~]|\.json$", name)):
                raise
    return PrunerConfig.from_pretrained(name, **options)


# ------------------------------------------------------------------------------------------------------ checks
def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{name} must be {wanted}, got {value!r:.80}")


def _budget(found: Any) -> Budget:
    names = [f.name for f in fields(Budget)]
    wanted = f"an object with one of {', '.join(names)}, such as {{'keep': 64}}"
    _check(isinstance(found, dict) and set(found) <= set(names), "budget", found, wanted)
    try:
        return Budget(**found)
    except BudgetError as error:
        raise ConfigError(f"budget: {error}") from None
    except OverflowError:
        raise ConfigError("budget: the number is too large; give the count or share to keep") from None
