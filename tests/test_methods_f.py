"""G-Prune, PyramidDrop, CDPruner, Script, SparseVLM, VATP and GreedyPrune, against slow re-computations in float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune import Budget, ConfigError, Geometry, VisualTokens, get_method
from prune.kernels import cluster, graph, heads
from prune.kernels.attention import row_attention
from prune.kernels.cluster import density_peaks
from prune.kernels.depth import scale_layers
from prune.kernels.dpp import dpp_map
from prune.kernels.graph import bipartite, propagate
from prune.kernels.heads import head_attention
from prune.kernels.quota import quota_topk, quotas
from prune.reducers.cdpruner import crops, min_max, text_relevance
from prune.reducers.gprune import gprune
from prune.reducers.greedyprune import greedy_veto
from prune.reducers.pyramiddrop import last_row
from prune.reducers.script import redundancy
from prune.reducers.sparsevlm import RATERS, SparseVLM, find_raters, recycle, rotary_weight
from prune.reducers.vatp import vatp
from prune.tokens import AttentionInputs

split = SparseVLM.split
repeatable = settings(derandomize=True, deadline=None, max_examples=25)

METHODS = [
    ("gprune", {}),
    ("gprune", {"similarity": 0.1, "iterations": 2, "temperature": 0.2}),
    ("pyramiddrop", {}),
    ("cdpruner", {}),
    ("cdpruner", {"negate": True}),
    ("script", {}),
    ("sparsevlm", {}),
    ("sparsevlm", {"version": "2.0", "heads": 3}),
    ("vatp", {}),
    ("vatp", {"rows": "text"}),
    ("vatp", {"rows": "received"}),
    ("greedyprune", {}),
    ("greedyprune", {"tau": 0.2}),
]
EVERY = pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
HEADS, KV_HEADS, DIM, BEFORE = 4, 2, 6, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(lengths, texts, seed=0, dtype=torch.float32, garbage=math.nan, tiles=2) -> VisualTokens:
    """One image per sequence: `BEFORE` columns, the image, its text; sequences are padded on the left."""
    g = torch.Generator().manual_seed(seed)
    b, n, t = len(lengths), max(lengths), max(texts)
    lengths_, texts_ = torch.tensor(lengths)[:, None], torch.tensor(texts)[:, None]
    mask = torch.arange(n) < lengths_
    text_mask = torch.arange(t) >= t - texts_

    def fill(real, *shape):
        x = torch.randn(*real.shape, *shape, generator=g).to(dtype)
        return x.masked_fill(~real.view(*real.shape, *(1,) * len(shape)), garbage)

    length = BEFORE + n + t
    begin = length - BEFORE - lengths_ - texts_
    valid = torch.arange(length) >= begin
    index, tile = torch.arange(n), torch.arange(n) * tiles // lengths_
    tile = tile.clamp(max=tiles - 1)

    def attention():
        return AttentionInputs(
            queries=fill(valid, HEADS, DIM),
            keys=fill(valid, KV_HEADS, DIM),
            values=fill(valid, KV_HEADS, DIM),
            valid=valid,
            scale=DIM**-0.5,
            sample=torch.arange(b),
            slots=(begin + BEFORE + index).clamp(max=length - 1),
            text_slots=torch.arange(length - t, length).expand(b, t),
            text_mask=text_mask,
            last=torch.full((b,), length - 1),
        )

    return VisualTokens(
        features=fill(mask, 12),
        mask=mask,
        coordinates=torch.stack([tile, tile * 0, (index // 5).expand_as(tile), (index % 5).expand_as(tile)], 2),
        tile=tile,
        columns=BEFORE + index.expand(b, n),
        inputs=fill(mask, 10),
        text_inputs=fill(text_mask, 10),
        text_features=fill(text_mask, 12),
        text_mask=text_mask,
        text_columns=torch.arange(t) - t + texts_ + BEFORE + lengths_,
        attention=attention(),
        entry_attention=attention(),
    )


def alone(tokens: VisualTokens, b: int) -> VisualTokens:
    """Row b without its padding."""
    out, real, text = {}, tokens.mask[b], tokens.text_mask[b]
    for name in (f.name for f in fields(tokens)):
        value = getattr(tokens, name)
        if isinstance(value, torch.Tensor):
            out[name] = value[b][text if "text" in name else real][None]
        elif isinstance(value, AttentionInputs):
            valid = value.valid[b]
            begin = int((~valid).sum())
            rows = {n: getattr(value, n)[b][valid][None] for n in ("queries", "keys", "values", "valid")}
            out[name] = replace(
                value,
                **rows,
                sample=torch.zeros(1, dtype=torch.long),
                slots=value.slots[b][real][None] - begin,
                text_slots=value.text_slots[b][text][None] - begin,
                text_mask=value.text_mask[b][text][None],
                last=value.last[b][None] - begin,
            )
    return VisualTokens(**out)


def widened(tokens: VisualTokens) -> VisualTokens:
    """The same numbers in fp32."""

    def wide(x):
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    out = {f.name: wide(getattr(tokens, f.name)) for f in fields(tokens)}
    for name in ("attention", "entry_attention"):
        out[name] = AttentionInputs(**{f.name: wide(getattr(out[name], f.name)) for f in fields(AttentionInputs)})
    return VisualTokens(**{**out, "memory": {}})


def kept(method, tokens, keep):
    reduction = method.reduce(replace(tokens, memory={}), keep)
    return [row[valid].tolist() for row, valid in zip(reduction.keep, reduction.valid)]


batches = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6), st.integers(0, 39)), min_size=1, max_size=3)


# ------------------------------------------------------------------------------------------------ what all owe
@EVERY
@repeatable
@given(batch=batches, seed=st.integers(0, 10**6), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
def test_counts_are_exact_and_rows_independent(name, options, batch, seed, garbage):
    lengths, texts, keeps = zip(*((n, t, 1 + k % n) for n, t, k in batch))
    method, tokens = get_method(name, **options), make(lengths, texts, seed, garbage=garbage)
    reduction = method.reduce(tokens, keeps)
    assert reduction.keep.dtype == torch.int64 and reduction.keep.shape == (len(batch), max(keeps))
    assert reduction.valid.tolist() == [[slot < k for slot in range(max(keeps))] for k in keeps]
    rows, features = kept(method, tokens, keeps), reduction.apply(tokens.features)
    for b, row in enumerate(rows):
        assert row == sorted(set(row)) and row[-1] < lengths[b]
        single = alone(tokens, b)
        assert row == kept(method, single, [keeps[b]])[0]
        merged = method.reduce(single, [keeps[b]]).apply(single.features)
        torch.testing.assert_close(features[b, : keeps[b]], merged[0])
        assert merged.isfinite().all()
    assert rows == kept(method, tokens, keeps)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_scored_in_fp32(name, options, dtype):
    method, tokens = get_method(name, **options), make([40, 17], [6, 3], dtype=dtype)
    assert kept(method, tokens, [19, 8]) == kept(method, widened(tokens), [19, 8])
    assert method.reduce(tokens, [19, 8]).apply(tokens.features).dtype == dtype


@EVERY
def test_keeping_all_changes_nothing(name, options):
    tokens = make([6, 3, 1], [2, 0, 1])
    reduction = get_method(name, **options).reduce(tokens, [6, 3, 1])
    assert [row[v].tolist() for row, v in zip(reduction.keep, reduction.valid)] == [list(range(n)) for n in (6, 3, 1)]
    out = reduction.apply(tokens.features)
    assert torch.equal(out[reduction.valid], tokens.features[tokens.mask])


@EVERY
@pytest.mark.parametrize("value", [0.0, 1.0, 300.0])
def test_of_equal_tokens_the_first_are_kept(name, options, value):
    tokens = make([11], [4], tiles=1)
    for x in (tokens.features, tokens.inputs):
        x[:] = x[:, :1] * value
    tokens.columns[:] = tokens.columns[:, :1]
    for at in (tokens.attention, tokens.entry_attention):
        at.keys[:, BEFORE : BEFORE + 11] = at.keys[:, BEFORE, None]
        at.values[:, BEFORE : BEFORE + 11] = at.values[:, BEFORE, None]
    assert kept(get_method(name, **options), tokens, [6])[0] == list(range(6))


@EVERY
def test_half_the_tokens_are_zero(name, options):
    tokens = make([30], [4])
    tokens.features[:, ::2] = 0
    tokens.inputs[:, ::2] = 0
    row = kept(get_method(name, **options), tokens, [20])[0]
    assert len(set(row)) == 20
    if name in ("gprune", "cdpruner"):  # nothing can be said for a token without a direction
        assert set(range(1, 30, 2)) <= set(row)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gprune", {"similarity": 1.0}),
        ("gprune", {"similarity": -0.1}),
        ("gprune", {"temperature": 0}),
        ("gprune", {"iterations": 0}),
        ("pyramiddrop", {"shares": (0.5, 0.5, 0.1)}),
        ("pyramiddrop", {"shares": 0.5}),
        ("pyramiddrop", {"layers": (8, 16)}),
        ("pyramiddrop", {"layers": (0, 8, 16)}),
        ("pyramiddrop", {"layers": 8}),
        ("script", {"threshold": 1.5}),
        ("script", {"few": -1}),
        ("sparsevlm", {"version": "3"}),
        ("sparsevlm", {"layers": (6, 2, 15)}),
        ("sparsevlm", {"layers": 2}),
        ("sparsevlm", {"heads": 0}),
        ("sparsevlm", {"rope_theta": 0}),
        ("vatp", {"layer": 0}),
        ("vatp", {"rows": "all"}),
        ("greedyprune", {"layer": 0}),
        ("greedyprune", {"tau": 1.1}),
    ],
)
def test_bad_options(name, options):
    ((option, value),) = options.items()
    with pytest.raises(ConfigError) as error:
        get_method(name, **options)
    assert f"{option}={value!r} must" in str(error.value)


# ------------------------------------------------------------------------------------------------ quota, depth
def jefferson(sizes: list[int], k: int) -> list[int]:
    """Give places one by one to the tile with the largest size / (places + 1)."""
    places = [0] * len(sizes)
    for _ in range(k):
        places[max(range(len(sizes)), key=lambda i: (sizes[i] / (places[i] + 1), -i))] += 1
    return places


@repeatable
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 200), st.integers(0, 10**6))
def test_every_tile_keeps_its_best(sizes, k, seed):
    total = sum(sizes)
    k = k % (total + 1)
    tile = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
    scores = torch.randn(1, total, generator=torch.Generator().manual_seed(seed))
    index, valid = quota_topk(scores, tile, k, torch.ones_like(tile).bool())
    assert valid.all() and index.shape[1] == k
    expected, begin, places = [], 0, jefferson(sizes, k)
    for size, count in zip(sizes, places):
        expected += sorted((begin + scores[0, begin : begin + size].argsort(descending=True)[:count]).tolist())
        begin += size
    assert index[0].tolist() == expected
    shares = quotas(tile, k, torch.ones_like(tile).bool())[0]
    assert shares.tolist() == [places[i] for i in tile[0]]


def test_quota_is_the_whole_part_of_one_ratio():
    """int(ratio * n) of both graphs, the rule of G-Prune's code, for counts that largest remainders would move."""
    for ratio in (0.1, 0.25, 0.35, 0.5, 0.75, 0.9):
        for sizes in ((576, 216), (64, 63), (49, 96), (10, 3), (7, 50)):
            counts = [int(ratio * n) for n in sizes]
            tile = torch.tensor([0] * sizes[0] + [1] * sizes[1])[None]
            index, _ = quota_topk(torch.randn(1, sum(sizes)), tile, sum(counts), torch.ones_like(tile).bool())
            assert (tile[0, index[0]] == 0).sum() == counts[0], (ratio, sizes)


def test_layers_scale_with_the_depth():
    assert scale_layers((8, 16, 24), 32, 32) == (8, 16, 24)
    assert scale_layers((8, 16, 24), 32, 28) == (7, 14, 21)
    assert scale_layers((8, 16, 24), 32, 80) == (20, 40, 60)
    for depth in range(2, 40):
        for paper in ((8, 16, 24), (3, 7, 16), (30, 31)):
            found = scale_layers(paper, 32, depth)
            assert len(found) == min(len(paper), depth - 1)
            assert list(found) == sorted(set(found)) and 1 <= found[0] and found[-1] < depth


# ------------------------------------------------------------------------------------------------ g-prune
def reference_gprune(x, similarity, temperature, iterations):
    """The dense matrix and its power, one graph."""
    x = x.double()
    cosine = torch.cosine_similarity(x[:, None], x[None], dim=-1)
    logits = torch.where(cosine >= similarity, cosine / temperature, -math.inf)
    matrix = logits.softmax(-1)
    return x.norm(dim=-1) @ torch.matrix_power(matrix, iterations) / (logits > -math.inf).sum(1)


@repeatable
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.6]), st.integers(0, 99))
def test_gprune_is_a_power_of_the_transition_matrix(first, second, iterations, similarity, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, first + second, 5, generator=g) + 0.5
    graph_of = torch.tensor([[3] * first + [8] * second])
    score, _ = gprune(x, graph_of, torch.ones_like(graph_of).bool(), similarity, 0.1, iterations)
    parts = [reference_gprune(part, similarity, 0.1, iterations) for part in (x[0, :first], x[0, first:])]
    torch.testing.assert_close(score[0].double(), torch.cat(parts), rtol=1e-4, atol=1e-6)


def test_gprune_in_chunks():
    x, tile = torch.randn(2, 33, 6) + 0.5, torch.arange(33).expand(2, -1) // 20
    mask = torch.arange(33) < torch.tensor([[33], [21]])
    arguments = (x, x.norm(dim=-1), tile, mask, 0.2, 0.1, 4)
    whole = propagate(*arguments)
    for chunk in (1, 5, 32):
        for mine, theirs in zip(propagate(*arguments, chunk=chunk), whole):
            torch.testing.assert_close(mine, theirs)
    with patch.object(graph, "ELEMENTS", 100):
        torch.testing.assert_close(propagate(*arguments)[0], whole[0])


def test_gprune_keeps_representatives():
    """Of a large uniform region and single tokens, equally long, the single ones and a share of the region."""
    region = torch.tensor([[1.0, 0, 0, 0]]) + 0.01 * torch.randn(40, 4)
    single = torch.eye(4)[1:]
    tokens = VisualTokens(torch.cat([region, single])[None])
    assert set(range(40, 43)) <= set(kept(get_method("gprune"), tokens, [10])[0])


def test_gprune_reads_base_and_grid_apart():
    tokens = make([40], [3])
    rows = kept(get_method("gprune"), tokens, [20])[0]
    assert sum(i < 20 for i in rows) == 10
    other = replace(tokens, features=tokens.features.clone())
    other.features[:, 20:] *= 7
    other.features[:, 25] = tokens.features[:, 3]
    assert kept(get_method("gprune"), other, [20])[0][:10] == rows[:10]


# ------------------------------------------------------------------------------------------------ pyramiddrop
def dense_attention(at: AttentionInputs, b: int) -> torch.Tensor:
    """`[H, L, L]` causal softmax attention of a sequence in float64, by loops over heads and rows."""
    s = int(at.sample[b])
    q, k, valid = at.queries[s].double(), at.keys[s].double(), at.valid[s]
    length, groups = len(valid), q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[1], length, length, dtype=torch.float64)
    for h in range(q.shape[1]):
        for i in range(length):
            seen = [j for j in range(i + 1) if valid[j]]
            if valid[i]:
                out[h, i, seen] = (k[seen, h // groups] @ q[i, h] * at.scale).softmax(0)
    return out


def test_pyramiddrop_is_the_last_row():
    tokens = make([9, 6], [3, 4])
    score = last_row(tokens.entry_attention)
    for b, n in enumerate((9, 6)):
        row = dense_attention(tokens.entry_attention, b)[:, -1].mean(0)[tokens.entry_attention.slots[b, :n]]
        torch.testing.assert_close(score[b, :n].double(), row, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [576, 2880, 256, 8])
def test_pyramiddrop_halves(n):
    method, geometry = get_method("pyramiddrop"), Geometry(n, layers=32)
    stages = method.stages(geometry, Budget(ratio=0.875))
    assert [str(stage.site) for stage in stages] == ["decoder:8", "decoder:16", "decoder:24"]
    assert [stage.keep for stage in stages] == [n // 2, n // 4, n // 8]
    assert method.kept(576, Budget(average=270), Geometry(576, layers=32)) == 72  # the paper's mean


def test_pyramiddrop_of_any_count_and_shares():
    method = get_method("pyramiddrop")
    assert method.counts(27 * 27, 27) == [243, 81, 27]
    assert method.counts(50, 50) == [50, 50, 50] and method.counts(50, 1)[-1] == 1
    two = get_method("pyramiddrop", shares=[0.6, 0.2], layers=[2, 5])
    assert [(str(s.site), s.keep) for s in two.plan(Geometry(100), 20)] == [("decoder:2", 60), ("decoder:5", 20)]
    assert [str(site) for site in method.sites(3)] == ["decoder:1", "decoder:2"]
    assert [s.keep for s in method.plan(Geometry(576, layers=3), 72)] == [144, 72]
    for n in (1, 2, 7, 100):
        counts = [method.counts(n, k) for k in range(1, n + 1)]
        assert all(a <= b for low, high in zip(counts, counts[1:]) for a, b in zip(low, high))
        assert all(n >= c[0] >= c[1] >= c[2] == k for k, c in enumerate(counts, 1))


# ------------------------------------------------------------------------------------------------ dpp, cdpruner
def reference_dpp(x, quality, k):
    """Add the token that makes the determinant of the chosen block largest, over and over."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    kernel = quality.double()[:, None] * (x @ x.T) * quality.double()
    chosen: list[int] = []
    for _ in range(k):
        volume = {}
        for j in set(range(len(x))) - set(chosen):
            block = kernel[chosen + [j]][:, chosen + [j]]
            volume[j] = round(float(torch.linalg.det(block)), 12)
        chosen.append(max(volume, key=lambda j: (volume[j], -j)))
    return chosen


@repeatable
@given(st.integers(1, 16), st.integers(1, 12), st.integers(0, 10**6))
def test_dpp_maximises_the_determinant(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    k = min(k, n)
    x, quality = torch.randn(1, n, 20, generator=g), 0.2 + torch.rand(1, n, generator=g)
    order, valid = dpp_map(x, quality, k)
    assert valid.all() and order[0].tolist() == reference_dpp(x[0], quality[0], k)


def test_dpp_beyond_the_rank_takes_other_tokens_in_order():
    x = torch.randn(1, 4, 3).repeat(1, 5, 1)  # 20 tokens, 4 kinds, rank 3
    order, valid = dpp_map(x, torch.ones(1, 20), 20)
    picks = order[0].tolist()
    assert valid.all() and sorted(picks) == list(range(20))
    assert max(picks[:3]) < 4  # one of each kind, the first one
    assert picks[3:] == sorted(picks[3:])


def test_dpp_gives_every_tile_its_share():
    tile = torch.tensor([[0] * 12 + [1] * 24 + [2] * 12])
    x, quality = torch.randn(1, 48, 30), torch.rand(1, 48) + 0.1
    quality[:, 36:] *= 100  # would take everything
    order, _ = dpp_map(x, quality, 12, tile=tile)
    for number, share in enumerate((3, 6, 3)):
        inside = (tile[0] == number).nonzero()[:, 0]
        single = reference_dpp(x[0, inside], quality[0, inside], share)
        assert [i for i in order[0].tolist() if tile[0, i] == number] == inside[single].tolist()


def test_relevance_is_the_mean_cosine_with_the_text():
    tokens = make([9, 6], [3, 4])
    found = text_relevance(tokens)
    for b in range(2):
        row = alone(tokens, b)
        cosine = [
            sum(float(torch.cosine_similarity(v.double(), t.double(), 0)) for t in row.text_inputs[0])
            for v in row.inputs[0]
        ]
        low, high = min(cosine), max(cosine)
        expected = torch.tensor([(c - low) / (high - low) for c in cosine])
        torch.testing.assert_close(found[b, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        negated = text_relevance(tokens, negate=True)[b, : len(expected)]
        torch.testing.assert_close(negated, 1 - expected, atol=1e-5, rtol=1e-5)


def test_relevance_of_the_batch_or_of_the_row():
    x, mask = torch.tensor([[0.0, 1.0, 9.0], [2.0, 4.0, 3.0]]), torch.tensor([[True, True, False], [True] * 3])
    torch.testing.assert_close(min_max(x, mask), torch.tensor([[0.0, 1, 0], [0, 1, 0.5]]), atol=2e-6, rtol=0)
    torch.testing.assert_close(
        min_max(x, mask, joint=True), torch.tensor([[0, 0.25, 0], [0.5, 1, 0.75]]), atol=2e-6, rtol=0
    )
    assert torch.equal(min_max(torch.full((1, 3), 0.3), torch.ones(1, 3).bool()), torch.ones(1, 3))


def test_cdpruner_without_text_is_diversity():
    tokens = make([20], [0], tiles=1)
    assert kept(get_method("cdpruner"), tokens, [6])[0] == sorted(reference_dpp(tokens.features[0], torch.ones(20), 6))


def test_frames_of_a_video_are_no_crops():
    tokens = make([12, 12], [2, 2], tiles=3)
    tokens.coordinates[1, :, 1] = tokens.tile[1]
    assert crops(tokens)[0].tolist() == tokens.tile[0].tolist()
    assert crops(tokens)[1].tolist() == [0] * 12
    assert crops(VisualTokens(tokens.features, tile=tokens.tile)) is tokens.tile


# ------------------------------------------------------------------------------------------------ script
def reference_script(tokens, keep, threshold=0.2, few=4, gain=1.0):
    """One image of one tile: loops over pairs, then over lists."""
    x = torch.nn.functional.normalize(tokens.features[0].double(), dim=-1)
    n, rated = len(x), []
    for i in range(n):
        others = [float(x[i] @ x[j]) for j in range(n) if (i - j) % 2]
        near = [c for c in others if c >= threshold]
        rho = len(near) * math.exp(gain * (sum(near) / len(near) - threshold)) if near else 0.0
        rated.append((rho + sum(others) / max(1, len(others))) / 2 if len(near) < few else rho)
    twice = min(n, 2 * keep)
    graph_names = sorted(range(n), key=lambda i: rated[i])[:twice]
    dpp = reference_dpp(tokens.features[0], text_relevance(tokens)[0], twice)
    both = [i for i in dpp if i in graph_names]
    return rated, sorted((both + [i for i in dpp if i not in both])[:keep])


@repeatable
@given(st.integers(1, 18), st.integers(1, 4), st.integers(0, 17), st.integers(0, 10**6))
def test_script_matches_reference(n, t, k, seed):
    keep = 1 + k % n
    tokens = make([n], [t], seed, tiles=1)
    tokens.features = torch.randn(1, n, 40, generator=torch.Generator().manual_seed(seed)) + 0.5
    rated, expected = reference_script(tokens, keep)
    found = redundancy(tokens.features, tokens.tile, tokens.mask, 0.2, 4, 1.0)[0]
    torch.testing.assert_close(found.double(), torch.tensor(rated, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert kept(get_method("script"), tokens, [keep])[0] == expected


def test_script_graph_has_a_say():
    """In the released code it has none."""
    tokens = make([40], [3], tiles=1)
    assert kept(get_method("script"), tokens, [10]) != kept(get_method("cdpruner"), tokens, [10])
    assert kept(get_method("script", threshold=0.4), tokens, [10]) != kept(get_method("script"), tokens, [10])


def test_bipartite_in_chunks_and_tiles():
    x, tile = torch.randn(2, 37, 5), torch.arange(37).expand(2, -1) // 15
    mask = torch.arange(37) < torch.tensor([[37], [18]])
    whole = bipartite(x, tile, mask, 0.1)
    for chunk in (1, 4):
        for mine, theirs in zip(bipartite(x, tile, mask, 0.1, chunk), whole):
            torch.testing.assert_close(mine, theirs)
    single = bipartite(x[:1, 15:30], tile[:1, 15:30], mask[:1, 15:30], 0.1)
    for mine, theirs in zip(single, whole):
        torch.testing.assert_close(mine[0], theirs[0, 15:30])
    assert (bipartite(x[:, :1], tile[:, :1], mask[:, :1], 0.1)[2] == 0).all()


# ------------------------------------------------------------------------------------------------ sparsevlm
def reference_recycle(features, score, k):
    """Kept places, and centre -> mean: the algorithm of the specification in loops, the first of equals denser."""
    n = len(features)
    order = sorted(range(n), key=lambda i: -score[i])
    chosen, rest = sorted(order[:k]), order[k:]
    if not rest:
        return chosen, {}
    taken = sorted(rest[: int(0.3 * len(rest)) + 1])
    clusters = int(len(taken) / 10) + 1
    x = features.double()
    gap = {(i, j): float((x[i] - x[j]).norm()) / math.sqrt(x.shape[1]) for i in taken for j in taken}
    density = {}
    for i in taken:
        nearest = sorted(gap[i, j] ** 2 for j in taken)[:clusters]
        density[i] = round(math.exp(-sum(nearest) / clusters), 12)
    peaks = {}
    for i in taken:
        denser = [gap[i, j] for j in taken if density[j] > density[i] or (density[j] == density[i] and j < i)]
        peaks[i] = density[i] * (min(denser) if denser else max(gap.values()))
    centres = sorted(taken, key=lambda i: (-peaks[i], i))[:clusters]
    members = {c: [] for c in centres}
    for i in taken:
        members[i if i in centres else min(sorted(centres), key=lambda c, i=i: gap[i, c])].append(i)
    return chosen, {c: x[m].mean(0) for c, m in members.items()}


@repeatable
@given(st.integers(2, 150), st.integers(0, 149), st.integers(0, 10**6))
def test_recycling_matches_reference(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    features, score = torch.randn(1, n, 4, generator=g), torch.rand(1, n, generator=g)
    direct = 1 + k % (n - 1)
    chosen, means = reference_recycle(features[0], score[0].tolist(), direct)
    keep = len(chosen) + len(means)
    parts = (torch.tensor([count]) for count in (direct, int(0.3 * (n - direct)) + 1, len(means)))
    reduction = recycle(features, score, [keep], tuple(parts), torch.ones(1, n).bool())
    places = sorted(chosen + list(means))
    assert reduction.keep[0].tolist() == places
    out = reduction.apply(features)[0].double()
    expected = torch.stack([means.get(i, features[0, i].double()) for i in places])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def authors_count(n: int, k: int) -> int:
    """Tokens after a stage of the code that keeps k of n."""
    taken = int(0.3 * (n - k)) + 1
    return k + int(taken / 10) + 1


def test_split_is_the_authors_for_every_count():
    for n in (2, 5, 40, 144, 577):
        reachable = {}
        for k in range(1, n):
            reachable[authors_count(n, k)] = k  # the largest k of those that make this count
        counts = torch.arange(1, n + 1)
        direct, taken, clusters = (x.tolist() for x in split(torch.full_like(counts, n), counts))
        for keep, k, m, c in zip(counts.tolist(), direct, taken, clusters):
            assert k + c == keep and 0 < k and c <= m <= n - k
            if keep == n:
                assert c == m == 0
            elif keep in reachable:
                assert k == reachable[keep], (n, keep)
            else:
                assert k == 1  # too few for the code's clusters


@pytest.mark.parametrize(
    ("version", "tables"),
    [
        ("1.0", ([300, 200, 110], [303, 110, 36], [238, 48, 26], [66, 30, 17])),
        ("2.0", ([300, 200, 118], [238, 108, 60], [246, 54, 28], [66, 34, 20])),
    ],
)
def test_sparsevlm_presets(version, tables):
    """From 576 tokens the stages keep what the authors' tables say."""
    method, geometry = get_method("sparsevlm", version=version), Geometry(576, layers=32)
    for table in tables:
        n, counts = 576, []
        for k in table:
            n = authors_count(n, k) if version == "1.0" else k
            counts.append(n)
        stages = method.stages(geometry, Budget(keep=n))
        assert [stage.keep for stage in stages] == counts
        assert [str(stage.site) for stage in stages] == ["decoder:3", "decoder:7", "decoder:16"]
        assert [stage.reducer.first for stage in stages] == [True, False, False]
        if version == "1.0":
            entering = [576, *counts]
            for before, after, k in zip(entering, counts, table):
                assert split(torch.tensor([before]), torch.tensor([after]))[0].item() == k


def test_sparsevlm_counts_of_any_size():
    for version in ("1.0", "2.0"):
        method = get_method("sparsevlm", version=version)
        for n in (1, 2, 9, 100, 2880):
            before = 0
            for keep in range(1, n + 1, max(1, n // 50)):
                counts = [stage.keep for stage in method.plan(Geometry(n, layers=4), keep)]
                assert n >= counts[0] >= counts[1] >= counts[2] == keep
                assert sum(counts) >= before  # budgets are found by bisection
                before = sum(counts)
    assert method.kept(576, Budget(ratio=0), Geometry(576)) == 576


def test_raters_are_above_average():
    tokens = make([9, 6], [5, 4])
    found = find_raters(tokens.inputs, tokens.mask, tokens.text_inputs, tokens.text_mask)
    for b in range(2):
        row = alone(tokens, b)
        share = (row.inputs[0].double() @ row.text_inputs[0].double().T).softmax(1).mean(0)
        assert found[b][tokens.text_mask[b]].tolist() == (share > share.mean()).tolist()
    assert not found[~tokens.text_mask].any()
    equal = find_raters(tokens.inputs, tokens.mask, torch.ones_like(tokens.text_inputs), tokens.text_mask)
    assert torch.equal(equal, tokens.text_mask)


def test_raters_are_remembered_however_the_text_is_padded_later():
    method, tokens = get_method("sparsevlm"), make([9, 6], [5, 3])
    first = method._raters(tokens)
    later = make([9, 6], [5, 3], seed=1)  # other inputs: must not be looked at
    later.memory = tokens.memory
    padded = torch.nn.functional.pad(later.text_mask, (2, 0))
    later.text_mask, later.text_columns = padded, torch.nn.functional.pad(later.text_columns, (2, 0), value=-1)
    assert torch.equal(method._raters(later), torch.nn.functional.pad(first, (2, 0)))
    assert set(tokens.memory) == {RATERS}


def reference_sparse(tokens, version, heads_):
    """Scores of one row, by loops."""
    at, n = tokens.attention, tokens.features.shape[1]
    maps = dense_attention(at, 0)
    share = (tokens.inputs[0].double() @ tokens.text_inputs[0].double().T).softmax(1).mean(0)
    raters = [t for t in range(len(share)) if share[t] > share.mean()] or list(range(len(share)))
    seen = torch.zeros(HEADS, n, dtype=torch.float64)
    for h in range(HEADS):
        for j in range(n):
            for t in raters:
                value = float(maps[h, at.text_slots[0, t], at.slots[0, j]])
                if version == "2.0":
                    distance = int(tokens.text_columns[0, t] - tokens.columns[0, j])
                    angles = [distance * 10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)]
                    weight = 2 / math.sqrt(DIM) * sum(math.cos(a) for a in angles)
                    value /= max(weight, math.sqrt(DIM) / 16)
                seen[h, j] += value / len(raters)
    if version == "2.0":
        seen = seen[seen.sum(1).argsort(descending=True)[:heads_]]
    return seen.mean(0)


@pytest.mark.parametrize("seed", range(5))
def test_sparsevlm_scores_match_reference(seed):
    tokens = make([30], [4], seed)
    score = reference_sparse(tokens, "2.0", 3)
    method = get_method("sparsevlm", version=2.0, heads=3)
    assert kept(method, tokens, [12])[0] == sorted(score.argsort(descending=True)[:12].tolist())
    score = reference_sparse(tokens, "1.0", 0)
    for keep in (1, 12, 29):
        direct = split(torch.tensor([30]), torch.tensor([keep]))[0].item()
        chosen, means = reference_recycle(tokens.features[0], score.tolist(), direct)
        chosen += list(means) if keep > 1 else []
        assert kept(get_method("sparsevlm"), tokens, [keep])[0] == sorted(chosen)


def test_rotary_weight():
    distance = torch.tensor([0, 1, 50, 1706, 1707])
    angles = distance.double()[:, None] * 10000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    theirs = 2 / math.sqrt(128) * angles.cos().sum(1)
    found = rotary_weight(distance, 128, 10000.0).double()
    torch.testing.assert_close(found[:3], theirs[:3], atol=1e-4, rtol=0)
    assert theirs[3] > 0 > theirs[4]  # where the code's changes its sign
    torch.testing.assert_close(found[3:], torch.full((2,), math.sqrt(128) / 16).double())


def test_head_attention_in_chunks():
    tokens = make([9, 6], [5, 4])
    at = tokens.attention
    q = at.queries[torch.arange(2)[:, None], at.text_slots]
    rows, gain = tokens.text_mask & (torch.arange(5) != 3), torch.rand(2, 5, 9)
    arguments = (q, at.keys, at.scale, at.text_slots, rows, at.valid, at.slots)
    whole = head_attention(*arguments, gain)
    for b, n in enumerate((9, 6)):
        maps, expected = dense_attention(at, b), 0
        for t in rows[b].nonzero()[:, 0].tolist():
            expected = expected + maps[:, at.text_slots[b, t], at.slots[b, :n]] * gain[b, t, :n].double()
        expected = expected / rows[b].sum()
        torch.testing.assert_close(whole[b, :, :n].double(), expected, rtol=1e-5, atol=1e-7)
    calls = []
    with patch.object(heads, "row_attention", lambda *args: calls.append(1) or row_attention(*args)):
        torch.testing.assert_close(head_attention(*arguments, gain, chunk=2), whole)
    assert len(calls) == 3


def test_clusters_in_chunks():
    x, mask = torch.randn(3, 50, 4), torch.arange(50) < torch.tensor([[50], [31], [1]])
    clusters = torch.tensor([6, 4, 1])
    whole = density_peaks(x, clusters, mask)
    assert [len(row[real].unique()) for row, real in zip(whole, mask)] == [6, 4, 1]
    assert torch.equal(density_peaks(x, clusters, mask, chunk=7), whole)
    with patch.object(cluster, "ELEMENTS", 200):
        assert torch.equal(density_peaks(x, clusters, mask), whole)
    spoilt = x.masked_fill(~mask[..., None], math.nan)
    assert torch.equal(density_peaks(spoilt, clusters, mask), whole)


def test_clusters_are_clusters():
    centres = 10 * torch.eye(4)
    x = centres.repeat(8, 1)[None] + 0.1 * torch.randn(1, 32, 4)
    found = density_peaks(x, torch.tensor([4]), torch.ones(1, 32).bool())[0]
    assert all(found[i] % 4 == i % 4 for i in range(32))


def test_two_equally_dense_points_are_decided_by_their_place():
    """With two clusters mutual nearest neighbours are equally dense; the code throws a die."""
    x = torch.tensor([[[0.0, 0.0], [5.0, 5.0], [0.3, 0.1], [5.0, 9.0]]])
    found = density_peaks(x, torch.tensor([2]), torch.ones(1, 4).bool())
    for _ in range(3):
        assert torch.equal(density_peaks(x, torch.tensor([2]), torch.ones(1, 4).bool()), found)
    flipped = density_peaks(x[:, [2, 1, 0, 3]], torch.tensor([2]), torch.ones(1, 4).bool())
    assert found[0, 0] == 0 and flipped[0, 0] == 0


# ------------------------------------------------------------------------------------------------ vatp
@pytest.mark.parametrize("rows", ["last", "text", "received"])
def test_vatp_is_attention_times_length(rows):
    tokens = make([9, 6], [3, 4])
    at, found = tokens.attention, vatp(tokens, rows)
    for b, n in enumerate((9, 6)):
        maps = dense_attention(at, b)
        text, image = at.text_slots[b][tokens.text_mask[b]], at.slots[b, :n]
        slots = {"last": [int(at.last[b])], "text": text.tolist(), "received": image.tolist()}[rows]
        for j in range(n):
            column, expected = int(at.slots[b, j]), 0.0
            for h in range(HEADS):
                attended = sum(float(maps[h, slot, column]) for slot in slots) / len(slots)
                value = at.values[b, column, h // (HEADS // KV_HEADS)].double()
                expected += attended * float(value.abs().sum()) / HEADS
            assert float(found[b, j]) == pytest.approx(expected, rel=1e-5)


def test_vatp_passes_by_a_sink():
    """Much attention, hardly any value."""
    tokens = make([12], [3])
    at = tokens.attention
    at.keys[0, BEFORE + 4] = 5 * at.queries[0, -1, ::2]
    row = kept(get_method("vatp"), tokens, [4])[0]
    at.values[0, BEFORE + 4] *= 1e-3
    assert 4 in row and 4 not in kept(get_method("vatp"), tokens, [4])[0]


# ------------------------------------------------------------------------------------------------ greedyprune
def reference_greedy(tokens, keep, tau):
    """Non-maximum suppression over a sorted list."""
    x = torch.nn.functional.normalize(tokens.features[0].double(), dim=-1)
    saliency = (x @ torch.nn.functional.normalize(tokens.text_features[0, -1].double(), dim=0)).tolist()
    order = sorted(range(len(x)), key=lambda i: -saliency[i])
    taken: list[int] = []
    for i in order:
        if len(taken) < keep and all(float(x[i] @ x[j]) <= tau for j in taken):
            taken.append(i)
    taken += [i for i in order if i not in taken][: keep - len(taken)]
    return sorted(taken)


@repeatable
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 29), st.sampled_from([-0.5, 0, 0.3, 0.6, 0.9]))
def test_greedyprune_matches_reference(n, t, k, tau):
    tokens, keep = make([n], [t], seed=n + 100 * k), 1 + k % n
    assert kept(get_method("greedyprune", tau=tau), tokens, [keep])[0] == reference_greedy(tokens, keep, tau)


def test_greedyprune_without_veto_or_with_all_is_a_top_k():
    tokens = make([40], [3])
    expected = reference_greedy(tokens, 10, 2.0)
    for tau in (1.0, -1.0):
        assert kept(get_method("greedyprune", tau=tau), tokens, [10])[0] == expected
    doubled = replace(tokens, features=tokens.features[:, [*range(20), *range(20)]])
    row = kept(get_method("greedyprune", tau=1.0), doubled, [10])[0]
    assert sorted(i % 20 for i in row) == sorted(2 * sorted({i % 20 for i in row}))  # duplicates are allowed
    assert len({i % 20 for i in kept(get_method("greedyprune"), doubled, [10])[0]}) == 10


def test_greedyprune_reads_the_last_text_token():
    tokens = make([20, 20], [4, 2])
    rows = kept(get_method("greedyprune"), tokens, [5, 5])
    tokens.text_features[:, :-1] = math.nan
    assert kept(get_method("greedyprune"), tokens, [5, 5]) == rows
    tokens.text_features[:, -1] *= -1
    assert kept(get_method("greedyprune"), tokens, [5, 5]) != rows


def test_veto_fills_up_with_the_heaviest():
    x = torch.tensor([[[1.0, 0], [1, 0.01], [0, 1], [1, 0.02], [0.01, 1]]])
    weight = torch.tensor([[5.0, 4, 3, 2, 1]])
    mask = torch.ones(1, 5).bool()
    picks = [greedy_veto(x, weight, [k], mask, 0.9)[0][0].tolist() for k in (1, 2, 3, 4)]
    assert picks == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
