"""Quantised linear layers on the CPU: bitsandbytes' 8 and 4 bits as transformers loads them, torchao's int8 weights.

None of the back-ends is needed by the library; a test skips with its reason where one is not installed.
"""

from __future__ import annotations

import importlib
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from fingerprint import changed, fingerprint
from matrix import PROJECTED, ROWS, Row
from reference import assert_close, check_counts, expect, merges_of, of_sample
from tiny import SPECIAL, build, collate, columns_of, mixed_batch, with_positions
from torch import nn
from transformers import BitsAndBytesConfig

FAMILIES = ("llava", "qwen2_5_vl")
WEIGHTS_ONLY = ("bnb-nf4", "torchao-int8")
ROUNDS = ("bnb-int8",)
"""Rounds activations too, row by row: noise of 1e-7 flips a rounding, which is 1/127 of the row's largest number."""


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def _bitsandbytes(family: str, **how) -> nn.Module:
    with TemporaryDirectory() as folder:
        plain = build(family)
        plain.save_pretrained(folder)
        config = BitsAndBytesConfig(**how)
        model = type(plain).from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    model.generation_config = plain.generation_config
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a kernel in bf16, for widths that tiny models have not
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _torchao(family: str) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build(family)
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


MAKE = {
    # Outliers are columns found over the whole batch, so that a row would depend on its neighbours, pruned or not.
    "bnb-int8": ("bitsandbytes", lambda family: _bitsandbytes(family, load_in_8bit=True, llm_int8_threshold=0.0)),
    "bnb-nf4": (
        "bitsandbytes",
        lambda family: _bitsandbytes(
            family, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    ),
    "torchao-int8": ("torchao", _torchao),
}


@cache
def quantised(back_end: str, family: str) -> nn.Module:
    """The model tests attach to, and the oracle of the reference when nothing is attached."""
    library, make = MAKE[back_end]
    try:
        importlib.import_module(library)
    except Exception as error:  # missing, or built for another torch
        pytest.skip(f"{library} cannot be imported: {error}")
    model = make(family)
    kinds = {type(layer.self_attn.q_proj.weight).__name__ for layer in model.model.language_model.layers}
    assert kinds <= {"Int8Params", "Params4bit", "Int8Tensor"}, f"not quantised: {kinds}"
    return model


def rows_for(family: str) -> list:
    return [row for row in ROWS if family not in row.exclude]


both = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("back_end", WEIGHTS_ONLY)
@both
def test_forward_equals_reference(back_end, family):
    """A ragged batch against every sample alone on the un-hooked quantised model, with every method."""
    model, samples = quantised(back_end, family), mixed_batch(family)
    inputs = with_positions(collate(samples))
    plain, before = model(**inputs).logits, fingerprint(model)
    for row in rows_for(family):
        with row.watched() as reductions, row.attach(model) as handle:
            logits, report = model(**inputs).logits, handle.last
        assert not changed(before, fingerprint(model)), row
        for number, sample in enumerate(samples):
            want = expect(
                model,
                sample,
                of_sample(report, number),
                row.policy,
                spans=sample.spans() if row.method().newlines else None,
                merges=merges_of(report, reductions) if reductions else None,
            )
            assert_close(logits[number, columns_of(samples, number)], want.logits)
        with row.attach(model, ratio=0):
            assert torch.equal(model(**inputs).logits, plain), row


@pytest.mark.parametrize("back_end", ROUNDS)
@both
def test_rounded_activations(back_end, family):
    """Counts as promised, decoding goes on, ratio 0 and remove() give the model bit for bit."""
    model, samples = quantised(back_end, family), mixed_batch(family)
    inputs = with_positions(collate(samples))
    plain, before = model(**inputs).logits, fingerprint(model)
    for row in rows_for(family):
        with row.attach(model) as handle:
            logits = model(**inputs).logits
            assert logits.isfinite().all() and not torch.equal(logits, plain), row
            if {"ratio", "keep"} & set(row.budget):
                check_counts(handle.last, row.budget, at_most=row.method().adaptive)
        with row.attach(model, ratio=0):
            assert torch.equal(model(**inputs).logits, plain), row
        assert torch.equal(model(**inputs).logits, plain), row
        assert not changed(before, fingerprint(model)), row


@pytest.mark.parametrize("back_end", WEIGHTS_ONLY)
@pytest.mark.parametrize("row", (PROJECTED, Row("random", {"layer": 1})), ids=str)  # they choose alike at every step
@both
def test_generation(back_end, row, family):
    """Greedy decoding with a cache and without one give the same tokens."""
    model, samples = quantised(back_end, family), mixed_batch(family)
    steps = dict(max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL)
    with row.attach(model):
        cached = model.generate(**collate(samples), **steps)
        again = model.generate(**collate(samples), **steps, use_cache=False)
    assert torch.equal(cached, again)
