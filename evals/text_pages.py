"""Pages with known text: pictures drawn with Pillow, and which pixels are ink. Trains and measures text classifiers.

Fonts come with matplotlib and photographs with scikit-learn, so pages are the same on every machine up to the version
of FreeType and of the JPEG coder. Page i depends on (split, seed, i) alone. Test pages share neither fonts nor halves
of the photographs with training.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

SIDE = 448  # pixels along one edge of a page; 28, 16 and 14 divide it
INK = 80  # opacity, of 255, from which a pixel is ink
SHARE = 0.005  # of a block's pixels that must be ink for it to be text: 4 of 28 x 28
KINDS = {"text": 0.55, "text on photograph": 0.1, "no text": 0.15, "photograph": 0.2}
"""Kinds of pages and how often they come."""

_LATIN = "abcdefghijklmnopqrstuvwxyz"
_MORE = ("абвгдежзийклмнопрстуфхцчшщъыьэюя", "αβγδεζηθικλμνξοπρστυφχψω", "àáâäçèéêëíîñóôöøúûüßæœ")
_SIGNS = ".,;:!?()-/&%$#@'\"+=*"
FONTS = {
    "train": (
        *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
        *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
        *("cmr10", "cmb10", "cmtt10"),
    ),
    "test": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmss10", "cmmi10"),
}


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        pixels: `[SIDE, SIDE, 3]` bytes, RGB.
        ink: `[SIDE, SIDE]` bool, where text was drawn.
        kind: one of `KINDS`.
    """

    pixels: np.ndarray
    ink: np.ndarray
    kind: str

    def labels(self, edge: int = 28) -> np.ndarray:
        """`[SIDE // edge, SIDE // edge]` bool: the blocks of `edge` x `edge` pixels that show text."""
        rows = SIDE // edge
        blocks = self.ink[: rows * edge, : rows * edge].reshape(rows, edge, rows, edge)
        return blocks.sum((1, 3)) >= SHARE * edge * edge


class Pages(Sequence):
    """The pages of one split, drawn when asked for.

    Args:
        split: "train" or "test".
        size: number of pages.
        seed: another seed gives other pages.
        fonts: files of fonts to use beside those of `FONTS`.
    """

    def __init__(self, split: str = "test", size: int = 400, seed: int = 0, fonts: Sequence[str] = ()):
        if split not in FONTS:
            raise ValueError(f"no split {split!r}; there are {', '.join(FONTS)}")
        self.split, self.size, self.seed, self.fonts = split, size, seed, tuple(fonts)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Page:
        if not -self.size <= index < self.size:
            raise IndexError(f"page {index} of {self.size}")
        source = np.random.SeedSequence([self.split == "test", self.seed, index % self.size])
        return draw(np.random.default_rng(source), self.split, self.fonts)


def system_fonts() -> list[str]:
    """Files of fonts of this machine that draw Latin letters, sorted; they differ from machine to machine."""
    from matplotlib import font_manager
    from PIL import ImageFont

    def draws(file: str) -> bool:
        try:
            font = ImageFont.truetype(file, 20)
            return len({bytes(font.getmask(letter)) for letter in "aegkmx"}) == 6  # else boxes for missing glyphs
        except OSError:
            return False

    return [file for file in sorted(font_manager.findSystemFonts()) if draws(file)]


# ------------------------------------------------------------------------------------------------------- drawing
def draw(rng: np.random.Generator, split: str, fonts: Sequence[str] = ()) -> Page:
    """A random page."""
    from PIL import Image

    kind = list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
    if "photograph" in kind:
        image = _photograph(rng, split, SIDE, SIDE)
    else:
        image = Image.fromarray(_paper(rng))
        _figures(rng, image, split)
    ink = Image.new("L", (SIDE, SIDE))
    if kind.startswith("text"):
        for _ in range(rng.integers(1, 6)):
            _paragraph(rng, image, ink, split, fonts)
    if rng.random() < 0.2:  # a crooked scan
        angle, fill = rng.uniform(-4, 4), tuple(int(value) for value in np.asarray(image)[0, 0])
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
        ink = ink.rotate(angle, Image.Resampling.BILINEAR)
    return Page(_worn(rng, image), np.asarray(ink) > INK, kind)


def _paper(rng) -> np.ndarray:
    """A background `[SIDE, SIDE, 3]` bytes: plain, graded or slightly uneven; mostly light."""
    light = rng.random() < 0.75
    base = rng.uniform(200, 256, 3) if light else rng.uniform(0, 256, 3)
    if light and rng.random() < 0.5:
        base[:] = 255
    paper = np.broadcast_to(base, (SIDE, SIDE, 3)).astype(np.float32)
    across, down = np.meshgrid(np.linspace(-1, 1, SIDE, dtype=np.float32), np.linspace(-1, 1, SIDE, dtype=np.float32))
    if rng.random() < 0.35:  # shade or a gradient
        slope = rng.uniform(-60, 60, (2, 3)).astype(np.float32) * rng.choice([0.3, 1])
        paper = paper + across[..., None] * slope[0] + down[..., None] * slope[1]
    if rng.random() < 0.2:  # blotches
        spots = rng.normal(0, rng.uniform(2, 12), (8, 8)).astype(np.float32)
        paper = paper + np.kron(spots, np.ones((SIDE // 8, SIDE // 8), np.float32))[..., None]
    return paper.clip(0, 255).astype(np.uint8)


def _figures(rng, image, split: str) -> None:
    """What pages hold beside text: rules, frames, filled boxes, bars, ellipses, photographs."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)

    def colour():
        return tuple(int(value) for value in rng.integers(0, 256, 3))

    if rng.random() < 0.25:
        width, height = (int(n) for n in rng.integers(80, 300, 2))
        corner = tuple(int(n) for n in rng.integers(0, SIDE - 80, 2))
        image.paste(_photograph(rng, split, width, height), corner)
    for _ in range(rng.integers(0, 4)):
        x, y, w, h = (int(n) for n in (*rng.integers(0, SIDE, 2), *rng.integers(10, 250, 2)))
        width = int(rng.integers(1, 6))
        match rng.integers(6):
            case 0:
                pen.rectangle((x, y, x + w, y + h), outline=colour(), width=width)
            case 1:
                pen.rectangle((x, y, x + w, y + h), fill=colour())
            case 2:
                pen.ellipse((x, y, x + w, y + h), outline=colour(), fill=colour() if rng.random() < 0.5 else None)
            case 3:
                pen.line((x, y, x + w, y + int(rng.integers(-100, 100))), fill=colour(), width=width)
            case 4:  # a table
                step, ink = int(rng.integers(14, 60)), colour()
                for n in range(0, h, step):
                    pen.line((x, y + n, x + w, y + n), fill=ink, width=min(width, 3))
                for n in range(0, w, 2 * step):
                    pen.line((x + n, y, x + n, y + h), fill=ink, width=min(width, 3))
            case 5:  # bars of a chart
                ink = colour()
                for n in range(0, w, 24):
                    pen.rectangle((x + n, y + int(rng.integers(0, h)), x + n + 15, y + h), fill=ink)


def _paragraph(rng, image, ink, split: str, fonts: Sequence[str]) -> None:
    """Lines of random words at a random place, in a colour that stands out from what is there."""
    from PIL import Image, ImageDraw

    choice = (*FONTS[split], *fonts)[rng.integers(len(FONTS[split]) + len(fonts))]
    size = int(np.exp(rng.uniform(np.log(8), np.log(56))))
    font = _font(choice, size)
    left, top = (int(n) for n in rng.integers(0, SIDE - 60, 2))
    right = min(SIDE - 4, left + int(rng.integers(80, SIDE)))
    bottom = min(SIDE - 4, top + int(rng.integers(size, 300)))
    letters = _LATIN
    if choice.startswith("DejaVu") and rng.random() < 0.2:
        letters = _MORE[rng.integers(len(_MORE))]
    line = round(size * rng.uniform(1.0, 1.8))
    mask = Image.new("L", image.size)
    pen = ImageDraw.Draw(mask)
    style, y = rng.random(), top
    while y + size < bottom + line:
        x = left
        while x < right:
            word = _word(rng, letters, style, plain=choice.startswith("cm"))
            width = font.getlength(word)
            if x + width > SIDE:
                break
            pen.text((x, y), word, fill=255, font=font)
            x += width + size * rng.uniform(0.25, 0.45) + (rng.random() < 0.05) * 4 * size
        y += line
    if (box := mask.getbbox()) is None:
        return
    under = np.asarray(image.crop(box).convert("L"), dtype=np.float32)
    mean = float(under.mean())
    for _ in range(20):
        colour = rng.integers(0, 256, 3) if rng.random() < 0.5 else np.full(3, rng.integers(0, 70))
        if abs(float(colour @ (0.299, 0.587, 0.114)) - mean) > 60:
            break
    else:
        colour = np.full(3, 255 if mean < 128 else 0)
    image.paste(tuple(int(value) for value in colour), mask=mask)
    ink.paste(255, mask=mask)


def _word(rng, letters: str, style: float, plain: bool) -> str:
    """A random word, number or sign. `plain` leaves out signs: old TeX fonts have others in their places."""
    count = int(rng.integers(1, 11))
    if style < 0.15 or rng.random() < 0.12:
        return "".join(str(n) for n in rng.integers(0, 10, count))
    word = "".join(letters[n] for n in rng.integers(0, len(letters), count))
    case = rng.random()
    word = word.upper() if style > 0.85 or case < 0.05 else word.capitalize() if case < 0.25 else word
    return word if plain or rng.random() > 0.2 else word + _SIGNS[rng.integers(len(_SIGNS))]


def _photograph(rng, split: str, width: int, height: int):
    """A piece of a photograph, at a random scale, maybe mirrored; a PIL image."""
    from PIL import Image

    photo = _photographs(split)[rng.integers(2)]
    scale = rng.uniform(0.35, 1.0)
    h, w = (max(8, int(scale * min(n, 320))) for n in (height, width))
    top, left = (int(rng.integers(0, max(1, n - m + 1))) for n, m in zip(photo.shape[:2], (h, w)))
    piece = Image.fromarray(photo[top : top + h, left : left + w])
    piece = piece.resize((width, height), Image.Resampling.BILINEAR)
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def _worn(rng, image) -> np.ndarray:
    """The page after a camera or a scanner: coarse, dimmed, blurred, noisy, JPEG. Bytes `[SIDE, SIDE, 3]`."""
    from PIL import Image, ImageFilter

    if rng.random() < 0.2:  # enlarged from a smaller picture
        small = int(SIDE * rng.uniform(0.5, 0.9))
        image = image.resize((small, small), Image.Resampling.BILINEAR)
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if rng.random() < 0.1:
        factor = rng.uniform(0.95, 1.05)
        image = image.point([min(255, round(factor * n)) for n in range(256)] * 3)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.BoxBlur(1))  # 3 x 3
    if rng.random() < 0.2:
        noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * np.sqrt(rng.uniform(10, 30))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.1:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(30, 101)))
        image = Image.open(file)
    return np.asarray(image)


@cache
def _font(name: str, size: int):
    import matplotlib
    from PIL import ImageFont

    file = name if os.path.sep in name else os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")
    return ImageFont.truetype(file, size)


@cache
def _photographs(split: str) -> list[np.ndarray]:
    """The left half of both photographs for training, the right half for tests; bytes."""
    from sklearn.datasets import load_sample_images

    cut = 320  # of 640 columns
    return [photo[:, cut:] if split == "test" else photo[:, :cut] for photo in load_sample_images().images]
