"""Tasks for vision transformers: pictures, their classes, and pictures to fit probes on.

    load_task("digits")                       built in, no download
    load_task("imagefolder:/data/pets")       a folder of class sub-folders with images in them

A folder's images are sorted by name within their class; every other one, the first included, is a test picture, the
others are there to fit probes on (`split="all"`: all of them are test pictures, which only models with a matching
classifier or with texts can be measured on). Test pictures go round the classes, so that a prefix is balanced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from prune.evals.digits import Digits
from prune.evals.tasks import Classes, LazyItem, TaskError, open_all

DIGITS = "digits"
FOLDER = "imagefolder"
FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def is_image_task(name: str) -> bool:
    """Whether a task's name is one of a task of classes."""
    return name == DIGITS or name.partition(":")[0] == FOLDER


def load(name: str, split: str | None, seed: int) -> tuple[str, list[Callable], Classes, dict]:
    """(name, what makes each item, classes, options) of a task of classes; see `prune.evals.tasks.load_task`."""
    return _digits(split, seed) if name == DIGITS else _image_folder(name.partition(":")[2], split)


def same(said: str, item) -> float:
    """The scorer of all tasks of classes: 1 for the right class."""
    return float(said == item.answer)


def _digits(split: str | None, seed: int) -> tuple[str, list[Callable], Classes, dict]:
    """Probes see the other split."""
    split = split or "test"
    try:
        pictures, others = Digits(split, seed), Digits("test" if split == "train" else "train", seed)
    except ValueError as error:
        raise TaskError(f"{DIGITS}: {error}") from None
    makers = [partial(_digit, pictures, index) for index in range(len(pictures))]
    train = [_digit(others, index) for index in range(len(others))]
    classes = Classes(tuple("0123456789"), train, prompt='a photo of the digit "{}"')
    return DIGITS, makers, classes, dict(split=split, seed=seed)


def _digit(pictures: Digits, index: int):
    return LazyItem("", str(pictures.label(index)), "", lambda: [Image.fromarray(pictures[index][0])])


def _image_folder(path: str, split: str | None) -> tuple[str, list[Callable], Classes, dict]:
    if not path:
        raise TaskError(f"{FOLDER}: needs a path, such as {FOLDER}:/data/pets")
    place = Path(os.path.abspath(os.path.expanduser(path)))
    if not place.is_dir():
        raise TaskError(f"there is no folder {place}; check the path")
    split = split or "test"
    if split not in ("test", "train", "all"):
        raise TaskError(f"{place} has no split {split!r}; there are test, train, all")
    found = {folder.name: _pictures(folder) for folder in sorted(place.iterdir()) if _is_class(folder)}
    if len(found) < 2:
        raise TaskError(f"{place} has {len(found)} sub-folders; give each class of pictures one, at least two of them")
    for name, files in found.items():
        if len(files) < (1 if split == "all" else 2):
            wanted = "" if split == "all" else ', one to test and one to fit probes on (split "all" needs one)'
            raise TaskError(f"{place / name} has {len(files)} images ({', '.join(FORMATS)}){wanted}; add some")
    if split == "all":
        test, train = found, {}
    else:
        test, train = ({name: files[start::2] for name, files in found.items()} for start in (0, 1))
    if split == "train":
        test, train = train, test
    makers = [partial(_picture, place, file) for file in _in_turn(test)]
    classes = Classes(tuple(found), [_picture(place, file) for file in _in_turn(train)])
    return f"{FOLDER}:{place}", makers, classes, dict(split=split)


def _is_class(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in FORMATS and file.is_file())


def _in_turn(classes: dict[str, list[Path]]) -> list[Path]:
    """One file of every class, then the next of every class that has one."""
    return [file for turn in zip_longest(*classes.values()) for file in turn if file is not None]


def _picture(place: Path, file: Path):
    name = str(file.relative_to(place))
    label = file.relative_to(place).parts[0]
    return LazyItem("", label, "", partial(open_all, [str(file)], str(place)), ((name, file.stat().st_size),))
