"""Ragged compaction against plain loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from prune.kernels.compaction import compact, dense_rank, forward_fill, take

masks = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b)
    )
)


@given(masks, st.integers(0, 3))
def test_compact_take_and_fill(rows, spare):
    keep = torch.tensor(rows)
    length = int(keep.sum(1).max()) + spare
    if length == 0:
        return
    source, valid, target = compact(keep, length)
    filled = forward_fill(target, length)
    x = torch.arange(keep.numel()).view(*keep.shape, 1)
    for row, flags in enumerate(rows):
        survivors = [c for c, flag in enumerate(flags) if flag]
        pad = length - len(survivors)
        assert valid[row].tolist() == [False] * pad + [True] * len(survivors)
        assert source[row, pad:].tolist() == survivors
        assert take(x, source)[row, pad:, 0].tolist() == x[row, survivors, 0].tolist()
        assert target[row].tolist() == [
            pad + survivors.index(c) if c in survivors else length for c in range(len(flags))
        ]
        for c in range(len(flags)):
            if survivors:
                before = [s for s in survivors if s <= c] or survivors[:1]
                assert filled[row, c] == pad + survivors.index(before[-1])


@given(masks, st.integers(1, 3), st.randoms(use_true_random=False))
def test_dense_rank(rows, axes, rng):
    valid = torch.tensor(rows)
    values = torch.tensor([[[rng.randrange(9) for _ in row] for row in rows] for _ in range(axes)])
    ranked = dense_rank(values, valid)
    for row in range(len(rows)):
        used = sorted(set(values[:, row, valid[row]].flatten().tolist()))
        for column in valid[row].nonzero()[:, 0].tolist():
            for axis in range(axes):
                assert ranked[axis, row, column] == used[0] + used.index(values[axis, row, column])


def test_take_reads_any_dimension_and_a_batch_of_one():
    x = torch.arange(24).view(3, 1, 8)
    index = torch.tensor([[0, 7], [3, 3]])
    assert take(x, index, dim=2).tolist() == [[[a * 8, a * 8 + 7], [a * 8 + 3, a * 8 + 3]] for a in range(3)]
