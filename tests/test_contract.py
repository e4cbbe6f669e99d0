"""The contract every method keeps on every family: see `matrix.py` for the table."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from fingerprint import changed, fingerprint
from matrix import IN_VITS, ROWS, cells
from reference import assert_close, check_counts, expect, merges_of, of_sample, places, trace
from tiny import (
    ATTENTION,
    FAMILIES,
    IMAGES,
    SPECIAL,
    VIDEO_FAMILIES,
    Image,
    Sample,
    Video,
    collate,
    columns_of,
    mixed_batch,
    pristine,
    shared,
    with_positions,
)

from prune import Budget, Geometry, list_methods


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_every_method_has_a_row():
    assert set(list_methods()) <= {row.name for row in ROWS} | set(IN_VITS)


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_without_pruning_is_the_model(family, attn):
    model, samples = pristine(family, attn), _rows(family)
    logits = model(**collate(samples)).logits
    for row, sample in enumerate(samples):
        assert_close(logits[row, columns_of(samples, row)], expect(model, sample).logits)


def _rows(family):
    if family not in VIDEO_FAMILIES:
        return mixed_batch(family)
    return mixed_batch(family) + [Sample(family, [3, Video(), 4], 4), Sample(family, [5, Image(1), 2, Video(), 3], 5)]


@cache
def _unpruned(family, attn):
    return pristine(family, attn)(**collate(mixed_batch(family)))


@cells()
def test_nothing_to_prune_is_bit_identical(row, family, attn):
    model, inputs, plain = shared(family, attn), collate(mixed_batch(family)), _unpruned(family, attn)
    with row.attach(model, ratio=0) as handle:
        out = model(**inputs)
        assert all(len(image.kept) == image.tokens for image in handle.last.images)
    assert torch.equal(out.logits, plain.logits)
    with row.attach(model) as handle, handle.disabled():
        out = model(**inputs)
        assert handle.last is None
    assert torch.equal(out.logits, plain.logits)
    for ours, theirs in zip(out.past_key_values.layers, plain.past_key_values.layers):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert torch.equal(model(**inputs).logits, plain.logits)  # after remove()


@cells()
def test_forward_equals_reference(row, family, attn):
    """A batch of ragged rows, padded left and right, against every sample alone on the un-hooked model."""
    model, oracle, samples = shared(family, attn), pristine(family, attn), mixed_batch(family)
    expected = {}
    for policy in row.policies:
        with row.watched() as reductions, row.attach(model, positions=policy) as handle:
            for side in ("left", "right"):
                reductions.clear()
                logits = model(**with_positions(collate(samples, side))).logits
                report = handle.last
                _check_report(row, model, report)
                for number, sample in enumerate(samples):
                    key = policy, number, *(tuple(image.kept.tolist()) for image in of_sample(report, number))
                    if key not in expected:
                        expected[key] = _expected(row, oracle, sample, report, number, policy, reductions)
                    want = expected[key]
                    columns = columns_of(samples, number, side)[want.first :]
                    assert_close(logits[number, columns], want.logits[want.first :])
        assert len([key for key in expected if key[0] == policy]) == len(samples), "the choice depends on the padding"


def _expected(row, oracle, sample, report, number, policy, reductions, answer=()):
    """The reference for one row of a batch, with the answer behind it."""
    images, merges = of_sample(report, number), merges_of(report, reductions) if reductions else {}
    spans = sample.spans() if row.method().newlines else None
    if not row.method().needs_projector or not merges:
        return expect(oracle, sample.then(list(answer)), images, policy, spans=spans, merges=merges)
    with _merged_before_projector(oracle, sample, images, merges):
        return expect(oracle, sample.then(list(answer)), images, policy, spans=spans)


@contextmanager
def _merged_before_projector(oracle, sample, images, merges):
    """The oracle with the sums of `merges` taken in what its projector reads; rows are found by what they become."""
    projector, inputs, outputs = oracle.model.multi_modal_projector, [], []

    def keep(module, args, output):
        inputs.append(args[0].flatten(0, -2))
        outputs.append(output.flatten(0, -2))

    hook = projector.register_forward_hook(keep)
    embeds = trace(oracle, collate([sample])).embeds
    hook.remove()
    spans, merged = places(oracle, sample, embeds), [x.clone() for x in inputs]
    for modality in ("image", "video"):
        own = [span for span, medium in zip(spans, sample.media) if medium.modality == modality]
        for span, image in zip(own, [image for image in images if image.layout.modality == modality]):
            at = [next((i, r) for i, x in enumerate(outputs) for r in _equal(x, embeds[c])) for c in span]
            for to, terms in merges[image.sample, image.index, "projected"].items():
                call, row = at[to]
                merged[call][row] = sum(weight * inputs[at[token][0]][at[token][1]] for weight, token in terms)
    calls = iter(merged)
    hook = projector.register_forward_pre_hook(lambda module, args: (next(calls).view_as(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _equal(rows, row):
    return (rows == row).all(-1).nonzero()[:, 0].tolist()


def _check_report(row, model, report):
    method, budget = row.method(), Budget(**row.budget)
    geometry = Geometry(1, layers=model.config.get_text_config().num_hidden_layers)
    check_counts(report, row.budget, lambda n: method.kept(n, budget, geometry), at_most=method.adaptive)
    for image in report.images:
        assert [str(site) for site in image.stages] == [str(site) for site in method.sites(geometry.layers)]


@cells(families=VIDEO_FAMILIES, attention=("sdpa",))
def test_videos_equal_reference(row, family, attn):
    model, oracle = shared(family, attn), pristine(family, attn)
    samples = [
        Sample(family, [3, Video(), 4], 1),
        Sample(family, [6], 2),
        Sample(family, [5, Image(1), 2, Video(), 3], 3),
    ]
    with row.watched() as reductions, row.attach(model) as handle:
        logits = model(**with_positions(collate(samples))).logits
        report = handle.last
    _check_report(row, model, report)
    for number, sample in enumerate(samples):
        want = _expected(row, oracle, sample, report, number, row.policy, reductions)
        assert_close(logits[number, columns_of(samples, number)], want.logits)


@cells()
def test_batch_row_equals_row_alone(row, family, attn):
    model, samples = shared(family, attn), mixed_batch(family)
    with row.attach(model) as handle:
        alone, kept = [], []
        for sample in samples:
            alone.append(model(**collate([sample])).logits[0])
            kept.append([image.kept.tolist() for image in handle.last.images] if sample.media else [])
        for side in ("left", "right"):
            logits = model(**with_positions(collate(samples, side))).logits
            for number in range(len(samples)):
                assert [image.kept.tolist() for image in of_sample(handle.last, number)] == kept[number]
                assert_close(logits[number, columns_of(samples, number, side)], alone[number])


@cells(families=[family for family in FAMILIES if len(set(IMAGES[family])) > 1], attention=("sdpa",))
def test_an_image_within_its_budget_is_left_alone(row, family, attn):
    """Also beside larger ones that are cut, by methods that merge or drop as the content asks."""
    model = shared(family, attn)
    samples = [Sample(family, [4, Image(0), Image(1), 9], 1), Sample(family, [7, Image(2), 5], 2)]
    with row.attach(model, ratio=0.0) as handle:
        model(**collate(samples))
        small = min(handle.last.images, key=lambda image: image.tokens)
    number = small.sample
    with row.attach(model, keep=small.tokens) as handle:
        alone = model(**collate([samples[number]])).logits[0]
        kept = [image.kept.tolist() for image in handle.last.images]
        logits = model(**with_positions(collate(samples))).logits
        found = of_sample(handle.last, number)
    assert [image.kept.tolist() for image in found] == kept
    assert len(found[small.index].kept) == small.tokens
    assert_close(logits[number, columns_of(samples, number)], alone)


@cells()
def test_cached_generation_equals_recomputation(row, family, attn):
    """Greedy decoding with a cache, ragged batch, against the reference on prompt + answer without one."""
    model, oracle, samples, steps = shared(family, attn), pristine(family, attn), mixed_batch(family), 4
    for policy in row.policies:
        with row.watched() as reductions, row.attach(model, positions=policy) as handle:
            out = model.generate(
                **collate(samples),
                max_new_tokens=steps,
                do_sample=False,
                suppress_tokens=SPECIAL,
                output_logits=True,
                return_dict_in_generate=True,
            )
            report = handle.last
        for number, sample in enumerate(samples):
            answer = out.sequences[number, -steps:].tolist()
            want = _expected(row, oracle, sample, report, number, policy, reductions, answer).logits[-steps - 1 : -1]
            got = torch.stack([logits[number] for logits in out.logits])
            assert_close(got, want)
            want[:, SPECIAL] = -torch.inf
            assert want.argmax(-1).tolist() == answer


@cells()
def test_remove_restores_everything(row, family, attn):
    model, samples = shared(family, attn), mixed_batch(family)
    before = fingerprint(model)
    with row.attach(model) as handle:
        assert changed(before, fingerprint(model)), "the fingerprint does not see hooks"
        model(**collate(samples))
        model.generate(**collate(samples[:1]), max_new_tokens=2, do_sample=False, suppress_tokens=SPECIAL)
        handle.remove()
        assert not changed(before, fingerprint(model))
    assert not changed(before, fingerprint(model))
