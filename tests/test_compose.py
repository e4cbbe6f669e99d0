"""Methods in sequence: every ordered pair of single-stage methods, and sites that depend on the decoder's depth."""

import pytest
import torch
from tiny import LAYERS, Image, Sample, collate, shared

from prune import Budget, Compose, ConfigError, Geometry, Method, apply_pruner, get_method, list_methods
from prune.kernels.depth import scale_layers

KINDS = {name: [site.kind for site in get_method(name).sites(LAYERS)] for name in list_methods()}
SINGLE = [name for name, kinds in KINDS.items() if kinds in (["projected"], ["decoder"])]


def member(name: str, layer: int) -> Method:
    """A method with its defaults, in the decoder at `layer`."""
    method = get_method(name)
    return method if method.sites()[0].kind == "projected" else get_method(name, layer=layer)


def test_there_are_single_stage_methods_of_both_kinds():
    kinds = [get_method(name).sites(LAYERS)[0].kind for name in SINGLE]
    assert kinds.count("projected") >= 10 and kinds.count("decoder") >= 4


@pytest.mark.parametrize("first", SINGLE)
def test_every_pair_prunes_to_the_budget_or_conflicts(first):
    """Decoder methods act at layer 1 as the first and at layer 2 as the second of a pair."""
    model, inputs = shared("llava"), collate([Sample("llava", [4, Image(0), 6])])
    for second in SINGLE:
        members = member(first, 1), member(second, 2)
        a, b = (method.sites()[0] for method in members)
        if a >= b:
            with pytest.raises(ConfigError, match=f"must ascend, got {a}, {b};"):
                Compose(*members)
            continue
        with apply_pruner(model, Compose(*members), keep=3) as handle, torch.no_grad():
            model(**inputs)
            (image,) = handle.last.images
        adaptive = members[0].adaptive or members[1].adaptive
        assert 1 <= len(image.kept) <= 3 if adaptive else len(image.kept) == 3, f"{first} + {second}"
        if not adaptive:  # 16 tokens, sqrt(3 / 16) of them after the first
            assert [len(kept) for kept in image.stages.values()] == [7, 3], f"{first} + {second}"


@pytest.mark.parametrize(("first", "second"), [("fastv", "fastv"), ("random", "dart")])
def test_the_same_layer_twice_is_a_conflict(first, second):
    methods = get_method(first, layer=2), get_method(second, layer=2)
    with pytest.raises(ConfigError, match="must ascend, got decoder:2, decoder:2"):
        Compose(*methods)


def test_members_that_move_with_the_depth_are_checked_on_the_decoder_at_hand():
    """PyramidDrop cuts at layers 8, 16 and 24 of 32, and at 1, 2 and 3 of 4."""
    model = shared("llava")
    pyramid, early, late = get_method("pyramiddrop"), get_method("fastv", layer=3), get_method("fastv", layer=30)
    before = Compose(early, pyramid)  # fine with 32 layers
    with pytest.raises(ConfigError, match="got decoder:3, decoder:1, decoder:2, decoder:3 in a decoder of 4 layers"):
        apply_pruner(model, before, ratio=0.5)
    with pytest.raises(ConfigError, match="ascend"):
        apply_pruner(model, Compose(early, pyramid, budgets=[Budget(ratio=0.5), Budget(ratio=0.5)]))
    with pytest.raises(ConfigError, match="layer=30 is out of range"):
        apply_pruner(model, Compose(pyramid, late), ratio=0.5)


def test_what_fits_a_deep_decoder_only_can_be_made():
    """FastV at 10 meets PyramidDrop's 8 of 32 layers, but not its 16 of 64."""
    composed = Compose(get_method("fastv", layer=10), get_method("pyramiddrop"))
    first = scale_layers((8,), 32, 64)[0]
    assert [site.layer for site in composed.sites(64)] == [10, first, 32, 48]
    with pytest.raises(ConfigError, match="in a decoder of 32 layers"):
        composed.plan(Geometry(100), 10)
