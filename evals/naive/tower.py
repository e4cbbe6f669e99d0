"""Direct implementations of the methods that rank by what the vision encoder says."""

from __future__ import annotations

import torch

from prune.evals.naive.common import cosines, tile_shares, tiles_of, top
from prune.learned_scorer import patch_images, shipped
from prune.reducers.flowcut import DEPTHS, Encoded
from prune.reducers.hiprune import HiPrune
from prune.reducers.index_preserving import IndexPreserving
from prune.reducers.prumerge import PruMerge
from prune.reducers.vflowopt import MAPS, PRESETS, VFlowOpt
from prune.reducers.visionzip import VisionZip
from prune.reducers.vispruner import VisPruner
from prune.tokens import VisualTokens


def fastervlm(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    score, found = t.tower["attention"][b], []
    for tile, share in tile_shares(t, b, keep):
        found += [tile[i] for i in top(score[tile], share)]
    return found


def vispruner(method: VisPruner, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    found = []
    for tile, share in tile_shares(t, b, keep):
        order = [tile[i] for i in top(t.tower["attention"][b][tile], len(tile))]
        important = int(share * method.important_ratio)
        found, rest = found + order[:important], order[important:]
        drop = method.drop or max(8, len(tile) // 72)
        while len(rest) > share - important:
            even, odd = rest[0::2], rest[1::2]
            gone = min(drop, len(rest) - (share - important), len(even))
            x = t.tower["features"][b]
            nearest = cosines(x[even], x[odd]).amax(1) if odd else torch.zeros(len(even))
            rest = [even[i] for i in top(nearest, len(even))[gone:]] + odd
        found += rest
    return found


def visionzip(method: VisionZip, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    found, metric = [], t.tower["keys"][b].float().mean(1)
    for tile, share in tile_shares(t, b, keep):
        few = min(share, round(share * method.contextual))
        dominant = [tile[i] for i in top(t.tower["attention"][b][tile], share - few)]
        rest = [place for place in tile if place not in dominant]
        targets = rest[:: max(1, len(rest) // max(1, few))][:few]
        homes = {target: [] for target in targets}
        for place in rest:
            if targets and place not in homes:
                homes[targets[int(cosines(metric[place][None], metric[targets]).argmax())]].append(place)
        found += dominant + targets
    return found


def hiprune(method: HiPrune, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    deep, found = t.tower["deep"][b], []
    for tile, share in tile_shares(t, b, keep):
        places = {tuple(t.patch[b, place].tolist()): place for place in tile}
        anchors = [tile[i] for i in top(t.tower["object"][b][tile], round(share * method.alpha / 5))]
        near = []
        for anchor in anchors:
            row, column = t.patch[b, anchor].tolist()
            for step in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
                if step in places and places[step] not in anchors + near:
                    near.append(places[step])
        ranked = [tile[i] for i in top(deep[tile], len(tile))]
        anchors, near = sorted(anchors, key=ranked.index), sorted(near, key=ranked.index)
        found += (anchors + near + [place for place in ranked if place not in anchors + near])[:share]
    return found


def prumerge(method: PruMerge, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    attention, keys, found = t.tower["attention"][b].float(), t.tower["keys"][b].float().flatten(1), []
    low, high = attention.quantile(0.25), attention.quantile(0.75)
    outlying = int((attention > high + 1.5 * (high - low)).sum())
    step = max(1, len(attention) // max(1, outlying) // 3)
    for tile, share in tile_shares(t, b, keep):
        room = max(0, share - 1) if share < len(tile) else share
        few = min(room, len(tile) * outlying // len(attention))
        chosen = [tile[i] for i in top(attention[tile], few)]
        spread = [place for place in tile[::step] if place not in chosen]
        count = min(room - len(chosen), len(spread))
        total = max(1, len(spread))
        wanted = [(2 * i * count + total) // (2 * total) for i in range(len(spread) + 1)]
        chosen += [place for i, place in enumerate(spread) if wanted[i + 1] > wanted[i]]
        for place in chosen:  # what is folded into it
            cosine = cosines(keys[place][None], keys[tile])[0]
            cosine[tile.index(place)] = -torch.inf
            _ = (attention[tile][cosine.topk(min(method.neighbours, len(tile))).indices]).tolist()
        rest = [place for place in tile if place not in chosen]
        found += chosen
        if rest and len(chosen) < share:
            found.append(rest[int(attention[rest].argmax())])
    return found


def flowcut(method: Encoded, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    score = None
    for number in range(len(DEPTHS)):
        parts = torch.zeros(t.features.shape[1], device=t.features.device)
        for tile in tiles_of(t.tile[b]):
            seen, alike = (t.tower[f"{name}{number}"][b].float()[tile] for name in ("attention", "similar"))
            strength = t.tower[f"values{number}"][b].float()[tile].mean(1).abs().sum(-1)
            parts[tile] = (seen / seen.sum() + alike / alike.sum()) * strength
        score = parts if score is None else 0.5 * score + 0.5 * parts
    found = []
    for tile, share in tile_shares(t, b, keep):
        found += [tile[i] for i in top(score[tile], share)]
    return found


def index_preserving(method: IndexPreserving, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    scorer = shipped()
    logits = [float(scorer(patch_images(pixels[None]))) for pixels in t.tower["pixels"][b]]
    places = {tuple(place): i for i, place in enumerate(t.coordinates[b].tolist())}
    pooled = []
    for tile, frame, row, column in t.coordinates[b].tolist():
        around = [(tile, frame, row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        pooled.append(max(logits[places[place]] for place in around if place in places))
    text = [i for i, score in enumerate(pooled) if score > 0] or range(len(pooled))
    return sorted(text, key=lambda i: (-pooled[i], i))[:keep]


def vflowopt(method: VFlowOpt, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    n = t.features.shape[1]
    if "importance" not in memory:
        preset = min(range(len(PRESETS)), key=lambda i: abs(keep / n - PRESETS[i][1][0]))
        memory["importance"], memory["cell"] = t.tower[MAPS[preset]][b], method.cell or PRESETS[preset][0][0]
    importance = memory["importance"][t.index[b]]
    if not method.recycle:
        return top(importance, keep)
    cell = memory["cell"]
    extra = min(int(n / cell**2), keep)
    certain = top(importance, keep - extra)
    squares: dict[tuple, list[int]] = {}
    for place in range(n):
        if place not in certain:
            tile, frame, row, column = t.coordinates[b, place].tolist()
            squares.setdefault((tile, frame, int(row / cell), int(column / cell)), []).append(place)
    best = sorted(max(square, key=lambda i: (float(importance[i]), -i)) for square in squares.values())
    best = sorted(best, key=lambda i: -float(importance[i]))[:extra]
    rest = [place for place in top(importance, n) if place not in certain and place not in best]
    return certain + best + rest[: extra - len(best)]
