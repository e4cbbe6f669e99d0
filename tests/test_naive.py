"""The methods against direct implementations of their papers: the same tokens are kept."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune import get_method, list_methods
from prune.evals.naive import BASELINES, choose
from prune.evals.synthetic import Shape, Synthetic, chain
from prune.reducers.vispruner import vispruner
from prune.reducers.zooprune import sensitivity, unit_directions

METHODS = [name for name in list_methods() if name not in BASELINES]
OPTIONS = {
    "zooprune": {"directions": 8},
    "greedyprune": {"tau": 0.2},  # of random tokens, none are alike at 0.9
    "gprune": {"similarity": 0.1},
    "todre": {"tau": 0.45},
    "framefusion": {"similarity": 0.1},
}
SHAPES = {"one tile": (Shape(1, 96, 64, text=8), 24), "two tiles": (Shape(1, 600, 64, text=5), 24)}

OTHER = {("expedit", "two tiles"): "the direct one knows a single grid only"}


def both(method, shape, keep, source):
    """Per stage the indices the method keeps, and those of the direct implementation; sorted."""
    memory, own = {}, [{}]
    for stage, n in chain(method, shape, keep):
        tokens = source.tokens(stage, n)
        tokens.memory = memory
        found = stage.reducer.reduce(tokens, [stage.keep])
        yield sorted(found.keep[0][found.valid[0]].tolist()), sorted(choose(stage.reducer, tokens, stage.keep, own)[0])


@pytest.fixture(scope="module")
def sources():
    return {name: Synthetic(shape) for name, (shape, _) in SHAPES.items()}


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_what_its_direct_implementation_keeps(name, shape, sources):
    if (name, shape) in OTHER:
        pytest.skip(OTHER[name, shape])
    method, (size, keep) = get_method(name, **OPTIONS.get(name, {})), SHAPES[shape]
    stages = list(both(method, size, keep, sources[shape]))
    assert stages
    for found, wanted in stages:
        assert found == wanted


# ------------------------------------------------------------------------------------------ two ways to the same result
def test_zooprune_takes_the_same_from_a_projector_that_tells_its_layers():
    source = Synthetic(Shape(2, 70, 64))
    x, projector = torch.randn(2, 70, 64), source._projector
    bank = unit_directions(16, 64, 3)
    told = sensitivity(x, projector, bank, 0.01, 64)
    untold = sensitivity(x, lambda rows: projector(rows), bank, 0.01, 64)
    torch.testing.assert_close(told, untold, rtol=1e-4, atol=0)
    wide = sensitivity(x, projector, bank, 0.5, 64)
    torch.testing.assert_close(sensitivity(x, projector.bfloat16(), bank, 0.5, 64), wide, rtol=2**-6, atol=0)


@pytest.mark.parametrize("limit", [1, 64 * 3, 64 * 70 * 5])
def test_zooprune_through_layers_in_chunks_is_the_same(limit, monkeypatch):
    x, projector = torch.randn(2, 70, 64), Synthetic(Shape(2, 70, 64))._projector
    bank = unit_directions(16, 64, 3)
    whole = sensitivity(x, projector, bank, 0.01, 64)
    monkeypatch.setattr("prune.reducers.zooprune.CACHED", limit)
    torch.testing.assert_close(sensitivity(x, projector, bank, 0.01, 64), whole)


@given(seed=st.integers(0, 10**6), different=st.integers(1, 12), zero=st.booleans())
@settings(max_examples=30, deadline=None)
def test_vispruner_breaks_ties_alike_with_stored_cosines_and_without(seed, different, zero):
    """Of images with few different tokens, in two tiles, where nearly all cosines are equal."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randn(different, 48, generator=g)
    kinds[0] = 0 if zero else kinds[0]
    x, attention = kinds[torch.randint(different, (2, 60), generator=g)], torch.rand(2, 60, generator=g)
    inputs = (
        attention,
        x,
        (torch.arange(60) >= 36).long().expand(2, -1),
        torch.ones(2, 60, dtype=torch.bool),
        [9, 14],
        0.5,
    )
    stored = vispruner(*inputs)
    with patch("prune.reducers.vispruner.STORED", 7):
        chunked = vispruner(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(stored, chunked))
