"""FiCoCo: layer by layer, fold the most redundant visual tokens into those they correlate with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.compaction import take
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.merging import chosen_indices
from prune.kernels.recipients import split_among_recipients
from prune.kernels.similarity import dot
from prune.kernels.topk import topk_mask
from prune.method import Reducer, Site, Stage
from prune.reducers.ficoco_v import FiCoCoV
from prune.registry import register
from prune.tokens import AttentionInputs, Merge, Reduction, VisualTokens


@register
@dataclass
class FiCoCo(Reducer):
    """Layer by layer, fold a few redundant visual tokens into their strongest correlates.

    Based on "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration" (arXiv 2411.17686).

    FiCoCo-L (`variant="l"`) acts in front of every decoder layer from the fifth on. All attention is that of the layer
    before, as logits without causal mask, mean over heads. Filter: a token is redundant that attends much to the image
    and little to the text, beta * mean over the image - (1 - beta) * mean over the text. Correlate: gamma * its
    attention to a kept token + (1 - gamma) * the way there over the text; the recipients of a token are the kept ones
    in the top `1 - quantile` of that. Compress: its feature is split over them by softmax and averaged in:
    (x + sum a s) / (1 + sum a).

    FiCoCo-V (`variant="v"`) acts inside the encoder, between attention and MLP of every block of the second half (index
    12 on of 24). Filter: a patch is redundant that attends much to the patches and that CLS attends little to, beta *
    mean attention to the patches - (1 - beta) * attention of CLS, softmax, mean over heads; that of the most redundant
    patch of every 2 x 2 window counts double, so that all regions lose some. Without CLS, minus the cosine of a patch's
    key to the mean key is the second term. Correlate and compress: as above, by the attention to patches that stay.

    Every layer removes the same number. With 32 layers, 576 tokens and a final count of 198 that is the released 14.

    Where paper, authors' code and we differ in L (`compat=True` is the code's way in all but the first and last two):
        - the code takes the first 576 columns for the image, system prompt and all; we take the image;
        - mean over the image, as in the paper; the code sums, so that its text term hardly counts;
        - recipients are kept tokens, as many as its own quantile gives; in the code tokens folded themselves can
          receive, and what they receive is lost;
        - recipients are averaged with what they receive, as in the paper; the code adds without dividing;
        - the code protects the first column, where it has the start of the prompt;
        - weights are a softmax over the recipients: the paper's C / sum C is no average where logits are negative;
        - tokens are folded between two layers, by attention of the one before; the code does so inside the layer,
          between attention and MLP;
        - positions are kept; the code truncates them and, in decoding, lags by one layer.
    In V we follow the paper; the released code cannot be run in a model to any purpose, for it loses the CLS token in
    its second layer (see `ficoco_v.released_v`, which repeats it). Of our own are: a negative redundancy is halved
    where a positive one is doubled, as in the code; on odd grids the last windows are smaller, the code has none there;
    every image decides for itself, the code once per batch; weights are C / sum C, of a softmax none is negative.

    Cost per layer: L O((N + T) H d) to filter, O(r (N + T) H d + T N H d + r T N) for r tokens folded and T of text;
    V O(N^2 H d) in chunks. Signals: attention (L), block (V).

    Args:
        variant: "l", in the decoder, or "v", inside the vision encoder.
        layers: the decoder layers in front of which, or the blocks in which, tokens are folded, ascending, at least 1.
            None: all from the fifth of 32 (index 5), for V from the middle (index 12 of 24) on.
        beta: weight of the image beside the text, or CLS, in the filter, in [0, 1]; None is the paper's: 0.6 for L,
            0.35 for V.
        gamma: weight of the direct correlation in L, in [0, 1].
        quantile: of the correlations of a token, above which they are recipients, in [0, 1).
        compat: the authors' arithmetic; L only.
        newlines: count separators inside the image (`image_newline`) as visual tokens.

    Raises:
        ConfigError: an option is out of range, or `compat` with V.
    """

    variant: str = "l"
    layers: tuple[int, ...] | None = None
    beta: float | None = None
    gamma: float = 0.6
    quantile: float = 0.998
    compat: bool = False
    newlines: bool = False

    name = "ficoco"
    title = "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration"
    arxiv = "2411.17686"
    signals = ("attention",)
    merges = True

    def __post_init__(self):
        if self.variant not in ("l", "v"):
            raise ConfigError(f"variant={self.variant!r} must be 'l' (in the decoder) or 'v' (inside the encoder)")
        if self.variant == "v":
            if self.compat:
                raise ConfigError(
                    'compat=True with variant="v" is refused: the released code re-orders its tokens, loses the CLS '
                    "token in its second layer and carries state from image to image; leave compat out"
                )
            self.signals = ("block",)
        if self.beta is None:
            self.beta = 0.6 if self.variant == "l" else 0.35
        if self.layers is not None:
            if not ascending(self.layers):
                raise ConfigError(f"layers={self.layers} must be ascending whole numbers >= 1, such as range(5, 32)")
        for option in ("beta", "gamma", "quantile"):
            value = getattr(self, option)
            if not 0 <= value <= 1 or (option == "quantile" and value == 1):
                raise ConfigError(f"{option}={value!r} must be in [0, 1{')' if option == 'quantile' else ']'}")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        kind, reducer, start, depth = "decoder", self, ((5,), 32), geometry.layers
        if self.variant == "v":
            kind, reducer, start, depth = "block", FiCoCoV(self.beta, self.quantile), ((12,), 24), geometry.blocks
        layers = self.layers or range(scale_layers(*start, depth)[0], depth)
        n, rounds = geometry.visual_tokens, len(layers)
        return tuple(
            Stage(Site.parse(f"{kind}:{layer}"), reducer, n - (n - keep) * done // rounds)
            for done, layer in enumerate(layers, 1)
        )

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return ficoco_l(tokens, keep, self.beta, self.gamma, self.quantile, self.compat)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n, text, width = geometry.visual_tokens, geometry.text_tokens, geometry.kv_heads * geometry.head_dim
        return 2 * ((n - keep) * (n + text) * width + text * n * width + (n - keep) * text * n)


@torch.no_grad()
def ficoco_l(
    tokens: VisualTokens, keep: Sequence[int], beta: float, gamma: float, quantile: float, compat: bool
) -> Reduction:
    """See `FiCoCo`."""
    attention, mask = Logits.of(tokens.attention, tokens.mask), tokens.mask
    redundancy = attention.redundancy(beta, compat)
    if compat:
        redundancy[:, 0] = -torch.inf
    chosen = topk_mask(-redundancy, keep, mask)
    correlation = lambda source: attention.correlation(source, gamma, compat)  # noqa: E731
    candidates = mask if compat else chosen
    source, slot, weight, received = split_among_recipients(correlation, chosen, mask, keep, quantile, candidates)
    index, valid = chosen_indices(chosen, max(keep, default=0))
    if compat:
        return Reduction(index, valid, Merge(source, slot, weight))
    weight = weight / (1 + received).gather(1, slot)
    return Reduction(index, valid, Merge(source, slot, weight, 1 / (1 + received)))


@dataclass
class Logits:
    """Attention logits between visual tokens and text, mean over heads, made when asked for.

    One head as wide as all key heads, for the mean over heads of dot products is a dot product, and the query heads
    that share a key head can be summed first: `[B, N or T, Hkv * d]` queries and keys in fp32, zero where there is no
    token.
    """

    queries: Tensor
    keys: Tensor
    text_queries: Tensor
    text_keys: Tensor
    count: Tensor
    text_count: Tensor

    @classmethod
    def of(cls, inputs: AttentionInputs, mask: Tensor) -> Logits:
        row, heads, shared = inputs.sample[:, None], inputs.queries.shape[2], inputs.keys.shape[2]

        def rows(x: Tensor, slots: Tensor, real: Tensor) -> Tensor:
            x = x[row, slots].float()
            if x.shape[2] > shared:
                x = x.unflatten(2, (shared, -1)).sum(3)
            return x.flatten(2).masked_fill_(~real[..., None], 0)

        image, text = (inputs.slots, mask), (inputs.text_slots, inputs.text_mask)
        queries, text_queries = (rows(inputs.queries, *at).mul_(inputs.scale / heads) for at in (image, text))
        keys, text_keys = (rows(inputs.keys, *at) for at in (image, text))
        counts = (real.sum(1)[:, None].clamp(min=1) for _, real in (image, text))
        return cls(queries, keys, text_queries, text_keys, *counts)

    def redundancy(self, beta: float, compat: bool = False) -> Tensor:
        """`[B, N]`."""
        to_image = dot(self.queries, self.keys.sum(1, keepdim=True))
        to_text = dot(self.queries, self.text_keys.sum(1, keepdim=True)) / self.text_count
        return beta * (to_image if compat else to_image / self.count) - (1 - beta) * to_text

    def correlation(self, source: Tensor, gamma: float, compat: bool = False) -> Tensor:
        """`[B, R, N]` of the tokens `source` `[B, R]` with all; in compat not with themselves."""
        queries = take(self.queries, source)
        with torch.autocast(queries.device.type, enabled=False):
            direct = queries @ self.keys.mT
            over_text = (queries @ self.text_keys.mT) @ (self.text_queries @ self.keys.mT)
        found = gamma * direct + (1 - gamma) * over_text
        return found.scatter(2, source[..., None], -torch.inf) if compat else found
