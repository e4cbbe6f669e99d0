"""ToMe: in every block of a vision transformer, merge the patches whose keys are most alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune.blocks import patch_sizes
from prune.budget import Budget, Geometry
from prune.errors import BudgetError, ConfigError
from prune.kernels.bipartite import best_match
from prune.kernels.merging import chosen_indices
from prune.kernels.tiles import group_rank
from prune.kernels.topk import host_counts, to_device
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import Merge, Reduction, VisualTokens

SLOPES = {"constant": 0.0, "linear": -1.0, "increasing": 1.0}
"""Schedules by name: the relative slope of tokens merged per block, ToMe's `inflect`."""


@register
@dataclass
class ToMe(Reducer):
    """Between attention and MLP of every block, merge a few patches into the patch whose key is most like theirs.

    Based on "Token Merging: Your ViT But Faster" (arXiv 2210.09461). Every other token of the sequence, prefix tokens
    counted (CLS is number 0), is a source, the rest are destinations. Every source has one best destination, by cosine
    of the keys, mean over heads. The sources most like theirs are merged into them: means weighted by the number of
    patches a token stands for. Attention counts a token as that many (`proportional`: log(size) is added to logits).
    Prefix tokens take no part.

    The budget says how many tokens are left after the last block, `schedule` where they go. The paper's r tokens per
    block is `keep = N - r * blocks`: r = 13 in a ViT-B/16 at 224 is `keep=40`. A block cannot merge more than half of
    its tokens; what one has no room for is merged by those behind it, or before it if need be.

    Where we differ from the authors' code:
        - LayerScale, q/k norms and every attention backend work: attention is the model's own. Keys are those that meet
          the queries, after norms and rotary embedding, where a model has them;
        - proportional attention is on for every model; the authors switch it off for MAE models without fine-tuning
          (`apply_pruner(..., proportional=False)`);
        - registers are protected as CLS and the distillation token are;
        - counts add up exactly: cumulative shares are rounded; the code rounds down what each block merges;
        - of equally similar pairs the first is merged; the code leaves that to the sort.
    As in the code the merged-into patches come last, behind the others: in their order if there is a CLS token, else
    the most similar first. Which tokens are sources in the next block depends on that.

    Cost per block: O(N^2 d / 4) and one chunked matrix product. Signals: block.

    Args:
        schedule: "constant", the same number in every block; "linear", falling to none in the last one ("increasing":
            rising from none); or a list of numbers in proportion to which blocks merge, the first for block 0, where
            0, or no entry, merges nothing. With N - keep = sum of the list it is the number of tokens block by block.

    Raises:
        ConfigError: `schedule` is none of these, or longer than the model is deep.
        BudgetError: `keep` or `ratio` asks for fewer tokens than halving in every block leaves. (In a `Compose` it
            leaves that many.)
    """

    schedule: str | tuple[float, ...] = "constant"

    name = "tome"
    title = "Token Merging: Your ViT But Faster"
    arxiv = "2210.09461"
    signals = ("block",)
    block_reads = "k"
    merges = True
    place = "inside"
    proportional = True

    def __post_init__(self):
        if isinstance(self.schedule, str):
            good = self.schedule in SLOPES
        else:
            good = all(0 <= w for w in self.schedule) and any(self.schedule)
        if not good:
            raise ConfigError(
                f"schedule={self.schedule!r} must be {', '.join(SLOPES)}, or numbers >= 0 per block, not all of them 0"
            )

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        """As everywhere, but never below what halving in every block leaves."""
        blocks, shares = self._blocks(geometry)
        n, keep = geometry.visual_tokens, max(keep, self._least(geometry))
        counts, before, done = [], n, 0.0
        for number, share in enumerate(shares, 1):
            done += share
            most = keep << (len(shares) - number)  # more than this, the blocks behind could not halve down to `keep`
            aim = n - round((n - keep) * done / sum(shares))
            counts.append(before := min(max(aim, keep, halved(before)), most, before))
        return tuple(Stage(Site.parse(f"block:{block}"), self, count) for block, count in zip(blocks, counts))

    def stages(self, geometry: Geometry, budget: Budget) -> tuple[Stage, ...]:
        stages, least = super().stages(geometry, budget), self._least(geometry)
        asked = budget.solve(geometry, lambda keep: [keep]) if budget.keep or budget.ratio is not None else least
        if asked < least:
            raise BudgetError(
                f"tome halves {geometry.visual_tokens} tokens at most once in each of {len(stages)} blocks, which "
                f"leaves {least}, not {asked}; keep more, or merge in more blocks"
            )
        return stages

    def _blocks(self, geometry: Geometry) -> tuple[list[int], list[float]]:
        """The blocks that merge, and in what proportion."""
        depth = geometry.blocks
        if isinstance(self.schedule, str):
            slope = SLOPES[self.schedule]
            shares = [1 + slope * (2 * block / max(1, depth - 1) - 1) for block in range(depth)]
        elif len(self.schedule) > depth:
            raise ConfigError(f"schedule has {len(self.schedule)} entries and the model {depth} blocks; give one each")
        else:
            shares = self.schedule
        blocks = [block for block, share in enumerate(shares) if share > 0] or [0]
        return blocks, [shares[block] or 1.0 for block in blocks]

    def _least(self, geometry: Geometry) -> int:
        least = geometry.visual_tokens
        for _ in self._blocks(geometry)[0]:
            least = halved(least)
        return least

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return tome(tokens, keep)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n = geometry.visual_tokens
        return 0 if keep >= n else 2 * (n // 2) * halved(n) * geometry.head_dim


def halved(count: int) -> int:
    """What is left when half of the tokens are merged into the other half."""
    return -(-count // 2)


@torch.no_grad()
def tome(tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
    """Merge down to `keep`, at least half of every row's tokens; see `ToMe`. `Reduction.sizes` is filled in."""
    mask, (rows, n) = tokens.mask, tokens.mask.shape
    place = torch.arange(n, device=mask.device).expand_as(mask)
    sizes = patch_sizes(tokens.sizes, mask)
    if min(keep, default=n) >= n:
        return Reduction(place, mask, sizes=sizes)
    first = tokens.block.prefix % 2  # the first patch at an even place of the sequence, prefix tokens counted
    metric = tokens.block.keys[:, tokens.block.prefix :].float().mean(2)
    match, cosine = best_match(metric[:, first::2], metric[:, 1 - first :: 2], mask[:, 1 - first :: 2])
    into, similarity = place.clone(), sizes.new_full((rows, n), -torch.inf)
    into[:, first::2], similarity[:, first::2] = 2 * match + 1 - first, cosine

    source = mask & (place % 2 == first)
    rank = group_rank(similarity, torch.zeros_like(place), source)
    count = to_device(host_counts(keep, rows), mask.device)[:, None]
    merged = source & (rank < mask.sum(1, keepdim=True) - count)
    stay = place if tokens.block.cls else rank
    order = torch.where(source, stay, n + place).masked_fill(merged | ~mask, 3 * n)
    order, index = order.sort(dim=1, stable=True)
    width = max(keep)
    index, valid = index[:, :width], order[:, :width] < 3 * n
    slot = torch.zeros_like(place).scatter_(1, index, place[:, :width])  # of every token that stays
    index = index.masked_fill(~valid, 0)
    source, real = chosen_indices(merged, n - min(keep))
    slot = slot.gather(1, into.gather(1, source)).masked_fill(~real, 0)
    weight = sizes.gather(1, source).masked_fill(~real, 0)
    own = sizes.gather(1, index).masked_fill(~valid, 1)
    total = own.scatter_add(1, slot, weight)
    merge = Merge(source, slot, weight / total.gather(1, slot), own / total)
    return Reduction(index, valid, merge, total)
