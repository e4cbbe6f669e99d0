"""DART: drop duplicates of a few pivot tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.errors import ConfigError
from prune.kernels import dot, topk_indices, topk_mask, unit
from prune.kernels.compaction import take
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, VisualTokens


@register
@dataclass
class Dart(Reducer):
    """After `layer` decoder layers, keep a few pivots and the visual tokens least similar to image and text pivots.

    Based on "Stop Looking for 'Important Tokens' in Multimodal Language Models: Duplication Matters More"
    (arXiv 2502.11494). Pivots are the tokens with the largest L1 norm of the keys of layer `layer - 1`. Pivot after
    pivot takes its share of the tokens not taken yet, least similar first; cosine of the final-norm hidden states.

    Where we differ from the authors' code:
        - the count is exact: image pivots and all, with the remainder going to the first pivots (the code rounds the
          share, so that its "128" keeps 132);
        - pivots take turns in ascending order; `pivot_order="authors"` is the code's order, that of a CPython set;
        - a prompt with fewer than `text_pivots` tokens after the image uses those there are; the code fails;
        - every image of a batch is reduced by itself; the code handles batch 1 and the first image.

    Cost: O((N + T) H d + P N D) for P pivots. Signals: keys, normed features, text after the image.

    Args:
        layer: the first decoder layer that sees the kept tokens only (2 in the paper).
        image_pivots: at least 1 (4 in the paper); all are kept, as far as the budget reaches.
        text_pivots: at least 0 (4 in the paper); never among the kept.
        pivot_order: "sorted" (ascending, image before text) or "authors" (reads the pivots back to the host).
        newlines: count separators inside the image (`image_newline`) as visual tokens, as the code does for LLaVA-NeXT.

    Raises:
        ConfigError: an option is out of range.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    pivot_order: str = "sorted"
    newlines: bool = False

    name = "dart"
    title = "Stop Looking for 'Important Tokens' in Multimodal Language Models: Duplication Matters More"
    arxiv = "2502.11494"
    signals = ("keys", "normed_features", "text_features")

    def __post_init__(self):
        for option, least in (("layer", 1), ("image_pivots", 1), ("text_pivots", 0)):
            value = getattr(self, option)
            if value < least:
                raise ConfigError(f"{option}={value!r} must be a whole number >= {least}")
        if self.pivot_order not in ("sorted", "authors"):
            raise ConfigError(f"pivot_order={self.pivot_order!r} must be 'sorted' or 'authors'")

    @property
    def site(self) -> str:
        return f"decoder:{self.layer}"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return Reduction(*dart(tokens, keep, self.image_pivots, self.text_pivots, self.pivot_order))


@torch.no_grad()
def dart(
    tokens: VisualTokens, keep: Sequence[int], image_pivots: int, text_pivots: int, pivot_order: str
) -> tuple[Tensor, Tensor]:
    """`index` `[B, K]` and `valid` `[B, K]` of the kept tokens, ascending; see `Dart`."""
    norm, text_norm = key_norm(tokens.keys), key_norm(tokens.text_keys)
    image_counts = [min(count, image_pivots) for count in keep]
    image, image_valid = topk_indices(norm, image_counts, tokens.mask)
    text, text_valid = topk_indices(text_norm, min(text_pivots, text_norm.shape[1]), tokens.text_mask)
    pivots = torch.cat([take(tokens.normed_features, image), take(tokens.normed_text, text)], 1)
    valid = torch.cat([image_valid, text_valid], 1)

    if pivot_order == "authors":
        columns = torch.cat([tokens.columns.gather(1, image), tokens.text_columns.gather(1, text)], 1)
        pivot_norm = torch.cat([norm.gather(1, image), text_norm.gather(1, text)], 1)
        order = set_order(columns, pivot_norm, valid, image.shape[1])
        pivots, valid = take(pivots, order), valid.gather(1, order)

    features, pivots = unit(tokens.normed_features), unit(pivots)
    taken = topk_mask(norm, image_counts, tokens.mask)
    number = valid.sum(1).clamp(min=1)
    rest = torch.tensor(list(keep)).to(norm.device, non_blocking=True) - taken.sum(1)
    for p in range(valid.shape[1]):
        turn = valid[:, :p].sum(1)  # of this pivot among those of its row; the first ones take the remainder
        share = (rest // number + (turn < rest % number)) * valid[:, p]
        similarity = dot(features, pivots[:, p : p + 1])
        taken = taken | topk_mask(-similarity, share, tokens.mask & ~taken)
    return topk_indices(taken.float(), keep, tokens.mask)


def key_norm(keys: Tensor) -> Tensor:
    """`[B, N]` fp32: L1 norm of keys `[B, N, H, d]` over heads and channels."""
    return torch.linalg.vector_norm(keys, ord=1, dim=(-2, -1), dtype=torch.float32)


def set_order(columns: Tensor, norm: Tensor, valid: Tensor, image_pivots: int) -> Tensor:
    """The order in which CPython iterates over the set of the pivots' columns, as a `[B, P]` permutation.

    The set is filled with the image pivots (the first `image_pivots` of the P) by falling norm, then with the text
    pivots by falling norm. Pivots that are not valid come last. Waits for the device.
    """
    permutation = []
    for row, norms, real in zip(columns.tolist(), norm.tolist(), valid.tolist()):
        slots = [p for p in range(len(row)) if real[p]]
        slots.sort(key=lambda p, norms=norms: (p >= image_pivots, -norms[p]))
        slot_of = {row[p]: p for p in slots}
        order = [slot_of[column] for column in {row[p] for p in slots}]
        permutation.append(order + [p for p in range(len(row)) if not real[p]])
    return torch.tensor(permutation, dtype=torch.int64).view(columns.shape).to(columns.device)
