"""Index-preserving pruning: drop the patches without text before the vision encoder, at the places they leave."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune.budget import Geometry
from prune.errors import ConfigError, InputError
from prune.kernels import topk_indices
from prune.learned_scorer import LearnedScorer, grey, patch_images, shipped
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens

CONTRAST = 0.25
"""Share of the image's own deviation from which a patch counts as drawn on, for `scorer="contrast"`."""
FAR = 1 << 60
"""The place of tokens that have none: no neighbour's."""


@register
@dataclass
class IndexPreserving(Reducer):
    """Before the first block of the vision encoder, drop patches that show no text, and let the others keep their
    places.

    Based on "Index-Preserving Lightweight Token Pruning for Efficient Document Understanding in Vision-Language Models"
    (arXiv 2509.06415). A small classifier gives every patch (in Qwen's towers: every 2 x 2 group, one token of the
    language model) a logit from its pixels alone. Logits go through a 3 x 3 max-pool on the image's grid, so that the
    neighbours of text stay too; what is then above 0 is kept. Position embeddings, windows and the position ids of the
    language model are those of the full image.

    The budget is an upper bound while `adaptive`, as in the paper, which has no budget: with a small one, such as
    `ratio=0.01`, the content decides. (One that removes no token, such as 1 % of 25, switches the method off.) Where
    more is above 0 than the budget allows, the highest logits win, ties the lowest index. An image with nothing above 0
    is kept, up to the budget: the paper does not say what to do.

    Where we differ from the authors' code:
        - their weights are not public; ours are trained on drawn pages (`prune/weights/text-patches/README.md`), see
          grey and have 160 hidden units, not RGB and 256, to be small;
        - two frames of a patch are averaged before they are scored, not scored both: in an image they are equal;
        - patches that are not 28 pixels wide are resized; so on plain vision transformers blocks are smaller than in
          the paper, which finds 28 pixels and more much better than 14;
        - batches of several images work; a video's frames are pooled each by itself.

    Cost: one product of `[N, 784]` and `[784, 160]` with "text", else O(N P) for P pixel values per token. Signals:
    pixels.

    Args:
        scorer: "text", the classifier that comes with the library; "contrast", which learns nothing: the standard
            deviation of the patch's pixels is above a quarter of the image's; a folder that
            `LearnedScorer.save_pretrained` wrote; or any module that maps patches `[n, 3, h, w]` of normalised pixels
            to logits `[n]` (a copy of it works, in eval mode; it cannot be saved in a pruner config, and its cost does
            not appear in accounts).
        dilate: whether to max-pool.
        adaptive: whether the content decides on the count; False keeps exactly what the budget says.

    Raises:
        ConfigError: an option is none of these, or the folder has no sound weights; names the file.
        InputError: in the forward, the grid of the patches is unknown and `dilate` is set, or tokens hold groups of
            patches of a kind `patch_images` does not know.
    """

    scorer: str | nn.Module = "text"
    dilate: bool = True
    adaptive: bool = True

    name = "index_preserving"
    title = "Index-Preserving Lightweight Token Pruning for Efficient Document Understanding in Vision-Language Models"
    arxiv = "2509.06415"
    site = "block:0"
    tower = {"pixels": Tower("pixels")}
    search = {"scorer": ("text", "contrast"), "dilate": (True, False)}

    def __post_init__(self):
        scorer = os.fspath(self.scorer) if isinstance(self.scorer, os.PathLike) else self.scorer
        self._module = None
        if isinstance(scorer, nn.Module):
            self._module = copy.deepcopy(scorer).eval().requires_grad_(False)
        elif not isinstance(scorer, str) or not scorer:
            raise ConfigError(f"scorer={scorer!r:.80} must be 'text', 'contrast', a folder with weights or a module")
        elif scorer not in ("text", "contrast"):
            self._module = LearnedScorer.from_pretrained(scorer)
        self.scorer, self._copies = scorer, {}

    @torch.no_grad()
    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        score = self.logits(tokens)
        if self.dilate:
            if tokens.coordinates is None:
                raise InputError("the grid of the patches is unknown; give dilate=False, which needs none")
            score = dilated(score, tokens.coordinates, tokens.mask)
        candidates = tokens.mask
        if self.adaptive:
            found = candidates & (score > 0)
            candidates = torch.where(found.any(1, keepdim=True), found, candidates)
        return Reduction(*topk_indices(score, keep, candidates))

    def logits(self, tokens: VisualTokens) -> Tensor:
        """`[B, N]` fp32, > 0 for text; -inf for padding and for patches with pixels that are no numbers."""
        pixels = tokens.tower["pixels"]
        patches = patch_images(pixels.flatten(0, 1))
        if self.scorer == "contrast":
            score = contrast(patches, tokens.mask)
        else:
            with torch.autocast(pixels.device.type, enabled=False):
                score = self._on(pixels.device)(patches).float().view_as(tokens.mask)
        return score.masked_fill(~tokens.mask | score.isnan(), -torch.inf)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        module = shipped() if self.scorer == "text" else self._module
        return geometry.visual_tokens * module.flops() if isinstance(module, LearnedScorer) else 0

    def _on(self, device: torch.device) -> nn.Module:
        """The classifier on a device; a copy for each."""
        if device not in self._copies:
            module = shipped() if self.scorer == "text" else self._module
            self._copies[device] = copy.deepcopy(module).to(device)
        return self._copies[device]


def contrast(patches: Tensor, mask: Tensor) -> Tensor:
    """How much a patch varies: log of the deviation of its pixels over `CONTRAST` times that of all the image's pixels.

    A factor or a constant on all pixels changes nothing.

    Args:
        patches: `[B * N, 3, h, w]` fp32.
        mask: `[B, N]` bool.

    Returns:
        `[B, N]` fp32; -inf for a flat patch, NaN in a flat image.
    """
    variance, mean = (part.view_as(mask) for part in torch.var_mean(grey(patches).flatten(1), dim=1, correction=0))
    real = mask & variance.isfinite()
    count = real.sum(1, keepdim=True).clamp(min=1)
    variance, mean = variance.masked_fill(~real, 0), mean.masked_fill(~real, 0)
    apart = (mean - mean.sum(1, keepdim=True) / count).masked_fill(~real, 0)
    whole = (variance + apart.square()).sum(1, keepdim=True) / count
    return 0.5 * (variance / (CONTRAST**2 * whole)).log()


def dilated(score: Tensor, coordinates: Tensor, mask: Tensor) -> Tensor:
    """The highest score among a token and its up to eight neighbours on the grid; 3 x 3 max-pool, stride 1.

    Tokens may be in any order and grids of any size, with holes. Tokens without a place keep their own score.

    Args:
        score: `[B, N]`, no NaN; -inf for padding.
        coordinates: `[B, N, 4]` int64 (tile, frame, row, column), -1 without a place; below 2 ** 12, 12, 16 and 16.
        mask: `[B, N]` bool, the real tokens.

    Returns:
        `[B, N]`.

    Cost: one sort and eight binary searches of N in N; no grid is made, so no host synchronisation.
    """
    tile, frame, row, column = (coordinates + 1).unbind(-1)
    place = (((tile << 12) + frame) << 34) + (row << 17) + column
    place = torch.where(mask & (row > 0) & (column > 0), place, FAR)
    found, order = place.sort(dim=1)
    ranked = score.gather(1, order)
    out = score
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            wanted = place + (down << 17) + right
            at = torch.searchsorted(found, wanted).clamp(max=found.shape[1] - 1)
            here = (found.gather(1, at) == wanted) & (place < FAR)
            out = torch.where(here, torch.maximum(out, ranked.gather(1, at)), out)
    return out
