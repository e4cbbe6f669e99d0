"""VATP: attention weighted by the length of the value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.compaction import take
from prune.kernels.heads import head_attention
from prune.method import Scorer
from prune.registry import register
from prune.tokens import VisualTokens


@register
@dataclass
class VATP(Scorer):
    """After `layer` decoder layers, keep the visual tokens with the largest attention times length of the value.

    Based on "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
    Matters" (arXiv 2406.12335). What a token contributes to another is its attention times its value, so an attention
    sink, whose value is tiny, contributes little. The paper evicts text from the KV cache, head by head; this is its
    score in the place of FastV's: in layer `layer - 1`, the attention of the last prompt token times the L1 norm of the
    head's value, mean over heads. No golden data, and no published result on images.

    Where we differ from the authors' code:
        - visual tokens are dropped for all later layers, instead of masking cache entries of each head;
        - attention is that of the prompt's last token (or of all text after the image, `rows="text"`, or of the image
          itself, `rows="received"`), not sums over all queries and over decoding;
        - grouped-query attention: every query head weighs with the value of the key head it reads;
        - the first 20 tokens need no protection: what stands before the image is never dropped.

    Cost: O((N + T) H d) for `rows="last"`, T times that for "text" and N times for "received". Signal: attention.

    Args:
        layer: the first decoder layer that sees the kept tokens only (FastV's 2).
        rows: "last" (prompt token; CLS in a vision transformer), "text" (mean over all text tokens after the image) or
            "received" (mean over the image's own tokens, for which vision transformers need no CLS).

    Raises:
        ConfigError: an option is out of range.
    """

    layer: int = 2
    rows: str = "last"

    name = "vatp"
    title = (
        "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also Matters"
    )
    arxiv = "2406.12335"
    signals = ("attention",)
    needs_question = True

    def __post_init__(self):
        if self.layer < 1:
            raise ConfigError(
                f"layer={self.layer!r} must be a whole number >= 1: attention comes from the layer before"
            )
        if self.rows not in ("last", "text", "received"):
            raise ConfigError(f"rows={self.rows!r} must be 'last', 'text' or 'received'")
        self.needs_question = self.reads_last = self.rows != "received"

    @property
    def site(self) -> str:
        return f"decoder:{self.layer}"

    def score(self, tokens: VisualTokens) -> Tensor:
        return vatp(tokens, self.rows)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        rows = {"last": 1, "text": geometry.text_tokens, "received": geometry.visual_tokens}[self.rows]
        return 2 * rows * (geometry.visual_tokens + geometry.text_tokens) * geometry.heads * geometry.head_dim


def vatp(tokens: VisualTokens, rows: str) -> Tensor:
    """`[B, N]` fp32: mean over heads of attention times the L1 norm of the value; see `VATP`."""
    at = tokens.attention
    last = at.last[at.sample][:, None]
    slots, counted = {
        "last": (last, torch.ones_like(last).bool()),
        "text": (at.text_slots, at.text_mask),
        "received": (at.slots, tokens.mask),
    }[rows]
    keys, valid = at.keys[at.sample], at.valid[at.sample]
    until = slots if at.causal else torch.full_like(slots, keys.shape[1] - 1)
    seen = head_attention(take(at.queries[at.sample], slots), keys, at.scale, until, counted, valid, at.slots)
    norm = torch.linalg.vector_norm(take(at.values[at.sample], at.slots), ord=1, dim=-1, dtype=torch.float32)
    norm = norm.transpose(1, 2).repeat_interleave(seen.shape[1] // norm.shape[2], 1)
    return (seen * norm).mean(1)
