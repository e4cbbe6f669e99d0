"""Soft clusters of a grid of tokens that stay local (Expedit), and features interpolated back from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ELEMENTS = 1 << 24
"""Weights between tokens and clusters held at a time: 64 MiB of fp32."""


@dataclass
class Cells:
    """K cells laid over a grid of H x W tokens, of every image its own: `rows` rows of cells, cell row i being the
    cells floor(i K / rows) to floor((i + 1) K / rows) - 1. If K = rows * w that is a grid of rows x w.

    Args:
        height, width: `[B, 1]` int64 of the grid of tokens.
        count: `[B, 1]` int64 K, at most H * W.
        rows: `[B, 1]` int64.
    """

    height: Tensor
    width: Tensor
    count: Tensor
    rows: Tensor

    @classmethod
    def of(cls, height: Tensor, width: Tensor, count: Tensor) -> Cells:
        """As square as the grid allows: the rows are K H / W under a root, rounded (half to even)."""
        rows = (count.double() * height / width).sqrt().round().long()
        least = (count + width - 1) // width  # no row of cells has more of them than tokens
        return cls(height, width, count, rows.maximum(least).minimum(height).minimum(count))

    def begin(self, row: Tensor) -> Tensor:
        """The first cell of a row of cells."""
        return row * self.count // self.rows

    def columns(self, row: Tensor) -> Tensor:
        """How many cells a row of cells has."""
        return (self.begin(row + 1) - self.begin(row)).clamp(min=1)

    def near(self, row: Tensor, column: Tensor, down: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
        """The cell so far from the home cell of tokens at (row, column) `[B, N]`; the home is by nearest up-sampling.

        Returns:
            `cell` `[B, N]` int64, whether there `is` one, and whether it `pools` the token (adaptive average pooling,
            whose regions overlap where sizes are no multiples).
        """
        at = row * self.rows // self.height + down
        inside = (at >= 0) & (at < self.rows)
        at = at.clamp(min=0).minimum(self.rows - 1)
        columns = self.columns(at)
        along = column * columns // self.width + right
        inside &= (along >= 0) & (along < columns)
        along = along.clamp(min=0).minimum(columns - 1)
        pools = _covers(at, row, self.rows, self.height) & _covers(along, column, columns, self.width)
        return self.begin(at) + along, inside, inside & pools

    def middle(self, cell: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column) of the token in the middle of every cell `[B, K]`; no two cells share one."""
        row = ((cell + 1) * self.rows - 1) // self.count  # the row whose first cell is this one or before it
        columns = self.columns(row)
        along = cell - self.begin(row)
        return (2 * row + 1) * self.height // (2 * self.rows), (2 * along + 1) * self.width // (2 * columns)


def _covers(cell: Tensor, token: Tensor, cells: Tensor, tokens: Tensor) -> Tensor:
    """Whether adaptive pooling of `tokens` places to `cells` cells gives the token to the cell."""
    return (token >= cell * tokens // cells) & (token < ((cell + 1) * tokens + cells - 1) // cells)


@torch.no_grad()
def cluster_grid(
    x: Tensor,
    row: Tensor,
    column: Tensor,
    mask: Tensor,
    cells: Cells,
    width: int,
    window: int,
    rounds: int,
    tau: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft k-means in which a token belongs to the clusters around its home cell only.

    Clusters start as adaptive average pools. In a round, a token belongs to the clusters of the cells at most
    `window // 2` rows and columns from home by the softmax of -tau times the squared distances; a cluster becomes the
    mean of the tokens weighted by how much they belong to it.

    Args:
        x: `[B, N, D]` float; everything in fp32.
        row, column: `[B, N]` int64, places on a full grid.
        mask: `[B, N]` bool.
        cells: the clusters; `width`, at least the largest count, on the host.
        rounds: at least 1.
        tau: > 0; None is 2 over the mean squared distance of the image's tokens to the pool of their home.

    Returns:
        `cell` `[B, N, window ** 2]` int64, `belongs` `[B, N, window ** 2]` fp32 (0 where there is no cell and at
        padding; sums to 1 over a token's cells), both of the last round; and `[B, width]` fp32, what belongs to a cell.

    Cost: 2 rounds + 1 (and 1 more for tau=None) products of `[N, width]` and `[N, D]` per image, in chunks of tokens;
        two fp32 copies of `x`. Elements outside the window are 0 there: passing over `x` once per cell of the window
        costs more, up to some 1000 clusters.
    """
    real = mask[..., None]
    x = x.float().masked_fill(~real, 0)
    # Without the mean, distances would be lost in large equal numbers.
    x = (x - x.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]).masked_fill_(~real, 0)
    reach = window // 2
    steps = [(down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)]
    found = [cells.near(row, column, *step) for step in steps]
    cell = torch.stack([near for near, _, _ in found], -1).masked_fill_(~real, 0)
    allowed = torch.stack([inside for _, inside, _ in found], -1) & real
    belongs = (torch.stack([pool for _, _, pool in found], -1) & real).float()
    centres, total = _means(x, cell, belongs, width)
    home = len(steps) // 2
    if tau is None:
        spread = _distances(x, centres, cell[..., home : home + 1])[..., 0].masked_fill(~mask, 0).sum(1)
        tau = (2 / (spread / mask.sum(1).clamp(min=1)).clamp(min=1e-12))[:, None, None]
    for _ in range(rounds):
        distance = _distances(x, centres, cell)
        belongs = (-tau * distance).masked_fill_(~allowed, -torch.inf).softmax(-1).nan_to_num_(0.0)
        centres, total = _means(x, cell, belongs, width)
    return cell, belongs, total


def _chunk(x: Tensor, width: int) -> int:
    """Tokens at a time."""
    return max(1, ELEMENTS // max(1, len(x) * width))


def _distances(x: Tensor, centres: Tensor, cell: Tensor) -> Tensor:
    """`[B, N, C]` squared distances of every token to its C clusters `cell`."""
    length, step = torch.linalg.vector_norm(centres, dim=-1).square()[:, None], _chunk(x, centres.shape[1])
    out = []
    for part, near in zip(x.split(step, dim=1), cell.split(step, dim=1)):
        with torch.autocast(x.device.type, enabled=False):
            products = torch.baddbmm(length, part, centres.mT, alpha=-2)
        own = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square()
        out.append((products.gather(2, near) + own).clamp_(min=0))
    return torch.cat(out, 1)


def _means(x: Tensor, cell: Tensor, weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Weighted means `[B, width, D]` of the tokens, and the weights' sums `[B, width]`."""
    total, sums = x.new_zeros(len(x), width), x.new_zeros(len(x), width, x.shape[2])
    step = _chunk(x, width)
    for part, near, share in zip(x.split(step, dim=1), cell.split(step, dim=1), weight.split(step, dim=1)):
        spread = x.new_zeros(*part.shape[:2], width).scatter_add_(2, near, share)
        total += spread.sum(1)
        with torch.autocast(x.device.type, enabled=False):
            sums += spread.mT @ part
    return sums.div_(total.clamp(min=1e-30)[..., None]), total


def interpolate(x: Tensor, clusters: Tensor, now: Tensor, neighbours: int, tau: float | None, power: int = 1) -> Tensor:
    """What tokens are now, from what their nearest clusters are: weights exp(-tau * squared distance), scaled.

    Args:
        x: `[B, N, D]` the tokens before, `clusters` `[B, K, D]` the clusters then, `now` `[B, K, E]` the clusters now.
        neighbours: so many nearest clusters count (more, where they are equally near).
        tau: > 0; None is 2 over the mean squared distance of the image's tokens to their nearest cluster.
        power: the weights of a token are divided by their L1 norm (1) or L2 norm (2).

    Returns:
        `[B, N, E]` in the dtype of `now`. Cost: O(B N K D), in chunks of tokens.
    """
    middle = clusters.float().mean(1, keepdim=True)  # without it, distances would be lost in large equal numbers
    x, clusters = x.detach().float() - middle.detach(), clusters.detach().float() - middle.detach()
    length = clusters.square().sum(-1)[:, None]
    parts = x.split(max(1, ELEMENTS // max(1, len(x) * clusters.shape[1])), dim=1)

    def distance(part: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (part.square().sum(-1, keepdim=True) + length - 2 * part @ clusters.mT).clamp(min=0)

    if tau is None:
        nearest = torch.cat([distance(part).amin(-1) for part in parts], 1).mean(1)
        tau = (2 / nearest.clamp(min=1e-12))[:, None, None]
    out = []
    for part in parts:
        logits = -tau * distance(part)
        least = logits.topk(min(neighbours, logits.shape[-1]), dim=-1).values
        logits = (logits - least[..., :1]).masked_fill(logits < least[..., -1:], -torch.inf)
        weight = logits.exp()
        weight = weight / torch.linalg.vector_norm(weight, ord=power, dim=-1, keepdim=True)
        out.append(weight @ now.float())
    return torch.cat(out, 1).to(now.dtype)
