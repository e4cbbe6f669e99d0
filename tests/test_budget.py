"""Budgets: four spellings, exact counts, clear refusals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune import Budget, BudgetError, Geometry
from prune.method import Reducer, alive


class AtLayer(Reducer):
    def __init__(self, layer):
        self.site = f"decoder:{layer}"


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [
        (576, 0.9, 58),
        (576, 0.5, 288),
        (15, 0.9, 2),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (3, 0.99, 1),
        (576, 0.0, 576),
        (1, 0.9, 1),
    ],
)
def test_ratio_rounds_the_decimal_it_was_written_as(n, ratio, kept):
    """15 * 0.1 is 1.5 and rounds to even, though 15 * (1 - 0.9) in floats is 1.4999..."""
    assert Reducer().kept(n, Budget(ratio=ratio)) == kept


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_keep_is_capped_at_what_there_is(n, keep):
    assert Reducer().kept(n, Budget(keep=keep)) == min(n, keep)


@given(st.integers(2, 3000), st.floats(0.01, 1), st.integers(1, 30))
def test_average_is_met_as_closely_as_whole_tokens_allow(n, share, layer):
    geometry, method = Geometry(n, layers=32), AtLayer(layer)
    target = max(1, share * n)  # below 1 it would be a share
    if target < (layer * n + 32 - layer) / 32:
        with pytest.raises(BudgetError, match="out of reach"):
            method.kept(n, Budget(average=target), geometry)
        return
    kept = method.kept(n, Budget(average=target), geometry)
    average = sum(alive(geometry, method.plan(geometry, kept))) / 32
    assert abs(average - target) <= (32 - layer) / 32 / 2 + 1e-9 or kept == n


@given(st.integers(1, 3000), st.floats(0.001, 0.999))
def test_an_average_below_one_is_a_share_of_the_tokens(n, share):
    kept = Reducer().kept(n, Budget(average=share))
    assert abs(kept - share * n) <= 0.5 + 1e-9 or kept == 1
    assert Reducer().kept(576, Budget(average=1 / 9)) == 64


@given(st.integers(2, 3000), st.integers(0, 500), st.floats(0.3, 1))
def test_flops_is_met_as_closely_as_whole_tokens_allow(n, text, share):
    geometry = Geometry(n, text)
    cost = lambda k: geometry.prefill_flops([k] * 32) / geometry.prefill_flops([n] * 32)  # noqa: E731
    if cost(1) > share:
        return
    kept = Reducer().kept(n, Budget(flops=share), geometry)
    others = [k for k in (kept - 1, kept + 1) if 1 <= k <= n]
    assert all(abs(cost(kept) - share) <= abs(cost(k) - share) + 1e-12 for k in others) or kept == n


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ratio": 0.5, "keep": 3},
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": math.nan},
        {"ratio": math.inf},
        {"ratio": "0.5"},
        {"ratio": True},
        {"keep": 0},
        {"keep": 2.5},
        {"average": 0},
        {"flops": 0},
        {"flops": 1.5},
    ],
)
def test_bad_budgets_are_refused(given):
    with pytest.raises(BudgetError):
        Budget(**given)


def test_flops_equal_torch_flop_counter():
    """The closed form counts what torch counts on a real decoder."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = LlamaModel(config).eval()
    geometry = Geometry(50, 14, 3, 64, 96, 4, 2, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 64, 64))
    counted = counter.get_total_flops()
    assert abs(geometry.prefill_flops([50] * 3) - counted) <= 0.01 * counted
