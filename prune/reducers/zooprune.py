"""ZOO-Prune: tokens whose projection moves most when they are nudged, and that are unlike each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels import topk_indices
from prune.kernels.diverse import importance_times_distance
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens

ELEMENTS = 1 << 26
"""Projected numbers held at a time."""

CACHED = 1 << 20
"""On the CPU: more do not stay in its caches."""


@register
@dataclass
class ZooPrune(Reducer):
    """After the projector, pick greedily by sensitivity of the projector times distance to the nearest pick.

    Based on "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models"
    (arXiv 2509.24837). Sensitivity is the mean over random unit directions u of ||M(x + h u) - M(x - h u)|| / 2h, for
    the projector M and its input x, scaled to [0, 1]. Distance is that of cosine, of projected features. Scaling and
    picking are done inside every tile of an image, which gets its share of the budget.

    Where we differ from the authors' code:
        - directions come from `seed`; the code draws new ones from the global generator for every image;
        - the differences are taken in the model's dtype, as the projector gives them, but nudges and norms in fp32; in
          half precision h is 0.5, because steps of 0.01 are as small as the rounding (`estimator="jvp"` has no step);
        - the whole projector for LLaVA-NeXT too; the code's low-rank one is built before the weights are loaded;
        - newlines of LLaVA-NeXT are text, and the budget follows the tokens there are, not 2880;
        - where one token joins several patches (Qwen, InternVL), a direction spans all of them.

    Cost: 2 m passes of the projector over all tokens, then O(K N D). A projector that tells its layers (linear,
    activation, linear, as LLaVA's) is cheaper, with the same result up to rounding: its first layer runs once, for
    W (x + h u) = W x + h W u, and its second on the differences, m passes instead of 2 m.

    Args:
        directions: m, at least 1 (64 in the paper; 16 to 160 are said to do as well).
        step: h, > 0; None is the paper's 0.01, and 0.5 in half precision.
        estimator: "fd" (finite differences) or "jvp" (their limit for small h, by forward-mode differentiation; costs
            about the same).
        seed: of the directions.

    Raises:
        ConfigError: an option is out of range.
    """

    directions: int = 64
    step: float | None = None
    estimator: str = "fd"
    seed: int = 0

    name = "zooprune"
    title = "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models"
    arxiv = "2509.24837"
    tower = {"features": Tower("features")}
    needs_projector = True
    positions = "compact"

    def __post_init__(self):
        if not 1 <= self.directions < 2**16:
            raise ConfigError(f"directions={self.directions!r} must be a whole number from 1 to 65535")
        if self.step is not None and not self.step > 0:
            raise ConfigError(f"step={self.step!r} must be None or > 0")
        if self.estimator not in ("fd", "jvp"):
            raise ConfigError(f"estimator={self.estimator!r} must be 'fd' or 'jvp'")

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        x = tokens.tower["features"].masked_fill(~tokens.mask[..., None], 0)
        bank = unit_directions(self.directions, x.shape[-1], self.seed).to(x.device, non_blocking=True)
        if self.estimator == "jvp":
            moved = sensitivity_jvp(x.float(), tokens.projector, bank)
        else:
            step = self.step or (0.01 if tokens.features.dtype == torch.float32 else 0.5)
            moved = sensitivity(x.float(), tokens.projector, bank, step, tokens.features.shape[-1])
        chosen = importance_times_distance(tokens.features, moved, keep, tokens.tile, tokens.mask)
        return Reduction(*topk_indices(chosen.float(), keep, tokens.mask))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        hidden = geometry.projector_hidden if self.estimator == "fd" else 0
        if not hidden:
            return 2 * self.directions * geometry.visual_tokens * geometry.projector_flops
        first = (geometry.visual_tokens + self.directions) * geometry.tower_features
        last = geometry.visual_tokens * self.directions * geometry.hidden_size
        return 2 * hidden * (first + last)


def unit_directions(count: int, width: int, seed: int) -> Tensor:
    """`[count, width]` fp32 random rows of length 1, drawn on the CPU from `seed` alone."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn / (torch.linalg.vector_norm(drawn, dim=-1, keepdim=True) + 1e-12)


@torch.no_grad()
def sensitivity(x: Tensor, project: Callable[[Tensor], Tensor], bank: Tensor, step: float, width: int) -> Tensor:
    """`[B, N]` fp32: how far the projection of `x` `[B, N, C]` moves along the directions `bank` `[m, C]`, on average.

    Args:
        project: the projector. It may have `layers`, (linear, activation, linear): two `nn.Linear` and an element-wise
            function between them, that are all it does.
        step: h of the central difference.
        width: of the projection; sets the size of the chunks of directions.
    """
    total = torch.zeros(x.shape[:2], device=x.device)
    limit = CACHED if x.device.type == "cpu" else ELEMENTS
    if (layers := getattr(project, "layers", None)) is not None:
        total = _through_layers(x, layers, step * bank, min(limit, ELEMENTS))
        return total / (2 * step * len(bank))
    for part in bank.split(max(1, min(limit, ELEMENTS) // max(1, x.shape[0] * x.shape[1] * width))):
        nudge = step * part
        ahead, behind = (project(x[:, :, None] + sign * nudge).float() for sign in (1, -1))
        total += torch.linalg.vector_norm(ahead - behind, dim=-1).sum(-1)
    return total / (2 * step * len(bank))


def _through_layers(x: Tensor, layers: tuple, nudges: Tensor, limit: int) -> Tensor:
    """`[B, N]` fp32: the sum over `nudges` `[m, C]` of how far apart the projections of x + and - a nudge are.

    Products in the layers' dtype, everything else in fp32.
    """
    first, activation, last = layers
    batch, n, _ = x.shape
    rows = torch.cat([x, nudges.expand(batch, -1, -1)], 1).to(first.weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        rows = linear(rows, first.weight).float()
        hidden, moves = rows[:, :n].flatten(0, 1), rows[0, n:]
        hidden = hidden if first.bias is None else hidden + first.bias.float()
        step = max(1, limit // max(1, hidden.shape[1]))
        out = []
        for part in hidden.split(step):
            total = part.new_zeros(len(part))
            for move in moves.split(max(1, limit // max(1, part.numel()))):
                apart = activation(part[:, None] + move) - activation(part[:, None] - move)
                moved = linear(apart.to(last.weight.dtype), last.weight)
                total += torch.linalg.vector_norm(moved, dim=-1, dtype=torch.float32).sum(1)
            out.append(total)
    return torch.cat(out).view(batch, n)


def sensitivity_jvp(x: Tensor, project: Callable[[Tensor], Tensor], bank: Tensor) -> Tensor:
    """The limit of `sensitivity` for small steps."""
    total = torch.zeros(x.shape[:2], device=x.device)
    for direction in bank:
        _, moved = torch.func.jvp(project, (x,), (direction.expand_as(x),))
        total += torch.linalg.vector_norm(moved.detach().float(), dim=-1)
    return total / len(bank)
