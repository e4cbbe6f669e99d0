"""Expedit: run the later blocks on local clusters of the patches, and interpolate the patches back from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.blocks import patch_sizes
from prune.budget import Geometry
from prune.errors import ConfigError, InputError
from prune.kernels.merging import chosen_indices
from prune.kernels.superpixels import Cells, cluster_grid, interpolate
from prune.kernels.topk import host_counts, to_device
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import Merge, Reduction, VisualTokens


@register
@dataclass
class Expedit(Reducer):
    """After a few blocks, replace the grid of patches by a coarser one of soft local clusters; undo it at the end.

    Based on "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning" (arXiv 2210.01035).
    Clusters start as adaptive average pools of the grid. Five times, a patch belongs to the clusters of the 5 x 5 cells
    around its own by the softmax of -tau * its squared distances to them, and clusters become weighted means. With
    `apply_pruner(..., restore=True)` the full grid comes back behind the last block: every patch is the mean of what
    its 20 nearest clusters have become, weighted by exp(-tau * squared distance as they were made).

    The kept "token" of a cluster is the patch in the middle of its cell; its features are those of the cluster.

    Where we differ from the authors' code:
        - any count works: of h rows of cells, as square as the grid allows, some have one cell more than others. Counts
          that are h x w, in the image's proportions, give the authors' grid;
        - the weights of a patch sum to 1 (L1), as a kernel average must; the code divides by the L2 norm, which makes
          features up to 4 times larger unless one cluster dominates. `compat=True` is the code's way;
        - tau is relative by default: distances depend on the model, and the paper sets it per model;
        - features are restored behind the last block; the authors restore logits of Segmenter's decoder, tapped layers
          of DPT, windows of SAM and Swin. Windowed models are not supported.

    Cost: O(rounds N K D), and O(N K D) to restore, in chunks. Signals: none but the grid. Made
    for a full grid: let it go first in a `Compose`.

    Args:
        layer: the first block that works on clusters; None: a third of the depth. The authors' alpha: 10 of 24 for
            Segmenter ViT-L on ADE20K (40 x 40 patches to 28 x 28), 12 on Cityscapes (48 x 48 to 32 x 32).
        tau: inverse temperature of the distances, above 0. None: 2 over the image's mean squared distance of patches to
            the pool of their cell (to restore: to their nearest cluster). The authors: 0.02 for Segmenter, 0.005 for
            SAM, 1.0 for DPT.
        rounds: of clustering, at least 1.
        window: cells around a patch's own that it can belong to: `window` x `window`, odd.
        neighbours: clusters a patch is restored from, at least 1.
        compat: the authors' L2 norm.

    Raises:
        ConfigError: an option is out of range.
        InputError: the patches are no grid.
    """

    layer: int | None = None
    tau: float | None = None
    rounds: int = 5
    window: int = 5
    neighbours: int = 20
    compat: bool = False

    name = "expedit"
    title = "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning"
    arxiv = "2210.01035"
    merges = True
    reconstructs = True

    def __post_init__(self):
        good = {
            "layer": self.layer is None or self.layer >= 0,
            "tau": self.tau is None or self.tau > 0,
            "rounds": self.rounds >= 1,
            "window": self.window >= 1 and self.window % 2 == 1,
            "neighbours": self.neighbours >= 1,
        }
        domain = {"layer": "a block, or None", "tau": "above 0, or None", "window": "an odd number >= 1"}
        for option, fits in good.items():
            if not fits:
                raise ConfigError(f"{option}={getattr(self, option)!r} must be {domain.get(option, 'at least 1')}")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        depth = geometry.blocks
        layer = min(max(1, round(depth / 3)), depth - 1) if self.layer is None else self.layer
        return (Stage(Site.parse(f"block:{layer}"), self, keep),)

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return expedit(tokens, keep, self.tau, self.rounds, self.window)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        products = 1 + 2 * self.rounds + (self.tau is None)  # pools, then distances and means
        return products * 2 * geometry.visual_tokens * keep * geometry.hidden_size

    def restore_flops(self, geometry: Geometry, keep: int) -> int:
        products = 2 + (self.tau is None)  # distances, maybe once more for their mean, and the weighted sum
        return products * 2 * geometry.visual_tokens * keep * geometry.hidden_size

    def restore(self, before: Tensor, after: Tensor, now: Tensor) -> Tensor:
        return interpolate(before, after, now, self.neighbours, self.tau, power=2 if self.compat else 1)


@torch.no_grad()
def expedit(tokens: VisualTokens, keep: Sequence[int], tau: float | None, rounds: int, window: int) -> Reduction:
    """See `Expedit`."""
    mask, (batch, n) = tokens.mask, tokens.mask.shape
    if tokens.coordinates is None:
        raise InputError(f"expedit clusters a grid, and {n} patches are none; use tome or another method without one")
    counts = host_counts(keep, batch)
    place, width = torch.arange(n, device=mask.device).expand_as(mask), max(counts, default=0)
    row, column = (tokens.coordinates[..., i].masked_fill(~mask, 0) for i in (2, 3))
    height, breadth = (x.amax(1, keepdim=True) + 1 for x in (row, column))
    cells = Cells.of(height, breadth, to_device(counts, mask.device)[:, None])
    cell, belongs, total = cluster_grid(tokens.features, row, column, mask, cells, width, window, rounds, tau)

    number = torch.arange(width, device=mask.device).expand(batch, -1)
    valid = number < cells.count
    at = cells.middle(torch.where(valid, number, 0))
    index = stand_ins(row * breadth + column, at[0] * breadth + at[1], mask, valid)
    empty = total == 0  # a hole in the grid, which an earlier cut has made: the stand-in stays as it is

    share = belongs / total.gather(1, cell.flatten(1)).view_as(belongs).clamp(min=1e-30)
    source = torch.where(share > 0, place[..., None], index[:, :1, None])
    slot = cell.masked_fill(share == 0, 0)
    sizes = belongs * patch_sizes(tokens.sizes, mask).masked_fill(~mask, 0)[..., None]
    sizes = torch.zeros_like(total).scatter_add_(1, cell.flatten(1), sizes.flatten(1)).masked_fill(empty, 1)
    merge = Merge(source.flatten(1), slot.flatten(1), share.flatten(1), empty.float())
    return Reduction(index, valid, merge, sizes)


def stand_ins(place: Tensor, wanted: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """`[B, K]` int64 the token at every wanted place, or, where there is none, the first that stands for no other cell.

    Args:
        place: `[B, N]` of the tokens, `wanted` `[B, K]` of the cells; numbers of places on the grid.
        valid: `[B, K]` bool, the cells that are wanted; the others get 0.
    """
    n = mask.shape[1]
    number = torch.arange(n, device=mask.device).expand_as(mask)
    token_at = torch.full((len(mask), n + 1), -1, device=mask.device)
    token_at.scatter_(1, torch.where(mask, place, n).clamp(max=n), number)[:, n] = -1
    index = token_at.gather(1, wanted.clamp(max=n)).masked_fill(~valid, -1)
    missing = valid & (index < 0)
    used = torch.zeros(len(mask), n + 1, dtype=torch.bool, device=mask.device)
    used.scatter_(1, torch.where(index < 0, n, index), True)
    free, _ = chosen_indices(mask & ~used[:, :n], wanted.shape[1])
    return torch.where(missing, free.gather(1, (missing.cumsum(1) - 1).clamp(min=0)), index.clamp(min=0))
