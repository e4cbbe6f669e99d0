"""FiCoCo: layer by layer, fold the most redundant visual tokens into those they correlate with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.attention import ELEMENTS
from prune.kernels.compaction import take
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.merging import chosen_indices, folds
from prune.kernels.similarity import dot
from prune.kernels.topk import topk_mask
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import AttentionInputs, Merge, Reduction, VisualTokens


@register
@dataclass
class FiCoCo(Reducer):
    """In front of every layer from the fifth on, fold a few redundant visual tokens into their strongest correlates.

    Based on "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration" (arXiv 2411.17686),
    FiCoCo-L. All attention is that of the layer before, as logits without causal mask, mean over heads. Filter: a token
    is redundant that attends much to the image and little to the text, beta * mean over the image - (1 - beta) * mean
    over the text. Correlate: gamma * its attention to a kept token + (1 - gamma) * the way there over the text; the
    recipients of a token are the kept ones in the top `1 - quantile` of that. Compress: its feature is split over them
    by softmax and averaged in: (x + sum a s) / (1 + sum a).

    Every layer removes the same number. With 32 layers, 576 tokens and a final count of 198 that is the released 14.

    Where paper, authors' code and we differ (`compat=True` is the code's way in all but the first and the last two):
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

    Cost per layer: O((N + T) H d) to filter, O(r (N + T) H d + T N H d + r T N) for r tokens folded and T of text.
    Signals: attention.

    Args:
        variant: "l", in the decoder. "v", in the vision encoder, is not available yet.
        layers: the decoder layers in front of which tokens are folded, ascending, at least 1. None: all from the fifth
            of 32 (index 5) on, or from as deep elsewhere.
        beta: weight of the image beside the text in the filter, in [0, 1].
        gamma: weight of the direct correlation, in [0, 1].
        quantile: of the correlations of a token, above which they are recipients, in [0, 1).
        compat: the authors' arithmetic.
        newlines: count separators inside the image (`image_newline`) as visual tokens.

    Raises:
        ConfigError: an option is out of range, or `variant="v"`.
    """

    variant: str = "l"
    layers: tuple[int, ...] | None = None
    beta: float = 0.6
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
        if self.variant == "v":
            raise ConfigError('variant="v" acts inside the vision encoder, which comes with vision sites; use "l"')
        if self.variant != "l":
            raise ConfigError(f"variant={self.variant!r} must be 'l'")
        if self.layers is not None:
            self.layers = tuple(self.layers)
            if not ascending(self.layers):
                raise ConfigError(f"layers={self.layers} must be ascending whole numbers >= 1, such as range(5, 32)")
        for option in ("beta", "gamma", "quantile"):
            value = getattr(self, option)
            if not 0 <= value <= 1 or (option == "quantile" and value == 1):
                raise ConfigError(f"{option}={value!r} must be in [0, 1{')' if option == 'quantile' else ']'}")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        layers = self.layers or range(scale_layers((5,), 32, geometry.layers)[0], geometry.layers)
        n, rounds = geometry.visual_tokens, len(layers)
        return tuple(
            Stage(Site.parse(f"decoder:{layer}"), self, n - (n - keep) * done // rounds)
            for done, layer in enumerate(layers, 1)
        )

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return ficoco_l(tokens, keep, self.beta, self.gamma, self.quantile, self.compat)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n, text, width = geometry.visual_tokens, geometry.text_tokens, geometry.heads * geometry.head_dim
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
    width = mask.shape[1] - min(keep, default=0)
    source, real = chosen_indices(mask & ~chosen, width)
    found = [
        recipients(attention.correlation(part, gamma, compat), mask if compat else chosen, quantile)
        for part in source.split(max(1, ELEMENTS // max(1, mask.numel())), dim=1)
    ]
    target, share = (torch.cat(parts, 1) for parts in zip(*found))  # [B, R, K]
    share = share.masked_fill(~real[..., None], 0)
    source = source[..., None].expand_as(target).flatten(1)
    source, slot, weight = folds(chosen, source, target.flatten(1), share.flatten(1))
    index, valid = chosen_indices(chosen, max(keep, default=0))
    if compat:
        return Reduction(index, valid, Merge(source, slot, weight))
    received = torch.zeros(index.shape, device=weight.device).scatter_add_(1, slot, weight)
    weight = weight / (1 + received).gather(1, slot)
    return Reduction(index, valid, Merge(source, slot, weight, 1 / (1 + received)))


@dataclass
class Logits:
    """Attention logits between visual tokens and text, mean over heads, made when asked for.

    One head as wide as all, for the mean over heads of dot products is a dot product: `[B, N or T, H * d]` queries and
    keys in fp32, zero where there is no token.
    """

    queries: Tensor
    keys: Tensor
    text_queries: Tensor
    text_keys: Tensor
    count: Tensor
    text_count: Tensor

    @classmethod
    def of(cls, inputs: AttentionInputs, mask: Tensor) -> Logits:
        row, heads = inputs.sample[:, None], inputs.queries.shape[2]

        def rows(x: Tensor, slots: Tensor, real: Tensor) -> Tensor:
            x = x[row, slots].float().repeat_interleave(heads // x.shape[2], dim=2).flatten(2)
            return x.masked_fill(~real[..., None], 0)

        image, text = (inputs.slots, mask), (inputs.text_slots, inputs.text_mask)
        queries, text_queries = (rows(inputs.queries, *at) * (inputs.scale / heads) for at in (image, text))
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


def recipients(correlation: Tensor, candidates: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The candidates above the quantile of every row, at least one, and the softmax over them, strongest first.

    Args:
        correlation: `[B, R, N]` fp32.
        candidates: `[B, N]` bool.

    Returns:
        `[B, R, K]` int64 and fp32. Rows with fewer recipients than K have weight 0 at the end.
    """
    allowed = correlation.masked_fill(~candidates[:, None], -torch.inf)
    n = candidates.sum(1) - 1
    number = (n - (n.double() * quantile).floor().long()).clamp(min=1)[:, None, None]
    most = max(1, candidates.shape[1] - 1 - int((candidates.shape[1] - 1) * quantile))
    logits, target = allowed.sort(dim=-1, descending=True, stable=True)
    logits, target = logits[..., :most], target[..., :most]
    logits = logits.masked_fill(torch.arange(most, device=logits.device) >= number, -torch.inf)
    return target, logits.softmax(-1).nan_to_num(0.0)


# ------------------------------------------------------------------------------- in the encoder: not a variant yet
def importance_v(attention: Tensor, weight: float) -> Tensor:
    """`[B, T - 1]` fp32 importance of the patches in an encoder layer: what CLS gives them less what they give others.

    Args:
        attention: `[B, T, T]` fp32, CLS first, mean over heads.
        weight: of the attention of CLS, beside that to the patches; each of length 1 over the patches.
    """
    from_cls, to_patches = attention[:, 0, 1:], attention[:, 1:, 1:].mean(-1)
    return weight * from_cls.div(_length(from_cls)) - (1 - weight) * to_patches.div(_length(to_patches))


def penalise(importance: Tensor, spared: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Double the redundancy of the most redundant patch of every 2 x 2 window, so that every window loses some.

    Args:
        importance: `[B, P]` fp32 of the patches alive, which fill the grid's open places in order.
        spared: `[B, side * side]` bool, places that are not open.
        side: of the grid; of an odd one the last row and column are in no window.

    Returns:
        The new importance, and `spared` with the windows' choices added. As in the authors' code, a place of the grid
        is taken for the number of a patch; places beyond P change nothing.
    """
    rank = ((~spared).cumsum(1) - 1).clamp(0, importance.shape[1] - 1)
    grid = importance.gather(1, rank).masked_fill(spared, torch.inf)
    even = side // 2 * 2
    windows = grid.view(-1, side, side)[:, :even, :even].unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    least = windows.argmin(-1)
    corner = torch.arange(0, even, 2, device=least.device)
    place = ((corner[:, None] + least // 2) * side + corner + least % 2).flatten(1)
    chosen = torch.zeros_like(spared).scatter_(1, place, True)
    chosen[:, importance.shape[1] :] = False
    hit = chosen[:, : importance.shape[1]]
    doubled = torch.where(importance > 0, importance / 2, importance * 2)
    return torch.where(hit, doubled, importance), spared | chosen


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
