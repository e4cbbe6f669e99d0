"""VFlowOpt: prune in three stages by one importance map of the vision encoder, recycling what the first one drops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.merging import chosen_indices, folds
from prune.kernels.tiles import group_extreme, group_rank, group_sum, tile_groups
from prune.kernels.topk import to_device, topk_mask
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import Merge, Reduction, Tower, VisualTokens

LAYERS, OF = (9, 18), 28
PRESETS = (
    ((17.387, 39.265), (0.11661529508161146, 1.0, 0.6011)),
    ((15.581, 34.760), (0.2651026358526424, 0.9833433139039235, 0.8773258179532721)),
    ((11.757, 28.683), (0.7233201448753168, 0.748747637472693, 0.487)),
)
"""Released (cell side, threshold) and share each stage retains, for a mean of 10 %, 25 % and 50 % of the tokens over
the layers."""
MAPS = tuple(f"attention{number}" for number in range(len(PRESETS)))
"""Names of the signals where every preset's threshold is read."""


@register
@dataclass
class VFlowOpt(Reducer):
    """Prune before the decoder and twice inside by what important patches attend to, folding what the first cut drops.

    Based on "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization"
    (arXiv 2508.05211). One importance map of the vision encoder ranks the tokens at all three cuts: the attention a
    patch receives from those that receive more than `threshold` times the mean. The first cut also drops one more token
    for every `cell` x `cell` square an image has room for; per square of the grid, what is dropped is averaged with the
    importance as weight and put back at the square's most important dropped token.

    All of it was found by the authors by Bayesian search for three budgets (`PRESETS`, LLaVA-OneVision); `prune tune
    vflowopt` is that search for any model and budget. A final count equal to one of theirs gives exactly its counts,
    others interpolate linearly in the final share. `threshold` and `cell` do not: every image takes those of the preset
    whose first cut leaves the most similar share.

    Where paper, authors' code and we differ:
        - a tile in which no patch is important has the attention received from all of them; the code has NaN;
        - counts are exact: as many of the best squares as the count has room for, filled up with the best dropped
          tokens. `compat=True` keeps one token per square, however many there are: the code's 258 becomes 263, and
          the budget of the first cut is no bound;
        - Eq. 4 sums over the important rows, the code averages; that matters with `alpha` only, and we average;
        - weights that sum to zero give a plain mean instead of NaN;
        - positions are those of the full sequence in all stages; the code renumbers in the first stage alone;
        - nothing is recycled in videos, as in the code, which does not in prompts with several images either; we do;
        - separators, if counted, have importance 1 and are never folded, as in the code.

    Cost: a few sorts of N values per stage. Signals: attention from the important patches, for all presets unless
    `threshold` is given (the encoder runs before the counts are known; three cost 6 % more than one); pixels if `alpha`
    is not 0.

    Args:
        layers: the two decoder layers in front of which the later cuts are. None: 9 and 18 of 28, or as deep elsewhere.
        shares: what the first and the second cut leave of the tokens they see, each in (0, 1], but never less than the
            final count; the third cut leaves that. None: as the presets, see above.
        cell: side of the squares in tokens, at least 1; None takes the nearest preset's.
        threshold: what makes a patch important, at least 0; None takes the nearest preset's. In a tile of fewer patches
            (the presets have 29 to 39, SigLIP's tiles 729) none can receive that much.
        alpha: weight of the patches' entropy (softmax over a tile); 0 in all released settings. Read from pixels of
            encoders with one patch per token.
        recycle: False drops without folding.
        compat: counts as the authors' code has them; see above.
        newlines: count separators inside the image (`image_newline`) as visual tokens, as the code does.

    Raises:
        ConfigError: an option is out of range.
    """

    layers: tuple[int, ...] | None = None
    cell: float | None = None
    alpha: float = 0.0
    recycle: bool = True
    compat: bool = False
    newlines: bool = False
    threshold: float | None = None
    shares: tuple[float, float] | None = None

    name = "vflowopt"
    title = "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization"
    arxiv = "2508.05211"
    merges = True
    search = {
        "shares.0": (0.1, 1.0),
        "shares.1": (0.1, 1.0),
        "threshold": (0.0, 50.0),
        "cell": (3.0, 24.0),
        "alpha": (-1.0, 1.0),
    }

    def __post_init__(self):
        if self.layers is not None:
            if not ascending(self.layers) or len(self.layers) > 2:
                raise ConfigError(f"layers={self.layers} must be one or two ascending numbers >= 1, such as (9, 18)")
        if self.shares is not None and not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares={self.shares!r} must be two numbers in (0, 1], such as (0.265, 0.983)")
        if self.cell is not None and not self.cell >= 1:
            raise ConfigError(f"cell={self.cell!r} must be at least 1, or None")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha={self.alpha!r} must be a finite number")
        self.adaptive = self.compat
        self.tower  # noqa: B018 - checks the threshold

    @property
    def tower(self) -> dict[str, Tower]:
        thresholds = {"attention": self.threshold}
        if self.threshold is None:
            thresholds = {name: threshold for name, ((_, threshold), _) in zip(MAPS, PRESETS)}
        found = {name: Tower("important_attention", threshold=value) for name, value in thresholds.items()}
        return {**found, "pixels": Tower("pixels")} if self.alpha else found

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        layers = self.layers or scale_layers(LAYERS, OF, geometry.layers)
        counts = stage_counts(geometry.visual_tokens, keep, self.shares)
        later = replace(self, recycle=False)
        return (
            Stage(Site.parse("projected"), self, counts[0]),
            *(Stage(Site.parse(f"decoder:{n}"), later, count) for n, count in zip(layers, counts[3 - len(layers) :])),
        )

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        importance = self.importance(tokens, keep)
        if self.recycle:
            sides = [self.cell] * len(PRESETS) if self.cell else [side for (side, _), _ in PRESETS]
            cell = doubles(sides, importance.device)[nearest_preset(keep, tokens.mask)]
            return recycle(tokens, importance, keep, cell, self.compat)
        chosen = topk_mask(importance, keep, tokens.mask)
        return Reduction(*chosen_indices(chosen, max(keep, default=0)))

    def importance(self, tokens: VisualTokens, keep: Sequence[int] = ()) -> Tensor:
        """`[B, N]` fp32. With entropy or presets it is made at the first stage, of whole images, and carried in
        `memory`; `keep`, the counts of that stage, is what presets are chosen by."""
        if (carried := tokens.memory.get("vflowopt")) is not None:
            place = torch.searchsorted(tokens.memory["vflowopt_index"], tokens.index.contiguous())
            return carried.gather(1, place.clamp(max=carried.shape[1] - 1))
        importance = tokens.tower.get("attention")
        if presets := importance is None:
            maps = torch.stack([tokens.tower[name] for name in MAPS], 1)
            importance = maps[torch.arange(len(maps), device=maps.device), nearest_preset(keep, tokens.mask)]
        if self.alpha:
            group = tile_groups(tokens.tile, tokens.mask)
            importance = importance + self.alpha * group_softmax(entropy(tokens.tower["pixels"]), group)
        if tokens.coordinates is not None:
            importance = importance.masked_fill(tokens.coordinates[..., 2] < 0, 1.0)
        if self.alpha or presets:
            tokens.memory["vflowopt"] = importance
            tokens.memory["vflowopt_index"] = tokens.index.masked_fill(~tokens.mask, torch.iinfo(torch.long).max)
        return importance


def doubles(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def nearest_preset(keep: Sequence[int], mask: Tensor) -> Tensor:
    """`[B]` int64, for every image the preset whose first cut leaves the share nearest to that of `keep`."""
    share = to_device(keep, mask.device) / mask.sum(1).clamp(min=1).double()
    firsts = doubles([shares[0] for _, shares in PRESETS], mask.device)
    return (share[:, None] - firsts).abs().argmin(1)


def left(n: int, share: float) -> int:
    """Tokens a cut leaves of `n` that retains this share."""
    return n - round(n * (1 - share))


def stage_counts(n: int, keep: int, shares: tuple[float, float] | None = None) -> tuple[int, int, int]:
    """Tokens of `n` left over after the three cuts, the last one being `keep`; `shares` as the option of that name."""
    if shares is not None:
        one = max(keep, left(n, shares[0]))
        return one, max(keep, left(one, shares[1])), keep
    curve = [(0.0, 0.0, 0.0)]
    for _, (first, second, third) in PRESETS:
        one = left(n, first)
        two = left(one, second)
        if keep == left(two, third):
            return one, two, keep
        curve.append((first * second * third, first, first * second))
    curve.append((1.0, 1.0, 1.0))
    share = keep / n
    low, high = next((a, b) for a, b in zip(curve, curve[1:]) if share <= b[0])
    along = (share - low[0]) / (high[0] - low[0])
    one, two = (max(keep, round(n * (low[i] + along * (high[i] - low[i])))) for i in (1, 2))
    return one, two, keep


@torch.no_grad()
def recycle(tokens: VisualTokens, importance: Tensor, keep: Sequence[int], cell: Tensor, compat: bool) -> Reduction:
    """Keep the most important tokens, and per cell of the grid one that the cell's dropped tokens are folded into.

    Args:
        importance: `[B, N]` fp32, non-negative.
        cell: `[B]` float64, side of the cells, in tokens.
        compat: the count kept is that of `keep`, less the cells there is room for, plus the cells there are.
    """
    places, count = tokens.coordinates, tokens.mask.sum(1)
    budget = torch.minimum(to_device(keep, count.device), count)
    image = ((places[..., 1] <= 0) | ~tokens.mask).all(1)  # of one frame
    extra = torch.minimum((count / cell**2).long(), budget) * image
    certain = topk_mask(importance, budget - extra, tokens.mask)
    low = tokens.mask & ~certain & (places[..., 2] >= 0) & image[:, None]
    row, column = ((places[..., i].clamp(min=0) / cell[:, None]).long() for i in (2, 3))
    key = ((places[..., 0].clamp(min=0) << 16) + places[..., 1].clamp(min=0) << 32) + (row << 16) + column
    group = tile_groups(key, low)
    best = low & (group_rank(importance, group, low) == 0)
    if not compat:  # the best cells, then the best of what is left over
        best = topk_mask(importance, extra, best)
        certain = certain | topk_mask(importance, extra - best.sum(1), tokens.mask & ~certain & ~best)
        low = low & ~certain
    chosen = certain | best
    position = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    into = group_sum(position.masked_fill(~best, 0), group)
    mass = importance.clamp(min=0).masked_fill(~low, 0)
    total = group_sum(mass, group)
    weight = torch.where(total > 0, mass / total.clamp(min=1e-30), 1 / group_sum(low, group).clamp(min=1))
    fold = low & ~best & group_extreme(best.long(), group, "amax").bool()
    source, slot, folded = folds(chosen, position, into, weight.masked_fill(~fold, 0))
    index, valid = chosen_indices(chosen, chosen.shape[1] if compat else max(keep, default=0))
    scale = torch.where(best, weight, 1.0).gather(1, index)
    return Reduction(index, valid, Merge(source, slot, folded, scale))


def entropy(pixels: Tensor) -> Tensor:
    """Entropy in bits of the grey values of patches `[..., 3 * p * p]`, normalised to [-1, 1], as an fp32 `[...]`.

    Values are cut to 256 levels the authors' way: those below 0 wrap around.
    """
    level = (255 * pixels.float()).trunc().long() % 256
    grey = (0.3333 * level.unflatten(-1, (3, -1)).sum(-2).float()).round().long()
    histogram = torch.zeros(*grey.shape[:-1], 256, device=grey.device)
    share = histogram.scatter_add_(-1, grey, torch.ones_like(grey, dtype=torch.float32)) / grey.shape[-1]
    return -(share * torch.log2(share + 1e-10)).sum(-1)


def group_softmax(x: Tensor, group: Tensor) -> Tensor:
    """Softmax of `x` `[B, N]` fp32 within every token's group."""
    x = (x - group_extreme(x, group, "amax")).exp()
    return x / group_sum(x, group)
