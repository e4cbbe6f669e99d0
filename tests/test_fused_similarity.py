"""The nearest neighbour and graph propagation in Triton give what the torch references give.

See tests/test_fused_attention.py on where the tests of `TestTriton` run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prune.kernels import cosine_reduce, graph
from prune.kernels.dispatch import NotServed
from prune.kernels.graph import propagate
from prune.kernels.neighbours import cosine_topk

CUDA = torch.cuda.is_available()
HERE = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU_ONLY = pytest.mark.skipif(not CUDA, reason="too many tiles for Triton's interpreter; needs a CUDA device")


@pytest.mark.skipif(HERE, reason="the tests of TestTriton run in this process")
def test_triton_under_its_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"{Path(__file__)}::TestTriton"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and "no tests ran" not in done.stdout, done.stdout + done.stderr


def tokens(n, dtype, dim=40, samples=2):
    """Tokens with duplicates and zero vectors, and a ragged mask that hides NaN; the last sample is all padding."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(samples, n, dim, generator=g) + 0.5
    if n >= 5:
        x[:, 3], x[:, n - 1] = x[:, 1], 0
    mask = torch.rand(samples, n, generator=g) > 0.3
    mask[0, : n // 2 + 1], mask[1:] = True, False
    return x.to(DEVICE, dtype), mask.to(DEVICE)


def both(kernel, monkeypatch, *args):
    found = []
    for provider in ("torch", "triton"):
        monkeypatch.setenv("PRUNE_KERNELS", provider)
        found.append(kernel(*args))
    return found


@pytest.mark.skipif(not HERE, reason="needs CUDA or TRITON_INTERPRET=1; see test_triton_under_its_interpreter")
class TestTriton:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [1, 5, 577, pytest.param(2880, marks=GPU_ONLY), pytest.param(16384, marks=GPU_ONLY)])
    def test_the_nearest_other(self, n, dtype, monkeypatch):
        x, mask = tokens(n, dtype)
        x = x.masked_fill(~mask[..., None], math.nan)
        want, got = both(cosine_reduce, monkeypatch, x, None, "max", mask)
        # Both measure with `dot`, so they differ only where they found different neighbours: near ties of the product.
        torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=1e-6)
        if n == 1:
            assert got[0].tolist() == [-math.inf]

    @pytest.mark.parametrize("n", [5, 577])
    def test_the_nearest_of_a_set(self, n, monkeypatch):
        x, mask = tokens(n, torch.float32)
        y, some = tokens(7, torch.float32)
        want, got = both(cosine_reduce, monkeypatch, x, y.masked_fill(~some[..., None], math.nan), "max", some)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert (got[1] == -math.inf).all()  # nothing to be near to

    def test_two_nearest_neighbours_tie(self, monkeypatch):
        """To the bit, as in torch."""
        base = torch.randn(1, 150, 100, device=DEVICE)
        x = torch.cat([base, base + 0.2 * torch.randn(1, 150, 100, device=DEVICE)], 1)
        want, got = both(cosine_reduce, monkeypatch, x)
        assert torch.equal(got[:, :150], got[:, 150:]) and torch.equal(got, want)

    def test_a_sum_and_a_wrong_name(self, monkeypatch):
        x, _ = tokens(5, torch.float32)
        want, got = both(cosine_reduce, monkeypatch, x, None, "sum")
        assert torch.equal(got, want)
        with pytest.raises(ValueError, match="'max' or 'sum'"):
            cosine_reduce(x, x, "mean")

    @pytest.mark.parametrize(
        ("n", "k", "dtype"),
        [
            *((5, k, dtype) for k in (3, 9) for dtype in DTYPES),
            (1, 1, torch.float32),
            (40, 9, torch.bfloat16),
            *(pytest.param(n, 32, dtype, marks=GPU_ONLY) for n in (577, 2880, 16384) for dtype in DTYPES),
        ],
    )
    def test_the_nearest_few(self, n, k, dtype, monkeypatch):
        """Signs: all products are exact, so that many tokens tie."""
        blocks = __import__("prune.kernels.fused.blocks", fromlist=["INTERPRETED"])
        monkeypatch.setattr(blocks, "INTERPRETED", (16, 16))  # sorting takes the interpreter long
        x, mask = tokens(n, dtype, dim=64)
        x = x.sign().masked_fill(~mask[..., None], math.nan)
        group = torch.arange(n, device=DEVICE).expand(2, -1) // 30
        own, hidden = torch.arange(n, device=DEVICE).expand(2, -1), group.masked_fill(~mask, -1)
        want, got = both(cosine_topk, monkeypatch, x[:, ::2], x, k, group[:, ::2], hidden, own[:, ::2])
        assert torch.equal(got[0][mask[:, ::2]], want[0][mask[:, ::2]]) and want[0].shape[-1] == min(n, k)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-6)
        want, got = both(cosine_topk, monkeypatch, x.nan_to_num().flip(1), x.nan_to_num(), k, group * 0, group * 0)
        assert torch.equal(got[0], want[0])  # nothing left out

    def test_more_than_a_tile_has_is_not_served(self, monkeypatch):
        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        x, group = torch.ones(1, 70, 16, device=DEVICE), torch.zeros(1, 70, dtype=torch.int64, device=DEVICE)
        with pytest.raises(NotServed, match="k=65"):
            cosine_topk(x, x, 65, group, group)

    @pytest.mark.parametrize("stored", [True, False])
    @pytest.mark.parametrize(
        ("n", "dtype"),
        [
            *((5, dtype) for dtype in DTYPES),
            (1, torch.float32),
            (577, torch.bfloat16),
            pytest.param(2880, torch.bfloat16, marks=GPU_ONLY),
        ],
    )
    def test_propagation(self, n, dtype, stored, monkeypatch):
        x, mask = tokens(n, dtype)
        start, group = torch.rand(2, n, device=DEVICE), torch.arange(n, device=DEVICE).expand(2, -1) // 300
        x, start = x.masked_fill(~mask[..., None], math.nan), start.masked_fill(~mask, math.nan)
        if not stored:
            for place in (graph, __import__("prune.kernels.fused.graph", fromlist=["ELEMENTS"])):
                monkeypatch.setattr(place, "ELEMENTS", 1)
            if n > 5 and not CUDA:
                monkeypatch.setattr(graph, "ELEMENTS", 1 << 16)  # torch goes row by row otherwise
        self.same_flow(monkeypatch, x, start, group, mask)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [40, pytest.param(2880, marks=GPU_ONLY), pytest.param(16384, marks=GPU_ONLY)])
    def test_propagation_along_many_edges(self, n, dtype, monkeypatch):
        """Signs: cosines are exact, and none is the threshold, so that no edge hangs on rounding."""
        x, mask = tokens(n, dtype, dim=64)
        start, group = torch.rand(2, n, device=DEVICE), torch.arange(n, device=DEVICE).expand(2, -1) // 300
        self.same_flow(monkeypatch, x.sign().masked_fill(~mask[..., None], math.nan), start, group, mask)

    def same_flow(self, monkeypatch, x, start, group, mask):
        (want, degrees), (got, edges) = both(propagate, monkeypatch, x, start, group, mask, 0.35, 0.03, 2)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(edges, degrees) and not edges[~mask].any() and not got[~mask].any()
