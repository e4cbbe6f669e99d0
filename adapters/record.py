"""What one prefill leaves behind for `handle.last`: device tensors, read only when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.adapters.planner import text_tokens
from prune.adapters.visual import Visual
from prune.budget import Budget, Geometry
from prune.method import Method
from prune.report import ImageReport, Report


@dataclass
class Record:
    """Args: the method and budget used, the images with their history, the caller's `[B, L]` validity, and sizes."""

    method: Method
    budget: Budget | None
    visual: Visual
    valid: Tensor
    geometry: Geometry
    bytes_per_value: int

    def report(self) -> Report:
        visual = self.visual
        samples, places = visual.sample.tolist(), visual.places.cpu()
        history = [(site, token.cpu(), mask.cpu()) for site, token, mask in visual.history]
        images, seen = [], {}
        for number, (sample, layout) in enumerate(zip(samples, visual.layouts)):
            stages = {str(site): token[number][mask[number]] for site, token, mask in history}
            index = seen[sample] = seen.get(sample, -1) + 1
            images.append(ImageReport(sample, index, layout, places[number, : visual.initial[number]], stages))
        images.sort(key=lambda image: (image.sample, image.index))
        batch = len(self.valid)
        per_layer = [[0] * self.geometry.layers for _ in range(batch)]
        for image in images:
            for layer in range(self.geometry.layers):
                per_layer[image.sample][layer] += self._alive(image, history, layer)
        return Report(
            method=repr(self.method),
            budget=str(self.budget) if self.budget is not None else "its own budgets",
            images=images,
            tokens_per_layer=per_layer,
            text_tokens=text_tokens(visual, self.valid),
            geometry=self.geometry,
            bytes_per_value=self.bytes_per_value,
        )

    @staticmethod
    def _alive(image: ImageReport, history: list, layer: int) -> int:
        count = image.tokens
        for site, _, _ in history:
            if site.kind != "decoder" or site.layer <= layer:
                count = len(image.stages[str(site)])
        return count


def bytes_per_value(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8
