"""At the edge: counts that depend on the content, images without survivors or at the very start, merged tokens."""

from dataclasses import dataclass

import pytest
import torch
from matrix import ENGINE, engine_cells
from reference import assert_close, expect, merges_of, of_sample, trace
from tiny import FAMILIES, SPECIAL, Image, Sample, collate, columns_of, mixed_batch, pristine, shared, with_positions

from prune import Merge, Reducer, Reduction, apply_pruner


@dataclass
class Bright(Reducer):
    """Keeps the tokens brighter than the mean of their image: any number up to the budget, none of the first image."""

    layer: int | None = None
    nothing: bool = False
    adaptive = True

    @property
    def site(self):
        return "projected" if self.layer is None else f"decoder:{self.layer}"

    def reduce(self, tokens, keep):
        light = tokens.features[..., 0]
        mean = (light * tokens.mask).sum(1, keepdim=True) / tokens.mask.sum(1, keepdim=True)
        wanted = (light > mean) & tokens.mask
        wanted &= wanted.cumsum(1) <= torch.tensor(keep)[:, None]
        wanted[: len(keep) if self.nothing else 1] = False
        index = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(keep)]
        return Reduction(index, wanted.gather(1, index))


@pytest.mark.parametrize("nothing", [False, True], ids=["some", "none"])
@pytest.mark.parametrize("layer", [None, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adaptive_counts(family, layer, nothing):
    """Ragged within a sample and over the batch, down to nothing; forward and a few greedy steps."""
    model, oracle, samples, steps = shared(family), pristine(family), mixed_batch(family), 3
    with apply_pruner(model, Bright(layer, nothing), ratio=0.25) as handle:
        logits = model(**collate(samples)).logits
        out = model.generate(
            **collate(samples), max_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        report = handle.last
    counts = [len(image.kept) for image in report.images]
    assert counts == [0] * 4 if nothing else counts[0] == 0 and all(counts[1:])
    for number, sample in enumerate(samples):
        answer = out.sequences[number, -steps:].tolist()
        want = expect(oracle, sample.then(answer), of_sample(report, number)).logits
        assert_close(logits[number, columns_of(samples, number)], want[: len(sample.ids)])
        assert_close(torch.stack([step[number] for step in out.logits]), want[-steps - 1 : -1])


@dataclass
class Folding(Reducer):
    """Keeps every third token or fewer and folds all others into the kept ones, unevenly; writes down what it did."""

    layer: int | None = None
    merges = True

    @property
    def site(self):
        return "projected" if self.layer is None else f"decoder:{self.layer}"

    def reduce(self, tokens, keep):
        rows, n = tokens.mask.shape
        most = max(keep)
        slots = torch.arange(most).expand(rows, most)
        source = torch.arange(n).expand(rows, n)
        slot = source % torch.tensor(keep)[:, None]
        weight = (1 + source % 5) / 7.0 * tokens.mask
        scale = 0.5 + slots / 10.0
        self.made = Reduction(slots, slots < torch.tensor(keep)[:, None], Merge(source, slot, weight, scale))
        return self.made


@pytest.mark.parametrize("layer", [None, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merging(family, layer):
    """Forward and a few greedy steps with merged tokens, in a ragged batch."""
    model, oracle, samples, steps = shared(family), pristine(family), mixed_batch(family), 3
    method = Folding(layer)
    with apply_pruner(model, method, ratio=0.7) as handle:
        logits = model(**collate(samples)).logits
        out = model.generate(
            **collate(samples), max_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        report = handle.last
    merges = merges_of(report, [method.made])
    assert len(merges) == 4
    for number, sample in enumerate(samples):
        answer = out.sequences[number, -steps:].tolist()
        want = expect(oracle, sample.then(answer), of_sample(report, number), merges=merges).logits
        assert_close(logits[number, columns_of(samples, number)], want[: len(sample.ids)])
        assert_close(torch.stack([step[number] for step in out.logits]), want[-steps - 1 : -1])


@engine_cells()
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_image_in_the_first_column(row, family, side):
    """Its first tokens may be gone: then nothing is promised before the first survivor, and all is right after it."""
    model, oracle = shared(family), pristine(family)
    samples = [Sample(family, [Image(0), 6], 1), Sample(family, [Image(1), 3, Image(2), 4], 2)]
    with row.attach(model) as handle:
        logits = model(**collate(samples, side)).logits
        report = handle.last
    for number, sample in enumerate(samples):
        want = expect(oracle, sample, of_sample(report, number), row.policy)
        columns = columns_of(samples, number, side)[want.first :]
        assert_close(logits[number, columns], want.logits[want.first :])


@engine_cells(families=("llava_next", "qwen2_5_vl", "qwen3_vl"))
def test_inference_mode(row, family):
    """Under inference_mode in-place tricks on saved tensors fail."""
    model, samples = shared(family), mixed_batch(family)
    with row.attach(model) as handle, torch.inference_mode():
        out = model.generate(**collate(samples), max_new_tokens=3, do_sample=False, suppress_tokens=SPECIAL)
        assert handle.last is not None
        with torch.no_grad():
            again = model.generate(**collate(samples), max_new_tokens=3, do_sample=False, suppress_tokens=SPECIAL)
    assert torch.equal(out, again)


@engine_cells()
@torch.no_grad()
def test_the_inner_model_alone(row, family):
    """`model.model` has no head; it can be pruned all the same."""
    model, sample = shared(family), Sample(family, [4, Image(0), 6], 1)
    with row.attach(model.model) as handle:
        hidden = model.model(**collate([sample])).last_hidden_state[0]
        images = handle.last.images
    want = expect(pristine(family), sample, images, row.policy).logits
    assert_close(model.lm_head(hidden), want)


@engine_cells(rows=ENGINE[:1])
@torch.no_grad()
def test_deterministic(row, family):
    model, inputs = shared(family), collate(mixed_batch(family))
    with row.attach(model):
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@engine_cells(families=("llava", "qwen2_5_vl"))
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@torch.no_grad()
def test_rows_of_a_pruned_cache_can_be_moved(row, family, how):
    """Ragged rows are swapped, dropped or doubled; each goes on as the conversation it is."""
    model, oracle = shared(family), pristine(family)
    samples = [Sample(family, [4, Image(0), 6], 1), Sample(family, [3, Image(1), 4, Image(2), 9], 2)]
    inputs = collate(samples)
    numbers = [trace(oracle, collate([sample.then([44])])).positions[:, -1] for sample in samples]
    with row.attach(model) as handle:
        cache = model(**with_positions(inputs)).past_key_values
        report = handle.last
        argument, rows = {
            "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
            "batch_select_indices": (torch.tensor([1]), [1]),
            "batch_repeat_interleave": (2, [0, 0, 1, 1]),
        }[how]
        getattr(cache, how)(argument)
        ids = torch.stack([numbers[number] for number in rows], 1)[..., None]
        step = {"input_ids": torch.full((len(rows), 1), 44), "position_ids": ids if len(ids) == 3 else ids[0]}
        logits = model(**step, past_key_values=cache).logits
    for place, number in enumerate(rows):
        want = expect(oracle, samples[number].then([44]), of_sample(report, number), row.policy).logits
        assert_close(logits[place, -1], want[-1])
