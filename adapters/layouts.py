"""Grid coordinates of the visual tokens, family by family.

Every function takes a `Request` and returns one `Layout` per image (or video), in the order their tokens appear in the
batch, row by row. All of it is host-side integer work on shapes; what costs a device synchronisation says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from prune.errors import InputError
from prune.report import Layout


@dataclass
class Request:
    """What one forward call reveals about its images (or its videos).

    Args:
        core: the model's inner module.
        modality: "image" or "video".
        mask: `[B, L]` bool, the placeholder columns of this modality.
        features: the encoder's per-image features, if they are known before the decoder runs (a list of `[n, D]` or one
            `[images, n, D]` tensor).
        inputs: the keyword arguments of the call (pixel values and the like).
        grid: `[images, 3]` (frames, rows, columns) in patches, for models of native resolution.
        sizes: `[images, 2]` (height, width) in pixels.
    """

    core: torch.nn.Module
    modality: str
    mask: Tensor
    features: list[Tensor] | Tensor | None
    inputs: dict
    grid: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def lengths(self) -> list[int] | None:
        """Visual columns per image, if the features tell."""
        return None if self.features is None else [math.prod(feature.shape[:-1]) for feature in self.features]

    @property
    def pixels(self) -> Tensor | None:
        name = {"image": "pixel_values", "video": "pixel_values_videos"}[self.modality]
        return self.inputs.get(name)

    def runs(self) -> list[int]:
        """Lengths of the contiguous runs of placeholders, row by row (synchronises)."""
        rows = self.mask.cpu().tolist()
        return [len(list(run)) for row in rows for is_visual, run in groupby(row) if is_visual]

    def equal_lengths(self) -> list[int]:
        """Lengths from the features, or else the placeholders shared out evenly over the images (synchronises)."""
        if (lengths := self.lengths) is not None:
            return lengths
        count = len(self.pixels)
        return [int(self.mask.sum()) // count] * count

    def side(self) -> int:
        """Patches along one edge of a tile of a fixed-resolution tower."""
        config = self.core.config.vision_config
        return config.image_size // config.patch_size


@lru_cache(maxsize=1024)
def grids(tiles: tuple[tuple[int, int, int], ...], separators: tuple[str, ...] = (), modality: str = "image") -> Layout:
    """The layout of tiles whose tokens follow each other in (frame, row, column) order.

    Args:
        tiles: (frames, rows, columns) per tile.
        separators: what is interspersed: "row" (a newline after every row of the last tile), "end" (one token at the
            very end), "start" (one at the start).
    """
    parts = []
    for number, (frames, rows, columns) in enumerate(tiles):
        places = torch.cartesian_prod(*(torch.arange(n) for n in (frames, rows, columns))).view(-1, 3)
        places = torch.cat([torch.full((len(places), 1), number), places], 1)
        if "row" in separators and number == len(tiles) - 1:
            newline = torch.full((frames * rows, 1, 4), -1)
            places = torch.cat([places.view(frames * rows, columns, 4), newline], 1).view(-1, 4)
        parts.append(places)
    nowhere = torch.full((1, 4), -1)
    parts = [nowhere] * ("start" in separators) + parts + [nowhere] * ("end" in separators)
    return Layout(tiles, torch.cat(parts), modality)


def _plain(n: int, modality: str = "image") -> Layout:
    """`n` tokens on a square, on a square after a CLS feature, or else on a line."""
    side = math.isqrt(n)
    if side * side == n:
        return grids(((1, side, side),), (), modality)
    if (side := math.isqrt(n - 1)) ** 2 == n - 1 and n > 2:
        return grids(((1, side, side),), ("start",), modality)
    return grids(((1, 1, n),), (), modality)


def square(request: Request) -> list[Layout]:
    """LLaVA-1.5: one square grid per image; native-resolution towers (Pixtral) by their image sizes."""
    if request.sizes is not None:
        patch = request.core.config.vision_config.patch_size
        return [grids(((1, h // patch, w // patch),)) for h, w in request.sizes.tolist()]
    return [_plain(n) for n in request.equal_lengths()]


def native(request: Request) -> list[Layout]:
    """Qwen-VL: the grid the processor reports, in merged units."""
    merge = request.core.config.vision_config.spatial_merge_size
    if request.grid is None:
        return guessed(request)
    shapes = [(t, h // merge, w // merge) for t, h, w in request.grid.tolist()]
    _check_size(shapes)
    return [grids((shape,), (), request.modality) for shape in shapes]


def tiled(request: Request) -> list[Layout]:
    """InternVL: a run of placeholders is one image of equal square tiles (its processor wraps every image in tags)."""
    lengths = request.lengths
    per_tile = lengths[0] if lengths else request.core.config.image_seq_length
    side = math.isqrt(per_tile)
    runs = request.runs()  # nothing else tells how many tiles an image has
    if side * side != per_tile or any(run % per_tile for run in runs):
        return [_plain(run) for run in runs]
    return [grids(((1, side, side),) * (run // per_tile)) for run in runs]


def pooled_frames(request: Request) -> list[Layout]:
    """LLaVA-OneVision and LLaVA-NeXT-Video: every frame pooled to half the grid; OneVision ends with a newline."""
    side = math.ceil(request.side() / 2)
    out = []
    for n in request.equal_lengths():
        frames, rest = divmod(n, side * side)
        layout = grids(((frames, side, side),), ("end",) * rest, "video") if rest < 2 and frames else _plain(n, "video")
        out.append(layout)
    return out


def anyres(request: Request) -> list[Layout]:
    """LLaVA-NeXT and OneVision: the whole image as tile 0, then the un-padded high-resolution grid, row by row, each
    row closed by an `image_newline`; a single-tile image ends with one newline.

    The grid's shape follows from the newlines: bit-exact copies of one parameter in the features (synchronises), or,
    before the features are known, what the model's own packing does with the image sizes.
    """
    newlines = _newlines_in_features(request) if request.features is not None else _newlines_by_packing(request)
    side = request.side()
    layouts = []
    for n, rows in newlines:
        grid = n - side * side - rows  # high-resolution tokens
        if rows == 1 and grid == 0:
            layouts.append(grids(((1, side, side),), ("end",)))
        elif rows and grid > 0 and grid % rows == 0:
            layouts.append(grids(((1, side, side), (1, rows, grid // rows)), ("row",)))
        else:
            layouts.append(_plain(n))
    return layouts


def _newlines_in_features(request: Request) -> list[tuple[int, int]]:
    newline = request.core.image_newline.detach()
    counts = [(feature.detach() == newline.to(feature)).all(-1).sum() for feature in request.features]
    return list(zip(request.lengths, torch.stack(counts).tolist()))


def _newlines_by_packing(request: Request) -> list[tuple[int, int]]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    core, side = request.core, request.side()
    config = core.config
    sizes, groups = request.sizes.cpu(), request.inputs.get("batch_num_images")
    tiled = [True] * len(sizes)
    if groups is not None:  # OneVision tiles an image only if its sample has no other
        tiled = [n == 1 for n in torch.as_tensor(groups).tolist() for _ in range(n)]
    edge = config.vision_config.image_size
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, edge) if many else 1
        for size, many in zip(sizes.tolist(), tiled)
    ]
    blank = [torch.zeros(count, side * side, 1) for count in tiles]
    options = {"vision_feature_select_strategy": "full"} if hasattr(config, "vision_feature_select_strategy") else {}
    if "vision_aspect_ratio" in request.inputs or hasattr(config, "vision_aspect_ratio"):
        options = {"vision_aspect_ratio": request.inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio}
    packed, _ = core.pack_image_features(blank, sizes, image_newline=torch.ones(1), **options)
    return [(len(one), int(one.sum())) for one in packed]


def guessed(request: Request) -> list[Layout]:
    """A model outside the family table: lengths from the features or from the runs of placeholders, square grids."""
    lengths = request.lengths
    return [_plain(n, request.modality) for n in (request.runs() if lengths is None else lengths)]


def _check_size(shapes: list[tuple[int, int, int]]) -> None:
    for number, shape in enumerate(shapes):
        if 0 in shape:
            raise InputError(f"image {number} is smaller than one patch and gives no visual token; enlarge it")


def layouts_of(layout: Callable[[Request], list[Layout]], request: Request) -> list[Layout]:
    """Run a layout function and check its result against the lengths the features have.

    Raises:
        InputError: an image has no tokens.
    """
    found = layout(request)
    lengths = request.lengths
    if lengths is not None and sum(lengths) != sum(len(one.coordinates) for one in found):
        found = guessed(request)
    if any(len(one.coordinates) == 0 for one in found):
        raise InputError("an image is smaller than one patch and gives no visual token; enlarge it")
    return found


def repeat_shapes(shapes: Tensor, lengths: list[int] | None, mask: Tensor) -> Tensor:
    """Repeat the images' shapes the way `generate` repeats the features for beams and returned sequences."""
    if lengths is None or len(lengths) == len(shapes) or len(lengths) % len(shapes):
        return shapes
    return shapes[repeat_order(len(shapes), lengths, mask)]


def repeat_order(count: int, lengths: list[int], mask: Tensor) -> list[int]:
    """Which of `count` encoded images each of the `len(lengths)` images of a call is.

    `generate` repeats the samples' groups of images, [A, B] -> [A, B, A, B]; the rows of the batch tell the groups
    (synchronises; only when something was repeated).
    """
    times = len(lengths) // count
    if times == 1:
        return list(range(count))
    per_row = mask.sum(1).tolist()
    order, at, first = [], 0, 0
    for number, tokens in enumerate(per_row):
        images = 0
        while tokens > 0:
            tokens -= lengths[at + images]
            images += 1
        order += range(first, first + images)
        at += images
        first += images if number % times == times - 1 else 0
    return order
