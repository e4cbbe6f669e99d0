"""What one forward of a vision transformer leaves behind for `handle.last`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prune.budget import Budget, Geometry
from prune.method import Method, Site
from prune.report import BlockImage, BlockReport, Layout


@dataclass
class VitRecord:
    """Args: the method and budget used, sizes, images, the patch grid, and the cuts: site, `index [B, K]`, `valid`
    (or None) and `into [B, N]` of each, with its place in the block."""

    method: Method
    budget: Budget | None
    geometry: Geometry
    batch: int
    grid: tuple[int, int] | None
    done: list[tuple[Site, Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def report(self) -> BlockReport:
        count = self.geometry.visual_tokens
        places = torch.full((count, 4), -1)
        if self.grid is not None:
            number = torch.arange(count)
            places = torch.stack([0 * number, 0 * number, number // self.grid[1], number % self.grid[1]], 1)
        layout = Layout(((1, *(self.grid or (1, count))),), places)
        done = [
            (
                site,
                place,
                index.cpu(),
                torch.ones_like(index).bool().cpu() if valid is None else valid.cpu(),
                into.cpu(),
            )
            for (site, index, valid, into), place in zip(self.done, self.places)
        ]
        images = [self._image(number, layout, places, done) for number in range(self.batch)]
        entering, in_mlp = [], []
        for image in images:
            counts = [(site.layer, place, len(kept)) for (site, place, *_), kept in zip(done, image.stages.values())]
            entering.append(self._counts(counts, False))
            in_mlp.append(self._counts(counts, True))
        return BlockReport(
            method=repr(self.method),
            budget=str(self.budget) if self.budget is not None else "its own budgets",
            images=images,
            tokens_per_layer=entering,
            text_tokens=[self.geometry.text_tokens] * self.batch,
            geometry=self.geometry,
            bytes_per_value=0,
            tokens_per_mlp=in_mlp,
        )

    def _image(self, number: int, layout: Layout, places: Tensor, done: list) -> BlockImage:
        stages, slots = {}, torch.arange(len(places))
        for site, _, index, valid, into in done:
            stages[str(site)] = index[number][valid[number]].sort().values
            slots = torch.where(slots < 0, slots, into[number][slots.clamp(min=0)])
        order = done[-1][2][number][done[-1][3][number]] if done else slots
        return BlockImage(number, 0, layout, places, stages, order=order, slots=slots)

    def _counts(self, cuts: list[tuple[int, str, int]], in_mlp: bool) -> list[int]:
        """Patches entering each block, or seen by its MLP."""
        out = []
        for layer in range(self.geometry.layers):
            counts = [n for at, place, n in cuts if at + (place == "inside" and not in_mlp) <= layer]
            out.append(counts[-1] if counts else self.geometry.visual_tokens)
        return out
