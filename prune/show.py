"""Pictures: the photograph with the dropped patches dimmed.

>>> overlay(photo, handle.last.images[0], title="dart, ratio=0.9", processor=processor).save("out.png")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from prune.errors import InputError
from prune.report import ImageReport

MARGIN, GAP = 24, 20
PAPER, INK, FAINT, EDGE = (255, 255, 255), (24, 24, 27), (113, 113, 122), (255, 255, 255)
PANEL_HEIGHT, TOTAL_WIDTH, PER_LINE = 672, 1640, 4
DIM_COLOUR, DIM_LIGHT, DIM_FLOOR = 0.15, 0.27, 26  # share of colour and brightness a dropped patch keeps; its black


@dataclass(frozen=True)
class Panel:
    """One grid and the picture it lies on.

    Args:
        picture: what the model saw there: a crop of the photograph, in the photograph's resolution.
        shape: (width, height) in proportion, as the model saw it.
        alive: `[rows, columns]` bool, True where the token survived.
        name: what the picture is, for the caption; "" for the only panel.
    """

    picture: Image.Image
    shape: tuple[float, float]
    alive: Tensor
    name: str = ""

    def paint(self, width: int, height: int) -> Image.Image:
        """The picture at this size: kept patches as they are, the others dimmed, a thin line between the two."""
        picture = self.picture.resize((width, height), Image.Resampling.LANCZOS)
        grid = Image.fromarray(self.alive.to(torch.uint8).mul(255).numpy())
        kept = grid.resize((width, height), Image.Resampling.NEAREST)
        grey = picture.convert("L").convert("RGB")
        dimmed = Image.blend(grey, picture, DIM_COLOUR).point(lambda value: value * DIM_LIGHT + DIM_FLOOR)
        patch = min(width / self.alive.shape[1], height / self.alive.shape[0])
        if patch >= 6:  # the line lies on the dropped side: kept patches stay whole
            thickness = 1 if patch < 20 else 2
            line = ImageChops.subtract(kept.filter(ImageFilter.MaxFilter(2 * thickness + 1)), kept)
            dimmed.paste(EDGE, mask=line.point(lambda value: value * 0.7))
        dimmed.paste(picture, mask=kept)
        return dimmed

    @property
    def caption(self) -> str:
        rows, columns = self.alive.shape
        return f"{self.name}: {int(self.alive.sum())} of {self.alive.numel()}  ·  {columns} x {rows} grid"


def overlay(
    image: Image.Image | Sequence[Image.Image], report: ImageReport, *, title: str = "", processor=None
) -> Image.Image:
    """Draw which visual tokens of one image survived: dropped patches dark and grey, kept ones untouched.

    What is drawn is what the model saw: LLaVA-1.5 sees the centre of the photograph only; an anyres image is one
    panel with the whole photograph squeezed to the base resolution and one with the high-resolution grid; a video is
    one panel per grid frame.

    Args:
        image: the picture the report is about, upright, of any mode; for a video its frames.
        report: `handle.last.images[i]`.
        title: stands before the counts, for example "dart, ratio=0.9".
        processor: the model's processor or image processor; tells whether pictures are cropped. Without it a grid that
            has not the picture's proportions is taken for a centre crop, which is right for LLaVA-1.5 and wrong for
            models that squeeze.

    Returns:
        An RGB picture, about 1700 pixels wide at most; a narrow one is widened to fit the title.

    Raises:
        InputError: not a picture, no frames, or tokens without a known grid.
    """
    shown = panels(image, report, processor)
    count = f"{len(report.kept)} of {report.tokens} visual tokens kept"
    if len(shown) == 1:
        rows, columns = shown[0].alive.shape
        count += f"  ·  {columns} x {rows} grid"
    separators = report.places[:, 0] < 0
    if separators.any():
        count += f"  ·  {int(separators[report.kept].sum())} of {int(separators.sum())} separators"
    return _page(shown, f"{title}  ·  {count}" if title else count)


def panels(image: Image.Image | Sequence[Image.Image], report: ImageReport, processor=None) -> list[Panel]:
    """The grids of one image, each with the part of the photograph it covers. Arguments and errors as in `overlay`."""
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        raise InputError("overlay wants a PIL image, or the list of a video's frames")
    frames = [frame.convert("RGB") for frame in frames]
    size, tiles = frames[0].size, report.layout.tiles
    survivors = _survivors(report)
    if len(tiles) == 1:
        (steps, rows, columns), (alive,) = tiles[0], survivors
        if rows == 1 and columns > 4 * math.ceil(size[0] / size[1]):
            raise InputError("the visual tokens of this model have no known grid, so there is no picture to draw")
        box = _seen(size, rows, columns, processor)
        pictures = [_crop(frames[step * len(frames) // steps], box) for step in range(steps)]
        shape = (columns, rows) if report.layout.modality == "image" else (box[2] - box[0], box[3] - box[1])
        names = [f"frame {step + 1}" for step in range(steps)] if steps > 1 else [""]
        return [Panel(picture, shape, one, name) for picture, one, name in zip(pictures, alive, names)]
    photo = frames[0]
    if len(tiles) == 2 and tiles[0][1] == tiles[0][2]:
        (_, side, _), (_, rows, columns) = tiles
        detail = _crop(photo, _unpadded(size, rows, columns, side))
        return [
            Panel(photo, (1, 1), survivors[0][0], "whole image"),
            Panel(detail, (columns, rows), survivors[1][0], "high resolution"),
        ]
    if len(set(tiles)) > 1:
        raise InputError(f"no way is known to lay out tiles of the grids {tiles}")
    mosaic = _mosaic(size, survivors[:-1])
    return [
        Panel(photo, tiles[-1][:0:-1], survivors[-1][0], "whole image"),
        Panel(photo, (mosaic.shape[1], mosaic.shape[0]), mosaic, "tiles"),
    ]


def _survivors(report: ImageReport) -> list[Tensor]:
    """Per tile `[frames, rows, columns]` bool."""
    alive = [torch.zeros(tile, dtype=torch.bool) for tile in report.layout.tiles]
    kept = report.places.cpu()[report.kept.cpu()]
    for number, grid in enumerate(alive):
        grid[tuple(kept[kept[:, 0] == number][:, 1:].T)] = True
    return alive


def _seen(size: tuple[int, int], rows: int, columns: int, processor) -> tuple[float, float, float, float]:
    """The box of a photograph that a single grid covers; it may reach beyond the photograph (padding)."""
    width, height = size
    settings = getattr(processor, "image_processor", processor)
    if settings is None:
        matches = abs(columns - rows * width / height) <= 1 or abs(rows - columns * height / width) <= 1
        return (0, 0, width, height) if matches else _centred(size, min(size), min(size))
    if getattr(settings, "image_grid_pinpoints", None):  # LLaVA-OneVision among several images: padded to a square
        return _centred(size, max(size), max(size))
    if not getattr(settings, "do_center_crop", False):
        return 0, 0, width, height
    resize = settings.size if getattr(settings, "do_resize", True) else {}
    if edge := resize.get("shortest_edge"):
        scale = min(size) / edge, min(size) / edge
    elif resize.get("height"):
        scale = width / resize["width"], height / resize["height"]
    else:
        scale = 1, 1
    return _centred(size, settings.crop_size["width"] * scale[0], settings.crop_size["height"] * scale[1])


def _unpadded(size: tuple[int, int], rows: int, columns: int, side: int) -> tuple[float, float, float, float]:
    """The box of an anyres high-resolution grid.

    The photograph fills a canvas of whole tiles, `side` tokens wide each, in one direction and is centred in the
    other, where rows or columns of mere padding were cut away: up to one token of padding, or of photograph cut off,
    is left. The direction it fills is the one that still has whole tiles.
    """
    width, height = size
    across, down = width / columns, height / rows
    if columns % side == 0 and rows % side == 0:
        token = max(across, down)
    elif columns % side == 0:
        token = across
    elif rows % side == 0:
        token = down
    else:  # LLaVA-OneVision has shrunk the grid
        return 0, 0, width, height
    return _centred(size, columns * token, rows * token)


def _mosaic(size: tuple[int, int], tiles: Sequence[Tensor]) -> Tensor:
    """`[rows, columns]` bool of all tiles in their places: the arrangement whose proportions are the photograph's."""
    n = len(tiles)
    wanted = size[0] / size[1]
    across = min((c for c in range(1, n + 1) if n % c == 0), key=lambda c: abs(wanted - c / (n // c)))
    lines = [torch.cat([tile[0] for tile in tiles[first : first + across]], 1) for first in range(0, n, across)]
    return torch.cat(lines, 0)


def _centred(size: tuple[int, int], width: float, height: float) -> tuple[float, float, float, float]:
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _crop(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    left, top = round(box[0]), round(box[1])
    width, height = max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))
    return picture.crop((left, top, left + width, top + height))  # black beyond the edge


def _page(shown: list[Panel], title: str) -> Image.Image:
    """The panels, line by line and equally high, under a title."""
    lines = [shown[first : first + PER_LINE] for first in range(0, len(shown), PER_LINE)]
    aspects = [[panel.shape[0] / panel.shape[1] for panel in line] for line in lines]
    room = TOTAL_WIDTH - GAP * (len(lines[0]) - 1)
    height = max(1, min(PANEL_HEIGHT, round(room / max(map(sum, aspects)))))
    widths = [[max(1, round(height * aspect)) for aspect in line] for line in aspects]
    text_height, caption_height = 56, 32 if len(shown) > 1 else 0
    inner = max(sum(line) + GAP * (len(line) - 1) for line in widths)
    font = _font(title, 24, max(inner, 480))
    inner = max(inner, math.ceil(font.getlength(title)))
    line_height = height + caption_height
    page = Image.new(
        "RGB",
        (inner + 2 * MARGIN, text_height + len(lines) * (line_height + GAP) - GAP + MARGIN),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, text_height / 2 + 2), title, INK, font, anchor="lm")
    for number, (line, line_widths) in enumerate(zip(lines, widths)):
        left, top = MARGIN, text_height + number * (line_height + GAP)
        for panel, width in zip(line, line_widths):
            page.paste(panel.paint(width, height), (left, top))
            if caption_height:
                draw.text((left, top + height + 10), panel.caption, FAINT, _font(panel.caption, 17, width))
            left += width + GAP
    return page


def _font(text: str, largest: int, width: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest size, down to 10, at which the text fits."""
    fonts = (ImageFont.load_default(size) for size in range(largest, 10, -1))
    return next((font for font in fonts if font.getlength(text) <= width), ImageFont.load_default(10))
