"""Scenes: a question-answering benchmark on pictures, made from data that ships with scikit-learn. No download.

Handwritten digits (`load_digits`) are coloured and pasted on crops of two photographs (`load_sample_images`); questions
ask for a colour, a digit, a count, a presence, the leftmost and the topmost digit. Answers come in turn, so that no
constant answer does better than `majority`. Item i depends on (split, seed, i) alone: the test items are the same on
every machine, up to the last bit of the machine's JPEG decoder.

Test items share nothing with training: other handwritten digits (every fifth one), another part of the photographs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

SIDE = 96  # pixels along one edge of an image
PATCH = 8  # pixels along one edge of a patch of the built-in model; objects are aligned to this grid
GRID = SIDE // PATCH
TEST_ITEMS = 1000

COLOURS = {
    "red": (235, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (250, 220, 30),
    "purple": (200, 60, 230),
    "white": (250, 250, 250),
}
SHAPES = {  # what is no digit; strokes in rows of eight bits
    "square": (0x00, 0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0x00),
    "cross": (0x81, 0xC3, 0x66, 0x3C, 0x3C, 0x66, 0xC3, 0x81),
    "triangle": (0x00, 0x18, 0x18, 0x3C, 0x3C, 0x7E, 0x7E, 0xFF),
    "stripes": (0xFF, 0xFF, 0x00, 0x00, 0xFF, 0xFF, 0x00, 0x00),
}
_DIGITS = tuple("0123456789")
_COLOURS = tuple(COLOURS)


@dataclass(frozen=True)
class Level:
    """How hard scenes are.

    Attributes:
        digits: smallest and largest number of digits in a scene.
        distractors: largest number of coloured shapes that are no digit.
        size: edge of an object, in patches.
        margin: by how many patches the leftmost (topmost) digit must lead for the question to be asked.
        repeats: whether several digits may have the same colour.
        answers: question kind -> the answers that come in turn.
    """

    digits: tuple[int, int]
    distractors: int
    size: int
    margin: int
    repeats: bool
    answers: dict[str, tuple[str, ...]]


_KINDS = {
    "colour-of": _COLOURS,
    "digit-of": _DIGITS,
    "presence": ("yes", "no"),
    "leftmost": _DIGITS,
    "topmost": _DIGITS,
}
LEVELS = {
    "scenes": Level((2, 5), 0, 2, 2, False, {**_KINDS, "count": tuple("2345")}),
    "scenes-hard": Level(
        (4, 8),
        3,
        1,
        1,
        True,
        {**_KINDS, "count": tuple("45678"), "leftmost-colour": _COLOURS, "topmost-colour": _COLOURS},
    ),
}


@dataclass(frozen=True)
class Thing:
    """An object of a scene.

    Attributes:
        name: "0" to "9" for a digit, else one of `SHAPES`.
        colour: one of `COLOURS`.
        row, column: of its top left patch.
        size: edge in patches.
    """

    name: str
    colour: str
    row: int
    column: int
    size: int

    @property
    def is_digit(self) -> bool:
        return self.name.isdigit()

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels."""
        left, top, edge = self.column * PATCH, self.row * PATCH, self.size * PATCH
        return left, top, left + edge, top + edge


@dataclass(frozen=True)
class Item:
    """One question about one picture.

    Attributes:
        images: one PIL image, RGB, `SIDE` x `SIDE` pixels.
        question: English text without a prompt around it.
        answer: one word.
        kind: the kind of question, a key of `Level.answers`.
        things: the objects in the picture.
    """

    images: list
    question: str
    answer: str
    kind: str
    things: tuple[Thing, ...]


class Scenes(Sequence):
    """The items of one split, made when asked for.

    Args:
        name: "scenes" or "scenes-hard".
        split: "test" or "train"; they share neither handwritten digits nor parts of the photographs.
        size: number of items.
        seed: another seed gives other scenes.

    Raises:
        ValueError: no such name or split, or a negative size or seed.
    """

    def __init__(self, name: str = "scenes", split: str = "test", size: int = TEST_ITEMS, seed: int = 0):
        if name not in LEVELS:
            raise ValueError(f"no scenes {name!r}; there are {', '.join(LEVELS)}")
        if split not in ("test", "train"):
            raise ValueError(f"no split {split!r}; there are test, train")
        if size < 0 or seed < 0:
            raise ValueError(f"size and seed must not be negative, got {size} and {seed}")
        self.name, self.split, self.size, self.seed = name, split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"item {index} of {self.size}")
        return self._item(index % self.size)

    def _item(self, index: int) -> Item:
        from PIL import Image

        answers = LEVELS[self.name].answers
        turn, kind = divmod(index, len(answers))
        kind = list(answers)[kind]
        answer = answers[kind][turn % len(answers[kind])]
        rng = generator(self.name, self.split, self.seed, index)
        while True:  # a scene is drawn again until the answer whose turn it is holds for it
            things = draw(rng, self.name)
            asked = questions(things, self.name)[kind].get(answer)
            if asked:
                question = asked[rng.integers(len(asked))]
                image = Image.fromarray(render(rng, things, self.split))
                return Item([image], question, answer, kind, things)


def majority(items) -> dict[str, float]:
    """What always giving the most frequent answer would score: question kind -> share of its items."""
    answers: dict[str, Counter] = {}
    for item in items:
        answers.setdefault(item.kind, Counter())[item.answer] += 1
    return {kind: max(count.values()) / sum(count.values()) for kind, count in answers.items()}


def patch_labels(things) -> np.ndarray:
    """[GRID, GRID] integers: the index of the object a patch shows, -1 for the background."""
    labels = np.full((GRID, GRID), -1)
    for index, thing in enumerate(things):
        labels[thing.row : thing.row + thing.size, thing.column : thing.column + thing.size] = index
    return labels


def generator(name: str, split: str, seed: int, index: int) -> np.random.Generator:
    """The random source of one item; no other item has any part in it."""
    return np.random.default_rng(np.random.SeedSequence([list(LEVELS).index(name), split == "test", seed, index]))


def draw(rng: np.random.Generator, name: str) -> tuple[Thing, ...]:
    """A random scene: digits all different, objects apart by at least one patch."""
    level = LEVELS[name]
    low, high = level.digits
    n_digits = int(rng.integers(low, high + 1))
    names = [_DIGITS[i] for i in rng.permutation(10)[:n_digits]]
    names += [list(SHAPES)[i] for i in rng.integers(len(SHAPES), size=int(rng.integers(level.distractors + 1)))]
    picks = rng.integers(len(_COLOURS), size=len(names)) if level.repeats else rng.permutation(len(_COLOURS))
    places: list[tuple[int, int]] = []
    while len(places) < len(names):
        row, column = (int(i) for i in rng.integers(GRID - level.size + 1, size=2))
        if all(max(abs(row - r), abs(column - c)) > level.size for r, c in places):
            places.append((row, column))
    return tuple(Thing(n, _COLOURS[i], r, c, level.size) for n, i, (r, c) in zip(names, picks, places))


def questions(things, name: str) -> dict[str, dict[str, list[str]]]:
    """Every question that has one right answer in a scene: kind -> answer -> questions."""
    level = LEVELS[name]
    digits = [thing for thing in things if thing.is_digit]
    colours = Counter(thing.colour for thing in digits)
    found: dict[str, dict[str, list[str]]] = {kind: {} for kind in level.answers}

    def add(kind: str, answer: str, question: str) -> None:
        found[kind].setdefault(answer, []).append(question)

    add("count", str(len(digits)), "How many digits are there?")
    for thing in digits:
        add("colour-of", thing.colour, f"What colour is the {thing.name}?")
        if colours[thing.colour] == 1:
            add("digit-of", thing.name, f"Which digit is {thing.colour}?")
    if level.repeats:  # of the right digit in the wrong colour
        for thing in digits:
            for colour in _COLOURS:
                add("presence", "yes" if colour == thing.colour else "no", f"Is there a {colour} {thing.name}?")
    else:
        present = {thing.name for thing in digits}
        for digit in _DIGITS:
            add("presence", "yes" if digit in present else "no", f"Is there {'an' if digit == '8' else 'a'} {digit}?")
    for kind, axis in (("leftmost", "column"), ("topmost", "row")):
        first, second = sorted(digits, key=lambda thing: getattr(thing, axis))[:2]
        if getattr(second, axis) - getattr(first, axis) >= level.margin:
            add(kind, first.name, f"Which digit is {kind}?")
            if f"{kind}-colour" in found:
                add(f"{kind}-colour", first.colour, f"What colour is the {kind} digit?")
    return found


def render(rng: np.random.Generator, things, split: str) -> np.ndarray:
    """The picture of a scene, [SIDE, SIDE, 3] bytes. Integer arithmetic only: no rounding that differs by machine."""
    photo = _photographs(split)[rng.integers(2)]
    top, left = (int(rng.integers(edge - SIDE + 1)) for edge in photo.shape[:2])
    image = photo[top : top + SIDE, left : left + SIDE].astype(np.int32)
    for thing in things:
        drawings = _strokes(split, thing.size * PATCH)[thing.name]
        ink = drawings[rng.integers(len(drawings))][..., None]
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-20, 21, size=3), 0, 255)
        x0, y0, x1, y1 = thing.box
        plate = image[y0:y1, x0:x1] // 3  # darkened, so that white is seen on the sky
        image[y0:y1, x0:x1] = (plate * (255 - ink) + colour * ink) // 255
    return image.astype(np.uint8)


def digit_indices(split: str) -> np.ndarray:
    """Which of the digits of `load_digits` a split draws from: every fifth one is for tests."""
    from sklearn.datasets import load_digits

    every = np.arange(len(load_digits().target))
    return every[(every % 5 == 0) == (split == "test")]


@cache
def _strokes(split: str, edge: int) -> dict[str, np.ndarray]:
    """Name of an object -> its drawings, [n, edge, edge] opacities 0 to 255."""
    from PIL import Image
    from sklearn.datasets import load_digits

    def enlarge(drawing):  # [8, 8] bytes; Pillow resizes bytes in integer arithmetic
        resized = Image.fromarray(drawing.astype(np.uint8)).resize((edge, edge), Image.Resampling.BICUBIC)
        return np.asarray(resized, dtype=np.int32)

    data = load_digits()
    chosen = digit_indices(split)
    drawings = {
        name: np.stack([enlarge(data.images[i] * 255 // 16) for i in chosen[data.target[chosen] == int(name)]])
        for name in _DIGITS
    }
    for name, rows in SHAPES.items():
        bits = np.unpackbits(np.array(rows, dtype=np.uint8)[:, None], axis=1)
        drawings[name] = enlarge(bits * 255)[None]
    return drawings


@cache
def _photographs(split: str) -> list[np.ndarray]:
    """The left three quarters of both photographs for training, the right quarter for tests; bytes."""
    from sklearn.datasets import load_sample_images

    cut = 480  # of 640 columns
    return [photo[:, cut:] if split == "test" else photo[:, :cut] for photo in load_sample_images().images]
