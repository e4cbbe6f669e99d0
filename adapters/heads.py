"""What one attention layer of the vision encoder gives away: numbers per patch out of its queries, keys and values."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from prune.kernels.attention import received_attention, row_attention
from prune.kernels.rows import important_attention

READS = {
    "cls_attention": "qk",
    "joint_cls_attention": "qk",
    "cls_value_similarity": "v",
    "received_attention": "qk",
    "important_attention": "qk",
    "keys": "k",
    "values": "v",
}
"""kind -> projections it is made of."""


def projections(attention: nn.Module, letters: set[str]) -> list[str]:
    """The sub-modules whose outputs hold these of q, k and v; norms over q and k apply between them and attention."""
    if hasattr(attention, "qkv"):
        return ["qkv"]
    norms = [f"{letter}_norm" for letter in letters if letter in "qk"]
    norms = [name for name in norms if not isinstance(getattr(attention, name, nn.Identity()), nn.Identity)]
    return [f"{letter}_proj" for letter in sorted(letters)] + sorted(norms)


class Heads:
    """Queries, keys and values of one attention layer, `[tiles, L, H, d]`, or `[P, H, d]` for packed images.

    Args:
        raw: what the layer's projections gave, by their names.
        kwargs: those of the layer's attention.
        cls: whether the first token of every tile is CLS.
    """

    def __init__(self, attention: nn.Module, raw: dict[str, Tensor], kwargs: dict, cls: bool):
        self.attention, self.raw, self.kwargs, self.cls = attention, raw, kwargs, cls
        self.scale = getattr(attention, "scale", None) or attention.scaling
        if "qkv" in raw:
            fused = raw["qkv"]
            self.parts = dict(zip("qkv", fused.view(len(fused), 3, attention.num_heads, -1).unbind(1)))
        else:
            self.parts = {name[0]: self._split(x) for name, x in raw.items() if name.endswith("proj")}

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.attention.num_heads, -1)

    def attended(self, letter: str) -> Tensor:
        """q or k as they meet in the attention: after norms and rotary embedding."""
        if f"{letter}_norm" in self.raw:
            return self._split(self.raw[f"{letter}_norm"])
        x, tables = self.parts[letter], self.kwargs.get("position_embeddings")
        if tables is None:
            return x
        cos, sin = (table.unsqueeze(-2).float() for table in tables)
        half = x.shape[-1] // 2
        x32 = x.float()
        return (x32 * cos + torch.cat([-x32[..., half:], x32[..., :half]], -1) * sin).to(x.dtype)

    @cached_property
    def attended_qk(self) -> tuple[Tensor, Tensor]:
        return self.attended("q"), self.attended("k")

    @property
    def sees(self) -> dict[str, Tensor]:
        """What says which patches see each other: the segments (images, frames, windows) of packed images."""
        return {} if self.attended_qk[0].dim() == 4 else {"cu_seqlens": self.kwargs["cu_seqlens"]}

    @cached_property
    def received(self) -> Tensor:
        """Attention received from all rows, `[tiles, L]` or `[P]`; several signals are made of it."""
        return received_attention(*self.attended_qk, self.scale, **self.sees)


def _cls(q: Tensor, k: Tensor, scale: float) -> Tensor:
    weights = row_attention(q[:, :1], k, scale)[:, :, 0].mean(1)
    weights[:, 0] = 0.0  # what CLS gives itself is no patch's
    return weights


def cls_attention(heads: Heads) -> Tensor:
    """`[tiles, L]`."""
    return _cls(heads.attended("q"), heads.attended("k"), heads.scale)


def joint_cls_attention(heads: Heads) -> Tensor:
    """`[tiles, L]`, one head as wide as all."""
    q, k = (heads.attended(letter).flatten(2)[:, :, None] for letter in "qk")
    return _cls(q, k, q.shape[-1] ** -0.5)


def cls_value_similarity(heads: Heads) -> Tensor:
    """`[tiles, L]`."""
    v = heads.parts["v"]
    return _cls(v, v, 1.0)


def received(heads: Heads) -> Tensor:
    """`[tiles, L]`, or `[P]` within the segments of packed images."""
    return heads.received


def important(heads: Heads, threshold: float) -> Tensor:
    """`[tiles, L]` or `[P]`. What CLS receives is no patch's: it counts as a row of `received` and no more."""
    (q, k), candidates = heads.attended_qk, None
    if heads.cls:
        candidates = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        candidates[:, 0] = False
    known = {"candidates": candidates, "received": heads.received}
    return important_attention(q, k, heads.scale, threshold, **known, **heads.sees)


DERIVE = {
    "cls_attention": cls_attention,
    "joint_cls_attention": joint_cls_attention,
    "cls_value_similarity": cls_value_similarity,
    "received_attention": received,
    "important_attention": important,
    "keys": lambda heads: heads.parts["k"],
    "values": lambda heads: heads.parts["v"],
}
"""kind -> (`Heads`, threshold if the kind has one) -> the signal."""
