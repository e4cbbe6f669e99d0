"""Attention masks that hide more than padding, on fresh and on pruned caches."""

import pytest
import tiny
import torch
from test_merge import KeepFirst
from tiny import Image, Sample, collate

from prune import CacheMismatchError, Compose, InputError, apply_pruner, get_method

CLOSE = dict(rtol=1e-5, atol=1e-5)


def two_images():
    return Sample("llava", [3, Image(0), 2, Image(0), 5])


@pytest.mark.parametrize("method", [get_method("dart"), Compose(get_method("random"), get_method("fastv", layer=1))])
def test_hidden_image_tokens_are_never_kept(method):
    """Half of the first image is masked out by the caller."""
    inputs = collate([two_images()])
    inputs["attention_mask"][0, 3:11] = 0
    with apply_pruner(tiny.shared("llava"), method, keep=4) as handle, torch.no_grad():
        tiny.shared("llava")(**inputs)
        first, second = handle.last.images
        assert len(first.kept) == len(second.kept) == 4 and first.kept.min() >= 8
        assert handle.last.text_tokens == [10]


def test_merging_beside_a_hidden_image_touches_no_other_token():
    model = tiny.shared("llava")
    inputs = collate([two_images()])
    inputs["attention_mask"][0, 3:19] = 0

    def logits(merge):
        with apply_pruner(model, KeepFirst(merge=merge), keep=16), torch.no_grad():
            return model(**inputs).logits[:, 19:22]

    torch.testing.assert_close(logits(True), logits(False), **CLOSE)  # text before the visible image


def test_four_dimensional_masks_count_padding_too():
    """As `generate` makes them for static caches: the same budget as with a 2-D mask."""
    model = tiny.shared("llava")
    batch = collate([Sample("llava", [3, Image(0), 4]), Sample("llava", [20, Image(0), 9], 1)])

    def kept(mask):
        with apply_pruner(model, "random", flops=0.8) as handle, torch.no_grad():
            model(**{**batch, "attention_mask": mask})
            return [len(image.kept) for image in handle.last.images], handle.last.text_tokens

    mask = batch["attention_mask"]
    square = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    assert kept(mask) == kept((square & mask[:, None].bool())[:, None])


def test_question_is_missed_under_a_four_dimensional_mask():
    batch = collate([Sample("llava", [3, Image(0)]), Sample("llava", [3, Image(0), 9], 1)], side="right")
    mask = batch["attention_mask"]
    square = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    batch["attention_mask"] = (square & mask[:, None].bool())[:, None]
    with apply_pruner(tiny.shared("llava"), "fastv", ratio=0.5), pytest.raises(InputError, match="sample 0"):
        tiny.shared("llava")(**batch)


@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("turn", [1, 3])
def test_old_columns_hidden_later_stay_hidden_for_that_call_only(method, turn):
    """Hiding the first text columns while continuing equals a conversation whose mask hid them for these tokens."""
    model = tiny.shared("llava")
    sample = Sample("llava", [6, Image(0), 5])
    inputs, length = collate([sample]), len(sample.ids)
    more = torch.arange(3, 3 + turn)[None]
    mask = torch.ones(1, length + turn, dtype=torch.long)
    hiding = mask.clone()
    hiding[:, :4] = 0
    positions = torch.arange(length, length + turn)[None]
    options = {} if method == "random" else {"layer": 2}
    with apply_pruner(model, method, keep=5, **options), torch.no_grad():

        def turn_logits(*masks):
            cache = model(**inputs, use_cache=True).past_key_values
            for number, one in enumerate(masks):
                past = length + number * turn
                out = model(
                    input_ids=more,
                    attention_mask=torch.cat([one[:, :length], torch.ones(1, past + turn - length).long()], 1),
                    past_key_values=cache,
                    position_ids=positions + number * turn,
                )
            return out.logits

        plain, hidden = turn_logits(mask), turn_logits(hiding)
        assert (plain - hidden).abs().max() > 1e-3
        full = torch.zeros(1, 1, turn, length + turn, dtype=torch.bool)
        full[..., :length] = hiding[:, None, None, :length].bool()
        full[..., length:] = torch.ones(turn, turn, dtype=torch.bool).tril()
        cache = model(**inputs, use_cache=True).past_key_values
        own = model(input_ids=more, attention_mask=full, past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(hidden, own, **CLOSE)
        assert not torch.allclose(turn_logits(hiding, mask), turn_logits(hiding, hiding))


def test_padding_in_a_turn_of_one_token():
    """Row 1 says nothing this turn; what row 0 says equals row 0 alone."""
    model = tiny.shared("llava")
    samples = [Sample("llava", [4, Image(0), 5]), Sample("llava", [4, Image(0), 5], 1)]
    inputs = collate(samples)
    past = inputs["attention_mask"]
    word = torch.tensor([[7], [0]])
    mask = torch.cat([past, torch.tensor([[1], [0]])], 1)
    next_mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
    length = past.shape[1]
    with apply_pruner(model, "random", keep=5), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        at = torch.full((2, 1), length)
        model(input_ids=word, attention_mask=mask, past_key_values=cache, position_ids=at)
        both = model(input_ids=word + 9, attention_mask=next_mask, past_key_values=cache, position_ids=at + 1).logits
        alone_inputs = collate(samples[1:])
        cache = model(**alone_inputs, use_cache=True).past_key_values
        alone = model(input_ids=word[1:] + 9, past_key_values=cache, position_ids=at[1:] + 1).logits
        torch.testing.assert_close(both[1:], alone, **CLOSE)


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_crop_is_exact_or_refused(method):
    model = tiny.shared("llava")
    sample = Sample("llava", [4, Image(0), 9])
    with apply_pruner(model, method, keep=4), torch.no_grad():
        cache = model(**collate([sample]), use_cache=True).past_key_values
        before = cache.get_seq_length()
        cache.crop(-5)
        assert cache.get_seq_length() == before - 5
        again = model(input_ids=torch.tensor([sample.ids[-5:]]), past_key_values=cache).logits
        expected = model(**collate([sample])).logits[:, -5:] if method == "random" else again
        torch.testing.assert_close(again, expected, **CLOSE)
        for reach in (10, 20):
            with pytest.raises(CacheMismatchError, match="reaches back to pruned image tokens"):
                cache.crop(-reach)


def test_prefill_in_chunks_is_refused():
    model = tiny.shared("llava")
    with apply_pruner(model, "random", keep=4), pytest.raises(InputError, match="prefill_chunk_size"):
        model.generate(**collate([Sample("llava", [4, Image(0), 9])]), max_new_tokens=2, prefill_chunk_size=8)


def test_compact_conversation_goes_on_by_hand_after_generate():
    """generate gives Qwen-VL's position ids a text axis, a plain forward does not."""
    model = tiny.shared("qwen2_5_vl")
    sample = Sample("qwen2_5_vl", [4, Image(0), 6])
    with apply_pruner(model, "random", keep=3, positions="compact"), torch.no_grad():
        out = model.generate(
            **collate([sample]), max_new_tokens=3, return_dict_in_generate=True, suppress_tokens=tiny.SPECIAL
        )
        next_logits = model(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values).logits[:, -1]
        longer = model.generate(**collate([sample]), max_new_tokens=4, suppress_tokens=tiny.SPECIAL)
        next_logits[:, tiny.SPECIAL] = -torch.inf
        assert next_logits.argmax(-1).tolist() == longer[:, -1].tolist()


def test_an_empty_visual_mask_prunes_nothing():
    model = tiny.shared("llava")
    embeds = model.get_input_embeddings()(torch.arange(3, 9)[None]).detach()
    with apply_pruner(model, "random", keep=4) as handle, torch.no_grad():
        expected = model(inputs_embeds=embeds).logits
        with handle.visual_mask(torch.zeros(1, 6, dtype=torch.bool)):
            assert torch.equal(model(inputs_embeds=embeds).logits, expected)
