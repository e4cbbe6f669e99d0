"""Accounts against what `FlopCounterMode` counts on real forwards, part by part, and KV bytes against real caches."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import pytest
import tiny
import torch
import transformers as hf
from matrix import DECODER, PROJECTED, ROWS, TWO_STAGE, Row, cells, engine_cells
from tiny import FAMILIES, LAYERS, VIDEO_FAMILIES, Image, Sample, Video, collate, mixed_batch, one
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune import Compose, ConfigError, Geometry, InputError, Method, UnsupportedModelError, apply_pruner
from prune.adapters import FAMILIES as TABLE
from prune.adapters.signals import CAPTURES
from prune.evals.accounting import ENCODERS, PARTS, SIGNAL_FLOPS, TOWER_SIGNAL_FLOPS, account, account_full
from prune.reducers.uniform import Uniform
from prune.tokens import SIGNALS, TOWER_KINDS, Tower

# Where the counter's modules lie; mergers lie inside Qwen's tower.
MODULES = {
    "tower": r"\.(vision_tower|visual)",
    "projector": r"\.(multi_modal_projector|merger|deepstack_merger_list\.\d+)",
    "merger": r"\.visual\.(merger|deepstack_merger_list\.\d+)",
    "attention": r"\.language_model\.layers\.\d+\.self_attn",
    "mlp": r"\.language_model\.layers\.\d+\.mlp",
    "head": r"\.lm_head",
    "rotary": r"\.language_model\.rotary_emb",  # a product in older transformers, too small to account for
}


def counted(run) -> dict[str, int]:
    """FLOPs by part, as torch counts them; what is in no module of the others is selection."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    parts = {
        part: sum(flops for name, flops in by_module.items() if re.search(pattern + "$", name))
        for part, pattern in MODULES.items()
    }
    parts["tower"] -= parts.pop("merger")
    parts["selection"] = by_module.get("Global", 0) - sum(parts.values())
    assert parts.pop("rotary") <= 1e-3 * sum(parts.values())
    return parts


def check(model: nn.Module, row: Row, inputs: dict, samples: int = 1) -> None:
    """The pruned and the un-pruned forward of equal samples."""
    width = inputs["input_ids"].shape[1]
    with row.attach(model) as handle:
        pruned = counted(lambda: model(**inputs))
        accounts = account(model, handle.last, inputs, head_positions=width)
        full = account_full(model, handle.last, inputs, head_positions=width)
        with handle.disabled():
            unpruned = counted(lambda: model(**inputs))
    assert len(accounts) == len(full) == samples
    for part in ("tower", "projector"):  # hooks make signals inside the tower; methods may call the projector
        pruned["selection"] += pruned[part] - unpruned[part]
        pruned[part] = unpruned[part]
    assert unpruned["selection"] == 0 < min(unpruned[part] for part in PARTS if part != "selection")
    for found, flops in ((accounts, pruned), (full, unpruned)):
        for one_sample in found:
            assert {part: samples * n for part, n in one_sample.flops.items()} == flops
        assert sum(one_sample.prefill for one_sample in found) == sum(flops.values())
    assert accounts[0].attention < full[0].attention


@cells(attention=("sdpa",))
def test_every_part_is_what_torch_counts(row, family, attn):
    check(tiny.shared(family, attn), row, collate(one(family)))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_eager_attention_costs_the_same(family):
    check(tiny.shared(family, "eager"), TWO_STAGE, collate(one(family)))


@engine_cells((Row("dart"), Row("divprune")))
def test_several_images_of_different_sizes(row, family):
    sample = Sample(family, [2, Image(0), 3, Image(1), 2, Image(2), 5])
    check(tiny.shared(family), row, collate([sample]))


@engine_cells((DECODER, Row("divprune")), VIDEO_FAMILIES)
def test_videos_alone_and_beside_images(row, family):
    several = [2, Video(), 3, Image(1), 2, Video(), 4]
    for items in ([2, Video(), 3], [2, Video(), 3, Image(1), 4], several):
        check(tiny.shared(family), row, collate([Sample(family, items)]))


@engine_cells((PROJECTED, Row("divprune"), Row("dart")), ("llava_onevision", "qwen2_5_vl", "internvl"))
def test_a_batch_of_equal_samples_costs_the_sum(row, family):
    check(tiny.shared(family), row, collate(one(family) * 3), samples=3)


@engine_cells((PROJECTED, DECODER, TWO_STAGE))
def test_a_sample_of_a_padded_batch_is_accounted_as_if_alone(row, family):
    model, samples = tiny.shared(family), mixed_batch(family)

    def accounts(batch):
        inputs = tiny.with_positions(collate(batch))
        with row.attach(model) as handle, torch.no_grad():
            model(**inputs)
            return account(model, handle.last, inputs), account_full(model, handle.last, inputs)

    (first, text, third), full = accounts(samples)
    assert ([first], [full[0]]) == accounts(samples[:1])
    assert ([third], [full[2]]) == accounts(samples[2:])
    assert text == full[1]
    assert text.tower == text.projector == text.selection == text.average_tokens == 0 < text.mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_costs_prefill_and_decoding(family):
    model, inputs = tiny.shared(family), collate(one(family))
    generate = partial(model.generate, **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=tiny.SPECIAL)
    with TWO_STAGE.attach(model) as handle:
        flops = sum(counted(generate).values())
        ((pruned,), (full,)) = account(model, handle.last, inputs), account_full(model, handle.last, inputs)
    assert pruned.prefill + pruned.decode(3) == flops
    assert full.prefill + full.decode(3) == sum(counted(generate).values())
    assert full.decode(3) > pruned.decode(3) > pruned.decode(0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_are_those_of_the_cache(family, dtype):
    model = tiny.build(family, dtype=dtype) if dtype == torch.bfloat16 else tiny.shared(family)
    inputs = collate(one(family) * 2, dtype=dtype)

    def stored():
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

    with TWO_STAGE.attach(model) as handle:
        pruned = stored()
        assert sum(sample.kv_bytes for sample in account(model, handle.last, inputs)) == pruned
    full = stored()
    assert sum(sample.kv_bytes for sample in account_full(model, handle.last, inputs)) == full > pruned


def test_tokens_per_layer_and_their_average():
    model, inputs = tiny.shared("qwen2_5_vl"), collate([Sample("qwen2_5_vl", [3, Image(0), 2, Image(2), 4])])
    with apply_pruner(model, "fastv", keep=3) as handle, torch.no_grad():
        model(**inputs)
        ((pruned,), (full,)) = account(model, handle.last, inputs), account_full(model, handle.last, inputs)
    assert pruned.tokens_per_layer == (34, 34, 6, 6) and pruned.average_tokens == 20
    assert full.tokens_per_layer == (34,) * LAYERS and full.average_tokens == 34
    assert pruned.text_tokens == full.text_tokens == inputs["input_ids"].shape[1] - 34
    assert pruned.attention + pruned.mlp == handle.last.flops[0]
    assert full.attention + full.mlp == handle.last.flops_full[0]


# ------------------------------------------------------------------------------------------------ selection
@contextmanager
def counting_reducers(row: Row, seen: list):
    """Run the row's reducers under a counter of their own, and note what they got and what it cost."""

    def counting(reduce):
        def wrapped(self, tokens, keep):
            with FlopCounterMode(display=False) as counter:
                out = reduce(self, tokens, keep)
            seen.append((self, tokens, keep, counter.get_total_flops()))
            return out

        return wrapped

    classes = {type(stage.reducer) for stage in row.method().plan(Geometry(100, layers=LAYERS), 10)}
    patches = [patch.object(cls, "reduce", counting(cls.reduce)) for cls in classes]
    for one_patch in patches:
        one_patch.start()
    try:
        yield
    finally:
        for one_patch in patches:
            one_patch.stop()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_selection_flops_are_those_of_reduce(row):
    """Each row's reducers under a counter of their own."""
    family = next(family for family in ("qwen2_5_vl", *FAMILIES) if family not in row.exclude)
    image = Image((1, 16, 12)) if family.startswith("qwen") else Image(0)
    seen, model = [], tiny.shared(family)
    with counting_reducers(row, seen), row.attach(model) as handle, torch.no_grad():
        model(**collate([Sample(family, [4, image, 9])]))
    assert len(seen) == len(handle.last.images[0].stages)
    text = handle.last.text_tokens[0]
    for reducer, tokens, (keep,), flops in seen:
        geometry = replace(handle.last.geometry, visual_tokens=tokens.features.shape[1], text_tokens=text)
        assert tokens.text_features is None or tokens.text_features.shape[1] == text
        assert reducer.selection_flops(geometry, keep) == flops


def test_divprune_is_known_to_compare_all_pairs():
    """So that the test above cannot pass by counting nothing."""
    row, seen = Row("divprune", {}, {"keep": 3}), []
    with counting_reducers(row, seen), row.attach(tiny.shared("llava")), torch.no_grad():
        tiny.shared("llava")(**collate(one("llava")))
    ((_, tokens, _, flops),) = seen
    rows, n, width = tokens.features.shape
    assert rows == 1 and flops == 2 * n * n * width > 0


@dataclass
class Reads(Uniform):
    """A method that reads signals and does nothing with them."""

    reads: tuple[str, ...] = ()
    tower: dict[str, Tower] = field(default_factory=dict)

    @property
    def signals(self):
        return self.reads


@dataclass(frozen=True)
class Given(Row):
    """A row of a method that is not registered."""

    given: Method | None = None

    def method(self):
        return self.given


@dataclass
class AsksText(Uniform):
    """A method with products of its own: image with text, and the kept tokens among themselves."""

    signals = ("text_features",)

    def reduce(self, tokens, keep):
        tokens.features @ tokens.text_features.transpose(1, 2)
        tokens.features[:, : max(keep)] @ tokens.features[:, : max(keep)].transpose(1, 2)
        return super().reduce(tokens, keep)

    def selection_flops(self, geometry, keep):
        return 2 * (geometry.visual_tokens * geometry.text_tokens + keep**2) * geometry.hidden_size


@pytest.mark.parametrize("layer", [None, 2])
def test_methods_are_told_the_sizes_they_work_on(layer):
    model, asks = tiny.shared("qwen3_vl"), Given("asks", given=AsksText(layer))
    check(model, asks, collate([Sample("qwen3_vl", [4, Image(0), 6])]))
    check(model, asks, collate([Sample("qwen3_vl", [2, Image(0), 3, Image(1), 5])]))
    second = Given("both", given=Compose(Uniform(), AsksText(3)))
    check(model, second, collate([Sample("qwen3_vl", [2, Image(0), 3, Image(1), 5])]))


@pytest.mark.parametrize("signal", sorted({*SIGNALS} - {"transition"}))
def test_decoder_signals_are_priced(signal):
    """`transition` needs layers of its own, and no products."""
    assert set(CAPTURES) <= set(SIGNAL_FLOPS) <= set(SIGNALS)
    reads = Given("reads", given=Reads(2, (signal,)))
    check(tiny.shared("qwen3_vl"), reads, collate([Sample("qwen3_vl", [2, Image(0), 3, Image(1), 5])]))


@pytest.mark.parametrize("kind", TOWER_KINDS)
def test_tower_signals_are_priced(kind):
    """Layer 0 has windows, layer 1 has none; a signal that is asked for twice is computed once."""
    assert set(TOWER_SIGNAL_FLOPS) < set(TOWER_KINDS)
    for family in ("internvl", "qwen2_5_vl"):
        if "cls" in kind and family == "qwen2_5_vl":
            continue  # no class token
        given = {"threshold": 3.3} if kind == "important_attention" else {}
        layers = [None] * 2 if kind == "pixels" else [0, 1]
        towers = {name: Tower(kind, layers[number], **given) for name, number in (("a", 0), ("b", 1), ("again", 0))}
        if given:  # what these are made of is made once
            towers |= {"sharper": Tower(kind, 0, 7.0), "all": Tower("received_attention", 0)}
        check(tiny.shared(family), Given("reads", given=Reads(None, (), towers)), collate(one(family)))


# ------------------------------------------------------------------------------------------------ unusual models
def llava(vision, decoder=None, **options) -> nn.Module:
    text = decoder or hf.LlamaConfig(**tiny.text_config())
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=tiny.IMAGE, **options)
    return hf.LlavaForConditionalGeneration(config).eval()


TOWER = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, patch_size=4)
FULL = {"vision_feature_select_strategy": "full"}


def prompt(tokens: int) -> torch.Tensor:
    return torch.tensor([[3, 4, *[tiny.IMAGE] * tokens, 5, 6, 7]])


def test_heads_wider_than_the_decoder():
    decoder = hf.Qwen3Config(**tiny.text_config(head_dim=24, num_attention_heads=6))
    model = llava(hf.CLIPVisionConfig(**TOWER, image_size=16), decoder)
    check(model, Row("fastv"), {"input_ids": prompt(16), "pixel_values": torch.randn(1, 3, 16, 16)})


def test_class_token_kept_and_features_of_several_layers():
    model = llava(hf.CLIPVisionConfig(**TOWER, image_size=16), vision_feature_layer=[-2, -1], **FULL)
    check(model, Row("random"), {"input_ids": prompt(17), "pixel_values": torch.randn(1, 3, 16, 16)})


def test_siglip_tower_with_a_pooling_head():
    model = llava(hf.SiglipVisionConfig(**TOWER, image_size=16, vision_use_head=True), vision_feature_layer=-1, **FULL)
    inputs = {"input_ids": prompt(32), "pixel_values": torch.randn(2, 3, 16, 16)}
    check(model, Row("random"), inputs)


def test_native_resolution_tower():
    model = llava(hf.PixtralVisionConfig(**TOWER, image_size=32), vision_feature_layer=-1, **FULL)
    shape = {"pixel_values": torch.randn(1, 3, 8, 32), "image_sizes": torch.tensor([[8, 32]])}
    check(model, Row("random"), {"input_ids": prompt(16), **shape})


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 20, 14), (2, 2, 22)])
def test_windows_of_any_fit(grid):
    check(tiny.shared("qwen2_5_vl"), Row("random"), collate([Sample("qwen2_5_vl", [2, Image(grid), 3])]))


# ------------------------------------------------------------------------------------------------ refusals
def test_the_table_has_every_family():
    assert set(ENCODERS) == {family.name for family in TABLE}


def test_a_family_outside_the_table_is_refused():
    model, inputs = tiny.shared("llava"), collate(one("llava"))
    with PROJECTED.attach(model) as handle, torch.no_grad():
        model(**inputs)
        with patch.dict(ENCODERS), pytest.raises(UnsupportedModelError, match="LlavaModel.*ENCODERS"):
            del ENCODERS["LLaVA-1.5"]
            account(model, handle.last, inputs)


def test_inputs_of_another_call_are_refused():
    for family, other, what in (
        ("llava", one("llava") * 2, "1 samples, the inputs hold 2"),
        ("qwen2_vl", [Sample("qwen2_vl", [2, Image(0), 1, Image(1), 2])], "1 images, the inputs hold 2"),
        ("qwen2_vl", [Sample("qwen2_vl", [2, Image(0), 1, Video(), 2])], "0 videos, the inputs hold 1"),
        ("internvl", [Sample("internvl", [2, Image(1), 2])], "1 tiles, the inputs hold 2"),
    ):
        model = tiny.shared(family)
        with PROJECTED.attach(model) as handle, torch.no_grad():
            model(**collate(one(family)))
            with pytest.raises(InputError, match=what):
                account(model, handle.last, collate(other))


def test_the_pruner_of_the_report_must_be_there():
    model, inputs = tiny.shared("llava"), collate(one("llava"))
    with PROJECTED.attach(model) as handle, torch.no_grad():
        model(**inputs)
        report = handle.last
    with pytest.raises(ConfigError, match=r"no pruner; call account before handle.remove\(\)"):
        account(model, report, inputs)
    with DECODER.attach(model), pytest.raises(ConfigError, match="FastV"):
        account(model, report, inputs)
    (full,) = account_full(model, report, inputs)
    assert full.selection == 0
    with pytest.raises(ConfigError, match="new_tokens=-1"):
        full.decode(-1)
