"""Every way to decode, and to go on with a conversation, on a pruned cache: always against prompt + answer in one piece
on the un-hooked model, without a cache."""

import copy
import dataclasses

import pytest
import torch
from matrix import COMPACT, TWO_STAGE, engine_cells
from reference import assert_close, expect, of_sample, places, trace
from tiny import FAMILIES, PAD, SPECIAL, VOCABULARY, Image, Sample, collate, pristine, shared
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin, QuantizedCache, StaticCache
from transformers.cache_utils import QuantizedLayer

STEPS = 5


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def _samples(family):
    """One image, and two images in a longer row."""
    return [Sample(family, [4, Image(0), 6], 1), Sample(family, [3, Image(1), 4, Image(2), 9], 2)]


def _samples_to_repeat(family):
    """Before it learned to repeat encoder outputs (5.18), `generate` repeated a LLaVA's pixels wrongly for beams and
    several sequences, pruned or not, unless every row had one image."""
    if hasattr(GenerationMixin, "_expand_multimodal_outputs") or family.startswith("qwen"):
        return _samples(family)
    return [Sample(family, [4, Image(0), 6], 1), Sample(family, [3, Image(2), 9], 2)]


def _generate(model, inputs, **options):
    settings = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=SPECIAL, output_logits=True)
    return model.generate(**inputs, **{**settings, "return_dict_in_generate": True, **options})


def _teacher(family, sample, answer, images, policy):
    """Logits that predict each token of the answer."""
    return expect(pristine(family), sample.then(answer), images, policy).logits[-len(answer) - 1 : -1]


def _greedy(logits, suppressed=None):
    logits = logits.clone()
    logits[:, suppressed or SPECIAL] = -torch.inf
    return logits.argmax(-1).tolist()


def _check(family, row, samples, out, report, copies=1):
    """The logits of every step of every sequence, `copies` sequences per sample."""
    for number, sequence in enumerate(out.sequences):
        answer = sequence[-len(out.logits) :].tolist()
        want = _teacher(family, samples[number // copies], answer, of_sample(report, number), row.policy)
        assert_close(torch.stack([logits[number] for logits in out.logits]), want)


# ------------------------------------------------------------------------------------------------------ strategies
@engine_cells()
def test_beam_search(row, family):
    model, samples, beams = shared(family), _samples_to_repeat(family), 3
    inputs = collate(samples)
    with row.attach(model) as handle:
        out = _generate(model, inputs, num_beams=beams, num_return_sequences=2, length_penalty=0.0, output_scores=True)
        report = handle.last
    for number, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores)):
        answer = sequence[inputs["input_ids"].shape[1] :].tolist()
        images = of_sample(report, number // 2 * beams)
        logits = _teacher(family, samples[number // 2], answer, images, row.policy)
        total = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert_close(score, total)


@engine_cells()
def test_sampling_several_sequences(row, family):
    model, samples = shared(family), _samples_to_repeat(family)
    torch.manual_seed(0)
    with row.attach(model) as handle:
        out = _generate(model, collate(samples), do_sample=True, num_return_sequences=3, top_k=0)
        report = handle.last
    assert len({tuple(sequence.tolist()) for sequence in out.sequences}) > 2, "all samples alike"
    _check(family, row, samples, out, report, copies=3)


@engine_cells()
def test_prompt_lookup_decoding(row, family):
    """The prompt holds every token the answer may, so that there always is a guess."""
    words = list(range(3, 99))
    sample = Sample(family, [4, Image(0), words + [5, 6, 7]], 1)
    others = [token for token in range(VOCABULARY) if token not in words]
    _check_speculative(row, family, sample, prompt_lookup_num_tokens=3, suppress_tokens=others)


@engine_cells()
def test_assistant_decoding(row, family):
    """The assistant is the same model un-pruned: it agrees at times, and at times its guesses are cropped away."""
    _check_speculative(row, family, _samples(family)[0], assistant_model=pristine(family))


def _check_speculative(row, family, sample, **options):
    model, steps, verified = shared(family), 8, []
    spy = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: verified.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    with row.attach(model) as handle:
        out = _generate(model, collate([sample]), max_new_tokens=steps, **options)
        images = handle.last.images
    spy.remove()
    assert any(length > 1 for length in verified[1:]), "no guess was ever verified"
    answer = out.sequences[0, -steps:].tolist()
    assert answer == _greedy(_teacher(family, sample, answer, images, row.policy), options.get("suppress_tokens"))


# ---------------------------------------------------------------------------------------------------------- caches
@engine_cells()
def test_static_cache(row, family):
    """Used twice, with a reset in between, and by the bare model afterwards."""
    model, samples = shared(family), _samples(family)
    inputs = collate(samples)
    room = inputs["input_ids"].shape[1] + STEPS
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
    with row.attach(model) as handle:
        for _ in range(2):
            out = _generate(model, inputs, past_key_values=cache)
            _check(family, row, samples, out, handle.last)
            cache.reset()
    bare = _generate(model, inputs, past_key_values=cache)
    assert torch.equal(bare.sequences, _generate(pristine(family), inputs).sequences)


@pytest.mark.parametrize(("row", "family"), [(COMPACT, "llava"), (TWO_STAGE, "qwen3_vl")], ids=str)
def test_a_compiled_step_has_no_graph_break(row, family):
    """Two steps after a ragged prefill into a static cache, as one graph."""
    model, oracle, samples = shared(family), pristine(family), _samples(family)
    inputs = collate(samples)
    steps = torch.tensor([[44, 46], [45, 47]])
    whole = [sample.then(ids) for sample, ids in zip(samples, steps.tolist())]
    mask = pad(inputs["attention_mask"], (0, 2), value=1)
    ids = _padded_positions([trace(oracle, collate([sample])).positions for sample in whole], mask)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=mask.shape[1])
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with row.attach(model) as handle:
        model(**inputs, position_ids=ids[..., :-2], past_key_values=cache)
        report = handle.last
        logits = [
            step(input_ids=steps[:, i : i + 1], position_ids=ids[..., i - 2][..., None], past_key_values=cache).logits
            for i in range(2)
        ]
    torch._dynamo.reset()
    for number, sample in enumerate(whole):
        want = expect(oracle, sample, of_sample(report, number), row.policy).logits
        assert_close(torch.cat(logits, 1)[number], want[-2:])


class _Identity(QuantizedLayer):
    """A quantised layer without a backend: it stores what it is given."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


@engine_cells()
def test_quantized_cache(row, family):
    model, samples = shared(family), _samples(family)
    layers = [_Identity(residual_length=2) for _ in model.model.language_model.layers]
    cache = QuantizedCache.__new__(QuantizedCache)
    super(QuantizedCache, cache).__init__(layers=layers)
    with row.attach(model) as handle:
        out = _generate(model, collate(samples), past_key_values=cache)
        _check(family, row, samples, out, handle.last)


# ---------------------------------------------------------------------------------------------------- conversations
def _turn(inputs, sequences):
    """Inputs of the next turn: all ids so far, no pixels."""
    rest = sequences[:, inputs["input_ids"].shape[1] :]
    new = {"input_ids": sequences, "attention_mask": torch.cat([inputs["attention_mask"], (rest != PAD).long()], 1)}
    if "mm_token_type_ids" in inputs:
        new["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, rest.shape[1]))
    return new


@engine_cells()
def test_conversation_goes_on_with_text(row, family):
    """A left-padded batch, all ids handed over again; twice from one cache by way of a deep copy, the second time with
    padding in the middle."""
    model, samples = shared(family), _samples(family)
    inputs = collate(samples)
    with row.attach(model) as handle:
        first = _generate(model, inputs, past_key_values=DynamicCache(config=model.config.get_text_config()))
        report = handle.last
        cache = first.past_key_values
        for words in ([[11, 12, 13, 14], [15, 16, 17, 18]], [[31, 32, 33, 34], [PAD, PAD, 35, 36]]):
            sequences = torch.cat([first.sequences, torch.tensor(words)], 1)
            out = _generate(model, _turn(inputs, sequences), past_key_values=copy.deepcopy(cache))
            later = [[t for t in ids if t != PAD] for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
            _check(family, row, [s.then(ids) for s, ids in zip(samples, later)], out, report)


@engine_cells()
def test_conversation_goes_on_in_a_static_cache(row, family):
    """One row: for several, `generate` itself loses track of padding in static caches."""
    model, sample = shared(family), _samples(family)[0]
    inputs = collate([sample])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + 20)
    with row.attach(model) as handle:
        first = _generate(model, inputs, past_key_values=cache)
        sequences = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
        out = _generate(model, _turn(inputs, sequences), past_key_values=cache)
        _check(family, row, [sample.then(sequences[0, len(sample.ids) :].tolist())], out, handle.last)


@engine_cells()
def test_conversation_starts_with_text(row, family):
    """The first turn has no image, so its cache is not pruned; the second has one. A left-padded batch."""
    model, oracle = shared(family), pristine(family)
    first = [Sample(family, [6], 1), Sample(family, [3], 2)]
    second = [Sample(family, [3, Image(0), 5], 3), Sample(family, [2, Image(1), 4], 4)]
    whole = [one.then(other) for one, other in zip(first, second)]
    inputs, later = collate(first), collate(second)
    mask = torch.cat([inputs["attention_mask"], later["attention_mask"]], 1)
    numbers = [trace(oracle, collate([sample])).positions for sample in whole]
    ids = _padded_positions(numbers, mask)
    start = inputs["input_ids"].shape[1]
    with row.attach(model) as handle:
        out = model(**inputs, position_ids=ids[..., :start])
        later |= {"attention_mask": mask, "position_ids": ids[..., start:]}
        logits = model(**later, past_key_values=out.past_key_values).logits
        report = handle.last
    for number, sample in enumerate(whole):
        want = expect(oracle, sample, of_sample(report, number), row.policy).logits
        length = len(second[number].ids)
        assert_close(logits[number, -length:], want[-length:])


def _padded_positions(numbers, mask):
    """Per-sample positions `[A, own length]` -> `[B, L]` or `[3, B, L]`, 0 at padding."""
    ids = torch.zeros(len(numbers[0]), *mask.shape, dtype=torch.long)
    for row, positions in enumerate(numbers):
        ids[:, row, mask[row].bool()] = positions
    return ids[0] if len(ids) == 1 else ids


@engine_cells()
def test_conversation_goes_on_after_a_right_padded_prefill(row, family):
    """Padding ends up in the middle; positions are the caller's."""
    model, oracle, samples = shared(family), pristine(family), _samples(family)
    inputs = collate(samples, "right")
    step = torch.tensor([[44], [45]])
    whole = [sample.then(ids) for sample, ids in zip(samples, step.tolist())]
    mask = pad(inputs["attention_mask"], (0, 1), value=1)
    ids = _padded_positions([trace(oracle, collate([sample])).positions for sample in whole], mask)
    with row.attach(model) as handle:
        out = model(**inputs, position_ids=ids[..., :-1])
        report = handle.last
        logits = model(
            input_ids=step, attention_mask=mask, position_ids=ids[..., -1:], past_key_values=out.past_key_values
        ).logits
    for number, sample in enumerate(whole):
        want = expect(oracle, sample, of_sample(report, number), row.policy).logits
        assert_close(logits[number, -1], want[-1])


@engine_cells()
def test_conversation_goes_on_with_new_ids_only(row, family):
    """A hand-written loop: prefill, then several tokens at once, then one by one; no mask, no position ids."""
    model, sample = shared(family), _samples(family)[0]
    inputs = {name: value for name, value in collate([sample]).items() if name != "attention_mask"}
    later = [21, 22, 23, 24, 25, 26]
    with row.attach(model) as handle:
        out = model(**inputs)
        got = [out.logits[0, -1:]]
        for new in ([21, 22, 23], [24], [25], [26]):
            out = model(input_ids=torch.tensor([new]), past_key_values=out.past_key_values)
            got.append(out.logits[0])
        images = handle.last.images
    want = expect(pristine(family), sample.then(later), images, row.policy).logits
    assert_close(torch.cat(got), want[-len(later) - 1 :])


@engine_cells()
def test_conversation_goes_on_with_another_image(row, family):
    """Two turns with an image each; a step after the second."""
    model, oracle = shared(family), pristine(family)
    first = Sample(family, [4, Image(0), 6], 1)
    second = Sample(family, [3, Image(1), 5], 2)
    whole = first.then(second).then([33])
    positions = {}
    if family.startswith("qwen"):  # outside generate() nobody but the caller can number a second image
        inputs = collate([whole])
        ids, _ = model.model.get_rope_index(
            inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=inputs["mm_token_type_ids"]
        )
        positions = {
            "first": ids[..., : len(first.ids)],
            "second": ids[..., len(first.ids) : -1],
            "step": ids[..., -1:],
        }
    give = lambda turn: {"position_ids": positions[turn]} if positions else {}  # noqa: E731
    with row.attach(model) as handle:
        out = model(**_without_mask(collate([first])), **give("first"))
        images = handle.last.images
        out = model(**_without_mask(collate([second])), **give("second"), past_key_values=out.past_key_values)
        images = images + handle.last.images
        got = out.logits[0]
        out = model(input_ids=torch.tensor([[33]]), **give("step"), past_key_values=out.past_key_values)
        got = torch.cat([got, out.logits[0]])
    want = expect(oracle, whole, images, row.policy)
    assert_close(got, want.logits[len(first.ids) :])


@engine_cells(families=[family for family in FAMILIES if not family.startswith("qwen")])
def test_generate_goes_on_with_another_image(row, family):
    """`generate` with all ids, the cache, and the new image's pixels. (The Qwen models cannot: they want the grids of
    all images for the positions and of the new one for the tower.)"""
    model = shared(family)
    first = Sample(family, [4, Image(0), 6], 1)
    second = Sample(family, [3, Image(1), 5], 2)
    with row.attach(model) as handle:
        out = _generate(model, collate([first]))
        images = handle.last.images
        whole = Sample(family, [out.sequences[0].tolist() + second.ids])
        pixels = {
            name: value for name, value in collate([second]).items() if name not in ("input_ids", "attention_mask")
        }
        out = _generate(model, {**collate([whole]), **pixels}, past_key_values=out.past_key_values)
        images = images + handle.last.images
    answer = out.sequences[0, -STEPS:].tolist()
    whole.media = first.media + second.media
    want = _teacher(family, whole, answer, images, row.policy)
    assert_close(torch.stack([logits[0] for logits in out.logits]), want)


def _without_mask(inputs):
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@engine_cells()
def test_disabled_in_the_middle_of_a_conversation(row, family):
    """A pruned conversation goes on while the pruner is off: with text, then with an image that stays whole."""
    model, oracle, sample = shared(family), pristine(family), _samples(family)[0]
    other = Sample(family, [2, Image(1), 4], 5)
    whole = sample.then([44, 45]).then(other)
    ids = trace(oracle, collate([whole])).positions
    ids = ids[:, None] if len(ids) == 3 else ids
    cut = len(sample.ids)
    with row.attach(model) as handle:
        out = model(**_without_mask(collate([sample])), position_ids=ids[..., :cut])
        images = handle.last.images
        with handle.disabled():
            step = {"input_ids": torch.tensor([[44, 45]]), "position_ids": ids[..., cut : cut + 2]}
            out = model(**step, past_key_values=out.past_key_values)
            inputs = {**_without_mask(collate([other])), "position_ids": ids[..., cut + 2 :]}
            last = model(**inputs, past_key_values=out.past_key_values)
            assert handle.last.images[0].kept.tolist() == images[0].kept.tolist()
    untouched = dataclasses.replace(images[0], places=torch.zeros(_n_places(oracle, other), 4), stages={})
    want = expect(oracle, whole, [*images, untouched], row.policy).logits[cut:]
    assert_close(torch.cat([out.logits[0], last.logits[0]]), want)


def _n_places(oracle, sample):
    return len(places(oracle, sample, trace(oracle, collate([sample])).embeds)[0])
