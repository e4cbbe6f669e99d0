"""From the order of the vision encoder (tiles x patches) to the order of the visual tokens.

What the model does with its features on the way - dropping padding, `image_newline`, shrinking, pooling of frames - is
done with signals too. `generate` encodes images where no hook sees their sizes, so the way is found from its result:
the one crop of the tiles that reproduces the packed features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from prune.adapters.layouts import Request, repeat_order
from prune.errors import InputError

TILE, PATCH = "tile", "patch"  # keys of the maps `anyres` adds to the signals


def plain(request: Request, signals: dict, projected: Tensor | None) -> dict:
    """Models that pass their features on as they are.

    Args:
        request: with features, or anything that has their shape.
        signals: key -> `[tiles, n, ...]` in the order of the encoder, without CLS.
        projected: `[tiles, n, D]` what the projector gave, for `anyres`.

    Returns:
        key -> `[tokens, ...]` for all images of the call, beams included.
    """
    return _repeat(request, {key: x.flatten(0, 1) for key, x in signals.items()}, sum(request.lengths))


def pooled(request: Request, signals: dict, projected: Tensor | None) -> dict:
    """LLaVA-OneVision and LLaVA-NeXT-Video: frames pooled by the model's own function, a newline at the end or none."""
    core = request.core
    out = {}
    for key, x in signals.items():
        rows = x[..., None].flatten(2)
        if hasattr(core, "apply_pooling"):
            rows = core.apply_pooling(rows)
        elif key[0] == "features" or not list(core.vision_resampler.parameters()):
            rows = core.vision_resampler(rows)
        else:  # a convolution over channels cannot pool anything but features
            side, stride = math.isqrt(rows.shape[1]), core.config.spatial_pool_stride
            rows = F.avg_pool2d(rows.transpose(1, 2).unflatten(2, (side, side)), stride).flatten(2).transpose(1, 2)
        out[key] = rows.unflatten(2, (*x.shape[2:], 1))[..., 0]
    frames, per_frame = next(iter(out.values())).shape[:2]
    video, newline = divmod(request.lengths[0], per_frame)
    for key, x in out.items():
        videos = x.unflatten(0, (-1, video)).flatten(1, 2)
        if newline:
            videos = torch.cat([videos, torch.zeros_like(videos[:, :newline])], 1)
        out[key] = videos.flatten(0, 1)
    return _repeat(request, out, len(request.lengths) * (video * per_frame + newline))


def _repeat(request: Request, flat: dict, total: int) -> dict:
    """`[tokens encoded, ...]` -> `[tokens of the call, ...]`: `generate` repeats images for beams."""
    encoded = len(next(iter(flat.values())))
    if encoded == total:
        return flat
    lengths = request.lengths
    order = repeat_order(len(lengths) * encoded // total, lengths, request.mask)
    sizes = [lengths[order.index(image)] for image in range(max(order) + 1)]
    return {key: torch.cat([x.split(sizes)[image] for image in order]) for key, x in flat.items()}


# ------------------------------------------------------------------------------------------------------- anyres
@dataclass(frozen=True)
class Crop:
    """The high-resolution part of an image: `tiles` (rows, columns) of tiles, of whose joined grid the patches from
    (`top`, `left`) on, `height` x `width` of them, are resized to `rows` x `columns`."""

    tiles: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int

    @property
    def resized(self) -> bool:
        return (self.rows, self.columns) != (self.height, self.width)

    def grid(self, x: Tensor, side: int) -> Tensor:
        """`[tiles, side * side, ...]` -> `[height, width, ...]`."""
        x = x.unflatten(1, (side, side)).unflatten(0, self.tiles).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return x[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass
class Place:
    """An image among the encoded tiles: the base tile `first`, then those of the crop; None if there is only one."""

    first: int
    crop: Crop | None
    side: int

    @property
    def count(self) -> int:
        return 1 if self.crop is None else 1 + math.prod(self.crop.tiles)

    def pack(self, x: Tensor) -> Tensor:
        """`[all tiles, side * side, ...]` -> `[tokens, ...]`, zeros at newlines."""
        base, crop = x[self.first], self.crop
        if crop is None:
            return torch.cat([base, torch.zeros_like(base[:1])])
        grid = crop.grid(x[self.first + 1 : self.first + self.count], self.side)
        if crop.resized:
            channels = grid.flatten(2).permute(2, 0, 1)[None] if grid.dim() > 2 else grid[None, None]
            small = F.interpolate(channels.contiguous(), (crop.rows, crop.columns), mode="bilinear")[0]
            grid = small.permute(1, 2, 0).unflatten(2, grid.shape[2:]) if grid.dim() > 2 else small[0]
        lines = torch.cat([grid, torch.zeros_like(grid[:, :1])], 1)
        return torch.cat([base, lines.flatten(0, 1)])

    def source(self) -> Tensor:
        """`[tokens]` int64, the nearest patch of every token among the patches of the image's tiles, -1 at newlines."""
        size, crop = self.side**2, self.crop
        patches = torch.arange(self.count * size).view(self.count, size)
        if crop is None:
            return torch.cat([patches[0], torch.full((1,), -1)])
        grid = crop.grid(patches[1:], self.side)
        near = [
            ((torch.arange(n) + 0.5) * whole / n).long()
            for n, whole in ((crop.rows, crop.height), (crop.columns, crop.width))
        ]
        lines = F.pad(grid[near[0]][:, near[1]], (0, 1), value=-1)
        return torch.cat([patches[0], lines.flatten()])


def anyres(request: Request, signals: dict, projected: Tensor | None) -> dict:
    """LLaVA-NeXT and OneVision: as `plain`, with the maps `TILE` `[tokens]` and `PATCH` `[tokens, 2]` added.

    Synchronises once and once per image.

    Raises:
        InputError: no crop of the tiles gives the features (a model that packs in another way).
    """
    places = find_places(request, projected)
    out = {key: torch.cat([place.pack(x) for place in places]) for key, x in signals.items()}
    side = request.side()
    source = torch.cat([place.source() for place in places])
    number, at = source.div(side * side, rounding_mode="floor"), source % (side * side)
    patch = torch.stack([at // side, at % side], -1).masked_fill(source[:, None] < 0, -1)
    maps = {TILE: number, PATCH: patch}
    return {**out, **{key: x.to(projected.device, non_blocking=True) for key, x in maps.items()}}


def find_places(request: Request, projected: Tensor) -> list[Place]:
    """Where every image of the call is among the tiles; repeated images share theirs."""
    core, side = request.core, request.side()
    config, size = core.config, side * side
    most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    newline = core.image_newline.detach()
    features = [feature.detach() for feature in request.features]
    probes = torch.tensor([0, size // 2, size - 1]).to(projected.device, non_blocking=True)
    begins = torch.stack([feature[probes] for feature in features])
    same = (begins[:, None] == projected[None, :, probes]).flatten(2).all(-1)
    lines = torch.stack([(feature == newline.to(feature)).all(-1).sum() for feature in features])
    table = torch.cat([lines[:, None], same.to(lines)], 1).tolist()
    places = []
    for feature, (rows, *matches) in zip(features, table):
        grid = len(feature) - size - rows
        if grid == 0:
            crops = [None]
        else:
            crops = crops_of(
                tuple(map(tuple, config.image_grid_pinpoints)),
                config.vision_config.image_size,
                side,
                rows,
                grid // max(rows, 1),
                int(most) if most.isdigit() else None,
            )
        options = (Place(first, crop, side) for first, match in enumerate(matches) if match for crop in crops)
        found = next((place for place in options if _gives(place, projected, feature)), None)
        if found is None:
            raise InputError(
                f"cannot tell from which tiles the {len(feature)} tokens of an image come: the model packs them in an "
                "unknown way; use a method that reads no signal of the vision encoder"
            )
        places.append(found)
    return places


@lru_cache(maxsize=1024)
def crops_of(
    pinpoints: tuple[tuple[int, int], ...], edge: int, side: int, rows: int, columns: int, most: int | None
) -> tuple[Crop, ...]:
    """All crops that end up as `rows` x `columns`: padding lies on both sides of one axis, and OneVision shrinks what
    has more patches than `most` tiles."""
    found = []
    for high, wide in pinpoints:
        tiles = (high // edge, wide // edge)
        full = (tiles[0] * side, tiles[1] * side)
        cuts = [(pad, 0) for pad in range((full[0] + 1) // 2)] + [(0, pad) for pad in range(1, (full[1] + 1) // 2)]
        for top, left in cuts:
            height, width = full[0] - 2 * top, full[1] - 2 * left
            if _shrunk(height, width, side, most) == (rows, columns):
                found.append(Crop(tiles, top, left, height, width, rows, columns))
    return tuple(dict.fromkeys(found))


def _shrunk(height: int, width: int, side: int, most: int | None) -> tuple[int, int]:
    ratio = 0 if most is None else math.sqrt(height * width / (most * side**2))
    return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


def _gives(place: Place, projected: Tensor, feature: Tensor) -> bool:
    """Whether packing the projector's output this way gives the packed features."""
    if place.first + place.count > len(projected):
        return False
    packed = place.pack(projected.detach())
    if packed.shape != feature.shape:
        return False
    real = (place.source() >= 0).to(packed.device, non_blocking=True)[:, None]
    off = ((packed - feature.to(packed)).abs() * real).amax()
    resized = place.crop is not None and place.crop.resized
    allowed = 8 * torch.finfo(packed.dtype).eps * packed.abs().amax() if resized else 0.0
    return bool(off <= allowed)
