"""Cases that read attention, put into one batch with another row."""

from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from golden_cases import batch
from torch import Tensor

from prune import VisualTokens
from prune.tokens import AttentionInputs

ALONE = "attention inputs: the reader itself puts the case into a ragged batch"
ATTENTION = ("attention", "entry_attention")


def plain_attention(queries: Tensor, keys: Tensor, valid: Tensor, begin: int, n: int, scale: float) -> AttentionInputs:
    """One image of `n` tokens from column `begin` on in every row; all valid columns after it are its text."""
    length = valid.shape[1]
    rows = torch.arange(len(valid))
    text = torch.arange(begin + n, length).expand(len(valid), -1)
    return AttentionInputs(
        queries=queries,
        keys=keys,
        values=torch.zeros_like(keys),
        valid=valid,
        scale=scale,
        sample=rows,
        slots=torch.arange(begin, begin + n).expand(len(valid), -1),
        text_slots=text,
        text_mask=valid.gather(1, text),
        last=torch.where(valid, torch.arange(length), 0).amax(1),
    )


def in_batch(tokens: VisualTokens) -> VisualTokens:
    """The case behind a row of fewer tokens and less text, with padding on the left that holds NaN."""
    plain = {f.name: getattr(tokens, f.name) for f in fields(tokens) if f.name not in (*ATTENTION, "memory")}
    other = {}
    for name, value in plain.items():
        if isinstance(value, Tensor):
            other[name] = value[:1, 1:] if "text" in name else value[:1, 2:]
    both = batch([VisualTokens(**other), VisualTokens(**plain)])
    for name in ATTENTION:
        if (at := getattr(tokens, name)) is not None:
            setattr(both, name, _with_other(at))
    return both


def _with_other(at: AttentionInputs, extra: int = 3) -> AttentionInputs:
    def sequences(x: Tensor) -> Tensor:
        filler = False if x.dtype == torch.bool else torch.nan
        return F.pad(torch.cat([x[:1].flip(1), x]), (0, 0) * (x.dim() - 2) + (extra, 0), value=filler)

    def images(x: Tensor, dropped: int) -> Tensor:
        filler = False if x.dtype == torch.bool else 0
        return torch.cat([F.pad(x[:1, dropped:], (0, dropped), value=filler), x])

    moved = replace(at, slots=at.slots + extra, text_slots=at.text_slots + extra)
    return AttentionInputs(
        queries=sequences(at.queries),
        keys=sequences(at.keys),
        values=sequences(at.values),
        valid=sequences(at.valid),
        scale=at.scale,
        sample=torch.cat([at.sample[:1], at.sample + 1]),
        slots=images(moved.slots, 2),
        text_slots=images(moved.text_slots, 1),
        text_mask=images(at.text_mask, 1),
        last=torch.cat([at.last[:1], at.last]) + extra,
    )
