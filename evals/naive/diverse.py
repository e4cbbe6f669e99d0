"""Direct implementations of the methods that pick diverse tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from prune.evals.naive.common import attention_matrix, cosines, dpp, quota_top, tile_shares, tiles_of, top
from prune.reducers.cdpruner import CDPruner
from prune.reducers.dart import Dart
from prune.reducers.script import Script
from prune.reducers.todre import Diverse, DropUnseen
from prune.reducers.zooprune import ZooPrune
from prune.tokens import VisualTokens


def divprune(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    distance = 1 - cosines(t.features[b])
    picks = [int(distance.sort(0).values[1].argmax())]
    while len(picks) < keep:
        nearest = distance[picks].amin(0)
        nearest[picks] = -torch.inf
        picks.append(int(nearest.argmax()))
    return picks


def times_distance(x: Tensor, importance: Tensor, keep: int) -> list[int]:
    """Greedy by importance, scaled to [0, 1], times the distance to the nearest pick."""
    score = (importance - importance.min()) / (importance.max() - importance.min() + 1e-8)
    distance = 1 - cosines(x)
    picks = [int(score.argmax())] if keep else []
    while len(picks) < keep:
        gain = score * distance[picks].amin(0)
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
    return picks


def norm_diversity(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    x, found = t.features[b], []
    for tile, share in tile_shares(t, b, keep):
        found += [tile[i] for i in times_distance(x[tile], x[tile].float().norm(dim=-1), share)]
    return found


def zooprune(method: ZooPrune, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    x, h = t.tower["features"][b].float(), method.step or 0.01
    drawn = torch.randn(method.directions, x.shape[1], generator=torch.Generator().manual_seed(method.seed))
    moved = torch.zeros(len(x), device=x.device)
    for direction in drawn.to(x.device):
        nudge = h * direction / direction.norm()
        moved += (t.projector(x + nudge) - t.projector(x - nudge)).float().norm(dim=-1) / (2 * h)
    found = []
    for tile, share in tile_shares(t, b, keep):
        found += [tile[i] for i in times_distance(t.features[b][tile], moved[tile] / method.directions, share)]
    return found


def relevance(t: VisualTokens, b: int) -> Tensor:
    cosine = cosines(t.inputs[b], t.text_inputs[b][t.text_mask[b]]).mean(1)
    return (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())


def cdpruner(method: CDPruner, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    return dpp(t.features[b], relevance(t, b), keep, t.tile[b])


def script(method: Script, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    x, tile, twice = t.features[b], t.tile[b], min(2 * keep, t.features.shape[1])
    cosine = cosines(x)
    redundancy = torch.zeros(len(x), device=x.device)
    for i in range(len(x)):
        other = cosine[i, (i + 1) % 2 :: 2][(tile == tile[i])[(i + 1) % 2 :: 2]]
        near = other[other >= method.threshold]
        if len(near):
            redundancy[i] = len(near) * (method.gain * (near.mean() - method.threshold)).exp()
        if len(near) < method.few:
            rated = redundancy[i] if len(near) else 0.0
            redundancy[i] = (rated + (other.mean() if len(other) else 0)) / 2
    named = set(quota_top(-redundancy, tile, twice))
    picks = dpp(x, relevance(t, b), twice, tile)
    late = torch.full((len(x),), 9.0 * twice)
    for step, place in enumerate(picks):
        late[place] = step - twice * (place in named)
    return quota_top(-late, tile, keep)


def todre(method: Diverse, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    cosine = cosines(t.features[b])
    first = t.tower["attention"][b].masked_fill(t.coordinates[b, :, 0] != 0, -1)
    picks = [int(first.argmax())]
    while len(picks) < keep:
        alike = cosine[picks].sum(0)
        alike[picks] = torch.inf
        picks.append(int(alike.argmin()))
    return picks


def todre_late(method: DropUnseen, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at = t.attention
    seen = attention_matrix(at, b).mean(0)[at.text_slots[b]][:, at.slots[b]].sum(1).mean()
    return [] if seen < method.tau else list(range(t.features.shape[1]))


def greedyprune(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    cosine = cosines(t.features[b])
    saliency = cosines(t.features[b], t.text_features[b][t.text_mask[b]][-1:])[:, 0]
    order, kept = top(saliency, len(saliency)), []
    for place in order:
        if len(kept) < keep and all(cosine[place, other] <= method.tau for other in kept):
            kept.append(place)
    return (kept + [place for place in order if place not in kept])[:keep]


def dart(method: Dart, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    norm, text_norm = (k[b].float().abs().sum((1, 2)) for k in (t.keys, t.text_keys))
    image, text = sorted(top(norm, min(keep, method.image_pivots))), sorted(top(text_norm, method.text_pivots))
    pivots = torch.cat([t.normed_features[b][image], t.normed_text[b][text]])
    cosine, kept = cosines(pivots, t.normed_features[b]), list(image)
    rest = keep - len(image)
    for turn, row in enumerate(cosine):
        pool = [place for place in range(len(norm)) if place not in kept]
        kept += [pool[i] for i in top(-row[pool], rest // len(pivots) + (turn < rest % len(pivots)))]
    return kept


def gprune(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    x, graph = t.features[b].float(), t.coordinates[b, :, 0]
    score = torch.zeros(len(x), device=x.device)
    for part in tiles_of(graph):
        cosine = cosines(x[part])
        edge = (cosine >= method.similarity) | torch.eye(len(part), device=x.device).bool()
        flow = (cosine / method.temperature).masked_fill(~edge, -torch.inf).softmax(-1)
        score[part] = (x[part].norm(dim=-1) @ torch.linalg.matrix_power(flow, method.iterations)) / edge.sum(-1)
    return quota_top(score, graph, keep)
