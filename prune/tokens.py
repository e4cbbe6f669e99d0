"""What a reducer is given (`VisualTokens`) and what it returns (`Reduction`). Tensors only, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prune.errors import ConfigError
from prune.kernels.compaction import take
from prune.kernels.merging import chosen_indices, fold_into

TOWER_KINDS = (
    "cls_attention",
    "joint_cls_attention",
    "cls_value_similarity",
    "received_attention",
    "important_attention",
    "keys",
    "values",
    "features",
    "pixels",
)
"""What `Tower.kind` may be."""

ALIVE = "alive"
"""One more kind, for the engine itself: 1 for tokens whose patch was left by stages inside the encoder, else 0."""


@dataclass(frozen=True)
class Tower:
    """A signal of the vision encoder; a reducer lists those it reads in `tower`, by names of its own.

    Where one visual token stands for several patches (Qwen's 2 x 2, InternVL's pixel shuffle) g is their number. Maps
    go through the model's own packing of tiles (un-padding, resizing, pooling of video frames) as the features do;
    separators get 0.

    Args:
        kind: one of `TOWER_KINDS`:
            "cls_attention" `[B, N]` fp32: softmax attention of the CLS token to the token's patch, mean over heads.
            "joint_cls_attention" `[B, N]` fp32: the same with all heads joined to one.
            "cls_value_similarity" `[B, N]` fp32: softmax, over all tokens of the tile, of the unscaled products of the
                CLS token's value with theirs, at the token's patch, mean over heads.
            "received_attention" `[B, N]` fp32: attention the token's patches receive, mean over all queries of the
                tile (or window, for windowed layers) and heads.
            "important_attention" `[B, N]` fp32: the same from the important patches only, those that themselves
                receive more than `threshold` times what patches of the tile (or window) receive on average; CLS is no
                patch. Where none does, it is "received_attention".
            "keys", "values" `[B, N, H, d]`: projections with bias, before rotary embedding; mean over the patches.
            "features" `[B, N, g * Dv]`: output of the layer, for layer None exactly what the projector reads (of all
                layers it reads, after a norm that follows the last one); patches joined in the projector's order.
            "pixels" `[B, N, g * P]`: normalised pixel values of the token's patches.
        layer: which encoder layer: None is the one whose output the projector reads (`vision_feature_layer`, or the
            last); an int counts from 0, a negative one from the end; a float in (0, 1) is a share of the depth:
            9 / 24 of 24 layers is the ninth, index 8. "pixels" has no layer.
        threshold: for "important_attention" alone, which needs one: at least 0.

    Raises:
        ConfigError: unknown kind, a layer that is none of these, or a threshold missing, out of range or out of place.
    """

    kind: str
    layer: int | float | None = None
    threshold: float | None = None

    def __post_init__(self):
        if self.kind not in (*TOWER_KINDS, ALIVE):
            raise ConfigError(f"tower signal {self.kind!r} is unknown; known are {', '.join(TOWER_KINDS)}")
        share = isinstance(self.layer, float)
        whole = self.layer is None or (isinstance(self.layer, int) and not isinstance(self.layer, bool))
        if not (whole or (share and 0 < self.layer < 1)):
            raise ConfigError(f"layer={self.layer!r} must be None, a whole number, or a share of the depth in (0, 1)")
        if self.kind != "important_attention":
            if self.threshold is not None:
                raise ConfigError(f"threshold={self.threshold!r} is for important_attention only, not {self.kind}")
        elif type(self.threshold) not in (int, float) or not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold={self.threshold!r} must be a number >= 0 for important_attention")


@dataclass
class AttentionInputs:
    """Queries, keys and values of one decoder layer for whole sequences; see `prune.kernels.attention`.

    `S` sequences (one per batch row) of `L` columns, maybe fewer than the prompt has after an earlier cut; `B` images.
    Attention is causal over the valid columns. Columns of an earlier turn, which only the KV cache holds, and a mask of
    the caller's own (4-D) are left out.

    Args:
        queries: `[S, L, H, d]` after RoPE.
        keys, values: `[S, L, H_kv, d]`, keys after RoPE.
        valid: `[S, L]` bool, False for padding.
        scale: factor of the logits.
        sample: `[B]` int64 row of every image.
        slots: `[B, N]` int64, where the image's tokens are among the L.
        text_slots, text_mask: `[B, T]`, where the text after the image is; `text_mask` False for padding.
        last: `[S]` int64 slot of the last valid token; in a vision transformer, of the CLS token.
        causal: False in vision transformers, where every token looks at every other.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    scale: float
    sample: Tensor
    slots: Tensor
    text_slots: Tensor
    text_mask: Tensor
    last: Tensor
    causal: bool = True


@dataclass
class BlockAttention:
    """Queries, keys and values of the attention of a vision transformer that ran last before the site.

    `P` prefix tokens (CLS, distillation, registers) come first, then the N patches the reducer was given. For a reducer
    with `place = "inside"` this is the attention of the site's own block, else that of the block before.

    Args:
        queries, keys: `[B, P + N, H, d]` as they meet in the attention: after norms over heads and rotary embedding.
        values: `[B, P + N, H, d]`.
        valid: `[B, P + N]` bool, False for the padding of ragged counts.
        bias: `[B, P + N]` fp32 that was added to the logits of every key (proportional attention), or None.
        scale: factor of the logits.
        prefix: P.
        cls: whether the first token is a CLS token.
        raw_keys: `[B, P + N, H, d]` keys before norms and rotary embedding; None where they are `keys`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    bias: Tensor | None
    scale: float
    prefix: int
    cls: bool
    raw_keys: Tensor | None = None


@dataclass
class Projector:
    """What maps "features" `[..., g * Dv]` of the tower to `[..., D]`; call it.

    Args:
        project: does it, for rows in any dtype.
        layers: (linear, activation, linear) if that is all it does, as in LLaVA: two `nn.Linear` and a function of
            every element; else None.
    """

    project: Callable[[Tensor], Tensor]
    layers: tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear] | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        return self.project(rows)


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
        index: `[B, N]` int64 index of every token among the image's original tokens, before any stage; None becomes
            0 to N - 1.
        tile: `[B, N]` int64 encoder tile (crop) of the image, or frame of the video, a token came from: 0 is the whole
            image where there are crops too; None becomes 0. Separators have -1.
        patch: `[B, N, 2]` int64 (row, column) of the token inside its tile, in units of tokens.
        tower: name -> tensor, the signals declared in `tower`; see `Tower`.
        projector: maps "features" `[..., g * Dv]` of the tower to `[..., D]`; given if `needs_projector`. See
            `Projector`.
        memory: scratch the stages of one prefill share, by name; rows are images, so that what an early stage stored
            per original token is `memory[name].gather(1, index)` later on.
        keys, values: `[B, N, H_kv, d]` of the decoder layer before the site, keys after RoPE.
        last_token_attention: `[B, N]` fp32, softmax attention of the sample's last valid token to every visual token
            in the decoder layer before the site, mean over heads.
        normed_features: `[B, N, D]` features after the decoder's final norm.
        attention: of the decoder layer before the site.
        entry_attention: of the site's own layer, at its input.
        transition: `[B, N, A, 4]` fp32, for the A layers of `transition_layers` that have run: length of output over
            length of input, and their cosine, of the self-attention module; the same of the MLP.
        transition_sums: `[B, A, 2]` fp32, sum of exp(1 - cosine) over the valid columns of the sample's sequence.
        inputs: `[B, N, D]` what entered the language model for these tokens.
        text_inputs: `[B, T, D]` what entered it for the text after the image; with `text_mask` and `text_columns`.
        text_features: `[B, T, D]` hidden states at the site of the text tokens AFTER the image in the same sample
            (the question); ascending, padded anywhere, see `text_mask`.
        text_mask: `[B, T]` bool.
        text_columns: `[B, T]` int64.
        sizes: `[B, N]` fp32, the patches every token stands for, at the blocks of a vision transformer; None means all
            stand for one.
        prefix_features: `[B, P, D]` the prefix tokens (CLS first, if there is one) at a block; None elsewhere.
        block: the attention that ran last before the site, at the blocks of a vision transformer.
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
    index: Tensor | None = None
    tile: Tensor | None = None
    patch: Tensor | None = None
    tower: dict[str, Tensor] = field(default_factory=dict)
    projector: Projector | Callable[[Tensor], Tensor] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    attention: AttentionInputs | None = None
    entry_attention: AttentionInputs | None = None
    transition: Tensor | None = None
    transition_sums: Tensor | None = None
    inputs: Tensor | None = None
    text_inputs: Tensor | None = None
    sizes: Tensor | None = None
    prefix_features: Tensor | None = None
    block: BlockAttention | None = None

    def __post_init__(self):
        shape, device = self.features.shape[:2], self.features.device
        if self.mask is None:
            self.mask = torch.ones(shape, dtype=torch.bool, device=device)
        if self.index is None:
            self.index = torch.arange(shape[1], device=device).expand(shape)
        if self.tile is None:
            self.tile = torch.zeros(shape, dtype=torch.long, device=device)


SIGNALS = (
    "keys",
    "values",
    "last_token_attention",
    "normed_features",
    "text_features",
    "attention",
    "entry_attention",
    "transition",
    "inputs",
    "block",
)
"""Names a reducer may declare in `signals`. "block" exists at the blocks of vision transformers only.
`text_features` and `inputs` add `text_mask` and `text_columns` too."""


@dataclass
class Merge:
    """Weighted sources added to kept tokens: `out[slot] = scale[slot] * kept[slot] + sum(weight * features[source])`.

    Args:
        source: `[B, M]` int64 index of the token that is folded in.
        slot: `[B, M]` int64 slot in `Reduction.keep` that receives it.
        weight: `[B, M]` fp32; 0 for padding.
        scale: `[B, K]` fp32 weight of the kept token itself; None means 1.
        space: "here" merges the features at the site; "tower" merges the vision encoder's features ("features" of
            `Tower` at its default layer) and sends the sums through the projector: tokens that receive something are
            replaced by the result. Only at `projected`, and the reducer must declare `needs_projector`.

    Raises:
        ConfigError: another `space`.
    """

    source: Tensor
    slot: Tensor
    weight: Tensor
    scale: Tensor | None = None
    space: str = "here"

    def __post_init__(self):
        if self.space not in ("here", "tower"):
            raise ConfigError(f"space={self.space!r} must be 'here' or 'tower'")


@dataclass
class Reduction:
    """Which tokens survive.

    Args:
        keep: `[B, K]` int64 indices into the row's N tokens, ascending over the valid slots; at a block of a vision
            transformer in any order, which becomes the order of the tokens.
        valid: `[B, K]` bool, False for the padding of ragged counts (at the end of the row); None means all valid.
        merge: what to fold into the kept tokens before the rest is dropped, if anything.
        sizes: `[B, K]` fp32, the patches every kept token stands for from now on, at a block only; None counts them
            from the merge: a kept token has its own size plus that of what is folded into it, and a source that goes
            to several slots is split in proportion to its weights.
    """

    keep: Tensor
    valid: Tensor | None = None
    merge: Merge | None = None
    sizes: Tensor | None = None

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
        return fold_into(out, features, merge.source, merge.slot, merge.weight).to(features.dtype)

    def sparing(self, counts: Sequence[int], mask: Tensor) -> Reduction:
        """The same, but some rows keep all their valid tokens as they are.

        Args:
            counts: per row, on the host: the number of its valid tokens, 0 for rows that are not spared.
            mask: `[B, N]` bool, the valid tokens.
        """
        spared = (torch.tensor(counts) > 0).to(mask.device, non_blocking=True)[:, None]
        more = max(0, max(counts) - self.keep.shape[1])
        keep, valid = chosen_indices(mask, self.keep.shape[1] + more)
        keep = torch.where(spared, keep, pad(self.keep, (0, more)))
        valid = torch.where(spared, valid, pad(self.valid, (0, more)))  # type: ignore[arg-type]
        merge = self.merge
        if merge is not None:
            scale = None if merge.scale is None else pad(merge.scale, (0, more), value=1.0).masked_fill(spared, 1.0)
            merge = replace(merge, weight=merge.weight.masked_fill(spared, 0.0), scale=scale)
        return Reduction(keep, valid, merge)
