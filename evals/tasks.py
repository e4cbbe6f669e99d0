"""Tasks: questions about pictures with their answers, and how what a model says is scored.

    load_task("scenes")                            built in, no download
    load_task("digits")                            built in, for vision transformers; see `prune.evals.image_tasks`
    load_task("imagefolder:/data/pets")            for vision transformers too
    load_task("folder:/data/mine")                 JSON lines and images; so does a plain path to a folder or .jsonl
    load_task("hf:org/name:config", split="val")   what `datasets.load_dataset` loads, from the hub or a local folder

One line of a folder's *.jsonl file; image paths are relative to the file:

    {"image": "a.png", "question": "What colour is the car?", "answer": "red", "kind": "colour"}
    {"images": ["a.png", "b.png"], "question": "How many cats are there?", "answer": ["2", "two"]}

"kind" is optional: accuracy is reported per kind. Everything but the pixels is checked when the task is loaded, before
any model is; pictures are decoded when asked for.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from prune.errors import PruneError
from prune.evals.scenes import LEVELS, TEST_ITEMS, Scenes
from prune.evals.scorers import SCORERS, WANTS, accepted
from prune.loading import on_white, open_image

MAX_NEW_TOKENS = 16
_COLUMNS = ("image", "question", "answer", "kind")


class TaskError(PruneError):
    """A task that cannot be loaded, or one of its pictures; names the file and line, or the row of the dataset."""


class Item(Protocol):
    """One question about one or more pictures. `evals.scenes.Item` is one too."""

    @property
    def images(self) -> Sequence[Image.Image]: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str | Sequence[str]: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class LazyItem:
    """An item that decodes its pictures when they are first asked for, and then holds them.

    Attributes:
        question: as the model is asked it, without a prompt around it.
        answer: the accepted answer, or several.
        kind: the kind of question, "" if the task has no kinds.
        load: opens the pictures.
        files: (name, bytes) of the image files, where there are any.
    """

    question: str
    answer: str | tuple[str, ...]
    kind: str
    load: Callable[[], list[Image.Image]]
    files: tuple[tuple[str, int], ...] = ()

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures, RGB.

        Raises:
            TaskError: one of them is gone or broken.
        """
        return self.load()


@dataclass(frozen=True)
class Classes:
    """What a task of classes, for vision transformers, has beside its items (whose question is empty).

    Args:
        names: the classes, in the order in which a classifier made for them has them.
        train: items to fit probes on, none of the task's own; empty where there are none.
        prompt: what a model of pictures and texts compares a picture with, `{}` standing for a class.
    """

    names: tuple[str, ...]
    train: Sequence[Item]
    prompt: str = "a photo of a {}"


@dataclass(frozen=True, eq=False)
class Task:
    """Questions, answers and a scorer.

    Attributes:
        name: "scenes", "folder:/data/mine" (absolute), "hf:org/name".
        items: as many as `len()` says; one is made anew each time it is asked for, so only who keeps it keeps pixels.
        scorer: (what the model said, the item) -> score between 0 and 1, 1 is right.
        options: JSON-able; `load_task(name, **options)` loads the same items again.
        max_new_tokens: how long an answer may get; 0 for tasks of classes, whose answers are no text.
        classes: of a task of classes; None for questions.
    """

    name: str
    items: Sequence[Item]
    scorer: Callable[[str, Item], float]
    options: dict
    max_new_tokens: int = MAX_NEW_TOKENS
    classes: Classes | None = None

    @cached_property
    def digest(self) -> str:
        """12 hex digits of the questions, answers and kinds of all items, in order, and of the names and sizes of their
        image files, if they have any; then of the items to fit probes on. Makes every item once, and opens no picture.
        """
        digest = hashlib.sha256()
        for item in [*self.items, *(self.classes.train if self.classes else ())]:
            parts = [item.question, accepted(item), item.kind, *getattr(item, "files", ())]
            digest.update(json.dumps(parts).encode() + b"\n")
        return digest.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------- loading
def list_tasks() -> list[str]:
    """The names of the built-in tasks."""
    return [*LEVELS, "digits"]


def load_task(
    name: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    scorer: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """A task by name.

    Args:
        name: "scenes", "scenes-hard", "folder:PATH", "hf:NAME", "hf:NAME:CONFIG" (NAME: a hub dataset or a local
            folder), or a path to an existing folder or .jsonl file; for vision transformers "digits" or
            "imagefolder:PATH".
        split: scenes, digits: "test" (default) or "train"; folder: the stem of one of several .jsonl files; hf: as
            `load_dataset` takes it, default "test"; imagefolder: "test" (default), "train" or "all".
        limit: take the first `limit` items (default and at most: all). Scenes cycle through their kinds, so there a
            prefix is balanced; sort files so that a prefix is fair.
        seed: another seed gives other scenes and other drawings of the digits. Nothing else is random: other tasks do
            not use it.
        scorer: a key of `SCORERS`, default "exact"; none for tasks of classes.
        columns: hf only: {"image" | "question" | "answer" | "kind": name of the dataset's column}, by default the same
            names. A picture is a PIL image, {"bytes", "path"} or a path, or a list of these.
        max_new_tokens: default 3 for scenes, else 16; none for tasks of classes.

    Raises:
        TaskError: no such task, split, scorer or column, or bad data; says where.
    """
    for option, value, least in (("limit", limit, 1), ("seed", seed, 0), ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise TaskError(f"{option} must be a whole number, at least {least}, got {value!r}")
    from prune.evals import image_tasks

    if image_tasks.is_image_task(name):
        for option, value in dict(scorer=scorer, columns=columns, max_new_tokens=max_new_tokens).items():
            if value is not None:
                raise TaskError(f"{option} is for questions; {name} asks for classes, and has none")
        name, makers, classes, found = image_tasks.load(name, split, seed)
        limit = limit if limit is not None and limit < len(makers) else None
        return Task(name, _Items(makers[:limit]), image_tasks.same, found | dict(limit=limit), 0, classes)
    scorer = "exact" if scorer is None else scorer
    if scorer not in SCORERS:
        raise TaskError(f"there is no scorer {scorer!r}; there are {', '.join(SCORERS)}")
    prefix, colon, rest = name.partition(":")
    is_hf = prefix == "hf" and colon
    if columns is not None and not is_hf:
        raise TaskError(f"columns are for hf: tasks only; {name} has none")
    if name in LEVELS:
        makers, found = _scenes(name, split, seed, scorer)
        max_new_tokens = max_new_tokens or 3
    elif is_hf:
        name, makers, found = _dataset(rest, split, limit, scorer, columns)
    elif prefix == "folder" and colon:
        name, makers, found = _folder(rest, split, scorer)
    elif os.path.isdir(name) or (name.endswith(".jsonl") and os.path.isfile(name)):
        name, makers, found = _folder(name, split, scorer)
    else:
        raise TaskError(_unknown(name))
    if not makers:
        raise TaskError(f"{name} has no items; put at least one question in it")
    limit = limit if limit is not None and limit < len(makers) else None  # one spelling for "all"
    max_new_tokens = max_new_tokens or MAX_NEW_TOKENS
    options = found | dict(limit=limit, scorer=scorer, max_new_tokens=max_new_tokens)
    return Task(name, _Items(makers[:limit]), SCORERS[scorer], options, max_new_tokens)


class _Items(Sequence):
    """Items made when asked for, by one function each."""

    def __init__(self, makers: Sequence[Callable[[], Item]]):
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index):
        made = self.makers[index]
        return [make() for make in made] if isinstance(index, slice) else made()


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), list_tasks(), n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return (
        f"there is no task, folder or .jsonl file {name!r}; {guess}Built in are {', '.join(list_tasks())}; "
        "else give folder:PATH (JSON lines and images), hf:NAME (a dataset) or imagefolder:PATH (a folder per class)"
    )


def _scenes(name: str, split: str | None, seed: int, scorer: str) -> tuple[list[Callable[[], Item]], dict]:
    try:
        items = Scenes(name, split or "test", TEST_ITEMS, seed)
    except ValueError as error:
        raise TaskError(f"{name}: {error}") from None
    _check_scorer(scorer, items[0].answer, name)
    return [partial(items.__getitem__, i) for i in range(len(items))], dict(split=items.split, seed=seed)


def _check_scorer(scorer: str, answer: str | tuple[str, ...], where: str) -> None:
    wanted, holds = WANTS.get(scorer, ("", None))
    if holds and not holds([answer] if isinstance(answer, str) else answer):
        raise TaskError(f"{where}: the scorer {scorer!r} wants {wanted}, got {answer!r:.80}; mend it or take exact")


def _item(
    row: Mapping[str, Any], names: Mapping[str, str], where: str, scorer: str, load, files=()
) -> Callable[[], Item]:
    """What makes the item of a row, its texts checked; `names` are the keys of the row by what they hold."""

    def text(key: str, value: Any, several: str = "") -> str:
        if not isinstance(value, str):
            raise TaskError(
                f"{where}: {names[key]!r} must be text{several}, got {type(value).__name__} ({value!r:.40})"
            )
        if not value.strip():
            raise TaskError(f"{where}: {names[key]!r} is empty")
        return value

    answer = row[names["answer"]]
    if isinstance(answer, (list, tuple)):
        answer = tuple(text("answer", one) for one in answer)
        if not answer:
            raise TaskError(f"{where}: {names['answer']!r} is an empty list; give at least one answer")
    else:
        text("answer", answer, " or a list of texts")
    _check_scorer(scorer, answer, where)
    kind = row.get(names["kind"])
    kind = "" if kind in (None, "") else text("kind", kind)
    return partial(LazyItem, text("question", row[names["question"]]), answer, kind, load, files)


# --------------------------------------------------------------------------------------------------------- folders
def _folder(path: str, split: str | None, scorer: str) -> tuple[str, list[Callable[[], Item]], dict]:
    if not path:
        raise TaskError("folder: needs a path, such as folder:/data/mine")
    place = Path(os.path.abspath(os.path.expanduser(path)))
    if place.is_dir():
        files = {file.stem: file for file in sorted(place.glob("*.jsonl")) if not file.name.startswith(".")}
    elif place.is_file():
        files = {place.stem: place}
    else:
        raise TaskError(f"there is no folder or file {place}; check the path")
    if not files:
        raise TaskError(f"{place} has no .jsonl file; write one JSON object per line, with image, question and answer")
    if split is None and len(files) > 1:
        raise TaskError(f"{place} has several .jsonl files; choose one by split: {', '.join(files)}")
    split = next(iter(files)) if split is None else split
    if split not in files:
        raise TaskError(f"{place} has no split {split!r}; there are {', '.join(files)}")
    return f"folder:{place}", list(_read_lines(files[split], scorer)), dict(split=split)


def _read_lines(file: Path, scorer: str) -> Iterator[Callable[[], Item]]:
    """What makes one item per line that is not blank."""
    names = {key: key for key in _COLUMNS}
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot read {file}: {error.strerror}") from None
    sizes: dict[str, int] = {}  # of images known to exist: often many questions share one
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        where = f"{file}, line {number}"
        try:
            text = line.decode("utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            raise TaskError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: not JSON ({error}); write one object per line") from None
        if not text:
            continue
        if not isinstance(row, dict):
            raise TaskError(f"{where}: must be a JSON object in {{}}, got {type(row).__name__}")
        if ("image" in row) == ("images" in row):
            raise TaskError(f'{where}: give "image" or "images" (a list){", not both" if "image" in row else ""}')
        for key in ("question", "answer"):
            if key not in row:
                raise TaskError(f"{where}: {key!r} is missing")
        paths = [row["image"]] if "image" in row else row["images"]
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
            key, wanted = ("image", "a path") if "image" in row else ("images", "a list of at least one path")
            raise TaskError(f"{where}: {key!r} must be {wanted}, got {row[key]!r:.80}")
        paths = [os.path.join(file.parent, path) for path in paths]
        for path in paths:
            if path not in sizes and not os.path.isfile(path):
                raise TaskError(f"{where}: there is no image {path}; paths are relative to {file.parent}")
            sizes[path] = sizes.get(path) or os.path.getsize(path)
        files = tuple((os.path.relpath(path, file.parent), sizes[path]) for path in paths)
        yield _item(row, names, where, scorer, partial(open_all, paths, where), files)


# -------------------------------------------------------------------------------------------------------- datasets
def _dataset(
    name: str, split: str | None, limit: int | None, scorer: str, columns: Mapping[str, str] | None
) -> tuple[str, list[Callable[[], Item]], dict]:
    if unknown := set(columns or {}) - set(_COLUMNS):
        raise TaskError(f"columns: unknown {', '.join(map(repr, sorted(unknown)))}; known are {', '.join(_COLUMNS)}")
    path, config = name, None
    if ":" in name and not os.path.exists(name):
        path, _, config = name.rpartition(":")
    if os.path.exists(path):
        path = os.path.abspath(path)
    if not path or config == "":
        raise TaskError("hf: needs a dataset, such as hf:org/name or hf:org/name:config")
    try:
        import datasets
    except ImportError:
        raise TaskError('hf: tasks need the package datasets: pip install "prune-vlm[datasets]"') from None
    name, split = f"hf:{path}" + (f":{config}" if config else ""), split or "test"
    try:
        data = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # builders, the hub and file readers raise anything
        raise TaskError(_not_loaded(datasets, path, config, split, error)) from None
    names = {key: key for key in _COLUMNS} | dict(columns or {})
    for key in _COLUMNS:
        if names[key] not in data.column_names and (key != "kind" or "kind" in (columns or {})):
            there = ", ".join(data.column_names)
            raise TaskError(f"{name} has no column {names[key]!r}; it has {there}: give columns={{{key!r}: ...}}")
    # the texts alone first: a row read in whole would decode its pictures
    texts = data.select(range(min(len(data), limit + 1 if limit else len(data))))
    texts = texts.select_columns([one for one in data.column_names if one in [names[key] for key in _COLUMNS[1:]]])
    pictures, column = data.select_columns([names["image"]]), names["image"]
    makers = []
    for index, row in enumerate(texts):
        where = f"{name}, split {split}, row {index}"
        makers.append(_item(row, names, where, scorer, partial(_open_row, pictures, column, index, where)))
    if makers:
        _ = makers[0]().images  # a column that holds no pictures shows here, not after the model is loaded
    return name, makers, dict(split=split, columns=dict(columns) if columns else None)


def _not_loaded(datasets, path: str, config: str | None, split: str, error: Exception) -> str:
    """Why a dataset could not be loaded, in one line."""
    if isinstance(error, ValueError):  # what an unknown split raises, among much else
        try:
            splits = datasets.get_dataset_split_names(path, config)
        except Exception:
            splits = []
        if splits and re.split(r"[\[+]", split)[0] not in splits:
            return f"the dataset {path} has no split {split!r}; there are {', '.join(splits)}"
    lines = str(error.__cause__ or error).splitlines()
    reason = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    return f"cannot load the dataset {path}: {reason}; check its name, its config and the network"


def _open_row(pictures, column: str, index: int, where: str) -> list[Image.Image]:
    try:
        value = pictures[index][column]
    except Exception as error:  # decoders raise anything on a broken picture
        raise TaskError(f"{where}: cannot read the picture: {error}") from None
    if value is None or value == []:
        raise TaskError(f"{where}: {column!r} has no picture")
    return open_all(value if isinstance(value, list) else [value], f"{where}, {column!r}")


# -------------------------------------------------------------------------------------------------------- pictures
def open_all(sources: Sequence, where: str) -> list[Image.Image]:
    """Pictures, RGB, from paths, PIL images or {"bytes", "path"}.

    Raises:
        TaskError: one of them is gone or broken; names `where`.
    """
    try:
        return [_open(source) for source in sources]
    except Exception as error:  # decoders raise anything on a broken picture
        raise TaskError(f"{where}: {error}") from None


def _open(source: Any) -> Image.Image:
    """A path, a PIL image or {"bytes", "path"} -> RGB."""
    if isinstance(source, str):
        if not os.path.isfile(source):  # `open_image` would take its own china.jpg for a missing one
            raise TaskError(f"there is no image {source}")
        return open_image(source)
    if isinstance(source, dict) and source.keys() <= {"bytes", "path"}:
        if not source.get("bytes"):
            return _open(source.get("path"))
        source = Image.open(io.BytesIO(source["bytes"]))
    if isinstance(source, Image.Image):
        return on_white(source)
    raise TypeError(f"a picture must be a PIL image, a path or {{'bytes', 'path'}}, got {type(source).__name__}")
