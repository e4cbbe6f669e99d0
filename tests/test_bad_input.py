"""Bad input gets an error of our own that names the cause and the fix, and leaves the model as it was: one row each."""

import pytest
import torch
import transformers as hf
from fingerprint import changed, fingerprint
from tiny import IMAGE, Image, Sample, build, collate, shared, text_config
from torch import nn

from prune import (
    AlreadyAttachedError,
    Budget,
    BudgetError,
    CacheMismatchError,
    Compose,
    ConfigError,
    InputError,
    PruneError,
    Site,
    UnknownMethodError,
    UnsupportedMethodError,
    UnsupportedModelError,
    apply_pruner,
    get_handle,
    get_method,
    list_methods,
)
from prune.reducers.script import Script
from prune.reducers.zooprune import ZooPrune

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------- models we refuse
def _text_only():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**text_config()))


def _clip_text():
    return hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                                              num_attention_heads=3))  # fmt: skip


def _swin():
    return hf.SwinModel(
        hf.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=2)
    )


def _audio():
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                         decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, num_mel_bins=8,
                         max_source_positions=20, max_target_positions=20)
    )  # fmt: skip


def _sliding_window():
    text = hf.Qwen2Config(**text_config(use_sliding_window=True, sliding_window=8, max_window_layers=2))
    config = build("llava").config
    config.text_config = text
    return hf.LlavaForConditionalGeneration(config)


def _without_tower():
    model = build("llava")
    model.model.vision_tower = None
    return model


MODELS = {
    "text only": (_text_only, "language_model.*LLaVA"),
    "text tower": (_clip_text, "language_model.*LLaVA"),
    "vision without a plain stack of blocks": (_swin, "language_model.*LLaVA.*timm ViT"),
    "audio": (_audio, "language_model.*LLaVA"),
    "plain module": (lambda: nn.Linear(2, 2), "language_model.*LLaVA"),
    "no vision tower": (_without_tower, "vision tower.*LLaVA"),
    "sliding window": (_sliding_window, "sliding_attention"),
}


@pytest.mark.parametrize("name", MODELS)
def test_unsupported_model(name):
    make, match = MODELS[name]
    model = make()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=match):
        apply_pruner(model, "random", ratio=0.5)
    assert not changed(before, fingerprint(model))


@pytest.mark.parametrize("thing", [None, "llava-hf/llava-1.5-7b-hf", {}, nn.Module], ids=repr)
def test_not_a_model(thing):
    with pytest.raises(UnsupportedModelError, match="wants a model"):
        apply_pruner(thing, "random", ratio=0.5)


# ------------------------------------------------------------------------------------------- arguments of attaching
def _two(*layers):
    return Compose(*(get_method("random", layer=layer) for layer in layers))


def _attached(model, call):
    with apply_pruner(model, "random", ratio=0.5) as handle:
        call(handle)


def _masked(model, handle, mask):
    with handle.visual_mask(mask):
        model(inputs_embeds=torch.zeros(1, 10, 32))


OWN_BUDGETS = [Budget(ratio=0.5), Budget(keep=2)]

# what is wrong: (error, what the message must say, call)
ARGUMENTS = {
    "unknown method": (UnknownMethodError, "'dart'.*uniform", lambda m: apply_pruner(m, "darts", ratio=0.5)),
    "no method": (ConfigError, "name or a method object", lambda m: apply_pruner(m, 3, ratio=0.5)),
    "method class": (ConfigError, "name or a method object", lambda m: apply_pruner(m, Compose, ratio=0.5)),
    "unknown option": (ConfigError, "'laier'.*'layer'", lambda m: apply_pruner(m, "fastv", ratio=0.5, laier=2)),
    "option beside object": (
        ConfigError,
        r"Random\(",
        lambda m: apply_pruner(m, get_method("random"), ratio=0.5, seed=2),
    ),
    "option of a wrong type": (ConfigError, "layer=", lambda m: apply_pruner(m, "fastv", ratio=0.5, layer="2")),
    "option of a hand-made method": (
        ConfigError,
        "step=inf must be a number",
        lambda m: apply_pruner(m, ZooPrune(step=INF), ratio=0.5),
    ),
    "option of a member": (
        ConfigError,
        "gain='x' must be a number",
        lambda m: apply_pruner(m, Compose(Script(gain="x"), get_method("fastv")), ratio=0.5),
    ),
    "seed of 100 bits": (ConfigError, "whole number", lambda m: apply_pruner(m, "random", ratio=0.5, seed=10**30)),
    "share of 1e308": (ConfigError, "a number", lambda m: apply_pruner(m, "flowcut", ratio=0.5, share=1e308)),
    "a stage in every layer there is": (
        ConfigError,
        "less than 1000",
        lambda m: apply_pruner(m, "framefusion", ratio=0.5, merges_before=10**12),
    ),
    "keep of 400 digits": (BudgetError, "too large", lambda m: apply_pruner(m, "random", keep=10**400)),
    "restore": (
        ConfigError,
        "restore='no' must be True or False",
        lambda m: apply_pruner(m, "dart", keep=3, restore="no"),
    ),
    "proportional": (ConfigError, "True, False or None", lambda m: apply_pruner(m, "dart", keep=3, proportional=1)),
    "budgets that are none": (
        ConfigError,
        r"one Budget\(ratio",
        lambda m: Compose(get_method("random"), get_method("fastv"), budgets=[0.5, 0.5]),
    ),
    "a list for a name": (UnknownMethodError, "unknown method", lambda m: get_method(["dart"])),
    "where nothing is": (ConfigError, "where='nowhere'", lambda m: list_methods(where="nowhere")),
    "layer of two squared": (ConfigError, "none of projected", lambda m: Site.parse("decoder:\u00b2")),
    "the handle of no model": (UnsupportedModelError, "get_handle wants a model", lambda m: get_handle("model")),
    "no folder": (ConfigError, "folder must be a path", lambda m: _attached(m, lambda h: h.save_pretrained(None))),
    "visual_mask of text": (ConfigError, "of bool", lambda m: _attached(m, lambda h: _masked(m, h, "x"))),
    "visual_mask of another length": (
        InputError,
        r"\(1, 9\) for inputs_embeds \(1, 10\)",
        lambda m: _attached(m, lambda h: _masked(m, h, torch.ones(1, 9, dtype=torch.bool))),
    ),
    "ratio and keep": (BudgetError, "exactly one.*ratio, keep", lambda m: apply_pruner(m, "dart", ratio=0.5, keep=4)),
    "no budget": (BudgetError, "exactly one.*ratio=", lambda m: apply_pruner(m, "dart")),
    "ratio 1": (BudgetError, r"\[0, 1\)", lambda m: apply_pruner(m, "dart", ratio=1.0)),
    "ratio 90": (BudgetError, r"\[0, 1\)", lambda m: apply_pruner(m, "dart", ratio=90)),
    "ratio below 0": (BudgetError, r"\[0, 1\)", lambda m: apply_pruner(m, "dart", ratio=-0.1)),
    "ratio nan": (BudgetError, "finite", lambda m: apply_pruner(m, "dart", ratio=NAN)),
    "ratio text": (BudgetError, "finite number", lambda m: apply_pruner(m, "dart", ratio="0.5")),
    "ratio bool": (BudgetError, "finite number", lambda m: apply_pruner(m, "dart", ratio=True)),
    "keep 0": (BudgetError, ">= 1", lambda m: apply_pruner(m, "dart", keep=0)),
    "keep half": (BudgetError, "whole number", lambda m: apply_pruner(m, "dart", keep=2.5)),
    "average 0": (BudgetError, "> 0", lambda m: apply_pruner(m, "dart", average=0)),
    "average inf": (BudgetError, "finite", lambda m: apply_pruner(m, "dart", average=INF)),
    "flops 2": (BudgetError, r"\(0, 1\]", lambda m: apply_pruner(m, "dart", flops=2)),
    "positions": (ConfigError, "'original' or 'compact'", lambda m: apply_pruner(m, "dart", ratio=0.5, positions="x")),
    "compact in the decoder": (
        ConfigError,
        'decoder:2; use positions="original"',
        lambda m: apply_pruner(m, "fastv", ratio=0.5, positions="compact"),
    ),
    "compact in a second stage": (
        ConfigError,
        "decoder:1",
        lambda m: apply_pruner(m, _two(None, 1), ratio=0.5, positions="compact"),
    ),
    "layer out of range": (ConfigError, "layers 0 to 3", lambda m: apply_pruner(m, "dart", ratio=0.5, layer=4)),
    "layer below 0": (ConfigError, ">= 0", lambda m: apply_pruner(m, "random", ratio=0.5, layer=-1)),
    "attention before layer 0": (ConfigError, ">= 1", lambda m: apply_pruner(m, "fastv", ratio=0.5, layer=0)),
    "sites that do not ascend": (ConfigError, "ascend", lambda m: apply_pruner(m, _two(2, 1), ratio=0.5)),
    "two budgets for a Compose": (
        BudgetError,
        "budgets of its own",
        lambda m: apply_pruner(m, Compose(*_two(None, 2).members, budgets=OWN_BUDGETS), ratio=0.5),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_argument(name):
    error, match, call = ARGUMENTS[name]
    model = shared("llava")
    before = fingerprint(model)
    with pytest.raises(error, match=match) as caught:
        call(model)
    assert isinstance(caught.value, PruneError)
    assert not changed(before, fingerprint(model))


def test_a_site_the_engine_does_not_serve():
    class Tower(type(get_method("random"))):
        site = "vision:1"

    model = shared("llava")
    before = fingerprint(model)
    with pytest.raises(UnsupportedMethodError, match="vision:1"):
        apply_pruner(model, Tower(), ratio=0.5)
    assert not changed(before, fingerprint(model))


def test_second_attach():
    model = shared("llava")
    with apply_pruner(model, "random", ratio=0.5) as handle:
        before = fingerprint(model)
        with pytest.raises(AlreadyAttachedError, match=r"handle\.remove\(\).*Compose"):
            apply_pruner(model, "random", ratio=0.5)
        assert not changed(before, fingerprint(model))
        handle.remove()  # the fix the message names
        apply_pruner(model, "random", ratio=0.5).remove()


def test_second_attach_through_another_door():
    """The inner model is the same model."""
    from peft import LoraConfig, get_peft_model

    model = build("llava")
    with apply_pruner(model, "random", ratio=0.5):
        with pytest.raises(AlreadyAttachedError):
            apply_pruner(model.model, "random", ratio=0.5)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(AlreadyAttachedError):
            apply_pruner(wrapped, "random", ratio=0.5)


@pytest.mark.parametrize("value", [0.5, None, {"ratio": 0.5}], ids=repr)
def test_assigning_no_budget(value):
    with apply_pruner(shared("llava"), "random", ratio=0.5) as handle:
        with pytest.raises(BudgetError, match=r"Budget\(keep"):
            handle.budget = value
        assert handle.budget == Budget(ratio=0.5)


# ---------------------------------------------------------------------------------------------- inputs of a forward
def _no_question(model):
    ends_with_image = Sample("llava", [4, Image()], 1)
    model(**collate([Sample("llava", [4, Image(), 3], 2), ends_with_image]))


def _no_question_after_newline(model):
    model(**collate([Sample("llava_next", [4, Image()], 1)]))


def _tiny_image(family):
    sample = Sample(family, [4, Image((1, 1, 1)), 3], 1)
    return lambda model: model(**collate([sample]))


def _out_of_reach(model):
    model(**collate([Sample("llava", [4, Image(), 3], 1)]))


# what is wrong: (family, method, budget, error, what the message must say, call)
INPUTS = {
    "no question": ("llava", "fastv", {"keep": 4}, InputError, "sample 1.*question after the image", _no_question),
    "no question after the last newline": (
        "llava_next",
        "fastv",
        {"keep": 4},
        InputError,
        "question after the image",
        _no_question_after_newline,
    ),
    "average out of reach": ("llava", "fastv", {"average": 2}, BudgetError, "earlier layer", _out_of_reach),
    "flops out of reach": ("llava", "fastv", {"flops": 0.05}, BudgetError, "earlier layer", _out_of_reach),
} | {
    f"image below one patch ({family})": (family, "random", {"keep": 4}, InputError, "patch", _tiny_image(family))
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_to_a_forward(name):
    family, method, budget, error, match, call = INPUTS[name]
    model = shared(family)
    before = fingerprint(model)
    with apply_pruner(model, method, **budget) as handle:
        attached = fingerprint(model)
        with pytest.raises(error, match=match):
            call(model)
        assert not changed(attached, fingerprint(model))
        handle.budget = Budget(ratio=0.5)
        model(**collate([Sample(family, [4, Image(0), 3], 1)]))  # the pruner still works
        assert handle.last is not None
    assert not changed(before, fingerprint(model))


# ----------------------------------------------------------------------------------------------------------- caches
def _prefill(model, rows=1, **options):
    inputs = collate([Sample("llava", [4, Image(), 3], 1)] * rows)
    del inputs["attention_mask"]
    return model(**inputs, **options).past_key_values


def _step(model, cache, rows=1):
    return model(input_ids=torch.full((rows, 1), 7), past_key_values=cache)


def _explode(module, args):
    raise ZeroDivisionError


def _interrupt(model, layer, call):
    bomb = model.model.language_model.layers[layer].mlp.register_forward_pre_hook(_explode)
    with pytest.raises(ZeroDivisionError):
        call()
    bomb.remove()


def _other_method(model, method):
    with apply_pruner(model, "uniform", keep=5):
        cache = _prefill(model)
    with apply_pruner(model, method, keep=5):
        _step(model, cache)


def _other_positions(model, method):
    with apply_pruner(model, "random", keep=5, positions="compact"):
        cache = _prefill(model)
    with apply_pruner(model, "random", keep=5, positions="original"):
        _step(model, cache)


def _other_layer(model, method):
    with apply_pruner(model, "random", keep=5, layer=1):
        cache = _prefill(model)
    with apply_pruner(model, "random", keep=5, layer=2):
        _step(model, cache)


def _other_batch(model, method):
    with apply_pruner(model, method, keep=5):
        _step(model, _prefill(model), rows=2)


def _torn_prefill(model, method):
    cache = hf.DynamicCache(config=model.config.get_text_config())
    with apply_pruner(model, method, keep=5):
        _interrupt(model, 2, lambda: _prefill(model, past_key_values=cache))
        _step(model, cache)


def _torn_step(model, method):
    with apply_pruner(model, method, keep=5):
        cache = _prefill(model)
        _step(model, cache)
        _interrupt(model, 2, lambda: _step(model, cache))
        _step(model, cache)


def _torn_second_image(model, method):
    with apply_pruner(model, method, keep=5):
        cache = _prefill(model)
        _interrupt(model, 3, lambda: _prefill(model, past_key_values=cache))
        _step(model, cache)


CACHES = {
    "filled under another method": (_other_method, "Uniform"),
    "filled with other positions": (_other_positions, "compact"),
    "filled with pruning at another layer": (_other_layer, "layer=1"),
    "another batch size": (_other_batch, "1 sequences, the inputs 2"),
    "prefill interrupted": (_torn_prefill, "interrupted"),
    "step interrupted": (_torn_step, "interrupted"),
    "second image interrupted": (_torn_second_image, "interrupted"),
}


@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("name", CACHES)
def test_cache_that_cannot_be_continued(name, method):
    call, match = CACHES[name]
    model = shared("llava")
    before = fingerprint(model)
    with pytest.raises(CacheMismatchError, match=f"(?s){match}.*fresh cache"):
        call(model, method)
    assert not changed(before, fingerprint(model))


def test_a_reset_cache_can_be_used_again():
    """The fix for an interrupted prefill that keeps the cache object."""
    model = shared("llava")
    cache = hf.StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    with apply_pruner(model, "random", keep=5):
        _interrupt(model, 2, lambda: _prefill(model, past_key_values=cache))
        cache.reset()
        again = _step(model, _prefill(model, past_key_values=cache)).logits
        assert torch.allclose(again, _step(model, _prefill(model)).logits, atol=1e-5)


def test_the_placeholder_is_what_we_think():
    """The rows above rely on it."""
    assert shared("llava").config.image_token_id == IMAGE
