"""Direct implementations of the methods that merge tokens: what is kept; nothing is folded."""

from __future__ import annotations

import torch
from torch import Tensor

from prune.evals.naive.common import block_attention, cosines, density_peaks, tile_shares, top
from prune.reducers.aim import Merging
from prune.reducers.bat import BAT
from prune.reducers.expedit import Expedit
from prune.reducers.ficoco import FiCoCo
from prune.tokens import VisualTokens


def tome(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    metric, first, n = t.block.keys[b, t.block.prefix :].float().mean(1), t.block.prefix % 2, t.features.shape[1]
    source, target = list(range(first, n, 2)), list(range(1 - first, n, 2))
    best = cosines(metric[source], metric[target]).amax(1)
    gone = {source[i] for i in top(best, n - keep)}
    unmerged = [i for i in (source if t.block.cls else [source[i] for i in top(best, len(source))]) if i not in gone]
    return unmerged + target


def aim(method: Merging, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    found = []
    for tile, share in tile_shares(t, b, keep):
        x, alive = t.features[b][tile].float(), list(tile)
        while len(alive) > max(1, share):
            cosine = cosines(x[0::2], x[1::2])
            count = min(len(alive) // 2, len(alive) - share)
            merged = top(cosine.amax(1), count)
            groups = {2 * j + 1: [2 * j + 1] for j in range(cosine.shape[1])}
            for i in merged:
                groups[2 * int(cosine[i].argmax()) + 1].append(2 * i)
            stay = [i for i in range(len(alive)) if i % 2 or i // 2 not in merged]
            x = torch.stack([x[groups.get(i, [i])].mean(0) for i in stay])
            alive = [alive[i] for i in stay]
        found += alive[:share]
    return found


def bat(method: BAT, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    n, x = t.features.shape[1], t.features[b]
    clusters = min(keep, max(1, round(method.clusters * keep)))
    pairs = min(keep - clusters, round(method.pairs * keep), n - keep)
    seen = block_attention(t.block, b)[:, 0, t.block.prefix :].mean(0)
    attentive = sorted(top(seen, keep - clusters + pairs))
    others = [i for i in range(n) if i not in attentive]
    cosine = cosines(x[attentive[0::2]], x[attentive[1::2]])
    gone = {attentive[2 * i] for i in top(cosine.amax(1), pairs)} if pairs else set()
    centres = [others[i] for i in density_peaks(x[others], clusters)]
    return [i for i in attentive if i not in gone] + centres


def expedit(method: Expedit, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    """For counts that are h x w in the image's proportions only: the authors' grid."""
    row, column = t.coordinates[b, :, 2], t.coordinates[b, :, 3]
    height, width, x = int(row.max()) + 1, int(column.max()) + 1, t.features[b].float()
    h = round((keep * height / width) ** 0.5)
    w = keep // h
    grid = x.view(height, width, -1).permute(2, 0, 1)[None]
    centres = torch.nn.functional.adaptive_avg_pool2d(grid, (h, w))[0].flatten(1).T
    cells = [divmod(i, w) for i in range(h * w)]
    outside = torch.zeros(len(x), h * w, device=x.device)
    for place in range(len(x)):
        at = int(row[place]) * h // height, int(column[place]) * w // width
        for i, cell in enumerate(cells):
            outside[place, i] = max(abs(cell[0] - at[0]), abs(cell[1] - at[1])) > method.window // 2
    home = (row * h // height) * w + column * w // width
    tau = method.tau or float(2 / (x - centres[home]).square().sum(-1).mean())
    for _ in range(method.rounds):
        distance = torch.stack([(x - centre).square().sum(-1) for centre in centres], 1)
        share = (-tau * distance - 1e16 * outside).softmax(-1)
        centres = torch.stack([(share[:, i, None] * x).sum(0) / share[:, i].sum() for i in range(h * w)])
    return [(2 * i + 1) * height // (2 * h) * width + (2 * j + 1) * width // (2 * w) for i, j in cells]


def ficoco(method: FiCoCo, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at, n = t.attention, t.features.shape[1]
    q, k = at.queries[b].float().transpose(0, 1), at.keys[b].float().transpose(0, 1)
    logits = (q @ k.repeat_interleave(len(q) // len(k), 0).mT * at.scale).mean(0)
    image, text = at.slots[b], at.text_slots[b]
    to_image, to_text, from_text = (logits[i][:, j] for i, j in ((image, image), (image, text), (text, image)))
    redundancy = method.beta * to_image.mean(1) - (1 - method.beta) * to_text.mean(1)
    gone = top(redundancy, n - keep)
    kept = [place for place in range(n) if place not in gone]
    for place in gone:
        correlation = method.gamma * to_image[place] + (1 - method.gamma) * (to_text[place] @ from_text)
        _shares(correlation[kept], method.quantile)
    return kept


def _shares(correlation: Tensor, quantile: float) -> Tensor:
    above = correlation > correlation.quantile(quantile)
    return correlation.masked_fill(~above, -torch.inf).softmax(0)
