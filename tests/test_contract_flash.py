"""FlashAttention without a GPU: its reading of masks and positions, emulated densely.

Flash kernels see a mask only as the lengths of un-padded sequences: transformers cuts the 2-D mask from the RIGHT to
the number of keys (SDPA reads it from the left), and takes gaps in `position_ids` for packed sequences. Both go
unnoticed under SDPA and eager.
"""

from functools import cache

import pytest
import torch
from matrix import engine_cells
from reference import assert_close, expect, of_sample
from tiny import SPECIAL, Image, Sample, build, collate, columns_of, mixed_batch, pristine, shared
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

NAME = "flash_attention_emulated"


@pytest.fixture(autouse=True, scope="module")
def emulated_flash_attention():
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]
    _model.cache_clear()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def _model(family):
    model = build(family)
    model.model.language_model.config._attn_implementation = NAME
    return model


def _attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """`integrations.flash_attention` and `modeling_flash_attention_utils`, with plain attention for the kernels."""
    batch, heads, length, _ = query.shape
    assert attention_mask is None or attention_mask.dim() == 2
    if attention_mask is not None and key.shape[2] > attention_mask.shape[1]:  # static caches
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    slots = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=query.dtype)
    for row in range(batch):
        for queries, keys in _sequences(attention_mask, position_ids, batch, row, length, slots):
            n, m = len(queries), len(keys)
            scores = query[row][:, queries] @ key[row][:, keys].transpose(1, 2) * scaling
            visible = torch.ones(n, m, dtype=torch.bool).tril(m - n)  # aligned at the bottom right
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
            out[row, queries] = (weights @ value[row][:, keys]).transpose(0, 1)
    return out, None


def _sequences(mask, position_ids, batch, row, length, slots):
    """(queries, keys) of every un-padded sequence of a row."""
    if mask is not None:
        keys = mask[row].nonzero()[:, 0].tolist()
        if length == slots:
            return [(keys, keys)]
        if length == 1:
            return [([0], keys)]
        return [(mask[row, -length:].nonzero()[:, 0].tolist(), keys)]
    if position_ids is not None and batch == 1 and length > 1:
        steps = torch.arange(length) + position_ids.min()
        if (position_ids[0] != steps).any():  # "packed": a sequence starts at every position 0, keys like queries
            starts = sorted({0, *(position_ids[0] == 0).nonzero()[:, 0].tolist()})
            parts = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], length])]
            return [(part, part) for part in parts]
    return [(list(range(length)), list(range(slots)))]


def _samples(family):
    return [Sample(family, [4, Image(0), 6], 1), Sample(family, [3, Image(1), 4, Image(2), 9], 2)]


def _check(family, row, sample, logits, images):
    """The last `len(logits)` columns of a conversation."""
    want = expect(pristine(family), sample, images, row.policy).logits[-len(logits) :]
    assert_close(logits, want)


@engine_cells()
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_one_sample(row, family, cache):
    """No padding, so no mask: the gaps in the positions must not be seen."""
    sample, model = _samples(family)[0], _model(family)
    with row.attach(model) as handle:
        logits = model(**collate([sample]), use_cache=cache).logits[0]
        images = handle.last.images
    _check(family, row, sample, logits, images)


@engine_cells()
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch(row, family, side):
    samples, model = mixed_batch(family), _model(family)
    with row.attach(model) as handle:
        logits = model(**collate(samples, side)).logits
        report = handle.last
    with row.attach(shared(family)) as handle:
        shared(family)(**collate(samples, side))
        for ours, theirs in zip(report.images, handle.last.images):
            assert ours.kept.tolist() == theirs.kept.tolist(), "the choice depends on the attention implementation"
    for number, sample in enumerate(samples):
        _check(family, row, sample, logits[number, columns_of(samples, number, side)], of_sample(report, number))


@engine_cells()
def test_generation_and_next_turn(row, family):
    """A left-padded batch decodes, then goes on with several new tokens at once."""
    samples, model, steps = _samples(family), _model(family), 3
    settings = dict(max_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL, output_logits=True)
    inputs = collate(samples)
    length = inputs["input_ids"].shape[1]
    with row.attach(model) as handle:
        first = model.generate(**inputs, **settings, return_dict_in_generate=True)
        report = handle.last
        asked = torch.cat([first.sequences, torch.tensor([[11, 12, 13], [14, 15, 16]])], 1)
        turn = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        turn["attention_mask"][:, :length] = inputs["attention_mask"]
        if "mm_token_type_ids" in inputs:
            turn["mm_token_type_ids"] = torch.nn.functional.pad(
                inputs["mm_token_type_ids"], (0, asked.shape[1] - length)
            )
        second = model.generate(**turn, **settings, past_key_values=first.past_key_values, return_dict_in_generate=True)
    for out, start in ((first, length), (second, asked.shape[1])):
        for number, sample in enumerate(samples):
            answer = out.sequences[number, length:-1].tolist()
            logits = torch.stack([step[number] for step in out.logits])
            assert start + steps == out.sequences.shape[1]
            _check(family, row, sample.then(answer), logits, of_sample(report, number))


@engine_cells()
def test_conversation_without_masks(row, family):
    """One sample, new ids only: with a cache and one row, gaps in the positions would hide the past."""
    sample, model = _samples(family)[0], _model(family)
    inputs = collate([sample])
    del inputs["attention_mask"]
    with row.attach(model) as handle:
        out = model(**inputs)
        images = handle.last.images
        step = model(input_ids=torch.tensor([[21, 22, 23]]), past_key_values=out.past_key_values)
    _check(family, row, sample.then([21, 22, 23]), torch.cat([out.logits[0], step.logits[0]]), images)


def test_the_emulation_sees_a_mask_that_is_too_long():
    """What this file is for: one column too many on the right is harmless under SDPA and wrong here."""
    sample = [Sample("llava", [6], 1), Sample("llava", [3], 2)]
    inputs = collate(sample)
    longer = {**inputs, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)}
    good, bad = (_model("llava").model.language_model(
        input_ids=x["input_ids"], attention_mask=x["attention_mask"], use_cache=True).last_hidden_state
        for x in (inputs, longer))  # fmt: skip
    assert not torch.allclose(good[1, -3:], bad[1, -3:], atol=1e-3)
