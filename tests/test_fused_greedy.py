"""Greedy selection in Triton picks what the torch reference picks, in the same order; and the reference's own parts.

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

import prune.kernels.greedy as greedy
from prune.kernels import dot, farthest_point, unit
from prune.kernels.dispatch import NotServed
from prune.kernels.diverse import importance_times_distance
from prune.kernels.dpp import dpp_map
from prune.kernels.greedy import RowDots, greedy_veto, spread
from prune.kernels.merging import chosen_indices, fold_into
from prune.kernels.recipients import strongest

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
HERE = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(HERE, reason="the tests below run in this process")
def test_triton_under_its_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"{Path(__file__)}::TestTriton"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------------------------------ Triton
RULES = {
    "farthest": lambda x, w, tile, k, mask: farthest_point(x, k, mask),
    "farthest, all": lambda x, w, tile, k, mask: farthest_point(x.nan_to_num(), k),
    "sum": lambda x, w, tile, k, mask: spread(x, heaviest(w, mask), k, mask, "sum"),
    "nearest": lambda x, w, tile, k, mask: spread(x, heaviest(w, mask), k, mask, "nearest"),
    "veto": lambda x, w, tile, k, mask: greedy_veto(x, w, k, mask, 0.25),
    "importance": lambda x, w, tile, k, mask: importance_times_distance(x, w, at_most(k, mask), tile, mask),
    "dpp": lambda x, w, tile, k, mask: dpp_map(x, w, k, mask),
    "dpp in tiles": lambda x, w, tile, k, mask: dpp_map(x, w, k, mask, tile),
}


def heaviest(w, mask):
    return w.masked_fill(~mask, -1).argmax(1, keepdim=True)


def at_most(k, mask):
    return [min(count, real) for count, real in zip(k, mask.sum(1).tolist())]


def case(n, dtype, width=32, images=2, signs=False, seed=0):
    """Features, weights, tiles and candidates: every third token is a copy of another, padding holds NaN."""
    torch.manual_seed(seed)
    x = torch.randn(images, n, width)
    x = (x.sign() if signs else x).to(dtype)  # of signs all cosines are exact, and tie
    weight = torch.randint(0, 8, (images, n)) / 8 if signs else torch.rand(images, n)
    source = torch.randint(0, n, (images, n)) * (torch.arange(n) % 3 == 2)
    source = torch.where(torch.arange(n) % 3 == 2, source, torch.arange(n))
    x, weight = x.gather(1, source[..., None].expand_as(x)), weight.gather(1, source)
    mask = torch.rand(images, n) > 0.2
    mask[:, 0] = True
    x[~mask] = math.nan
    tile = torch.randint(0, 3, (images, n))
    return tuple(t.to(DEVICE) for t in (x, weight, tile, mask))


def compare(monkeypatch, run, *args):
    found = []
    for provider in ("torch", "triton"):
        monkeypatch.setenv("PRUNE_KERNELS", provider)
        out = run(*args)
        found.append(out if isinstance(out, tuple) else (out,))
    for reference, triton in zip(*found):
        assert triton.dtype == reference.dtype and triton.tolist() == reference.tolist()


class TestTriton:
    __test__ = HERE

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 5])
    @pytest.mark.parametrize("rule", RULES)
    def test_few_tokens(self, monkeypatch, rule, n, dtype):
        x, weight, tile, mask = case(n, dtype)
        compare(monkeypatch, RULES[rule], x, weight, tile, [n, n // 2], mask)

    @pytest.mark.parametrize("rule", RULES)
    def test_copies_and_padding(self, monkeypatch, rule):
        x, weight, tile, mask = case(37, torch.float16)
        compare(monkeypatch, RULES[rule], x, weight, tile, [20, 9], mask)

    @pytest.mark.parametrize("rule", RULES)
    def test_many_tokens(self, monkeypatch, rule):
        """More than one tile of products; several steps of the sum; one image, for the interpreter is slow."""
        x, weight, tile, mask = case(577, torch.bfloat16, width=40, images=1)
        compare(monkeypatch, RULES[rule], x, weight, tile, [8], mask)

    @pytest.mark.parametrize("rule", [rule for rule in RULES if "dpp" not in rule])
    def test_exact_ties(self, monkeypatch, rule):
        """Signs have exact cosines, most of them equal: nothing but the order of tokens decides."""
        x, weight, tile, mask = case(45, torch.float32, width=16, signs=True)
        compare(monkeypatch, RULES[rule], x, weight, tile, [20, 30], mask)

    @pytest.mark.parametrize("rule", ["farthest", "nearest", "sum", "veto", "dpp", "dpp in tiles"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equal_tokens_come_in_order(self, monkeypatch, rule, dtype):
        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        x = torch.randn(1, 1, 24).to(DEVICE, dtype).expand(1, 6, 24)
        one = torch.ones(1, 6, device=DEVICE)
        order, valid = RULES[rule](x, one, one.long(), [5], one.bool())
        assert order.tolist() == [[0, 1, 2, 3, 4]] and valid.all()

    def test_no_picks(self, monkeypatch):
        x, weight, tile, mask = case(5, torch.float32)
        for rule in RULES.values():
            compare(monkeypatch, rule, x, weight, tile, [0, 0], mask)
            compare(monkeypatch, rule, x, weight, tile, [0, 3], torch.zeros_like(mask))

    def test_a_broken_model_gets_its_count(self, monkeypatch):
        """NaN among the candidates: no token twice."""
        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        x, weight, tile, mask = case(5, torch.float32)
        x = x.nan_to_num()
        x[:, 2] = math.nan
        for rule in ("farthest", "nearest", "sum", "veto", "dpp"):
            order, _ = RULES[rule](x, weight, tile, [5, 5], torch.ones_like(mask))
            assert order.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2

    def test_refused(self, monkeypatch):
        monkeypatch.setenv("PRUNE_KERNELS", "triton")
        x, weight, tile, mask = case(5, torch.float32)
        with pytest.raises(NotServed, match="float64"):
            farthest_point(x.double(), 2, mask)
        with pytest.raises(ValueError, match="for each of 2 rows"):
            spread(x, heaviest(weight, mask), [1], mask)
        with pytest.raises(NotServed, match="1 x 20000 tokens"):
            farthest_point(torch.zeros(1, 20000, 1, device=DEVICE), 2)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: so many tokens take the interpreter too long")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width", "images"), [(2880, 4096, 2), (16384, 1024, 1)])  # 16384: as many as are served
@pytest.mark.parametrize("rule", RULES)
def test_thousands_of_tokens_on_cuda(monkeypatch, rule, n, width, images, dtype):
    """Signs: whatever the order of the sums, cosines are exact; but for the DPP's decomposition."""
    x, weight, tile, mask = case(n, dtype, width, images, signs="dpp" not in rule)
    counts = [40, 17] if "dpp" in rule else [320, 100]
    compare(monkeypatch, RULES[rule], x, weight, tile, counts[:images], mask)


# --------------------------------------------------------------------------------------------------------- reference
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 1000), (3, 40, 7), (1, 577, 64)])
@pytest.mark.parametrize("cached", [1, 100, 1 << 18])
def test_dots_in_pieces_are_dots_to_the_bit(monkeypatch, shape, cached):
    monkeypatch.setattr(greedy, "CACHED", cached)
    torch.manual_seed(0)
    x, pick = torch.randn(shape), torch.randint(0, shape[1], (shape[0], 1))
    dots = RowDots(x)
    dots.pick.copy_(pick)
    rows = x.gather(1, pick[..., None].expand(-1, 1, shape[2]))
    assert torch.equal(dots(), dot(x, rows))
    part = shape[2] // 2
    assert torch.equal(dots(part), dot(x[..., :part], rows[..., :part]))


def slow_spread(x, first, k, rule):
    """From the definition, in double precision."""
    cosine = unit(x.double()).double() @ unit(x.double()).double().T
    picks = [first]
    while len(picks) < k:
        score = cosine[:, picks].sum(1) if rule == "sum" else cosine[:, picks].amax(1)
        picks.append(min((j for j in range(len(x)) if j not in picks), key=lambda j: (score[j].item(), j)))
    return picks


@pytest.mark.parametrize("rule", ["sum", "nearest"])
def test_spread_matches_its_definition(rule):
    torch.manual_seed(0)
    x = torch.randn(2, 30, 16)
    first, mask = torch.tensor([[4], [9]]), torch.arange(30) < torch.tensor([[30], [20]])
    x[~mask] = math.nan
    order, valid = spread(x, first, [12, 7], mask, rule)
    assert order[0].tolist() == slow_spread(x[0], 4, 12, rule)
    assert order[1, :7].tolist() == slow_spread(x[1, :20], 9, 7, rule) and valid.sum(1).tolist() == [12, 7]
    with pytest.raises(ValueError, match="'nearest' or 'sum'"):
        spread(x, first, 3, mask, "mean")


def test_veto_by_hand():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]])
    weight, mask = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]), torch.ones(1, 5, dtype=torch.bool)
    order, _ = greedy_veto(x, weight, 5, mask, 0.5)
    assert order.tolist() == [[0, 2, 4, 1, 3]]  # 1 is like 0, 3 like 2; they fill up, heaviest first
    assert greedy_veto(x, weight, 2, mask, 1.0)[0].tolist() == [[0, 1]]


def test_strongest_is_a_stable_sort():
    torch.manual_seed(0)
    x = torch.randint(0, 4, (3, 5, 20)).float()
    expected = x.sort(dim=-1, descending=True, stable=True)
    for number in (1, 3, 20):
        values, places = strongest(x.clone(), number)
        assert torch.equal(values, expected.values[..., :number])
        assert torch.equal(places, expected.indices[..., :number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_into_adds_one_by_one(dtype):
    torch.manual_seed(0)
    x, out = torch.randn(2, 6, 3).to(dtype), torch.randn(2, 4, 3)
    source, slot, weight = torch.randint(0, 6, (2, 9)), torch.randint(0, 4, (2, 9)), torch.rand(2, 9)
    expected = out.clone()
    for b in range(2):
        for i, j, w in zip(source[b], slot[b], weight[b]):
            expected[b, j] += w * x[b, i].float()
    assert torch.equal(fold_into(out, x, source, slot, weight), expected)


def test_chosen_indices_with_more_or_less_room():
    chosen = torch.tensor([[False, True, True, False, True], [False, False, False, True, False]])
    index, valid = chosen_indices(chosen, 4)
    assert index.tolist() == [[1, 2, 4, 0], [3, 0, 0, 0]]
    assert valid.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert chosen_indices(chosen, 2)[0].tolist() == [[1, 2], [3, 0]]
    assert chosen_indices(chosen, 0)[0].shape == (2, 0)
