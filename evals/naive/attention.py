"""Direct implementations of the methods that rank by attention of the decoder. Whole attention matrices are made."""

from __future__ import annotations

import torch

from prune.evals.naive.common import attention_matrix, cosines, density_peaks, tiles_of, top
from prune.reducers.aim import Ranking
from prune.reducers.flowcut import Instructed
from prune.reducers.framefusion import Fusing
from prune.reducers.sparsevlm import SparseVLM
from prune.reducers.transprune import TransPrune
from prune.tokens import VisualTokens


def fastv(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    return top(t.last_token_attention[b], keep)


def pyramiddrop(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at = t.entry_attention
    return top(attention_matrix(at, b).mean(0)[at.last[b], at.slots[b]], keep)


def vatp(method, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at = t.attention
    seen = attention_matrix(at, b)[:, at.last[b], at.slots[b]]
    length = at.values[b, at.slots[b]].float().abs().sum(-1).T
    return top((seen * length.repeat_interleave(len(seen) // len(length), 0)).mean(0), keep)


def transprune(method: TransPrune, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at, totals = t.entry_attention, memory.setdefault("transprune", [])
    variation = torch.zeros(t.features.shape[1], device=t.features.device)
    for layer in range(t.transition.shape[2]):
        ratio, cosine = t.transition[b, :, layer, 0::2], t.transition[b, :, layer, 1::2]
        change = (1 - cosine.abs()).exp()
        if layer == len(totals):
            totals.append(change.sum(0))
        variation += (ratio * change / totals[layer]).sum(1)
    seen = attention_matrix(at, b).mean(0)[at.text_slots[b]][:, at.slots[b]].mean(0)
    return top(method.alpha * variation / variation.sum() + (1 - method.alpha) * seen / seen.sum(), keep)


def sparsevlm(method: SparseVLM, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at, n = t.attention, t.features.shape[1]
    if "raters" not in memory:
        share = (t.inputs[b].float() @ t.text_inputs[b].float().T).softmax(-1).mean(0)
        memory["raters"] = (share > share.mean()).nonzero()[:, 0]
    score = attention_matrix(at, b).mean(0)[at.text_slots[b][memory["raters"]]][:, at.slots[b]].mean(0)
    for count in range(keep, 0, -1):  # as many as leave room for the clusters of the others
        taken = int(0.3 * (n - count)) + 1
        clusters = taken // 10 + 1
        if count + clusters <= keep:
            break
    order = top(score, n)
    again = sorted(order[count : count + taken])
    return order[:count] + [again[i] for i in density_peaks(t.features[b][again], keep - count)]


def flowcut_late(method: Instructed, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    at, slots = t.attention, t.attention.slots[b]
    keys, values = (x[b, slots].float().transpose(0, 1) for x in (at.keys, at.values))
    query, value = (x[b, at.last[b]].float()[:, None] for x in (at.queries, at.values))
    keys = keys.repeat_interleave(len(query) // len(keys), 0)
    seen = (query @ keys.mT * at.scale).softmax(-1)[:, 0].mean(0)
    alike = (value @ values.mT * values.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)
    return top((seen / seen.sum() + alike / alike.sum()) * values.mean(0).abs().sum(-1), keep)


def aim_late(method: Ranking, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    flow = attention_matrix(t.attention, b, method.temperature)
    rank = torch.full((len(flow), 1, flow.shape[1]), 1 / flow.shape[1], device=flow.device)
    for _ in range(method.iterations):
        rank = rank @ flow
    return top(rank[:, 0].square().mean(0).sqrt()[t.attention.slots[b]], keep)


def framefusion(method: Fusing, t: VisualTokens, b: int, keep: int, memory: dict) -> list[int]:
    n = t.features.shape[1]
    least = round(memory.setdefault("framefusion", n) * method.least)
    tile, row, column = (t.coordinates[b, :, i] for i in (0, 2, 3))
    cosine = torch.full((n,), -2.0)
    for patch in tiles_of((tile << 32) + (row << 16) + column):
        for before, after in zip(patch, patch[1:]):
            cosine[after] = cosines(t.features[b, before : before + 1], t.features[b, after : after + 1])[0, 0]
    similar = min(int((cosine >= method.similarity).sum()), max(0, n - least))
    gone = set(top(cosine, max(similar, n - keep)))
    return [place for place in range(n) if place not in gone]
