"""What methods read beside the features, re-computed from the q/k/v projections of one decoder layer.

Only what a method declares, only at its layer, without eager attention and without an N x N matrix: keys and values
cost one projection of the layer, the last token's attention one row of q against all keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune.adapters.positions import last_valid
from prune.errors import UnsupportedMethodError
from prune.kernels.compaction import take


@dataclass
class LayerInput:
    """What a decoder layer is about to see.

    Args:
        layer: the module.
        index: its number.
        hidden: `[B, L, D]`.
        rope: (cos, sin), each `[B or 1, L, d]`; `[3, B, L, d]` where the attention module itself joins M-RoPE's axes
            (Qwen-VL in older transformers).
        mask: the attention mask the layer gets, or None.
        valid: `[B, L]` bool validity of the new columns.
        past_valid: `[B, P]` bool validity of the cached columns.
        cache: the KV cache, or None.
    """

    layer: nn.Module
    index: int
    hidden: Tensor
    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    valid: Tensor
    past_valid: Tensor
    cache: object


def _tables(at: LayerInput) -> tuple[Tensor, ...]:
    """(cos, sin) `[B or 1, L, d]`, with the t, h and w sections of M-RoPE joined."""
    if at.rope[0].dim() == 3:
        return at.rope
    sections = at.layer.self_attn.config.rope_parameters["mrope_section"] * 2
    parts = (table.split(sections, dim=-1) for table in at.rope)
    return tuple(torch.cat([part[i % 3] for i, part in enumerate(split)], -1) for split in parts)


def _rotate(x: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotary embedding of `x [B, L, H, d]`."""
    cos, sin = (t.unsqueeze(2) for t in rope)
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + rotated * sin


def _project(attention: nn.Module, kind: str, hidden: Tensor) -> Tensor:
    """q, k or v heads `[B, L, H, d]`, through the sub-modules so that LoRA, quantisation and off-loading apply."""
    heads = getattr(attention, f"{kind}_proj")(hidden)
    heads = heads.view(*hidden.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)
    return _all_heads(attention, kind, heads if norm is None else norm(heads), 2)


def _all_heads(attention: nn.Module, kind: str, heads: Tensor, dim: int) -> Tensor:
    """Tensor parallelism gives every process some of the heads; all must choose the same tokens, so by all heads.

    Raises:
        UnsupportedMethodError: there are fewer heads than the config says, and nothing tells where the others are.
    """
    config = attention.config
    total = config.num_attention_heads if kind == "q" else config.num_key_value_heads
    if heads.shape[dim] == total:
        return heads
    mesh = getattr(getattr(attention, f"{kind}_proj").weight, "device_mesh", None)
    if mesh is None or heads.shape[dim] * mesh.size() != total:
        raise UnsupportedMethodError(
            f"{heads.shape[dim]} of the decoder's {total} {kind} heads are in this process, and it is not known where "
            "the others are; use a method that needs no signal of the decoder, such as divprune"
        )
    from torch.distributed.tensor import DTensor, Shard  # slow to import, and rarely needed

    return DTensor.from_local(heads.contiguous(), mesh, [Shard(dim)]).full_tensor()


def keys(at: LayerInput, normed: Tensor) -> Tensor:
    """`[B, L, H_kv, d]` keys after RoPE."""
    return _rotate(_project(at.layer.self_attn, "k", normed), _tables(at))


def values(at: LayerInput, normed: Tensor) -> Tensor:
    """`[B, L, H_kv, d]` values."""
    return _project(at.layer.self_attn, "v", normed)


def last_token_attention(at: LayerInput, normed: Tensor) -> Tensor:
    """`[B, L]` fp32: softmax attention of each row's last valid token to every new column, mean over heads.

    Cached columns take part in the softmax, and a 4-D mask is obeyed. O(B L H d).
    """
    attention = at.layer.self_attn
    width = at.hidden.shape[1]
    columns, last = torch.arange(width, device=at.hidden.device), last_valid(at.valid)
    rope = tuple(take(t, last) for t in _tables(at))
    q = _rotate(_project(attention, "q", take(normed, last)), rope)[:, 0]
    k = keys(at, normed).transpose(1, 2)
    seen = (columns <= last) & at.valid
    past = _past_keys(at.cache, at.index, at.past_valid.shape[1])
    if past is not None:
        past = _all_heads(attention, "k", past, 1)
        k, seen = torch.cat([past.to(k), k], 2), torch.cat([at.past_valid, seen], 1)
    batch, kv_heads, total, dim = k.shape
    grouped = q.view(batch, kv_heads, -1, dim).float()
    logits = grouped @ k.float().transpose(2, 3) * attention.scaling
    if isinstance(at.mask, Tensor) and at.mask.dim() == 4:
        row = take(at.mask[:, 0, :, :total].expand(batch, -1, -1), last)[:, 0]
        seen = seen & (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2)
    logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
    return logits.softmax(-1).mean((1, 2))[:, -width:].nan_to_num(0.0)


def _past_keys(cache, layer: int, length: int) -> Tensor | None:
    """`[B, H_kv, length, d]` cached keys; None if there are none, or the cache keeps them in another form (quantised):
    attention is then normalised over the new columns alone."""
    if cache is None or length == 0 or layer >= len(cache.layers):
        return None
    stored = getattr(cache.layers[layer], "keys", None)
    if not isinstance(stored, Tensor) or stored.dim() != 4 or stored.shape[2] < length:
        return None
    return stored[:, :, :length]


@dataclass
class Projections:
    """Queries `[B, L, H, d]`, keys and values `[B, L, H_kv, d]` of one layer, after RoPE, and the attention's scale."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    def to(self, device: torch.device) -> Projections:
        return Projections(*(x.to(device) for x in (self.queries, self.keys, self.values)), self.scale)


def attention(at: LayerInput, normed: Tensor) -> Projections:
    """All that attention over the new columns is made of. O(B L D^2)."""
    queries = _rotate(_project(at.layer.self_attn, "q", normed), _tables(at))
    return Projections(queries, keys(at, normed), values(at, normed), at.layer.self_attn.scaling)


CAPTURES = {"keys": keys, "values": values, "last_token_attention": last_token_attention, "attention": attention}
"""Signals taken at the layer before the site."""


@torch.no_grad()
def capture(names: tuple[str, ...], at: LayerInput) -> dict[str, Tensor | Projections]:
    """The declared signals of one layer, every one with the sequence in dimension 1."""
    wanted = [name for name in names if name in CAPTURES]
    if not wanted:
        return {}
    norm = at.layer.input_layernorm
    if any(weight.is_meta for weight in norm.parameters()) and not hasattr(norm, "_hf_hook"):
        raise UnsupportedMethodError(
            f"{', '.join(wanted)} are made of a decoder layer's weights before it runs, and they are off-loaded until "
            "then; off-load module by module (leave out preload_module_classes), or use a method that needs no signal "
            "of the decoder, such as divprune"
        )
    normed = norm(at.hidden)
    return {name: CAPTURES[name](at, normed) for name in wanted}
