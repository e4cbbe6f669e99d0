"""Methods that act inside the vision encoder of a vision-language model.

`test_vit_contract.py` holds the engine's arithmetic in the blocks against a forward by hand; here it is that the model
around it gets the features that engine makes, and goes on with the survivors alone.
"""

import copy

import pytest
import torch
from fingerprint import changed, fingerprint
from reference import assert_close, expect, places, trace
from tiny import Image, Sample, collate, columns_of, mixed_batch, one, pristine, shared
from torch.utils.flop_counter import FlopCounterMode

from prune import Budget, BudgetError, Compose, ConfigError, UnsupportedMethodError, apply_pruner, get_method
from prune.evals.accounting import account, account_full

FAMILIES = ("llava", "llava_next", "llava_next_video", "llava_onevision")
TILED = FAMILIES[1:]
METHODS = {
    "tome": lambda: get_method("tome"),
    "bat": lambda: get_method("bat", layers=(1,)),
    "expedit": lambda: get_method("expedit"),
    "ficoco": lambda: get_method("ficoco", variant="v", layers=(1,)),
    "flowcut": lambda: get_method("flowcut", encoder="inside", layer=None),
    "flowcut and decoder": lambda: get_method("flowcut", encoder="inside", layer=2),
    "index_preserving": lambda: get_method("index_preserving", scorer="contrast"),
    "index_preserving, adaptive": lambda: get_method("index_preserving", scorer="contrast", adaptive=True),
    "tome, then fastv": lambda: Compose(get_method("tome"), get_method("fastv", layer=2)),
}
MOVED = {"divprune": {"block": 1}, "fastv": {"block": 1}, "uniform": {"block": 0}}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def attach(model, method: str, **budget):
    if method in MOVED:
        return apply_pruner(model, method, **MOVED[method], **budget)
    return apply_pruner(model, METHODS[method](), **budget)


def inputs_with_features_of(model, sample: Sample) -> dict:
    """Embeddings of a sample as the un-hooked model would make them of the features `model` makes."""
    inputs = collate([sample])
    bare = pristine(sample.family)
    embeds = trace(bare, inputs).embeds.clone()
    for modality in ("image", "video"):
        spans = [span for span, medium in zip(sample.spans(), sample.media) if medium.modality == modality]
        if not spans:
            continue
        suffix = "" if modality == "image" else "_videos"
        given = {f"pixel_values{suffix}": inputs[f"pixel_values{suffix}"]}
        if modality == "image" and "image_sizes" in inputs:
            given["image_sizes"] = inputs["image_sizes"]
        if "batch_num_images" in inputs and modality == "image":
            given["batch_num_images"] = inputs["batch_num_images"]
        found = getattr(model.model, f"get_{modality}_features")(**given, return_dict=True).pooler_output
        rows = torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in found])
        embeds[[column for span in spans for column in span]] = rows
    return {"inputs_embeds": embeds[None]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*METHODS, *MOVED])
def test_the_decoder_sees_the_survivors_and_their_features(method, family):
    model, samples = shared(family), mixed_batch(family)
    with attach(model, method, ratio=0.5) as handle:
        logits = model(**collate(samples)).logits
        images, positions = handle.last.images, handle.method.positions
        given = [inputs_with_features_of(model, sample) for sample in samples]
    assert any(len(image.kept) < image.tokens for image in images)
    for row, sample in enumerate(samples):
        bare, own = pristine(family), [image for image in images if image.sample == row]
        spans = places(bare, sample, trace(bare, collate([sample])).embeds)
        want = expect(bare, sample, own, positions, inputs=given[row], spans=spans)
        columns = columns_of(samples, row)
        assert_close(logits[row, columns][want.first :], want.logits[want.first :])


@pytest.mark.parametrize("method", [name for name in (*METHODS, *MOVED) if "then" not in name])
def test_features_are_those_of_the_encoder_by_itself(method):
    model = shared("llava")
    tower = copy.deepcopy(model.model.vision_tower)
    del tower.encoder.layers[model.config.vision_feature_layer + 1 :]  # what the projector does not read
    pixels = collate(one("llava"))["pixel_values"].repeat(3, 1, 1, 1) + torch.randn(3, 1, 1, 1)
    with attach(model, method, ratio=0.5):
        seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    if method == "flowcut and decoder":  # leaves twice the tokens before the decoder: all of them
        return assert_close(seen[-2], tower(pixels, output_hidden_states=True).hidden_states[-1])
    options = dict(MOVED.get(method, {}), restore=True, ratio=0.5)
    inner = method if method in MOVED else METHODS[method]()
    with apply_pruner(tower, inner, **options):
        want = tower(pixels, output_hidden_states=True).hidden_states
    bare = tower(pixels, output_hidden_states=True).hidden_states
    assert not torch.equal(bare[-1], want[-1])
    assert_close(seen[-2], want[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_prune_and_off_are_bit_identical(family):
    model, inputs = shared(family), collate(mixed_batch(family))
    bare = fingerprint(model)
    want = pristine(family)(**inputs).logits
    with apply_pruner(model, METHODS["tome"](), ratio=0.0) as handle:
        assert torch.equal(model(**inputs).logits, want)
        handle.budget = Budget(ratio=0.5)
        assert not torch.equal(model(**inputs).logits, want)
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, want)
        assert not torch.equal(model(**inputs).logits, want)
    assert torch.equal(model(**inputs).logits, want)
    assert not changed(bare, fingerprint(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["tome", "flowcut", "divprune"])
def test_cached_generation_equals_recomputation(method, family):
    model, inputs = shared(family), collate(mixed_batch(family))
    with attach(model, method, ratio=0.75):
        options = dict(max_new_tokens=4, do_sample=False, bad_words_ids=[[model.config.image_token_id]])
        cached = model.generate(**inputs, **options)
        again = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, again)


def test_counts_are_exact_where_an_image_is_one_tile():
    model = shared("llava")
    sample = Sample("llava", [3, Image(0), 4, Image(1), 2])
    for budget, kept in (({"keep": 5}, 5), ({"ratio": 0.75}, 4), ({"average": 6}, 6), ({"average": 0.25}, 4)):
        with attach(model, "tome", **budget) as handle:
            model(**collate([sample]))
            assert [len(image.kept) for image in handle.last.images] == [kept, kept]


@pytest.mark.parametrize("family", TILED)
def test_counts_are_bounds_where_tiles_are_cropped(family):
    model, samples = shared(family), mixed_batch(family)
    for ratio in (0.3, 0.5, 0.75):
        with attach(model, "tome", ratio=ratio) as handle:
            model(**collate(samples))
            images = handle.last.images
        assert all(0 < len(image.kept) <= round(image.tokens * (1 - ratio)) for image in images)
        assert sum(len(image.kept) for image in images) >= 0.8 * (1 - ratio) * sum(image.tokens for image in images)


def test_what_cannot_be_known_inside_the_encoder_is_refused():
    llava, tiled = shared("llava"), shared("llava_next")
    bare = fingerprint(llava)
    for model, method, budget, error, words in (
        (tiled, METHODS["tome"](), {"keep": 5}, BudgetError, "give ratio="),
        (tiled, METHODS["tome"](), {"average": 5}, BudgetError, "give ratio="),
        (llava, METHODS["tome"](), {"flops": 0.5}, BudgetError, "flops="),
        (llava, Compose(get_method("tome"), get_method("hiprune")), {"ratio": 0.5}, UnsupportedMethodError, "hiprune"),
        (llava, get_method("bat", layers=(7, 8)), {"ratio": 0.5}, ConfigError, "has blocks"),
        (shared("internvl"), METHODS["tome"](), {"ratio": 0.5}, UnsupportedMethodError, "internvl_vision"),
    ):
        with pytest.raises(error, match=words):
            apply_pruner(model, method, **budget)
    for options, words in (
        ({"restore": True}, "restore"),
        ({"proportional": True}, "proportional"),
        ({"block": 9}, "block=9"),
    ):
        with pytest.raises(ConfigError, match=words):
            apply_pruner(llava, "divprune", ratio=0.5, **options)
    assert not changed(bare, fingerprint(llava))


def test_a_budget_that_cannot_be_shared_out_is_refused_when_it_is_assigned_later():
    model = shared("llava_next")
    with attach(model, "tome", ratio=0.5) as handle:
        handle.budget = Budget(keep=4)
        with pytest.raises(BudgetError, match="give ratio="):
            model(**collate(mixed_batch("llava_next")))
        handle.budget = Budget(ratio=0.5)
        model(**collate(mixed_batch("llava_next")))


def test_a_pruner_inside_the_encoder_is_saved_with_its_block(tmp_path):
    model, inputs = shared("llava"), collate(mixed_batch("llava"))
    with apply_pruner(model, "divprune", ratio=0.5, block=1) as handle:
        want = model(**inputs).logits
        handle.save_pretrained(tmp_path)
    with apply_pruner(model, tmp_path):
        assert torch.equal(model(**inputs).logits, want)


def test_images_encoded_before_the_pruner_came_are_refused():
    model, inputs = shared("llava"), collate(one("llava"))
    encoded = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    given = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with attach(model, "tome", ratio=0.5), pytest.raises(Exception, match="encoded without it"):
        model(**given, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*METHODS, *MOVED])
def test_flops_are_counted_exactly(method, family):
    model = shared(family)
    sample = mixed_batch(family)[0]
    inputs = collate([sample])
    with attach(model, method, ratio=0.5) as handle:
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        ((pruned,), (full,)) = (
            price(model, handle.last, inputs, inputs["input_ids"].shape[1]) for price in (account, account_full)
        )
    assert pruned.prefill == counter.get_total_flops()
    assert pruned.tower <= full.tower
