"""Top-k and best matches in Triton are those of the torch reference.

Without CUDA, one test runs `TestTriton` of this file in a process of its own under Triton's interpreter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prune.kernels import topk_indices, topk_mask, unit
from prune.kernels.bipartite import best_match, bipartite_merge
from prune.kernels.dispatch import NotServed

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
HERE = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1e-40, 1.0, 2.0, math.inf, math.nan])


@pytest.mark.skipif(HERE, reason="the tests below run in this process")
def test_triton_under_its_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"{Path(__file__)}::TestTriton"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def both(monkeypatch, run):
    found = []
    for provider in ("torch", "triton"):
        monkeypatch.setenv("PRUNE_KERNELS", provider)
        found.append(run())
    return found


def rows(n, dtype, ties):
    """Four rows of scores, one of them without candidates."""
    torch.manual_seed(n)
    scores = VALUES[torch.randint(0, len(VALUES), (4, n))] if ties else torch.randn(4, n)
    mask = torch.rand(4, n) > 0.4
    mask[3] = False
    return scores.to(DEVICE, dtype), mask.to(DEVICE), [n // 3, 0, n + 2, 2]


def vectors(n, m, dtype, signs):
    torch.manual_seed(n)
    x, y = torch.randn(2, n, 80 if not signs else 64), torch.randn(2, m, 80 if not signs else 64)
    if signs:  # cosines are exact, and tie
        x, y = x.sign(), y.sign()
    y[:, m // 2] = y[:, -1] = x[:, n // 2] = y[:, 0]  # which its first copy matches, whatever the tile
    mask = torch.rand(2, m) > 0.3
    mask[0, [0, -1]] = True
    y[~mask] = math.nan
    mask[1] &= n > 1  # a row without candidates
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype), mask.to(DEVICE)


class TestTriton:
    __test__ = HERE

    @pytest.mark.parametrize("n", [1, 5, 577])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("ties", [False, True])
    def test_topk(self, monkeypatch, n, dtype, ties):
        scores, mask, counts = rows(n, dtype, ties)
        for candidates in (mask, None):
            reference, triton = both(monkeypatch, lambda m=candidates: topk_indices(scores, counts, m))
            assert triton[0].dtype == torch.int64 and triton[1].dtype == torch.bool
            assert torch.equal(reference[0], triton[0]) and torch.equal(reference[1], triton[1])
        for k in (torch.tensor(counts, device=DEVICE), 3):
            reference, triton = both(monkeypatch, lambda k=k: topk_mask(scores, k, mask))
            assert triton.dtype == torch.bool and torch.equal(reference, triton)

    @pytest.mark.parametrize("n", [2880, 16384])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_topk_of_long_rows(self, monkeypatch, n, dtype):
        scores, mask, counts = rows(n, dtype, ties=False)  # in half precision thousands tie
        reference, triton = both(monkeypatch, lambda: topk_indices(scores, counts, mask))
        assert torch.equal(reference[0], triton[0]) and torch.equal(reference[1], triton[1])

    def test_topk_of_a_view(self, monkeypatch):
        """Rows that do not lie next to each other."""
        scores = torch.randn(3, 20, device=DEVICE)[:, ::2]
        reference, triton = both(monkeypatch, lambda: topk_indices(scores, 4, (scores > 0).T.contiguous().T)[0])
        assert torch.equal(reference, triton)

    def test_topk_refuses(self, monkeypatch):
        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        for scores in (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 40000), torch.zeros(1, 0)):
            with pytest.raises(NotServed):
                topk_mask(scores.to(DEVICE), 1)
        with pytest.raises(ValueError, match="for each of 1 rows"):
            topk_indices(torch.zeros(1, 4, device=DEVICE), [1, 2])

    @pytest.mark.parametrize("n, m", [(1, 1), (5, 3), (70, 129)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("signs", [False, True])
    def test_best_match(self, monkeypatch, n, m, dtype, signs):
        x, y, mask = vectors(n, m, dtype, signs)
        self.same_matches(monkeypatch, x, y, mask, 0 if signs else 4e-7)

    def test_577_matches(self, monkeypatch):
        self.same_matches(monkeypatch, *vectors(577, 288, torch.bfloat16, signs=True), 0)

    def same_matches(self, monkeypatch, x, y, mask, tolerance):
        (index, cosine), (found, measured) = both(monkeypatch, lambda: best_match(x, y, mask))
        assert found.dtype == torch.int64 and measured.dtype == torch.float32
        assert torch.equal(index, found)
        torch.testing.assert_close(measured, cosine, atol=tolerance, rtol=0)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: too slow in the interpreter")
@pytest.mark.parametrize("n", [2880, 16384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_matches_on_cuda(monkeypatch, n, dtype):
    x, y, mask = vectors(n, n, dtype, signs=True)
    (index, cosine), (found, measured) = both(monkeypatch, lambda: best_match(x, y, mask))
    assert torch.equal(index, found) and torch.equal(cosine, measured)


def slow_halving(x, target, by_similarity=False):
    """One round of bipartite matching over `[n, D]`, from the definition: who goes where."""
    cosine = unit(x) @ unit(x).T
    n = len(x)
    best = {i: max(range(1, n, 2), key=lambda j: (cosine[i, j].item(), -j)) for i in range(0, n, 2)} if n > 1 else {}
    merged = sorted(best, key=lambda i: (-cosine[i, best[i]].item(), i))[: min(n // 2, n - target)]
    return [best[i] if i in merged else i for i in range(n)]


def test_a_round_of_merging_in_groups():
    """Groups of several sizes beside each other, one of a single token, and padding."""
    torch.manual_seed(0)
    sizes = (7, 1, 4, 9)
    group = torch.cat([torch.full((size,), g) for g, size in enumerate(sizes)] + [torch.full((3,), 4)])
    group = group[torch.randperm(len(group))]
    x, mask = torch.randn(1, len(group), 12), group < 4
    x[0, ~mask] = math.nan
    merged = bipartite_merge(x, group[None], torch.full((1, len(group)), 3).clamp(max=5), mask[None], rounds=1)
    for g in range(4):
        members = (group == g).nonzero()[:, 0]
        expected = members[slow_halving(x[0, members], 3)]
        assert torch.equal(merged.into[0, members], expected)
