"""FiCoCo-V: FiCoCo between attention and MLP of the last half of a vision encoder's layers; see `ficoco.FiCoCo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.blocks import patch_attention, patch_sizes, summary_attention
from prune.budget import Geometry
from prune.kernels.merging import chosen_indices
from prune.kernels.recipients import recipients, split_among_recipients
from prune.kernels.similarity import dot, unit
from prune.kernels.tiles import group_rank, tile_groups
from prune.kernels.topk import topk_mask
from prune.method import Reducer
from prune.tokens import BlockAttention, Merge, Reduction, VisualTokens


@dataclass
class FiCoCoV(Reducer):
    """One layer of FiCoCo-V; see `FiCoCo` for the method and its options.

    Filter: redundancy = beta * mean attention to the patches - (1 - beta) * attention from CLS, both softmax, mean over
    heads; without CLS, minus the cosine of a patch's key (heads joined) to the mean key takes the place of the latter.
    The most redundant patch of every 2 x 2 window of the grid counts double. Correlate and compress: as in the decoder,
    by the attention to the patches that stay; weights are its shares.
    """

    beta: float = 0.35
    quantile: float = 0.998

    name = "ficoco"
    signals = ("block",)
    merges = True
    place = "inside"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return ficoco_v(tokens, keep, self.beta, self.quantile)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n = geometry.visual_tokens
        rows = n + (n - keep) + (geometry.text_tokens > 0)  # that of CLS
        return 2 * rows * (n + geometry.text_tokens) * geometry.heads * geometry.head_dim


@torch.no_grad()
def ficoco_v(tokens: VisualTokens, keep: Sequence[int], beta: float, quantile: float) -> Reduction:
    """See `FiCoCoV`."""
    block, mask = tokens.block, tokens.mask
    every = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    to_patches = torch.cat([part.sum(-1) for part in patch_attention(block, every, mask)], 1)
    to_patches = to_patches / mask.sum(1, keepdim=True).clamp(min=1)
    redundancy = beta * to_patches - (1 - beta) * from_cls(block, mask)
    chosen = topk_mask(-penalise(redundancy, tokens), keep, mask)

    def correlation(source: Tensor) -> Tensor:
        """The log of it: a softmax of these is a share of the attention."""
        return torch.cat(patch_attention(block, source, mask), 1).log()

    source, slot, share, received = split_among_recipients(correlation, chosen, mask, keep, quantile)
    index, valid = chosen_indices(chosen, max(keep, default=0))
    total = 1 + received
    sizes = patch_sizes(tokens.sizes, mask)
    own = sizes.gather(1, index).masked_fill(~valid, 1)
    moved = own.scatter_add(1, slot, share * sizes.gather(1, source))
    return Reduction(index, valid, Merge(source, slot, share / total.gather(1, slot), 1 / total), moved)


def from_cls(block: BlockAttention, mask: Tensor) -> Tensor:
    """`[B, N]` fp32 importance of the patches as the encoder sees it."""
    if block.cls:
        return summary_attention(block, mask)
    keys = block.keys[:, block.prefix :].float().flatten(2).masked_fill(~mask[..., None], 0)
    return -dot(unit(keys), unit(keys.sum(1, keepdim=True)))


def penalise(redundancy: Tensor, tokens: VisualTokens) -> Tensor:
    """The redundancy with that of the most redundant patch of every 2 x 2 window doubled (halved, if it is negative).

    Windows lie on the original grid, at even rows and columns; on an odd grid the last ones are smaller. Without
    coordinates there are none.
    """
    if tokens.coordinates is None:
        return redundancy
    frame, row, column = (tokens.coordinates[..., i].clamp(min=0) for i in (1, 2, 3))
    window = tile_groups((frame << 40) + (row // 2 << 20) + column // 2, tokens.mask)
    first = group_rank(redundancy, window, tokens.mask) == 0
    worse = torch.where(redundancy > 0, redundancy * 2, redundancy / 2)
    return torch.where(first, worse, redundancy)


# ------------------------------------------------------------------------------------------------- the released code
@dataclass
class Released:
    """One layer as the authors' code computes it, for one image of T tokens that loses R; see `released_v`.

    Args:
        score: `[T - 1]` of the patches after the local penalty; low is redundant.
        spared: `[side * side]` bool, the global state after this layer.
        merged, remain: `[R]` and `[T - R]` int64, in the code's order: by ascending score, the first token last.
        target, share: `[R, K]`, where each merged token goes.
        out, size: `[T - R, D]` and `[T - R, 1]`; row j belongs to `remain[j]`.
    """

    score: Tensor
    spared: Tensor
    merged: Tensor
    remain: Tensor
    target: Tensor
    share: Tensor
    out: Tensor
    size: Tensor


@torch.no_grad()
def released_v(
    attention: Tensor, hidden: Tensor, spared: Tensor, remove: int, side: int, weight: float, quantile: float
) -> Released:
    """The released FiCoCo-V, with its five defects, to compare with: no model should run it.

    Against the paper (1) attention is logits, and `weight` 0.35 is on CLS, where the paper has it on the patches; (2)
    places of the grid that were penalised, not discarded, are remembered, taken for numbers of patches later on, and
    carried over to the next image; (3) merged tokens and CLS can be recipients; (4) tokens come out in the order of
    their scores, so that CLS is last and the next layer takes a patch for it; (5) recipients are named by their old
    numbers but looked up in the new order, so that other tokens than those meant receive.

    Args:
        attention: `[T, T]` fp32 logits, mean over heads; row 0 is what the code takes for CLS.
        hidden: `[T, D]`.
        spared: `[side * side]` bool, the state the layer before (or the image before) left.
        remove: tokens to merge.
        side: of the grid.
        weight: of the attention of CLS.
        quantile: as in `FiCoCo`.
    """
    total, left = len(hidden), len(hidden) - remove
    score, spared = (x[0] for x in _penalised(_importance(attention, weight)[None], spared[None], side))
    order = torch.cat([score.new_full((1,), torch.inf), score]).sort(stable=True).indices
    merged, remain = order[:remove], order[remove:]
    everything = torch.ones(1, total, dtype=torch.bool, device=hidden.device)
    target, share = (x[0] for x in recipients(attention[merged][None], everything, quantile))
    slot = torch.where(target < left, target, target - remove).flatten()
    folded = (hidden[merged][:, None] * share[..., None]).flatten(0, 1)
    out = hidden[remain].index_add(0, slot, folded)
    size = share.new_ones(left).index_add(0, slot, share.flatten())[:, None]
    return Released(score, spared, merged, remain, target, share, out / size, size)


def _importance(attention: Tensor, weight: float) -> Tensor:
    """`[T - 1]`: what CLS gives the patches less what they give others, each of length 1."""
    from_cls, to_patches = attention[0, 1:], attention[1:, 1:].mean(-1)
    parts = (x / torch.linalg.vector_norm(x).clamp(min=1e-12) for x in (from_cls, to_patches))
    return weight * next(parts) - (1 - weight) * next(parts)


def _penalised(importance: Tensor, spared: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Double the redundancy of the most redundant patch of every 2 x 2 window, as the code does.

    Args:
        importance: `[B, P]` fp32 of the patches alive, which fill the grid's open places in order.
        spared: `[B, side * side]` bool, places that are not open.
        side: of the grid; of an odd one the last row and column are in no window.

    Returns:
        The new importance, and `spared` with the windows' choices added. A place of the grid is taken for the number of
        a patch; places beyond P change nothing.
    """
    rank = ((~spared).cumsum(1) - 1).clamp(0, importance.shape[1] - 1)
    grid = importance.gather(1, rank).masked_fill(spared, torch.inf)
    even = side // 2 * 2
    windows = grid.view(-1, side, side)[:, :even, :even].unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    least = windows.argmin(-1)
    corner = torch.arange(0, even, 2, device=least.device)
    place = ((corner[:, None] + least // 2) * side + corner + least % 2).flatten(1)
    chosen = torch.zeros_like(spared).scatter_(1, place, True)
    chosen[:, importance.shape[1] :] = False
    hit = chosen[:, : importance.shape[1]]
    doubled = torch.where(importance > 0, importance / 2, importance * 2)
    return torch.where(hit, doubled, importance), spared | chosen
