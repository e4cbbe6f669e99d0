"""The kernels against plain-Python references: ties, ragged rows, garbage in the padding, low precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune.kernels import cosine_reduce, cosine_similarity, dot, farthest_point, topk_indices, topk_mask, unit

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


VALUES = [-math.inf, -1.0, -0.0, 0.0, 1.0, 2.0, math.inf, math.nan]


@st.composite
def rows(draw):
    """(scores, counts, candidates): a batch rich in ties, infinities and NaN."""
    b, n = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    grid = lambda values: [draw(st.lists(values, min_size=n, max_size=n)) for _ in range(b)]  # noqa: E731
    counts = draw(st.lists(st.integers(0, n + 2), min_size=b, max_size=b))
    return torch.tensor(grid(st.sampled_from(VALUES))), counts, torch.tensor(grid(st.booleans()))


def reference_topk(scores, k, candidates):
    rank = lambda j: (math.isnan(scores[j]), -scores[j] if not math.isnan(scores[j]) else 0.0, j)  # noqa: E731
    return sorted(sorted((j for j in range(len(scores)) if candidates[j]), key=rank)[:k])


@given(rows())
def test_topk_matches_reference(case):
    scores, counts, mask = case
    index, valid = topk_indices(scores, counts, mask)
    assert index.dtype == torch.int64 and index.shape == valid.shape == (len(scores), max(counts))
    for b, k in enumerate(counts):
        expected = reference_topk(scores[b].tolist(), k, mask[b].tolist())
        assert index[b, : len(expected)].tolist() == expected
        assert valid[b].tolist() == [slot < len(expected) for slot in range(max(counts))]
        assert not index[b, len(expected) :].any()
        assert topk_mask(scores, counts, mask)[b].nonzero()[:, 0].tolist() == expected


@given(rows())
def test_topk_rows_do_not_influence_each_other(case):
    scores, counts, mask = case
    index, valid = topk_indices(scores, counts, mask)
    for b, k in enumerate(counts):
        real = mask[b]
        alone, alone_valid = topk_indices(scores[b : b + 1], k, real[None])
        assert index[b][valid[b]].tolist() == alone[alone_valid].tolist()


def test_topk_of_a_long_row_is_stable():
    """Sorting routines switch algorithm with the length; ties must not depend on it."""
    index, _ = topk_indices(torch.zeros(2, 5000), [7, 3000])
    assert index[0, :7].tolist() == list(range(7)) and index[1].tolist() == list(range(3000))


def test_topk_defaults_and_dtypes():
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    assert topk_indices(scores, 2)[0].tolist() == [[0, 2]]
    assert topk_indices(scores.bfloat16(), [2])[0].tolist() == [[0, 2]]
    assert topk_indices(scores, 3)[0].tolist() == [[0, 1, 2]]
    assert topk_indices(scores, 0)[0].shape == (1, 0)
    assert topk_mask(scores, torch.tensor([1])).tolist() == [[True, False, False]]
    index, valid = topk_indices(torch.zeros(2, 0), 2)
    assert index.tolist() == [[0, 0], [0, 0]] and not valid.any()


@pytest.mark.parametrize("k", [-1, [1], [1, 2, 3], [1, -1]])
def test_topk_rejects_bad_counts(k):
    with pytest.raises(ValueError, match="for each of 2 rows"):
        topk_indices(torch.zeros(2, 4), k)


# ------------------------------------------------------------------------------------------------------ similarity
def reference_cosine(x, y):
    x, y = x.double(), y.double()
    return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_similarity_is_fp32(dtype):
    x, y = torch.randn(2, 7, 33).to(dtype), torch.randn(2, 5, 33).to(dtype)
    got = cosine_similarity(x, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference_cosine(x, y), atol=1e-6, rtol=0)


def test_cosine_stays_fp32_under_autocast():
    x, y = torch.randn(2, 7, 64), torch.randn(2, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cosine_similarity(x, y), cosine_reduce(x), cosine_reduce(x, y, "sum")
        order, _ = farthest_point(x, 4)
    for got, expected in zip(inside, (cosine_similarity(x, y), cosine_reduce(x), cosine_reduce(x, y, "sum"))):
        assert torch.equal(got, expected)
    assert torch.equal(order, farthest_point(x, 4)[0])


def test_zero_vectors_have_cosine_zero():
    x = torch.zeros(1, 2, 4)
    assert torch.equal(unit(x), x) and not cosine_similarity(x, torch.randn(1, 3, 4)).any()


def test_dot_gives_equal_bits_for_equal_pairs():
    """What ties rest on. A matrix product fails this: rows at the edge of a tile are summed in another order."""
    for n in (7, 10, 11, 577):
        a, b = unit(torch.randn(2, 1, 1, 1000))
        assert dot(a.expand(1, n, 1000).contiguous(), b).unique().numel() == 1
        assert torch.equal(dot(a, b), dot(b, a))


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("others", [False, True])
def test_cosine_reduce(chunk, reduce, others):
    x = torch.randn(3, 7, 16)
    y = x.clone() if others else torch.randn(3, 5, 16)
    mask = torch.arange(y.shape[1]) < torch.tensor([[y.shape[1]], [2], [1]])
    y[~mask] = math.nan
    cosine = reference_cosine(x, y).masked_fill(~mask[:, None], -math.inf)
    if others:
        x = y
        cosine.diagonal(0, 1, 2).fill_(-math.inf)
    expected = cosine.amax(-1) if reduce == "max" else cosine.masked_fill(cosine == -math.inf, 0).sum(-1)
    got = cosine_reduce(x, None if others else y, reduce, mask, chunk)
    assert got.dtype == torch.float32
    real = mask if others else torch.ones_like(got, dtype=torch.bool)
    torch.testing.assert_close(got[real], expected[real].float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("pairs", [3, 5, 50])
def test_cosine_reduce_ties_two_nearest_neighbours(pairs):
    """They are equally near to each other, to the bit, and whatever the chunk; a matrix product's sums are not."""
    base = torch.randn(1, pairs, 100)
    x = torch.cat([base, base + 0.2 * torch.randn(1, pairs, 100)], 1)
    nearest = cosine_reduce(x)
    assert torch.equal(nearest[:, :pairs], nearest[:, pairs:])
    assert torch.equal(nearest, cosine_reduce(x, chunk=1)) and torch.equal(nearest, cosine_reduce(x, chunk=5))


def test_cosine_reduce_over_nothing_and_wrong_name():
    x = torch.randn(1, 2, 3)
    assert cosine_reduce(x, x[:, :0]).tolist() == [[-math.inf] * 2]
    assert cosine_reduce(x, x[:, :0], "sum").tolist() == [[0.0] * 2]
    with pytest.raises(ValueError, match="'max' or 'sum'"):
        cosine_reduce(x, x, "mean")


# -------------------------------------------------------------------------------------------------- farthest point
def reference_farthest(x, k):
    """Step by step from the definition, one row `[n, D]`, in double precision, over the whole distance matrix."""
    distance = 1 - reference_cosine(x, x)
    n, picks = len(x), []
    for _ in range(min(k, n)):
        best = None
        for j in (j for j in range(n) if j not in picks):
            peers = picks or [i for i in range(n) if i != j]
            score = min((distance[i, j].item() for i in peers), default=math.inf)
            if best is None or score > best[0]:
                best = (score, j)
        picks.append(best[1])
    return picks


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 10**6), st.data())
@settings(max_examples=40)
def test_farthest_point_matches_reference(lengths, seed, data):
    counts = [data.draw(st.integers(0, n + 1)) for n in lengths]
    x = torch.randn(len(lengths), max(lengths), 6, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    x[~mask] = data.draw(st.sampled_from([math.nan, math.inf, 1e30, 0.0]))
    order, valid = farthest_point(x, counts, mask, chunk=data.draw(st.sampled_from([1, 5, 1024])))
    assert order.shape == (len(lengths), max(counts))
    for b, (n, k) in enumerate(zip(lengths, counts)):
        assert valid[b].tolist() == [slot < min(n, k) for slot in range(max(counts))]
        picks = order[b][valid[b]].tolist()
        assert sorted(set(picks)) == sorted(picks)
        if n != 2:  # with two tokens the reference's first pick hangs on its rounding
            assert picks == reference_farthest(x[b, :n], k)
        alone, _ = farthest_point(x[b : b + 1, :n], k)
        assert picks == alone[0, : min(n, k)].tolist()


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 11), st.integers(2, 700))
def test_farthest_point_with_duplicates(seed, distinct, copies, width):
    """No token is returned twice, and copies tie exactly: all first copies, then the lowest indices in order."""
    base = torch.randn(1, distinct, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    n = distinct * copies
    for x, firsts in (
        (base.repeat(1, copies, 1), list(range(distinct))),
        (base.repeat_interleave(copies, 1), list(range(0, n, copies))),
    ):
        picks = farthest_point(x, n)[0][0].tolist()
        assert picks[0] == 0  # every nearest neighbour is a copy: all tie
        if width > 10:  # on a plane or so, two of the distinct ones may point the same way
            assert sorted(picks[:distinct]) == firsts
            assert picks[distinct:] == [j for j in range(n) if j not in firsts]


@given(st.integers(0, 10**6), st.integers(1, 97))
def test_farthest_point_of_two_is_index_order(seed, width):
    """Their distance to each other is one number, whichever is asked."""
    pair = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(seed))
    assert farthest_point(pair, 2)[0].tolist() == [[0, 1]]


def test_farthest_point_edges():
    x = torch.randn(2, 3, 4)
    assert farthest_point(x[:, :1], 1)[0].tolist() == [[0], [0]]
    assert farthest_point(x, 3)[0].sort(1).values.tolist() == [[0, 1, 2]] * 2
    assert farthest_point(x, 0)[0].shape == (2, 0)
    order, valid = farthest_point(x, [2, 2], torch.tensor([[False] * 3, [False, True, False]]))
    assert valid.tolist() == [[False, False], [True, False]] and order[1, 0] == 1
    nan = x.clone()
    nan[0, 1] = math.nan  # a broken model still gets its count, without repetition
    assert farthest_point(nan, 3)[0].sort(1).values.tolist() == [[0, 1, 2]] * 2


def test_farthest_point_in_low_precision_computes_in_fp32():
    x = torch.randn(2, 50, 32).bfloat16()
    assert torch.equal(farthest_point(x, 20)[0], farthest_point(x.float(), 20)[0])


def test_kernels_keep_no_graph_and_leave_inputs_alone():
    x = torch.randn(2, 9, 8, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    before = x.detach().clone()
    farthest_point(x, 3, mask)
    topk_indices(x[..., 0], 3, mask)
    assert torch.equal(x.detach(), before) and mask.all()
    assert not topk_mask(x[..., 0], 2).requires_grad
