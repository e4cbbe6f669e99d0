"""Attention kernels in Triton give the numbers of the torch references; packed sequences and memory of the references.

On CUDA the tests of `TestTriton` run as they are. Elsewhere they need Triton's interpreter, which must be on before
Triton is imported: TRITON_INTERPRET=1 in the environment, or `test_triton_under_its_interpreter`, which starts a
process with it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prune.kernels import attention_pagerank, received_attention, row_attention
from prune.kernels.attention import by_segment
from prune.kernels.heads import head_attention
from prune.kernels.rows import important_attention, mean_row_attention, rows_to_columns

CUDA = torch.cuda.is_available()
HERE = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
GPU_ONLY = pytest.mark.skipif(not CUDA, reason="too many tiles for Triton's interpreter; needs a CUDA device")


@pytest.mark.skipif(HERE, reason="the tests of TestTriton run in this process")
def test_triton_under_its_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"{Path(__file__)}::TestTriton"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and "no tests ran" not in done.stdout, done.stdout + done.stderr


class Case:
    """Random inputs of `N` places: ragged `valid` with NaN where it is False, masks, rows, packed bounds."""

    def __init__(self, n, dtype, samples=2, heads=4, kv_heads=2, dim=24):
        g = torch.Generator().manual_seed(n)
        normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.q, self.k = normal(samples, n, heads, dim), normal(samples, n, kv_heads, dim)
        self.valid = torch.rand(samples, n, generator=g) > 0.3
        self.valid[0, 0], self.valid[-1] = True, samples == 1  # the last of several samples has no valid column
        self.mask = torch.rand(1, n, n, generator=g) > 0.5
        self.mask[:, n // 2] = False  # a row that sees nothing
        self.slots = torch.randint(n, (samples, 3), generator=g)
        self.rows = torch.rand(samples, 3, generator=g) > 0.3
        self.queries = normal(samples, 3, heads, dim)
        self.queries[~self.rows] = math.nan
        self.columns = torch.randint(n, (samples, 4), generator=g)
        self.bounds = torch.tensor([0, n // 3, n // 3, n - 1, n], dtype=torch.int32)  # an empty one, one of length 1
        self.holey_q, self.holey_k = self.q.clone(), self.k.clone()
        self.holey_q[~self.valid], self.holey_k[~self.valid] = math.nan, math.nan
        for name in ("q", "k", "queries", "holey_q", "holey_k"):
            setattr(self, name, getattr(self, name).to(dtype))
        for name, x in vars(self).items():
            setattr(self, name, x.to(DEVICE))
        self.rows_at = (self.queries, self.holey_k, 0.3, self.slots, self.rows, self.valid)


RUNS = {
    "received": lambda c: (received_attention, c.q, c.k, 0.3),
    "received, padded": lambda c: (received_attention, c.holey_q, c.holey_k, 0.3, c.valid),
    "received, causal": lambda c: (received_attention, c.holey_q, c.holey_k, 0.3, c.valid, dict(causal=True)),
    "received, masked": lambda c: (received_attention, c.q, c.k, 0.3, dict(mask=c.mask)),
    "received, mask and valid": lambda c: (
        *(received_attention, c.holey_q, c.holey_k, 0.3, c.valid),
        dict(mask=c.mask, causal=True),
    ),
    "received, packed": lambda c: (received_attention, c.q[0], c.k[0], 0.3, dict(cu_seqlens=c.bounds)),
    "received, packed, causal": lambda c: (
        *(received_attention, c.q[0], c.k[0], 0.3),
        dict(cu_seqlens=c.bounds, causal=True),
    ),
    "pagerank": lambda c: (attention_pagerank, c.holey_q, c.holey_k, 0.3, c.valid, 3),
    "pagerank, valid as a mask": lambda c: (
        *(attention_pagerank, c.q, c.k, 0.3, None, 2, 0.5),
        dict(mask=c.valid[:, None].expand(-1, c.q.shape[1], -1)),
    ),
    "rows": lambda c: (row_attention, c.q[:, :3], c.k, 0.3),
    "rows, masked": lambda c: (row_attention, c.q[:, :3], c.holey_k, 0.3, c.valid[:, None]),
    "mean rows": lambda c: (mean_row_attention, *c.rows_at),
    "rows to columns": lambda c: (rows_to_columns, c.queries, c.holey_k, 0.3, c.rows, c.valid),
    "heads": lambda c: (head_attention, *c.rows_at, c.columns),
    "heads with a gain": lambda c: (head_attention, *c.rows_at, c.columns, torch.rand(2, 3, 4, device=DEVICE)),
}
WIDE = ("received", "received, causal", "received, packed", "pagerank", "mean rows", "rows, masked")  # several tiles


def compare(name, case, monkeypatch, rtol=1e-4, atol=1e-6):
    kernel, *args = RUNS[name](case)
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    monkeypatch.setenv("PRUNE_KERNELS", "torch")
    want = kernel(*args, **kwargs)
    monkeypatch.setenv("PRUNE_KERNELS", "triton")
    got = kernel(*args, **kwargs)
    assert got.dtype == torch.float32 and got.isfinite().all() and want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    return got


@pytest.mark.skipif(not HERE, reason="needs CUDA or TRITON_INTERPRET=1; see test_triton_under_its_interpreter")
class TestTriton:
    @pytest.mark.parametrize("name", RUNS)
    def test_few_places(self, name, monkeypatch):
        compare(name, Case(5, torch.float32), monkeypatch)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", RUNS)
    def test_half_precision(self, name, dtype, monkeypatch):
        """Products of half-precision numbers are exact in fp32: no wider tolerance."""
        compare(name, Case(37, dtype), monkeypatch)

    @pytest.mark.parametrize("name", ["received", "received, causal", "received, packed", "pagerank", "mean rows"])
    def test_one_place(self, name, monkeypatch):
        got = compare(name, Case(1, torch.float32, samples=1), monkeypatch)
        if name != "mean rows":
            assert got.flatten().tolist() == [1.0]

    @pytest.mark.parametrize("name", WIDE)
    def test_several_tiles(self, name, monkeypatch):
        compare(name, Case(577, torch.bfloat16, samples=1, heads=2, kv_heads=1, dim=16), monkeypatch)

    def test_equal_columns_receive_the_same(self, monkeypatch):
        """To the bit, in whatever tile they are: rounding must not decide ties."""
        case = Case(300, torch.float32, samples=1, heads=1, kv_heads=1, dim=16)
        case.k[:, [3, 70, 290]] = case.k[:, [3]]
        got = compare("received", case, monkeypatch)
        assert got[0, 3] == got[0, 70] == got[0, 290]

    @GPU_ONLY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("n", "heads", "kv_heads", "dim"), [(2880, 8, 4, 128), (16384, 2, 1, 64)])
    @pytest.mark.parametrize("name", RUNS)
    def test_a_high_resolution_image_and_a_long_video(self, name, n, heads, kv_heads, dim, dtype, monkeypatch):
        compare(name, Case(n, dtype, heads=heads, kv_heads=kv_heads, dim=dim), monkeypatch, atol=1e-6)

    @GPU_ONLY
    def test_memory_of_a_long_sequence(self, monkeypatch):
        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        q, k = torch.randn(2, 1, 16384, 16, 64, device=DEVICE).bfloat16()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        received_attention(q, k, 0.1)
        assert torch.cuda.max_memory_allocated() - before <= 16 << 20

    @GPU_ONLY
    def test_a_long_sequence(self, monkeypatch):
        compare("received, causal", Case(16384, torch.bfloat16, 1, heads=16, kv_heads=4, dim=64), monkeypatch)

    def test_what_is_not_served_says_so(self, monkeypatch):
        from prune.kernels.dispatch import NotServed

        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        q = torch.randn(1, 3, 1, 300, device=DEVICE)
        with pytest.raises(NotServed, match="heads of 300"):
            received_attention(q, q, 1.0)
        with pytest.raises(NotServed, match="float64"):
            received_attention(q[..., :8].double(), q[..., :8].double(), 1.0)
        with pytest.raises(NotServed, match="empty"):
            received_attention(q[:0, ..., :8], q[:0, ..., :8], 1.0)


# ------------------------------------------------------------------------------------------------ torch references
BOUNDS = torch.tensor([0, 4, 8, 8, 13, 17, 18], dtype=torch.int32)  # lengths 4, 4, 0, 5, 4, 1


@pytest.fixture
def packed():
    g = torch.Generator().manual_seed(1)
    return torch.randn(18, 4, 8, generator=g), torch.randn(18, 2, 8, generator=g)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_attend_to_themselves(packed, causal):
    got = received_attention(*packed, 0.4, causal=causal, cu_seqlens=BOUNDS)
    for start, end in zip(BOUNDS.tolist(), BOUNDS.tolist()[1:]):
        alone = received_attention(*(x[None, start:end] for x in packed), 0.4, causal=causal)
        torch.testing.assert_close(got[start:end], alone[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("given_received", [False, True])
def test_important_rows_of_packed_sequences(packed, given_received):
    candidates = torch.arange(18) % 4 != 0
    received = received_attention(*packed, 0.4, cu_seqlens=BOUNDS) if given_received else None
    got = important_attention(*packed, 0.4, 1.1, None, candidates, received, cu_seqlens=BOUNDS)
    for start, end in zip(BOUNDS.tolist(), BOUNDS.tolist()[1:]):
        parts = [x[None, start:end] for x in packed]
        alone = important_attention(*parts, 0.4, 1.1, None, candidates[None, start:end])
        torch.testing.assert_close(got[start:end], alone[0], rtol=0, atol=1e-7)


def test_packed_sequences_are_not_padded(packed):
    """Sequences of one length run together, and nothing longer than a sequence is seen."""
    shapes = []
    by_segment(lambda x: shapes.append(tuple(x.shape)) or x[..., 0, 0], BOUNDS, packed[0])
    assert shapes == [(3, 4, 4, 8), (1, 5, 4, 8), (1, 1, 4, 8)]


def test_packed_sequences_take_no_mask(packed):
    with pytest.raises(ValueError, match="cu_seqlens"):
        received_attention(*packed, 0.4, torch.ones(1, 18, dtype=torch.bool), cu_seqlens=BOUNDS)
    with pytest.raises(ValueError, match="cu_seqlens"):
        important_attention(*packed, 0.4, 1.0, torch.ones(1, 18, dtype=torch.bool), cu_seqlens=BOUNDS)


@pytest.mark.parametrize("tile", [1, 60, 1000])
def test_tiles_do_not_matter(tile, monkeypatch):
    case = Case(7, torch.float32)
    found = []
    for size in (1 << 18, tile):
        monkeypatch.setattr("prune.kernels.attention.TILE", size)
        monkeypatch.setattr("prune.kernels.attention.TILES", {"cuda": size})
        calls = [RUNS[name](case) for name in RUNS if name != "heads with a gain"]
        calls = [(call[0].reference, *call[1:], {})[: len(call) + (not isinstance(call[-1], dict))] for call in calls]
        found.append([kernel(*args, **kwargs) for kernel, *args, kwargs in calls])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside and still there, and the most there ever were. Meta tensors will do."""

    def __init__(self):
        super().__init__()
        self.views, self.live, self.peak = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in self.views or not self._given(storage, args):
                    self.live += size * (not self.views[key])
                    self.views[key] += 1
                    weakref.finalize(x, self._gone, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def _given(self, storage, args):
        """Whether it is a view of something that was there before."""
        return any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage._cdata for x in args)

    def _gone(self, key, size):
        self.views[key] -= 1
        if not self.views[key]:
            self.live -= size
            del self.views[key]


@pytest.mark.parametrize(("tile", "padded"), [("cpu", True), ("cuda", False), ("cuda", True)])
def test_memory_of_a_long_sequence_in_torch(tile, padded, monkeypatch):
    """16384 places, 16 heads: all weights would be 16 GiB."""
    if tile == "cuda":
        monkeypatch.setattr("prune.kernels.attention.TILE", 1 << 24)
    monkeypatch.setattr("torch.autocast", lambda *args, **kwargs: nullcontext())  # it knows no meta tensors
    heads = 16 if tile == "cuda" else 1  # heads run one after the other
    q = torch.empty(1, 16384, heads, 128, dtype=torch.bfloat16, device="meta")
    valid = torch.empty(1, 16384, dtype=torch.bool, device="meta") if padded else None
    with LiveBytes() as counted:
        received_attention.reference(q, q, 0.1, valid)
    assert (1 << 20) < counted.peak <= (256 << 20 if tile == "cuda" else 64 << 20)


def test_live_bytes_counts():
    with LiveBytes() as counted:
        x = torch.zeros(1000)
        y = (x + 1)[:10]  # a view keeps all of it
        del x
        z = y * 2
    assert counted.peak == 8000 and counted.live == 4040 and len(z) == 10
