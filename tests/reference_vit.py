"""Vision transformers by hand, one image at a time: what the engine must compute, written without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune.adapters.vit_families import find_vit


def entering(model: nn.Module, run, pixels: Tensor) -> tuple[Tensor, dict]:
    """What enters block 0 (`[B, T, D]`) and its keyword arguments, on a bare model."""
    found = {}

    def keep(module, args, kwargs):
        found["x"], found["kwargs"] = args[0], kwargs

    handle = find_vit(model).blocks[0].block.register_forward_pre_hook(keep, with_kwargs=True)
    run(model, pixels)
    handle.remove()
    x = found["x"]
    return (x if len(x) == len(pixels) else x.transpose(0, 1)), found["kwargs"]


def turned(x: Tensor, rope: Tensor | None, prefix: int, numbers: list[int], half: bool) -> Tensor:
    """Rotary embedding of `[H, T, d]`, pair by pair."""
    if rope is None:
        return x
    rope = rope if rope.dim() == 3 else rope[None]
    out = x.clone()
    for head in range(len(x)):
        table = rope[head % len(rope)]
        sin, cos = table.chunk(2, -1)
        for token, number in enumerate(numbers):
            d = x.shape[-1]
            for channel in range(d):
                if half:
                    other, sign = (channel + d // 2, -1) if channel < d // 2 else (channel - d // 2, 1)
                else:
                    other, sign = (channel + 1, -1) if channel % 2 == 0 else (channel - 1, 1)
                value = x[head, prefix + token]
                out[head, prefix + token, channel] = (
                    value[channel] * cos[number, channel] + sign * value[other] * sin[number, channel]
                )
    return out


def heads_by_hand(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[H, T, d]` of `x` `[T, D]`, before norms and rotary embedding."""
    heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
    if getattr(attention, "in_proj_weight", None) is not None:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        rows = (x @ weight.T + bias).chunk(3, -1)
    elif getattr(attention, "qkv", None) is not None:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        rows = x @ attention.qkv.weight.T
        rows = (rows if bias is None else rows + bias).chunk(3, -1)
    else:
        rows = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    q, k, v = (row.view(len(x), -1, rows[0].shape[-1] // heads).transpose(0, 1) for row in rows)
    groups = heads // len(k)
    return q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)


def attend(attention: nn.Module, x: Tensor, sizes: Tensor | None, rope, prefix: int, numbers: list[int]):
    """(output before the projection's residual `[T, D]`, q, k, v, weights `[H, T, T]`)."""
    q, k, v = heads_by_hand(attention, x)
    for name in ("q_norm", "k_norm"):
        if isinstance(getattr(attention, name, None), nn.Module):
            q, k = (attention.q_norm(q), k) if name == "q_norm" else (q, attention.k_norm(k))
    half = getattr(attention, "rotate_half", False)
    q, k = (turned(part, rope, prefix, numbers, half) for part in (q, k))
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if sizes is not None:
        logits = logits + torch.cat([torch.zeros(prefix), sizes.log()])
    weights = logits.softmax(-1)
    joined = (weights @ v).transpose(0, 1).reshape(len(x), -1)
    if isinstance(getattr(attention, "norm", None), nn.Module):
        joined = attention.norm(joined)
    out = next(getattr(attention, name) for name in ("proj", "out_proj", "o_proj") if hasattr(attention, name))
    return out(joined), q, k, v, weights


def block_by_hand(block: nn.Module, x: Tensor, cut, sizes, rope, prefix, numbers):
    """One block on `[T, D]`; `cut` is called between attention and MLP and gives (x, sizes, numbers)."""
    same = nn.Identity()
    norm1 = _first(block, "norm1", "layernorm_before", "layer_norm1", "ln_1")
    norm2 = _first(block, "norm2", "layernorm_after", "layer_norm2", "ln_2")
    attention = _first(block, "attn", "attention", "self_attn")
    scale1 = _first(block, "ls1", "layer_scale1", "ls_1", default=same)
    scale2 = _first(block, "ls2", "layer_scale2", "ls_2", default=same)
    out = scale1(attend(attention, norm1(x), sizes, rope, prefix, numbers)[0])
    if getattr(block, "gamma_1", None) is not None:
        out = out * block.gamma_1
    x, sizes, numbers = cut(x + out, sizes, numbers)
    out = scale2(block.mlp(norm2(x)))
    if getattr(block, "gamma_2", None) is not None:
        out = out * block.gamma_2
    return x + out, sizes, numbers


def _first(module: nn.Module, *names: str, default=None):
    found = next((getattr(module, name) for name in names if hasattr(module, name)), default)
    assert found is not None, names
    return found


def reduce_by_hand(x: Tensor, prefix: int, numbers: list[int], sizes: Tensor, stage: dict):
    """(tokens `[P + K, D]`, sizes, numbers) after a `Reduction` of one row, entry by entry."""
    patches = x[prefix:]
    rows, left, grown = [], [], []
    for slot, (source, valid) in enumerate(zip(stage["keep"], stage["valid"])):
        if not valid:
            continue
        row, size = patches[source].clone(), float(sizes[source])
        if stage.get("merge"):
            merge = stage["merge"]
            row = row * merge["scale"][slot]
            for entry in range(len(merge["source"])):
                if merge["slot"][entry] == slot and merge["weight"][entry] > 0:
                    other = merge["source"][entry]
                    row = row + merge["weight"][entry] * patches[other]
                    total = sum(merge["weight"][e] for e in range(len(merge["source"])) if merge["source"][e] == other)
                    size += float(sizes[other]) * merge["weight"][entry] / total
        rows.append(row)
        left.append(numbers[source])
        grown.append(size)
    return torch.cat([x[:prefix], torch.stack(rows)]), torch.tensor(grown), left


def forward_by_hand(model: nn.Module, run, pixels: Tensor, prefix: int, stages: dict, proportional: bool):
    """Tokens `[P + K, D]` behind the last block for one image `[1, 3, H, W]`.

    Args:
        stages: (block, place) -> keep, valid and merge of the image's row, as lists.
    """
    x, kwargs = entering(model, run, pixels)
    x = x[0]
    numbers = list(range(len(x) - prefix))
    sizes = torch.ones(len(numbers))
    for index, part in enumerate(find_vit(model).blocks):
        if (index, "input") in stages:
            x, sizes, numbers = reduce_by_hand(x, prefix, numbers, sizes, stages[index, "input"])
        cut = stages.get((index, "inside"))

        def between(x, counted, numbers, cut=cut, sizes=sizes):
            if cut is None:
                return x, sizes, numbers
            return reduce_by_hand(x, prefix, numbers, sizes, cut)

        rope = kwargs.get("rope")
        if rope is not None and hasattr(find_vit(model).trunk, "rope_mixed") and find_vit(model).trunk.rope_mixed:
            rope = find_vit(model).trunk.rope.get_embed()[index]
        counted = sizes if proportional else None
        x, sizes, numbers = block_by_hand(part.block, x, between, counted, rope, prefix, numbers)
    return x, sizes, numbers
