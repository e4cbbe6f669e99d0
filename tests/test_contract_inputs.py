"""Every way to call `forward`: embeddings, labels, masks, and what may be asked of the output."""

import pytest
import torch
from matrix import ENGINE, cells, engine_cells
from reference import assert_close, expect, of_sample, trace
from tiny import SPECIAL, Image, Sample, build, collate, columns_of, mixed_batch, pristine, shared
from torch.nn.functional import cross_entropy, pad
from transformers import modeling_utils

from prune import get_handle

BF16 = 0.05  # relative; one bfloat16 rounding is 0.004


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def _sample(family):
    return Sample(family, [4, Image(0), 9], 1)


def _explicit_positions(model, inputs):
    """Position ids for calls in which the Qwen models cannot make their own."""
    if "mm_token_type_ids" not in inputs:
        return {}
    names = ("input_ids", "image_grid_thw", "mm_token_type_ids", "attention_mask")
    ids, _ = model.model.get_rope_index(**{name: inputs[name] for name in names})
    return {"position_ids": ids}


# ------------------------------------------------------------------------------------------------------ embeddings
@engine_cells()
def test_raw_embeddings_and_pixels(row, family):
    """Placeholders are recognised by their embedding, as the models do."""
    model, oracle, sample = shared(family), pristine(family), _sample(family)
    inputs = collate([sample])
    inputs |= _explicit_positions(model, inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with row.attach(model) as handle:
        logits = model(**inputs).logits[0]
        images = handle.last.images
    assert_close(logits, expect(oracle, sample, images, row.policy, inputs=inputs).logits)


@engine_cells()
def test_merged_embeddings_and_a_visual_mask(row, family):
    """Forward and generate; every run of True counts as one image, `image_newline` included."""
    model, oracle = shared(family), pristine(family)
    samples = [_sample(family), Sample(family, [5], 2)]
    length = len(samples[0].ids)
    rows = [trace(oracle, collate([sample])).embeds for sample in samples]
    embeds = torch.stack([pad(row_, (0, 0, length - len(row_), 0)) for row_ in rows])
    mask = collate(samples)["attention_mask"]
    visual = torch.zeros_like(mask, dtype=torch.bool)
    visual[0, samples[0].spans()[0]] = True
    ids = (mask.cumsum(1) - 1).clamp(min=0)
    ids = ids.expand(3, -1, -1) if family.startswith("qwen") else ids
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    with row.attach(model) as handle, handle.visual_mask(visual):
        logits = model(**inputs, position_ids=ids).logits
        report = handle.last
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=SPECIAL, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert handle.last.images[0].kept.tolist() == report.images[0].kept.tolist()
    for number, sample in enumerate(samples):
        answer = out.sequences[number].tolist()
        merged = torch.cat([rows[number], model.get_input_embeddings()(torch.tensor(answer))])[None]
        ids = torch.arange(merged.shape[1])[None]
        ids = ids.expand(3, -1, -1) if family.startswith("qwen") else ids
        want = expect(
            oracle, sample, of_sample(report, number), row.policy,
            inputs={"inputs_embeds": merged, "position_ids": ids}, spans=sample.spans(),
        ).logits  # fmt: skip
        assert_close(logits[number, columns_of(samples, number)], want[: len(sample.ids)])
        assert_close(torch.stack([step[number] for step in out.logits]), want[len(sample.ids) - 1 : -1])


# ------------------------------------------------------------------------------------------------- labels and masks
@engine_cells()
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_and_loss(row, family, side):
    """The loss is that of the shorter sequence: a label is predicted by the last survivor before it."""
    model, oracle, samples = shared(family), pristine(family), mixed_batch(family)
    inputs = collate(samples, side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[torch.isin(labels, torch.tensor(SPECIAL))] = -100
    for number in range(len(samples)):
        labels[number, columns_of(samples, number, side)[0]] = -100  # nothing predicts a first token
    with row.attach(model) as handle:
        out = model(**inputs, labels=labels)
        report = handle.last
    predicted, wanted = [], []
    for number, sample in enumerate(samples):
        logits = expect(oracle, sample, of_sample(report, number), row.policy).logits
        own = labels[number, columns_of(samples, number, side)]
        predicted.append(logits[:-1][own[1:] != -100])
        wanted.append(own[1:][own[1:] != -100])
    assert out.logits.shape[:2] == labels.shape
    assert_close(out.loss, cross_entropy(torch.cat(predicted), torch.cat(wanted)))


@engine_cells()
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "float"])
def test_caller_made_4d_mask(row, family, kind):
    """A mask over the caller's columns, at prefill and for a decoded token."""
    model, sample = shared(family), _sample(family)
    whole = sample.then([50])
    length = len(whole.ids)
    allowed = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.7
    allowed = (allowed | torch.eye(length, dtype=torch.bool)).tril()
    allowed[:, 0] = True
    inputs = collate([whole])
    inputs |= _explicit_positions(model, inputs)
    mask = allowed if kind == torch.bool else torch.zeros(length, length).masked_fill(~allowed, torch.finfo(kind).min)
    step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask[None, None, -1:]}
    inputs |= {"attention_mask": mask[None, None, :-1, :-1], "input_ids": inputs["input_ids"][:, :-1]}
    if "position_ids" in inputs:
        step["position_ids"] = inputs["position_ids"][..., -1:]
        inputs["position_ids"] = inputs["position_ids"][..., :-1]
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :-1]
    with row.attach(model) as handle:
        first = model(**inputs)
        images = handle.last.images
        second = model(**step, past_key_values=first.past_key_values)
    want = expect(pristine(family), whole, images, row.policy, allowed).logits
    assert_close(torch.cat([first.logits[0], second.logits[0]]), want)


@cells(rows=ENGINE)
def test_without_mask_and_cache(row, family, attn):
    """Gaps in the position ids must not be read as packed sequences."""
    model, sample = shared(family, attn), _sample(family)
    inputs = collate([sample])
    del inputs["attention_mask"]
    with row.attach(model) as handle:
        out = model(**inputs, use_cache=False)
        images = handle.last.images
    assert out.past_key_values is None
    assert_close(out.logits[0], expect(pristine(family, attn), sample, images, row.policy).logits)


# --------------------------------------------------------------------------------------------------------- outputs
@engine_cells()
def test_logits_to_keep(row, family):
    """Counts and columns are the caller's."""
    model, samples = shared(family), mixed_batch(family)
    inputs = collate(samples)
    length = inputs["input_ids"].shape[1]
    ask = lambda keep: model(**inputs, logits_to_keep=keep).logits  # noqa: E731
    with row.attach(model):
        full = model(**inputs).logits
        assert_close(ask(3), full[:, -3:])
        columns = torch.tensor([5, length // 2, length - 2])
        assert_close(ask(columns), full[:, columns])
        chosen = torch.rand(length, generator=torch.Generator().manual_seed(0)) < 0.3
        assert_close(ask(chosen), full[:, chosen])
        if hasattr(modeling_utils, "slice_logits_to_keep"):  # 2-D forms came with it
            per_row = torch.stack([columns, columns - 1, columns - 2])
            assert_close(ask(per_row), torch.take_along_dim(full, per_row[..., None], 1))
            chosen = torch.rand(full.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.3
            assert_close(ask(chosen), full[chosen])


@cells(rows=ENGINE)
def test_hidden_states_and_attentions(row, family, attn):
    """They stay as long as the layers' sequences; with return_dict=False as well."""
    model, sample = shared(family, attn), _sample(family)
    inputs = collate([sample])
    with row.attach(model) as handle:
        out = model(**inputs, output_hidden_states=True, output_attentions=attn == "eager")
        images = handle.last.images
        as_tuple = model(**inputs, return_dict=False)
    want = expect(pristine(family, attn), sample, images, row.policy)
    assert_close(out.logits[0], want.logits)
    assert torch.equal(as_tuple[0], out.logits)
    assert len(out.hidden_states) == len(want.hidden)
    for ours, theirs in zip(out.hidden_states, want.hidden):
        assert_close(ours[0], theirs)
    if attn == "eager":
        assert len(out.attentions) == len(want.attention)
        for ours, theirs in zip(out.attentions, want.attention):
            assert_close(ours[0], theirs)


@engine_cells()
def test_bfloat16(row, family):
    model, samples = build(family, dtype=torch.bfloat16), mixed_batch(family)
    with row.attach(model) as handle:
        logits = model(**collate(samples, dtype=torch.bfloat16)).logits
        report = handle.last
    assert logits.dtype == torch.bfloat16
    handle = get_handle(model)
    assert handle is None
    for number, sample in enumerate(samples):
        want = expect(model, sample, of_sample(report, number), row.policy)
        assert_close(logits[number, columns_of(samples, number)], want.logits, BF16)
