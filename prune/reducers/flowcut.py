"""FlowCut: rank patches by what flows from and to them through the vision encoder, then by the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from prune.blocks import summary_attention, summary_similarity
from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.attention import row_attention
from prune.kernels.compaction import take
from prune.kernels.merging import chosen_indices
from prune.kernels.tiles import group_extreme, group_rank, group_sum, tile_groups, tile_shares
from prune.kernels.topk import host_counts, to_device, topk_mask
from prune.method import Method, Reducer, Scorer, Site, Stage
from prune.registry import register
from prune.tokens import BlockAttention, Reduction, Tower, VisualTokens

DEPTHS = (19 / 24, 20 / 24, 21 / 24, 22 / 24)
"""The encoder's layers whose scores are averaged: the last is the one after which the authors reach their target."""


@register
@dataclass
class FlowCut(Method):
    """Keep the patches CLS attends to, whose values are alike and strong, then those the last prompt token attends to.

    Based on "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models" (arXiv
    2505.19536). Score of a patch in an encoder layer: (attention of CLS / its sum + similarity of values / its sum) *
    L1 norm of its value, mean over heads; over the layers a running mean of which every new layer is half. In the
    decoder: the same with the last prompt token in the place of CLS, its softmax over the visual tokens alone. The
    encoder leaves `share` times the budget, split over tiles by size, the decoder the budget itself: with 2, the
    paper's setting for LLaVA-NeXT; `layer=None` leaves it all to the encoder, as for LLaVA-1.5.

    The paper prunes inside the encoder (`encoder="inside"`): after every second block, counted back from the last but
    one, patches go, the more the more concentrated the attention of CLS is, so that later blocks work on the survivors;
    in front of the last block the target is reached exactly. Without CLS the mean query and value stand in for its own,
    as in the code for Qwen2-VL and in the paper. How many patches go in between depends on the image: a compute budget
    is an upper bound. `layer=None, encoder="inside"` is the method in a plain vision transformer.

    `encoder="after"` is an APPROXIMATION: the whole encoder runs, the scores of the last four layers that count are
    averaged (older ones weigh 6 % together), and the best are taken at once. Similarity is a softmax of products with
    CLS's value; without CLS, with the mean value of the tile, as in the paper.

    Where we differ from the authors' code beside that:
        - tiles share the count in proportion to their tokens; the code gives every tile half the target, so that the
          total grows with the number of tiles;
        - positions are kept in the decoder; the code renumbers;
        - every image of a sample has its own budget; the code takes all from the first placeholder on for the image;
        - inside the encoder every image loses its own number of patches, the code's batch that of the image that loses
          most; without CLS values are compared too, as in the paper.

    Cost: O(N H d) per encoder layer read and in the decoder. Signals: CLS attention, similarity to CLS's value, and
    values of four encoder layers (after), or block (inside); attention of the decoder.

    Args:
        layer: the first decoder layer that sees the final tokens only, at least 1; None prunes before the decoder only.
        share: tokens the encoder's cut leaves, in units of the final count, at least 1.
        score: "cls", or "received" for encoders without a CLS token: mean attention of all patches, and similarity to
            the mean value, instead. For `encoder="after"` alone.
        encoder: "after" the encoder, or "inside" it, as in the paper.

    Raises:
        ConfigError: an option is out of range.
    """

    layer: int | None = 2
    share: float = 2.0
    score: str = "cls"
    encoder: str = "after"

    name = "flowcut"
    title = "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models"
    arxiv = "2505.19536"
    signals = ("attention",)
    needs_question = True

    def __post_init__(self):
        if self.layer is not None and self.layer < 1:
            raise ConfigError(f"layer={self.layer!r} must be a whole number >= 1, or None")
        if not self.share >= 1:
            raise ConfigError(f"share={self.share!r} must be at least 1: tokens before the last cut per token after it")
        if self.score not in ("cls", "received"):
            raise ConfigError(f"score={self.score!r} must be 'cls' or 'received'")
        if self.encoder not in ("after", "inside"):
            raise ConfigError(f"encoder={self.encoder!r} must be 'after' or 'inside'")
        self.adaptive = self.encoder == "inside"
        self.needs_question = self.layer is not None
        self.signals = ("block",) * self.adaptive + ("attention",) * self.needs_question

    @property
    def tower(self) -> dict[str, Tower]:
        return {} if self.adaptive else Encoded(self.score).tower

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        n, later, before = geometry.visual_tokens, (), keep
        if self.layer is not None:
            before = max(keep, min(n, round(self.share * keep)))
            later = (Stage(Site.parse(f"decoder:{self.layer}"), Instructed(), keep),)
        if self.encoder == "after":
            return Stage(Site.parse("projected"), Encoded(self.score), before), *later
        last = geometry.blocks - 1
        if last < 1:
            raise ConfigError('encoder="inside" cuts between blocks, and this model has one; use encoder="after"')
        steps = ((block, Flowing(before, last - block)) for block in range(1, last + 1))
        return *(Stage(Site.parse(f"block:{i}"), step, n if step.left else before) for i, step in steps), *later


@dataclass
class Encoded(Reducer):
    """FlowCut's cut by the encoder; see `FlowCut`."""

    score: str = "cls"

    name = "flowcut"

    @property
    def tower(self) -> dict[str, Tower]:
        kinds = {"attention": "received_attention", "values": "values"}
        if self.score == "cls":
            kinds |= {"attention": "cls_attention", "similar": "cls_value_similarity"}
        found = {f"{name}{i}": Tower(kind, depth) for i, depth in enumerate(DEPTHS) for name, kind in kinds.items()}
        return MappingProxyType(found)

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        group = tile_groups(tokens.tile, tokens.mask)
        mean = None
        for number in range(len(DEPTHS)):
            attention, values = tokens.tower[f"attention{number}"].float(), tokens.tower[f"values{number}"]
            if self.score == "cls":
                similar = tokens.tower[f"similar{number}"]
            else:
                similar = similarity(values.float().masked_fill(~tokens.mask[..., None, None], 0), group)
            flow = attention / group_sum(attention, group) + similar / group_sum(similar, group)
            flow = flow.nan_to_num(0.0) * strength(values).masked_fill(~tokens.mask, 0)
            mean = flow if mean is None else (mean + flow) / 2
        chosen = group_rank(mean, group, tokens.mask) < tile_shares(keep, group, tokens.mask)
        return Reduction(*chosen_indices(chosen, max(keep, default=0)))


@dataclass
class Instructed(Scorer):
    """FlowCut's cut in the decoder; see `FlowCut`."""

    name = "flowcut"
    signals = ("attention",)
    needs_question = True

    def score(self, tokens: VisualTokens) -> Tensor:
        given, row = tokens.attention, tokens.attention.sample
        last, mask = given.last[row][:, None], tokens.mask[:, None]
        query, value = take(given.queries[row], last), take(given.values[row], last)
        keys, values = take(given.keys[row], given.slots), take(given.values[row], given.slots)
        scale = values.shape[-1] ** -0.5
        attention = row_attention(query, keys, given.scale, mask)[:, :, 0].mean(1)
        similar = row_attention(value, values, scale, mask)[:, :, 0].mean(1)
        return (attention + similar) * strength(values)  # both sum to 1 over the image

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        return 2 * geometry.visual_tokens * (geometry.heads + geometry.kv_heads) * geometry.head_dim


def strength(values: Tensor) -> Tensor:
    """`[..., N]` fp32: L1 norm of the mean over heads of values `[..., N, H, d]`."""
    return values.mean(-2, dtype=torch.float32).abs().sum(-1)


def similarity(values: Tensor, group: Tensor) -> Tensor:
    """Softmax over a group of the products of values with the group's mean value, mean over heads.

    Args:
        values: `[B, N, H, d]` fp32.
        group: `[B, N]` from `tile_groups`.
    """
    rows, n, heads, _ = values.shape
    index = group[..., None, None].expand_as(values)
    total = torch.zeros_like(values).scatter_add_(1, index, values).gather(1, index)
    size = group_sum(torch.ones_like(group), group)[..., None]
    logits = ((values * total).sum(-1) / size).transpose(1, 2).reshape(rows * heads, n)
    within = group[:, None].expand(-1, heads, -1).reshape(rows * heads, n)
    weight = (logits - group_extreme(logits, within, "amax")).exp()
    return (weight / group_sum(weight, within)).view(rows, heads, n).mean(1)


# ------------------------------------------------------------------------------------------------ inside the encoder
@dataclass
class Flowing(Reducer):
    """What FlowCut does after one block of the encoder: update the scores, and drop patches; see `FlowCut`.

    If the distance L to the last cut is even and not 0, (n - target) / sqrt(L) * (1 - rho^2) of the n patches go, rho
    being the entropy of the attention as a share of the largest possible; if it is 0, all but `target`.

    Args:
        target: patches left by the last cut.
        left: distance L, in blocks.
        similar: rank by the similarity of values too; without CLS the authors' code does not.
        shared: all rows lose the number of the row that loses most, as in the authors' code.
    """

    target: int
    left: int
    similar: bool = True
    shared: bool = False

    name = "flowcut"
    signals = ("block",)
    block_reads = "qkv"

    def __post_init__(self):
        self.adaptive = self.left > 0

    @torch.no_grad()
    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        flow, mask = observe(tokens.block, tokens.mask, self.similar), tokens.mask
        before = recall(tokens)
        total = flow.score if before is None else (before + flow.score) / 2
        remember(tokens, total)
        number = mask.sum(1)
        count = to_device(host_counts(keep, len(mask)), mask.device)
        if self.left > 0:
            gone = (number - self.target) / self.left**0.5 * (1 - concentration(flow.attention, number).square())
            gone = ((gone.amax() if self.shared else gone).round().long()) if self.left % 2 == 0 else 0
            count = torch.minimum((number - gone).clamp(min=self.target), count)
        return Reduction(*chosen_indices(topk_mask(total, count, mask), max(keep, default=0)))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        columns = geometry.visual_tokens + geometry.text_tokens
        return 2 * (1 + self.similar) * columns * geometry.heads * geometry.head_dim


@dataclass
class Flow:
    """The patches in one block, `[B, N]` fp32 each: `attention`, `similar` (zeros where it is not wanted), `strength`,
    and the block's `score`."""

    attention: Tensor
    similar: Tensor
    strength: Tensor
    score: Tensor


def observe(block: BlockAttention, mask: Tensor, similar: bool = True) -> Flow:
    """What CLS, or the mean patch where there is none, attends to in a block; 0 at padding."""
    attention = summary_attention(block, mask)
    alike = summary_similarity(block, mask) if similar else torch.zeros_like(attention)
    strong = strength(block.values[:, block.prefix :]).masked_fill(~mask, 0)
    shares = [x / x.sum(1, keepdim=True).clamp(min=1e-30) for x in (attention, alike)]
    return Flow(attention, alike, strong, sum(shares) * strong)


def concentration(attention: Tensor, number: Tensor) -> Tensor:
    """`[B]`: entropy of the attention `[B, N]` over its largest possible value, that of `number` `[B]` equal ones."""
    share = attention / attention.sum(1, keepdim=True).clamp(min=1e-30)
    return torch.special.entr(share).sum(1) / number.clamp(min=2).log()


def remember(tokens: VisualTokens, total: Tensor) -> None:
    """Keep the scores `[B, N]` for later stages, whichever tokens are left then."""
    index, order = tokens.index.masked_fill(~tokens.mask, torch.iinfo(torch.long).max).sort(1)
    tokens.memory["flowcut_index"], tokens.memory["flowcut"] = index.contiguous(), total.gather(1, order)


def recall(tokens: VisualTokens) -> Tensor | None:
    """`[B, N]` what was kept of the tokens at hand, or None."""
    if (total := tokens.memory.get("flowcut")) is None:
        return None
    place = torch.searchsorted(tokens.memory["flowcut_index"], tokens.index.contiguous())
    return total.gather(1, place.clamp(max=total.shape[1] - 1))
