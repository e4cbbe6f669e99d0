"""What surrounds a model in real life: exceptions, training, adapters, copies, threads, other people's hooks."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from fingerprint import changed, fingerprint
from matrix import COMPACT, DECODER, PROJECTED, TWO_STAGE, engine_cells
from peft import LoraConfig, get_peft_model
from reference import assert_close, expect, of_sample
from tiny import (
    FAMILIES,
    SPECIAL,
    Image,
    Sample,
    build,
    collate,
    columns_of,
    mixed_batch,
    pristine,
    shared,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from prune import Budget, InputError, apply_pruner, get_handle


def _sample(family, seed=1):
    return Sample(family, [4, Image(0), 6], seed)


def _agrees(model, oracle, row, samples, handle):
    """The pruned model's logits on a batch are the reference's."""
    with torch.no_grad():
        logits = model(**collate(samples)).logits
        for number, sample in enumerate(samples):
            want = expect(oracle, sample, of_sample(handle.last, number), row.policy)
            assert_close(logits[number, columns_of(samples, number)], want.logits)
    return logits


def _bomb(*args):
    raise ZeroDivisionError


# ------------------------------------------------------------------------------------------------------ exceptions
@engine_cells()
@pytest.mark.parametrize("place", ["tower", "layer", "head"])
def test_exception_inside_a_forward(row, family, place):
    """Nothing is left behind: the next call is right, and remove() restores everything."""
    model, samples = shared(family), mixed_batch(family)
    core = model.model
    tower = core.visual if hasattr(core, "visual") else core.vision_tower
    module = {"tower": tower, "layer": core.language_model.layers[2].mlp, "head": model.lm_head}[place]
    before = fingerprint(model)
    with row.attach(model) as handle:
        attached = fingerprint(model)
        bomb = module.register_forward_pre_hook(_bomb)
        with pytest.raises(ZeroDivisionError):
            model(**collate(samples))
        bomb.remove()
        assert not changed(attached, fingerprint(model))
        _agrees(model, pristine(family), row, samples, handle)
        bomb = module.register_forward_pre_hook(_bomb)
        with pytest.raises(ZeroDivisionError):
            model(**collate(samples))
        bomb.remove()
    assert not changed(before, fingerprint(model))


def test_exception_inside_the_context_removes_the_pruner():
    model = shared("llava")
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), PROJECTED.attach(model):
        _bomb()
    assert not changed(before, fingerprint(model))


# -------------------------------------------------------------------------------------------------------- training
def _gradients(model, samples):
    inputs = collate(samples)
    logits = model(**inputs).logits
    keep = inputs["attention_mask"].bool()
    (logits[keep] ** 2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _zero(name):
    """Keys shifted by a constant give the same attention: this gradient is rounding noise."""
    return name.endswith("k_proj.bias")


HOOKS_ARE_REPLAYED = "__call__" in vars(GradientCheckpointingLayer)  # transformers 5.16: hooks lie inside the replay


@engine_cells()
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointing", "reentrant"])
def test_gradients(row, family, reentrant):
    """Those of the reference; the same with gradient checkpointing, which runs the layers twice."""
    samples, oracle = mixed_batch(family), build(family)
    model = build(family)
    with row.attach(model) as handle:
        plain = _gradients(model, samples)
        report = handle.last
        for number, sample in enumerate(samples):
            want = expect(oracle, sample, of_sample(report, number), row.policy)
            (want.logits[want.first :] ** 2).sum().backward()
        for name, parameter in oracle.named_parameters():
            if parameter.grad is not None and not _zero(name):
                assert_close(plain[name], parameter.grad)
        model.zero_grad()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # the name in 5.16 too
        model.enable_input_require_grads()
        if HOOKS_ARE_REPLAYED and (row in (DECODER, TWO_STAGE) or family == "qwen3_vl"):
            with pytest.raises(InputError, match="gradient checkpointing in this version"):
                _gradients(model, samples)
            return
        again = _gradients(model, samples)
    for name in plain:
        if not _zero(name):
            assert_close(again[name], plain[name])


@engine_cells()
def test_peft(row, family):
    """LoRA on the projections the signals are computed from; the oracle has it merged into its weights."""
    model = build(family)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config).eval()
    oracle = copy.deepcopy(wrapped).merge_and_unload().eval()
    with torch.no_grad():
        logits = wrapped(**collate([_sample(family)])).logits  # also lets transformers install its own hooks
        assert not torch.allclose(logits, pristine(family)(**collate([_sample(family)])).logits)
    before = fingerprint(wrapped)
    with row.attach(wrapped) as handle:
        _agrees(wrapped, oracle, row, mixed_batch(family), handle)
        assert get_handle(wrapped) is not None and get_handle(model) is not None
    assert not changed(before, fingerprint(wrapped))


# ----------------------------------------------------------------------------------------------- copies and company
@engine_cells()
def test_deepcopy_carries_its_own_pruner(row, family):
    model, samples = build(family), mixed_batch(family)
    handle = row.attach(model)
    twin = copy.deepcopy(model)
    other = get_handle(twin)
    handle.remove()
    assert get_handle(model) is None
    logits = _agrees(twin, pristine(family), row, samples, other)
    with torch.no_grad():
        assert not torch.equal(model(**collate(samples)).logits, logits)
        assert torch.equal(model(**collate(samples)).logits, pristine(family)(**collate(samples)).logits)
        other.remove()
        assert torch.equal(twin(**collate(samples)).logits, pristine(family)(**collate(samples)).logits)


@torch.no_grad()
def test_two_models_in_one_process():
    """Interleaved steps of two conversations on two models with two methods."""
    models = [shared("llava"), shared("qwen3_vl")]
    rows = [TWO_STAGE, COMPACT]
    samples = [_sample("llava"), _sample("qwen3_vl")]
    handles = [row.attach(model) for row, model in zip(rows, models)]
    outs = [model(**collate([sample])) for model, sample in zip(models, samples)]
    steps = [
        model(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values) for model, out in zip(models, outs)
    ]
    for row, sample, handle, out, step in zip(rows, samples, handles, outs, steps):
        want = expect(pristine(sample.family), sample.then([9]), handle.last.images, row.policy).logits
        assert_close(torch.cat([out.logits[0], step.logits[0]]), want)
        handle.remove()


@engine_cells()
def test_threads(row, family):
    """Four threads on one model, each with its own image, size and text."""
    model = shared(family)
    samples = [Sample(family, [3 + i, Image(i % 3), 5], i) for i in range(4)]
    inputs, got = [collate([sample]) for sample in samples], {}
    with row.attach(model):
        with torch.no_grad():
            want = [model(**one).logits for one in inputs]
        barrier = threading.Barrier(len(samples))

        def run(number):
            with torch.no_grad():
                barrier.wait()
                got[number] = [model(**inputs[number]).logits for _ in range(3)]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, logits in enumerate(want):
        assert all(torch.equal(one, logits) for one in got[number])


@pytest.mark.parametrize("first", ["accelerate", "pruner"])
@engine_cells(rows=(PROJECTED, DECODER), families=("llava", "qwen3_vl"))
def test_accelerate_hooks(row, family, first):
    """accelerate replaces `forward` of every module; either may come first."""
    model, samples = build(family), mixed_batch(family)
    if first == "accelerate":
        attach_align_device_hook(model, execution_device="cpu")
    with row.attach(model) as handle:
        if first == "pruner":
            attach_align_device_hook(model, execution_device="cpu")
        _agrees(model, pristine(family), row, samples, handle)
        remove_hook_from_submodules(model)
        _agrees(model, pristine(family), row, samples, handle)


@engine_cells(families=("llava", "qwen2_5_vl"))
@torch.no_grad()
def test_a_pruned_cache_can_be_stored(row, family):
    model, sample = shared(family), _sample(family)
    inputs = collate([sample])
    del inputs["attention_mask"]
    with row.attach(model) as handle:
        cache = pickle.loads(pickle.dumps(model(**inputs).past_key_values))
        step = model(input_ids=torch.tensor([[9, 10]]), past_key_values=cache)
        images = handle.last.images
    want = expect(pristine(family), sample.then([9, 10]), images, row.policy).logits
    assert_close(step.logits[0], want[-2:])


# ------------------------------------------------------------------------------------------------------ the handle
@torch.no_grad()
def test_the_budget_can_be_changed():
    model, inputs = shared("llava"), collate([_sample("llava")])
    with PROJECTED.attach(model, keep=4) as handle:
        kept = []
        for budget in (Budget(keep=4), Budget(ratio=0.5), Budget(average=3)):
            handle.budget = budget
            model(**inputs)
            kept.append(len(handle.last.images[0].kept))
    assert kept == [4, 8, 3]


@torch.no_grad()
def test_get_handle_finds_the_same_pruner():
    model = shared("llava")
    assert get_handle(model) is None
    with PROJECTED.attach(model) as handle:
        get_handle(model).budget = Budget(keep=2)
        assert handle.budget == Budget(keep=2)
        get_handle(model).remove()
        assert get_handle(model) is None
        handle = DECODER.attach(model)  # what the error for a second pruner recommends
        handle.remove()


@torch.no_grad()
def test_nothing_is_kept_alive_after_remove():
    model = build("llava")
    handle = PROJECTED.attach(model)
    model(**collate([_sample("llava")]))
    engine = weakref.ref(handle._engine)
    handle.remove()
    del handle
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_only_calls_are_left_alone(family):
    model, sample = shared(family), Sample(family, [9], 1)
    inputs = collate([sample])
    plain = pristine(family)(**inputs)
    with apply_pruner(model, TWO_STAGE.method(), keep=1) as handle:
        out = model(**inputs)
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=SPECIAL)
        assert handle.last is None
    assert torch.equal(out.logits, plain.logits)
    assert type(out.past_key_values) is type(plain.past_key_values)
    bare = pristine(family).generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=SPECIAL)
    assert torch.equal(generated, bare)
