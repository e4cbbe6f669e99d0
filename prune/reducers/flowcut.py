"""FlowCut: rank patches by what flows from and to them through the vision encoder, then by the instruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.attention import row_attention
from prune.kernels.compaction import take
from prune.kernels.merging import chosen_indices
from prune.kernels.tiles import group_extreme, group_rank, group_sum, tile_groups, tile_shares
from prune.kernels.topk import topk_mask
from prune.method import Method, Reducer, Scorer, Site, Stage
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens

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

    The encoder's cut is an APPROXIMATION until methods can act inside the vision encoder: the authors prune after every
    second layer, so that later layers work on the survivors (`schedule` is that, on given layers). Here the whole
    encoder runs, the scores of the last four layers that count are averaged (older ones weigh 6 % together), and the
    best are taken at once. Similarity is a softmax of products with CLS's value; without CLS, with the mean value of
    the tile, as in the paper.

    Where we differ from the authors' code beside that:
        - tiles share the count in proportion to their tokens; the code gives every tile half the target, so that the
          total grows with the number of tiles;
        - positions are kept in the decoder; the code renumbers;
        - every image of a sample has its own budget; the code takes all from the first placeholder on for the image.

    Cost: O(N H d) per encoder layer read and in the decoder. Signals: CLS attention, similarity to CLS's value, and
    values of four encoder layers; attention of the decoder.

    Args:
        layer: the first decoder layer that sees the final tokens only, at least 1; None prunes before the decoder only.
        share: tokens the encoder's cut leaves, in units of the final count, at least 1.
        score: "cls", or "received" for encoders without a CLS token: mean attention of all patches, and similarity to
            the mean value, instead.

    Raises:
        ConfigError: an option is out of range.
    """

    layer: int | None = 2
    share: float = 2.0
    score: str = "cls"

    name = "flowcut"
    title = "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models"
    arxiv = "2505.19536"
    signals = ("attention",)
    needs_question = True

    def __post_init__(self):
        if self.layer is not None and (not isinstance(self.layer, int) or self.layer < 1):
            raise ConfigError(f"layer={self.layer!r} must be a whole number >= 1, or None")
        if not self.share >= 1:
            raise ConfigError(f"share={self.share!r} must be at least 1: tokens before the last cut per token after it")
        if self.score not in ("cls", "received"):
            raise ConfigError(f"score={self.score!r} must be 'cls' or 'received'")
        self.needs_question = self.layer is not None
        self.signals = ("attention",) if self.needs_question else ()

    @property
    def tower(self) -> dict[str, Tower]:
        return Encoded(self.score).tower

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        first = Site.parse("projected"), Encoded(self.score)
        if self.layer is None:
            return (Stage(*first, keep),)
        before = max(keep, min(geometry.visual_tokens, round(self.share * keep)))
        return Stage(*first, before), Stage(Site.parse(f"decoder:{self.layer}"), Instructed(), keep)


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
            attention, values = (tokens.tower[f"{name}{number}"].float() for name in ("attention", "values"))
            values = values.masked_fill(~tokens.mask[..., None, None], 0)
            similar = tokens.tower[f"similar{number}"] if self.score == "cls" else similarity(values, group)
            flow = attention / group_sum(attention, group) + similar / group_sum(similar, group)
            flow = flow.nan_to_num(0.0) * strength(values)
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
    return values.float().mean(-2).abs().sum(-1)


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


# --------------------------------------------------------------------- inside the encoder: needs sites in the encoder
@dataclass
class Flow:
    """What `schedule` saw of the patches in one layer, `[B, N]` each: `attention`, `similar` (zeros without CLS),
    `strength`, the layer's `score`, the running mean `total`, and which were alive before the cut after it."""

    attention: Tensor
    similar: Tensor
    strength: Tensor
    score: Tensor
    total: Tensor
    alive: Tensor


@dataclass
class Scheduled:
    """The result of `schedule`: the hidden states after the last layer, the patches alive, and what it saw."""

    hidden: Tensor
    alive: Tensor
    flows: list[Flow] = field(default_factory=list)


@torch.no_grad()
def schedule(
    layers: Sequence[Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]],
    hidden: Tensor,
    target: int,
    final: int,
    cls: bool = True,
    shared: bool = False,
) -> Scheduled:
    """The progressive pruning of the paper, by masks, on the layers of an encoder.

    After every layer with an even distance L to layer `final`, (n - target) / sqrt(L) * (1 - rho^2) of the n patches
    go, rho being the entropy of the attention as a share of the largest possible; after `final` all but the target.

    Args:
        layers: (hidden `[B, T, D]`, alive `[B, T]` bool) -> queries, keys, values `[B, T, H, d]` and the new hidden
            states, in which tokens that are not alive have no part. Scale of the attention: d ** -0.5.
        hidden: `[B, T, D]`, CLS first if there is one.
        target: patches left in the end.
        final: index of the layer after which they are reached.
        cls: False ranks by the attention of the mean query, without similarity, as the code for Qwen2-VL does.
        shared: all rows lose the number of the row that loses most, as in the authors' code.
    """
    result = Scheduled(hidden, torch.ones(hidden.shape[0], hidden.shape[1] - cls, dtype=torch.bool).to(hidden.device))
    total = None
    for index, layer in enumerate(layers):
        alive = torch.cat([torch.ones_like(result.alive[:, :1]), result.alive], 1) if cls else result.alive
        q, k, v, result.hidden = layer(result.hidden, alive)
        left = final - index
        if left < 0:
            continue
        flow = observe(q, k, v, alive, cls)
        total = flow.score if total is None else (total + flow.score) / 2
        flow.total, flow.alive = total, result.alive
        result.flows.append(flow)
        if left % 2 == 0:
            number = result.alive.sum(1)
            count = torch.full_like(number, target)
            if left > 0:
                gone = (number - target) / left**0.5 * (1 - concentration(flow.attention, number).square())
                gone = (gone.amax() if shared else gone).round().long()
                count = (number - gone).clamp(min=target)
            result.alive = topk_mask(total, count, result.alive)
    return result


def observe(q: Tensor, k: Tensor, v: Tensor, alive: Tensor, cls: bool) -> Flow:
    """The scores of one layer, zero at patches that are not alive."""
    scale, seen = q.shape[-1] ** -0.5, alive[:, None]
    if cls:
        attention, similar = (
            row_attention(x[:, :1], y, s, seen)[:, :, 0].mean(1)[:, 1:] for x, y, s in ((q, k, scale), (v, v, 1.0))
        )
        v, alive = v[:, 1:], alive[:, 1:]
    else:
        query = q.masked_fill(~alive[..., None, None], 0).sum(1, keepdim=True) / alive.sum(1)[:, None, None, None]
        attention = row_attention(query, k, scale, seen)[:, :, 0].mean(1)
        similar = torch.zeros_like(attention)
    strong = strength(v) * alive
    shares = [x / x.sum(1, keepdim=True).clamp(min=1e-30) for x in (attention, similar)]
    return Flow(attention, similar, strong, sum(shares) * strong, strong, alive)


def concentration(attention: Tensor, number: Tensor) -> Tensor:
    """`[B]`: entropy of the attention `[B, N]` over its largest possible value, that of `number` `[B]` equal ones."""
    share = attention / attention.sum(1, keepdim=True).clamp(min=1e-30)
    return torch.special.entr(share).sum(1) / number.clamp(min=2).log()
