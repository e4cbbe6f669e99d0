"""What the last prefill did, for people: `handle.last`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.method import Site
from prune.registry import acts_at


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of one image, tile set or video lie.

    Args:
        tiles: (frames, rows, columns) of every tile's grid, in order. An anyres image is tile 0, the whole image at
            base resolution, then its high-resolution grid; a plain image or a video is one tile.
        coordinates: `[n, 4]` int64 on the CPU: (tile, frame, row, column) of every token in sequence order; -1 for
            tokens that belong to no grid place (`image_newline`, a CLS feature).
        modality: "image" or "video".
    """

    tiles: tuple[tuple[int, int, int], ...]
    coordinates: Tensor
    modality: str = "image"

    @cached_property
    def on_grid(self) -> Tensor:
        """`[n]` bool: the tokens that have a grid place."""
        return self.coordinates[:, 0] >= 0


@dataclass(frozen=True)
class ImageReport:
    """One image of the last prefill.

    Args:
        sample, index: batch row, and the image's number within it.
        layout: where its tokens lie. Indices below count the tokens the method could choose from (`places`).
        places: `[n, 4]` coordinates of these tokens (the layout's, without separators unless the method counts them).
        stages: site -> ascending indices of the tokens alive after it.
    """

    sample: int
    index: int
    layout: Layout
    places: Tensor
    stages: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Visual tokens before pruning."""
        return len(self.places)

    @property
    def kept(self) -> Tensor:
        """Ascending indices of the tokens alive after the last stage."""
        return list(self.stages.values())[-1] if self.stages else torch.arange(self.tokens)


@dataclass(frozen=True)
class Report:
    """The last prefill: kept tokens, and what they cost, per sample.

    Args:
        method, budget: as text.
        images: every image, in sample order.
        tokens_per_layer: `[samples][layers]` visual tokens entering each decoder layer.
        text_tokens: `[samples]` all other valid tokens.
        geometry: the decoder's sizes.
        bytes_per_value: of the KV cache.
    """

    method: str
    budget: str
    images: list[ImageReport]
    tokens_per_layer: list[list[int]]
    text_tokens: list[int]
    geometry: Geometry
    bytes_per_value: int

    @property
    def average_tokens(self) -> list[float]:
        """Per sample: mean over decoder layers of the visual tokens alive."""
        return [sum(alive) / len(alive) for alive in self.tokens_per_layer]

    @property
    def flops(self) -> list[int]:
        """Per sample: decoder prefill FLOPs with pruning (`Geometry.prefill_flops`)."""
        return [geometry.prefill_flops(alive) for geometry, alive in self._samples()]

    @property
    def flops_full(self) -> list[int]:
        """Per sample: decoder prefill FLOPs without pruning."""
        return [geometry.prefill_flops([geometry.visual_tokens] * len(alive)) for geometry, alive in self._samples()]

    @property
    def kv_bytes(self) -> list[int]:
        """Per sample: KV-cache bytes after the prefill, with pruning (padding not counted)."""
        return [geometry.kv_bytes(alive, self.bytes_per_value) for geometry, alive in self._samples()]

    @property
    def kv_bytes_full(self) -> list[int]:
        """Per sample: KV-cache bytes after the prefill, without pruning."""
        return [
            geometry.kv_bytes([geometry.visual_tokens] * len(alive), self.bytes_per_value)
            for geometry, alive in self._samples()
        ]

    def _samples(self):
        for sample, (alive, text) in enumerate(zip(self.tokens_per_layer, self.text_tokens)):
            visual = sum(image.tokens for image in self.images if image.sample == sample)
            yield replace(self.geometry, visual_tokens=visual, text_tokens=text), alive

    def __str__(self):
        lines = [f"{self.method} ({self.budget})"]
        for image in self.images:
            counts = " -> ".join(str(n) for n in [image.tokens, *(len(kept) for kept in image.stages.values())])
            sites = ", ".join(image.stages) or "nothing pruned"
            lines.append(f"  sample {image.sample} image {image.index}: {counts} visual tokens ({sites})")
        for sample, (now, full) in enumerate(zip(self.flops, self.flops_full)):
            lines.append(
                f"  sample {sample}: {self.average_tokens[sample]:.1f} visual tokens per layer, "
                f"prefill {now / full:.1%} of {full / 1e9:.3g} GFLOPs, "
                f"KV {self.kv_bytes[sample] / self.kv_bytes_full[sample]:.1%} "
                f"of {self.kv_bytes_full[sample] / 2**20:.3g} MiB"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class BlockImage(ImageReport):
    """One image of the last forward of a vision transformer.

    Args:
        order: numbers of the patches left at the end, in the order the tokens have (after the prefix tokens).
        slots: `[n]` for every patch the slot in `order` it is in at the end: its own, that of the token it was merged
            into, or -1 if it was dropped.
    """

    order: Tensor
    slots: Tensor


@dataclass(frozen=True)
class BlockReport(Report):
    """The last forward of a vision transformer: `handle.last`.

    As `Report`, with blocks in the place of decoder layers: every image is a sample, `text_tokens` are the prefix
    tokens (CLS, registers), there is no KV cache, and FLOPs are those of the blocks alone, without patch embedding and
    head.

    Args:
        tokens_per_mlp: `[samples][layers]` patches every block's MLP sees.
    """

    tokens_per_mlp: list[list[int]]

    @property
    def flops(self) -> list[int]:
        """Per image: FLOPs of the blocks with pruning, `Geometry.prefill_flops`; signals and selection not counted."""
        rows = zip(self._samples(), self.tokens_per_mlp)
        return [geometry.prefill_flops(alive, in_mlp) for (geometry, alive), in_mlp in rows]

    def __str__(self):
        lines = [f"{self.method} ({self.budget})"]
        for image, now, full in zip(self.images, self.flops, self.flops_full):
            counts = [image.tokens, *(len(kept) for kept in image.stages.values())]
            shown = [*counts[:3], "...", *counts[-2:]] if len(counts) > 6 else counts
            sites = acts_at([Site.parse(site) for site in image.stages]) or "none pruned"
            lines.append(
                f"  image {image.sample}: {' -> '.join(map(str, shown))} patches ({sites}), "
                f"blocks {now / full:.1%} of {full / 1e9:.3g} GFLOPs"
            )
        return "\n".join(lines)
