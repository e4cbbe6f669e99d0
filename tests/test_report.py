"""`handle.last` tells what happened, and budgets are met through a real model."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from tiny import Image, Sample, collate

from prune import Budget, Compose, ConfigError, Method, Site, Stage, apply_pruner, get_method

FAMILY = "qwen2_5_vl"


def samples():
    return [
        Sample(FAMILY, [3, Image(0), 4]),
        Sample(FAMILY, [2, Image(1), 3, Image(2), 9], 1),
        Sample(FAMILY, [7], 2),
    ]


def report(method, batch=None, side="left", **budget):
    model = tiny.shared(FAMILY)
    with apply_pruner(model, method, **budget) as handle, torch.no_grad():
        model(**collate(batch or samples(), side))
        return handle.last


def test_images_layers_and_text_are_counted_per_sample():
    last = report("fastv", keep=3)
    assert [(image.sample, image.index, image.tokens) for image in last.images] == [(0, 0, 16), (1, 0, 12), (1, 1, 18)]
    assert last.tokens_per_layer == [[16, 16, 3, 3], [30, 30, 6, 6], [0] * 4]
    assert last.text_tokens == [len(sample.ids) - sum(len(span) for span in sample.spans()) for sample in samples()]
    assert last.average_tokens == [9.5, 18, 0]


def test_kv_bytes_are_what_the_cache_holds():
    """Batch 1, so that no padding is stored."""
    model = tiny.shared(FAMILY)
    with apply_pruner(model, "fastv", ratio=0.7) as handle, torch.no_grad():
        cache = model(**collate(samples()[:1]), use_cache=True).past_key_values
        stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert handle.last.kv_bytes == [stored]


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_average_is_met(method):
    last = report(method, average=10)
    for image in last.images:
        counts = (
            [image.tokens, image.tokens, len(image.kept), len(image.kept)] if method == "fastv" else [len(image.kept)]
        )
        assert abs(sum(counts) / len(counts) - 10) <= 0.5


@pytest.mark.parametrize("side", ["left", "right"])
def test_flops_are_met_by_every_sample_whatever_the_padding(side):
    last = report("random", side=side, flops=0.7)
    shares = [now / full for now, full in zip(last.flops, last.flops_full)]
    assert shares[2] == 1 and all(abs(share - 0.7) < 0.03 for share in shares[:2])
    for number, sample in enumerate(samples()[:2]):
        (alone,) = {tuple(len(i.kept) for i in report("random", [sample], flops=0.7).images)}
        assert alone == tuple(len(i.kept) for i in last.images if i.sample == number)


def test_budget_can_change_between_prefills():
    model = tiny.shared(FAMILY)
    with apply_pruner(model, "random", ratio=0.5) as handle, torch.no_grad():
        assert handle.last is None
        model(**collate(samples()))
        assert [len(image.kept) for image in handle.last.images] == [8, 6, 9]
        handle.budget = Budget(keep=2)
        model(**collate(samples()))
        assert [len(image.kept) for image in handle.last.images] == [2, 2, 2]


def test_compose_shares_one_budget_or_takes_its_own():
    first, second = get_method("random"), get_method("fastv", layer=2)
    last = report(Compose(first, second), ratio=0.75)
    assert [[len(kept) for kept in image.stages.values()] for image in last.images] == [[8, 4], [6, 3], [8, 4]]
    own = Compose(first, second, budgets=[Budget(keep=10), Budget(ratio=0.5)])
    last = report(own)
    assert [[len(kept) for kept in image.stages.values()] for image in last.images] == [[10, 5]] * 3


def test_stages_are_nested_and_index_the_image():
    for image in report(Compose(get_method("random"), get_method("fastv")), ratio=0.8).images:
        first, second = image.stages.values()
        assert set(second.tolist()) <= set(first.tolist()) <= set(range(image.tokens))
        assert first.tolist() == sorted(first.tolist()) and torch.equal(image.kept, second)


def test_a_failed_forward_leaves_the_last_report():
    model = tiny.shared(FAMILY)
    with apply_pruner(model, "random", ratio=0.5) as handle, torch.no_grad():
        model(**collate(samples()))
        before = str(handle.last)
        broken = model.model.language_model.norm.register_forward_hook(lambda *_: 1 / 0)
        try:
            with pytest.raises(ZeroDivisionError):
                model(**collate(samples()[:1]))
        finally:
            broken.remove()
        assert str(handle.last) == before


def test_text_form_names_counts_and_costs():
    text = str(report("fastv", keep=3))
    assert "FastV(layer=2) (keep=3)" in text and "16 -> 3 visual tokens (decoder:2)" in text and "KV" in text


def test_flops_of_many_equal_images_do_not_all_round_the_same_way():
    sample = Sample("llava", [item for _ in range(8) for item in (Image(0), 1)] + [4])
    with apply_pruner(tiny.shared("llava"), "random", flops=0.5) as handle, torch.no_grad():
        tiny.shared("llava")(**collate([sample]))
        last = handle.last
    assert abs(last.flops[0] / last.flops_full[0] - 0.5) < 0.005
    assert {len(image.kept) for image in last.images} <= {min(k := [len(i.kept) for i in last.images]), max(k)}


def test_sites_that_move_are_refused():
    @dataclass
    class Moving(Method):
        name = "moving"

        def plan(self, geometry, keep):
            return (Stage(Site.parse(f"decoder:{1 if keep > 5 else 2}"), get_method("random"), keep),)

    with apply_pruner(tiny.shared("llava"), Moving(), keep=4), pytest.raises(ConfigError, match="geometry.layers"):
        tiny.shared("llava")(**collate([Sample("llava", [2, Image(0), 3])]))
