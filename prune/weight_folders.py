"""Folders of weights that a saved pruner carries, for options that may be a network; and files written whole.

The annotation of such an option names `nn.Module`, as that of the `scorer` of `index_preserving` does.
"""

from __future__ import annotations

import os
import re
import shutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import nn

from prune import learned_scorer
from prune.errors import ConfigError, UnknownMethodError
from prune.method import Method
from prune.options import hints_of
from prune.registry import method_class

WEIGHTS = {learned_scorer.CONFIG: 2**16, learned_scorer.WEIGHTS: learned_scorer.LIMIT}  # files of a folder, bytes


def _networks(cls: type[Method]) -> dict[str, tuple[str, ...]]:
    """Options of a method that may be a network, each with the texts that are not folders: its default, and choices in
    `search` or in a `Literal`."""
    hints, found = hints_of(cls), {}  # type: ignore[arg-type]  # as in `prune.options`
    for option in fields(cls) if hints else ():  # type: ignore[arg-type]
        parts = typing.get_args(hints[option.name]) or (hints[option.name],)
        if not any(isinstance(part, type) and issubclass(part, nn.Module) for part in parts):
            continue
        words = [word for part in parts for word in typing.get_args(part)]
        words += [option.default] if option.default is not MISSING else []
        choices = getattr(cls, "search", {}).get(option.name, ())
        words += choices if isinstance(choices, list | tuple) else ()
        found[option.name] = tuple(word for word in words if isinstance(word, str))
    return found


def weight_folders(method: object, options: Mapping[str, object]) -> list[str]:
    """The options that are folders of weights; none of a method that does not exist."""
    try:
        networks = _networks(method_class(method)) if isinstance(method, str) else {}
    except UnknownMethodError:
        return []
    return [
        name
        for name, words in networks.items()
        if isinstance(value := options.get(name), str) and value and value not in words
    ]


def located(method: object, options: Mapping[str, Any], locate: Callable[[str], Path]) -> dict[str, str]:
    """The options that are folders of weights, with their paths in place of their names in the file."""
    found = {}
    for name in weight_folders(method, options):
        if not re.fullmatch(r"(?=.{1,200}$)\w[\w.-]*(/\w[\w.-]*)*", options[name], re.ASCII):
            raise ConfigError(
                f"option {name}={options[name]!r:.80} must be a folder of weights beside the file, such as "
                "'weights/scorer'; handle.save_pretrained copies it there"
            )
        found[name] = str(locate(options[name]))
    return found


def copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ConfigError(f"there is no file {source} any more, which the pruner's weights come from; put it back")
    if not (target.exists() and source.samefile(target)):
        write(target, lambda draft: shutil.copyfile(source, draft))


def write(target: Path, fill: Callable[[Path], object]) -> None:
    """Make a file through a draft beside it, so that it is there whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(draft)
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; give another folder") from None
