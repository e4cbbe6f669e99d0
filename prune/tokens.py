"""What a reducer is given (`VisualTokens`) and what it returns (`Reduction`). Tensors only, no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.kernels.compaction import take


@dataclass
class VisualTokens:
    """The visual tokens of a batch of images at one site, with the signals the reducer declared.

    A row is one *image* (or tile set, or video) wherever it sits: a sample with three images gives three rows, so
    budgets and similarities never mix images. `B` images, padded at the end to the longest, `N`. Rows of padding
    (`mask` False) hold arbitrary values and must never be kept.

    Args:
        features: `[B, N, D]` hidden states at the site, in the model's dtype (score in fp32).
        mask: `[B, N]` bool, True for real tokens; None means all are real.
        coordinates: `[B, N, 4]` int64 (tile, frame, row, column) of every token on its grid; -1 where a token has no
            place (separators such as `image_newline`).
        columns: `[B, N]` int64 position of every token in the sample's token sequence, padding not counted.
        keys, values: `[B, N, H_kv, d]` of the decoder layer before the site, keys after RoPE.
        last_token_attention: `[B, N]` fp32, softmax attention of the sample's last valid token to every visual token
            in the decoder layer before the site, mean over heads.
        normed_features: `[B, N, D]` features after the decoder's final norm.
        text_features: `[B, T, D]` hidden states at the site of the text tokens AFTER the image in the same sample
            (the question); ascending, padded anywhere, see `text_mask`.
        text_mask: `[B, T]` bool.
        text_columns: `[B, T]` int64.
        text_keys: `[B, T, H_kv, d]`, given when both `keys` and `text_features` are declared.
        normed_text: `[B, T, D]`, given when both `normed_features` and `text_features` are declared.
    """

    features: Tensor
    mask: Tensor | None = None
    coordinates: Tensor | None = None
    columns: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    last_token_attention: Tensor | None = None
    normed_features: Tensor | None = None
    text_features: Tensor | None = None
    text_mask: Tensor | None = None
    text_columns: Tensor | None = None
    text_keys: Tensor | None = None
    normed_text: Tensor | None = None

    def __post_init__(self):
        if self.mask is None:
            self.mask = torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)


SIGNALS = ("keys", "values", "last_token_attention", "normed_features", "text_features")
"""Names a reducer may declare in `signals`. `text_features` alone adds `text_mask` and `text_columns` too."""


@dataclass
class Merge:
    """Weighted sources added to kept tokens: `out[slot] = scale[slot] * kept[slot] + sum(weight * features[source])`.

    Args:
        source: `[B, M]` int64 index of the token that is folded in.
        slot: `[B, M]` int64 slot in `Reduction.keep` that receives it.
        weight: `[B, M]` fp32; 0 for padding.
        scale: `[B, K]` fp32 weight of the kept token itself; None means 1.
    """

    source: Tensor
    slot: Tensor
    weight: Tensor
    scale: Tensor | None = None


@dataclass
class Reduction:
    """Which tokens survive.

    Args:
        keep: `[B, K]` int64 indices into the row's N tokens, ascending over the valid slots.
        valid: `[B, K]` bool, False for the padding of ragged counts (at the end of the row); None means all valid.
        merge: what to fold into the kept tokens before the rest is dropped, if anything.
    """

    keep: Tensor
    valid: Tensor | None = None
    merge: Merge | None = None

    def __post_init__(self):
        if self.valid is None:
            self.valid = torch.ones_like(self.keep, dtype=torch.bool)

    def apply(self, features: Tensor) -> Tensor:
        """The kept features `[B, K, D]` of `[B, N, D]`, merged in fp32 if asked for, in the input's dtype."""
        kept = take(features, self.keep)
        if self.merge is None:
            return kept
        merge = self.merge
        out = kept.float() if merge.scale is None else kept.float() * merge.scale[..., None]
        folded = take(features, merge.source).float() * merge.weight[..., None]
        index = merge.slot[..., None].expand_as(folded)
        return out.scatter_add(1, index, folded).to(features.dtype)
