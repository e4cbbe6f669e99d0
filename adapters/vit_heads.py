"""Queries, keys and values of the attention of a vision transformer, from what its projections gave."""

from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune.adapters.heads import Heads
from prune.kernels.compaction import take
from prune.tokens import AttentionInputs, BlockAttention

NAMES = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}
NEVER = -1e30  # a logit whose softmax is 0, and which is finite, so that a product with 0 is 0


def heads_of(attention: nn.Module) -> tuple[int, int, int]:
    """Heads, key heads and channels of a head."""
    heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
    dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    if not dim:
        dim = (getattr(attention, "embed_dim", None) or _width(attention)) // heads
    return heads, getattr(attention, "num_kv_heads", None) or heads, dim


def _width(attention: nn.Module) -> int:
    """Channels of the queries, where the module does not say (EVA of older timm)."""
    fused = getattr(attention, "qkv", None)
    return attention.q_proj.out_features if fused is None else fused.out_features // 3


def projections(attention: nn.Module) -> list[str]:
    """The sub-modules whose outputs hold q, k and v, and norms over them.

    None of q, k and v are there where the module multiplies with its weights itself (`nn.MultiheadAttention`, EVA with
    a bias on q and v alone): then they are made again from what enters the module.
    """
    names = [name for name in ("q_norm", "k_norm") if _is_norm(getattr(attention, name, None))]
    if hasattr(attention, "in_proj_weight") or getattr(attention, "q_bias", None) is not None:
        return names
    if getattr(attention, "qkv", None) is not None:
        return ["qkv", *names]
    return [_name(attention, letter) for letter in "qkv"] + names


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _name(attention: nn.Module, letter: str) -> str:
    return next(name for name in NAMES[letter] if getattr(attention, name, None) is not None)


class Captured(BlockAttention):
    """A `BlockAttention` whose tensors are made when somebody reads them.

    Args:
        attention: the module.
        entered: `[B, T, D]` what enters it.
        rope: rotary table of the patches as timm hands it to the module, `[..., N, 2 * d]`, or None.
        valid, bias, prefix, cls: see `BlockAttention`.
        full: whether all of `valid` is True, known on the host.
    """

    def __init__(
        self,
        attention: nn.Module,
        entered: Tensor,
        rope: Tensor | None,
        valid: Tensor,
        bias: Tensor | None,
        prefix: int,
        cls: bool,
        full: bool,
    ):
        self.attention, self.entered, self.rope = attention, entered, rope
        self.prefix, self.cls, self.full = prefix, cls, full
        self._valid, self._bias = valid, bias
        self.raw: dict[str, Tensor] = {}
        self.slots: Tensor | None = None  # of the tokens that are left, after a cut behind this attention
        self.scale = getattr(attention, "scale", None) or getattr(attention, "scaling", None)
        self.scale = self.scale or heads_of(attention)[2] ** -0.5

    def narrowed(self, slots: Tensor, valid: Tensor | None) -> Captured:
        """The same for some of the tokens (`[B, T]`, slots of what is left); `valid` of the patches, or None."""
        other = copy(self)
        other.slots = slots if self.slots is None else self.slots.gather(1, slots)
        other.full = valid is None
        other._left_valid = torch.ones_like(slots, dtype=torch.bool)
        other._left_valid[:, self.prefix :] = True if valid is None else valid
        for name in ("queries", "keys", "values", "raw_keys"):
            vars(other).pop(name, None)
        return other

    def _left(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.slots is None else take(x, self.slots)

    @property
    def valid(self) -> Tensor:
        return self._valid if self.slots is None else self._left_valid

    @property
    def bias(self) -> Tensor | None:
        return self._left(self._bias)

    @cached_property
    def queries(self) -> Tensor:
        return self._left(self._attended("q"))

    @cached_property
    def keys(self) -> Tensor:
        return self._left(self._attended("k"))

    @cached_property
    def values(self) -> Tensor:
        return self._left(self._grouped(self._projected("v")))

    @cached_property
    def raw_keys(self) -> Tensor | None:
        if "k_norm" not in self.raw and self.rope is None:
            return None
        return self._left(self._grouped(self._projected("k")))

    @torch.no_grad()
    def _projected(self, letter: str) -> Tensor:
        """`[B, T, H, d]` before norm and rotary embedding."""
        number, attention, dim = "qkv".index(letter), self.attention, heads_of(self.attention)[2]
        if "qkv" in self.raw:
            return self.raw["qkv"].unflatten(-1, (3, -1, dim))[:, :, number]
        if name := next((name for name in NAMES[letter] if name in self.raw), None):
            return self.raw[name].unflatten(-1, (-1, dim))
        fused = attention.in_proj_weight if hasattr(attention, "in_proj_weight") else attention.qkv.weight
        rows = slice(number * len(fused) // 3, (number + 1) * len(fused) // 3)
        if hasattr(attention, "in_proj_bias"):
            bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
        else:
            bias = (attention.q_bias, attention.k_bias, attention.v_bias)[number]
        return F.linear(self.entered, fused[rows], bias).unflatten(-1, (-1, dim))

    def _attended(self, letter: str) -> Tensor:
        normed = self.raw.get(f"{letter}_norm")
        x = self._projected(letter) if normed is None else normed.transpose(1, 2)
        if self.rope is not None:
            x = rotated(x, self.rope, self.prefix, getattr(self.attention, "rotate_half", False))
        return self._grouped(x)

    def _grouped(self, x: Tensor) -> Tensor:
        """Every query head gets its key head."""
        groups = heads_of(self.attention)[0] // x.shape[2]
        return x if groups == 1 else x.repeat_interleave(groups, 2)


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary embedding of the patches in `x` `[B, T, H, d]`, as timm's `apply_rot_embed_cat` does it."""
    patches = x[:, prefix:].transpose(1, 2)
    sin, cos = rope.chunk(2, -1)
    if half:
        first, second = patches.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    patches = (patches * cos + turned * sin).to(x.dtype).transpose(1, 2)
    return torch.cat([x[:, :prefix], patches], 1)


def biased(block: Captured) -> tuple[Tensor, Tensor]:
    """q and k `[B, T, H, d]`, with one more channel that holds what is added to the logits, if anything is.

    So every kernel that takes queries and keys sees proportional attention, and nothing of padding.
    """
    hidden = ~block.valid
    if block.bias is None and block.full:
        return block.queries, block.keys
    extra = torch.zeros_like(block.valid, dtype=torch.float32) if block.bias is None else block.bias.float()
    extra = extra.masked_fill(hidden, NEVER)[:, :, None, None].expand(*block.keys.shape[:3], 1)
    one = torch.full_like(extra, 1 / block.scale)
    return torch.cat([block.queries.float(), one], -1), torch.cat([block.keys.float(), extra], -1)


class BlockHeads(Heads):
    """What `prune.adapters.heads.DERIVE` reads, of a block."""

    def __init__(self, block: Captured):
        self.block, self.scale, self.cls = block, block.scale, block.cls

    @cached_property
    def _biased(self) -> tuple[Tensor, Tensor]:
        return biased(self.block)

    def attended(self, letter: str) -> Tensor:
        return self._biased["qk".index(letter)]

    @property
    def parts(self) -> dict[str, Tensor]:
        block = self.block
        return {"k": block.keys if block.raw_keys is None else block.raw_keys, "v": block.values}

    @property
    def sees(self) -> dict[str, Tensor]:
        return {} if self.block.full else {"valid": self.block.valid}


def attention_inputs(block: Captured) -> AttentionInputs:
    """The block's attention as reducers written for decoders read it.

    The CLS token comes last, as the token whose row they read does there; there is no text.
    """
    q, k = biased(block)
    batch, length = block.valid.shape
    device = q.device
    order = torch.arange(length, device=device).roll(-1)
    nothing = torch.zeros(batch, 0, dtype=torch.long, device=device)
    return AttentionInputs(
        queries=q[:, order],
        keys=k[:, order],
        values=block.values[:, order],
        valid=block.valid[:, order],
        scale=block.scale,
        sample=torch.arange(batch, device=device),
        slots=((torch.arange(block.prefix, length, device=device) - 1) % length).expand(batch, -1),
        text_slots=nothing,
        text_mask=nothing.bool(),
        last=torch.full((batch,), length - 1, device=device),
        causal=False,
    )
