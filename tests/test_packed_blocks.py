"""Cuts inside Qwen's packed vision encoders, against the encoder run by hand with dropped patches hidden."""

import copy
import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from fingerprint import changed, fingerprint
from reference import assert_close as same
from test_index_preserving_qwen import GRIDS, attention, hidden_tower, some_groups
from tiny import SPECIAL, Image, Sample, Video, build, collate, columns_of, pristine, shared
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from prune import Budget, Compose, Merge, Reducer, Reduction, apply_pruner, get_method
from prune.adapters.packed_blocks import works_inside
from prune.adapters.structure import find_parts
from prune.errors import BudgetError, ConfigError, InputError, UnsupportedMethodError
from prune.evals.accounting import account, account_full
from prune.kernels.topk import topk_indices
from prune.method import Method, Site, Stage
from prune.tokens import Tower

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MERGE = 4
MIXED = torch.tensor([[1, 8, 8], [1, 4, 12], [3, 4, 8], [1, 12, 6]])  # the third is a video
FLASH = "flash_attention_2_emulated"


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("grad" in request.node.name):
        yield


@dataclass
class Some(Reducer):
    """Keeps arbitrary groups: those for which a wave of (image, group) is highest; adaptive: is above 0, too."""

    layer: int = 0
    phase: float = 0.0
    adaptive: bool = False
    fold: bool = False
    reads: tuple = ()
    seen: list = field(default_factory=list, repr=False)

    name = "some"

    @property
    def site(self):
        return f"block:{self.layer}"

    @property
    def tower(self):
        return {name: Tower(name) for name in self.reads}

    def reduce(self, tokens, keep):
        assert all(most <= count for most, count in zip(keep, tokens.mask.sum(1).tolist(), strict=True))
        wave = torch.sin(37.0 * tokens.index.float() + self.phase)
        candidates = tokens.mask & (wave > 0) if self.adaptive else tokens.mask
        found = Reduction(*topk_indices(wave, keep, candidates))
        if self.fold:  # the row's first group and its last take a share of the first one dropped
            kept = torch.zeros_like(tokens.mask).scatter(1, found.keep.masked_fill(~found.valid, 0), True)
            kept = kept | (found.keep[:, :1] == torch.arange(kept.shape[1]))
            dropped = (tokens.mask & ~kept).long().argmax(1, keepdim=True)
            last = found.valid.sum(1, keepdim=True) - 1
            found.merge = Merge(
                dropped.expand(-1, 2),
                torch.cat([0 * last, last], 1),
                torch.tensor([[0.75, 0.25]]).expand(len(kept), -1),
                torch.linspace(0.5, 1.0, found.keep.shape[1]).expand(len(kept), -1),
            )
        self.seen.append((tokens, found))
        return found


def pixels_of(tower: nn.Module, grids: Tensor, seed: int = 0) -> Tensor:
    patch = tower.patch_embed
    values = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
    return torch.randn(int(grids.prod(1).sum()), values, generator=torch.Generator().manual_seed(seed))


def calls_of(tower: nn.Module, pixels: Tensor, grids: Tensor) -> tuple[list, Tensor]:
    """What every block of the bare tower is given, and the slot of every group of `pixels` in its sequence."""
    calls, merged = [], []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
        for block in tower.blocks
    ]
    hooks.append(tower.merger.register_forward_hook(lambda module, args, out: merged.append(out)))
    out = tower(pixels, grid_thw=grids)
    for hook in hooks:
        hook.remove()
    return calls, (out.pooler_output[:, None] == merged[0]).all(-1).long().argmax(1)


def by_hand(tower: nn.Module, pixels: Tensor, grids: Tensor, cuts: dict[int, Tensor], changes: dict | None = None):
    """The tower with groups hidden from a block on, which stay what they were.

    Args:
        cuts: block -> `[groups]` bool in the order of `pixels`, those left.
        changes: block -> function of the groups `[groups, g, D]` entering it, in the order of `pixels`.

    Returns:
        Features of the last block, of the merger (in the order of `pixels`), and deepstack features.
    """
    calls, order = calls_of(tower, pixels, grids)
    x, shown, deep = calls[0][0], torch.ones(len(pixels), dtype=torch.bool), []
    for index, (block, (_, kwargs)) in enumerate(zip(tower.blocks, calls)):
        if index in cuts:
            if changes and index in changes:
                x = changes[index](x.unflatten(0, (-1, MERGE))[order])[order.argsort()].flatten(0, 1)
            shown = shown & cuts[index][order.argsort()].repeat_interleave(MERGE)
        segment = torch.bucketize(torch.arange(len(x)), kwargs["cu_seqlens"][1:], right=True)
        mask = (segment[:, None] == segment) & shown
        new = x + attention(block.attn, block.norm1(x), mask, *kwargs["position_embeddings"])
        new = new + block.mlp(block.norm2(new))
        x = torch.where(shown[:, None], new, x)
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            deep.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)](x))
    return x, tower.merger(x)[order], deep


def left(seen: tuple, grids: Tensor, rows: list[int] | None = None) -> Tensor:
    """`[groups]` bool: what a reducer left; images that were not rows are whole."""
    tokens, found = seen
    counts = (grids.prod(1) // MERGE).tolist()
    parts = [torch.ones(n, dtype=torch.bool) for n in counts]
    for number, row in enumerate(range(len(counts)) if rows is None else rows):
        valid = found.valid[number] & tokens.mask[number].gather(0, found.keep[number])
        parts[row] = torch.zeros(counts[row]).index_fill(0, tokens.index[number][found.keep[number][valid]], 1).bool()
    return torch.cat(parts)


def compare(out, want):
    features, merged, deep = want
    same(out.last_hidden_state, features)
    same(out.pooler_output, merged)
    assert len(deep) == len(getattr(out, "deepstack_features", []))
    for ours, theirs in zip(getattr(out, "deepstack_features", []), deep):
        same(ours, theirs)


# -------------------------------------------------------------------------------------------------- what is computed
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("attn", tiny.ATTENTION)
@pytest.mark.parametrize("blocks", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("family", QWEN)
def test_cuts_are_the_tower_with_patches_hidden(family, blocks, attn, adaptive):
    model, tower = shared(family, attn), pristine(family, attn).model.visual
    pixels = pixels_of(tower, MIXED)
    spies = [Some(layer, number, adaptive) for number, layer in enumerate(blocks)]
    with apply_pruner(model, Compose(*spies) if len(spies) > 1 else spies[0], ratio=0.6):
        out = model.model.visual(pixels, grid_thw=MIXED)
    cuts = {spy.layer: left(spy.seen[-1], MIXED) for spy in spies}
    last = cuts[blocks[-1]]
    assert 0 < last.sum() < len(last) / 2 and len(last.split((MIXED.prod(1) // MERGE).tolist())) == len(MIXED)
    compare(out, by_hand(tower, pixels, MIXED, cuts))
    bare = tower(pixels, grid_thw=MIXED).pooler_output
    assert (out.pooler_output - bare)[last].abs().max() > 1e-2  # hiding matters


@pytest.mark.parametrize("scorer", ["given", "contrast"])
def test_index_preserving_is_the_full_tower_with_dropped_patches_hidden(scorer):
    """The acceptance line of issue 5: windows, full attention, places of the full image; 1e-5."""
    model = build("qwen2_5_vl")
    pixels, kept = pixels_of(model.model.visual, GRIDS), some_groups(0.5)
    pixels = torch.where(kept.repeat_interleave(MERGE)[:, None], pixels, 0.3 + 0.01 * pixels)
    options = {"scorer": Drawn() if scorer == "given" else "contrast", "dilate": False}
    with apply_pruner(model, "index_preserving", ratio=0.05, **options):
        out = model.model.visual(pixels, grid_thw=GRIDS)
    _, merged = hidden_tower(model.model.visual, pixels, GRIDS, kept)
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(out.pooler_output[kept], merged[kept], atol=1e-5, rtol=0)


class Drawn(nn.Module):
    """Logit of a patch: above 0 if its pixels differ from each other."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches.flatten(1).var(1) - 0.01


@pytest.mark.parametrize("family", QWEN)
def test_merges_are_sums_of_whole_groups_and_leave_copies_behind(family):
    model, tower = shared(family), pristine(family).model.visual
    pixels, spies = pixels_of(tower, MIXED), [Some(1, 0, fold=True), Some(2, 1)]
    with apply_pruner(model, Compose(*spies), ratio=0.7):
        out = model.model.visual(pixels, grid_thw=MIXED)
    found, starts = spies[0].seen[-1][1], [0, *(MIXED.prod(1) // MERGE).cumsum(0).tolist()]
    source, merge = [], found.merge

    def merged(before):
        groups = before.clone()
        for row, start in enumerate(starts[:-1]):
            kept = (start + found.keep[row][found.valid[row]]).tolist()
            for slot, place in enumerate(kept):
                groups[place] = before[place] * merge.scale[row, slot]
            for entry in range(2):
                gone, slot = start + int(merge.source[row, entry]), int(merge.slot[row, entry])
                groups[kept[slot]] += merge.weight[row, entry] * before[gone]
            source.append((start + int(merge.source[row, 0]), kept[0]))
        return groups

    cuts = {spy.layer: left(spy.seen[-1], MIXED) for spy in spies}
    want = by_hand(tower, pixels, MIXED, cuts, {1: merged})
    same(out.pooler_output[cuts[2]], want[1][cuts[2]])
    for gone, into in source:  # copies of the group they went to
        assert torch.equal(out.pooler_output[gone], out.pooler_output[into])
    shown = spies[1].seen[-1][0]
    for row, count in enumerate(found.valid.sum(1).tolist()):
        assert shown.sizes[row, :count].tolist() == [1.75, *[1.0] * (count - 2), 1.25]


@pytest.mark.parametrize("family", QWEN)
def test_what_a_reducer_is_shown(family):
    model, tower = shared(family), pristine(family).model.visual
    pixels, spies = pixels_of(tower, MIXED), [Some(1, 0, reads=("pixels",)), Some(2, 1, reads=("pixels",))]
    with apply_pruner(model, Compose(*spies), ratio=0.5):
        model.model.visual(pixels, grid_thw=MIXED)
    calls, order = calls_of(tower, pixels, MIXED)
    counts = (MIXED.prod(1) // MERGE).tolist()
    rows = calls[1][0].unflatten(0, (-1, MERGE))[order].flatten(1).split(counts)
    drawn = pixels.unflatten(0, (-1, MERGE)).flatten(1).split(counts)
    (first, found), (second, _) = spies[0].seen[-1], spies[1].seen[-1]
    assert first.memory is second.memory
    for number, (t, h, w) in enumerate((MIXED // torch.tensor([1, 2, 2])).tolist()):
        count = counts[number]
        assert first.mask[number].tolist() == [True] * count + [False] * (max(counts) - count)
        assert first.index[number, :count].tolist() == list(range(count))
        places = [[0, f, r, c] for f in range(t) for r in range(h) for c in range(w)]
        assert first.coordinates[number, :count].tolist() == places
        assert first.tile[number, :count].tolist() == [place[1] for place in places]
        assert torch.equal(first.features[number, :count], rows[number])
        assert torch.equal(first.tower["pixels"][number, :count], drawn[number])
        kept = found.keep[number][found.valid[number]]
        alive = int(second.mask[number].sum())
        assert second.index[number, :alive].tolist() == kept.tolist()
        assert second.coordinates[number, :alive].tolist() == [places[n] for n in kept.tolist()]
        assert torch.equal(second.tower["pixels"][number, :alive], drawn[number][kept])
    cuts, entered = {1: left(spies[0].seen[-1], MIXED), 2: torch.ones(sum(counts), dtype=torch.bool)}, []
    by_hand(tower, pixels, MIXED, cuts, {2: lambda groups: entered.append(groups) or groups})
    for number, rows in enumerate(entered[0].flatten(1).split(counts)):
        alive = int(second.mask[number].sum())
        same(second.features[number, :alive], rows[second.index[number, :alive]])


def test_segments_of_flash_attention_are_those_of_the_patches_left():
    """Bounds without empty segments, and the longest one, for windows and frames alike."""
    model, spy, given = build("qwen2_5_vl"), Some(1, 0), []
    tower, pixels = model.model.visual, pixels_of(model.model.visual, MIXED)
    bare, order = calls_of(tower, pixels, MIXED)
    with apply_pruner(model, spy, ratio=0.9):
        for block in tower.blocks:
            block.attn.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
        tower(pixels, grid_thw=MIXED, max_seqlen=96, max_window_seqlen=16)
    kept = left(spy.seen[-1], MIXED)[order.argsort()].repeat_interleave(MERGE)
    assert torch.equal(given[0]["cu_seqlens"], bare[0][1]["cu_seqlens"]) and given[0]["max_seqlen"] == 16
    for block in (1, 2, 3):
        whole = bare[block][1]["cu_seqlens"]
        lengths = [int(kept[a:b].sum()) for a, b in zip(whole, whole[1:])]
        assert 0 in lengths  # windows, or frames of the video
        bounds, most = given[block]["cu_seqlens"], given[block]["max_seqlen"]
        assert bounds.dtype == whole.dtype and bounds.diff().tolist() == [n for n in lengths if n]
        assert type(most) is int and most == max(lengths)
        for table, full in zip(given[block]["position_embeddings"], bare[block][1]["position_embeddings"]):
            assert torch.equal(table, full[kept])
    assert given[1]["cu_seqlens"] is given[3]["cu_seqlens"]  # made once


@pytest.mark.parametrize("family", QWEN)
def test_flash_attention(family, monkeypatch):
    """Emulated: one call for all segments, which it knows by their bounds alone."""

    def flash(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **kwargs):
        bounds = cu_seq_lens_q.tolist()
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k) and bounds[-1] == query.shape[2]
        assert max_length_q == max(b - a for a, b in zip(bounds, bounds[1:]))
        segment = torch.bucketize(torch.arange(bounds[-1]), cu_seq_lens_q[1:], right=True)
        mask = segment[:, None] == segment
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    model, other, spy = build(family), shared(family), Some(1, 0)
    pixels = pixels_of(model.model.visual, MIXED)
    AttentionInterface.register(FLASH, flash)
    try:
        model.model.visual.config._attn_implementation = FLASH
        with apply_pruner(model, spy, ratio=0.7):
            ours = model.model.visual(pixels, grid_thw=MIXED)
    finally:
        del AttentionInterface._global_mapping[FLASH]
    with apply_pruner(other, spy, ratio=0.7):
        theirs = other.model.visual(pixels, grid_thw=MIXED)
    same(ours.pooler_output, theirs.pooler_output)


# -------------------------------------------------------------------------------------------------- whole models
def rows_of(family: str) -> list[Sample]:
    """One image; text; images of three sizes; a video between images; a video alone; a small image alone."""
    return [
        Sample(family, [4, Image(0), 6], 1),
        Sample(family, [7], 2),
        Sample(family, [3, Image(1), 4, Image(2), Image(0), 5], 3),
        Sample(family, [5, Image(1), 2, Video(), Image(2), 3], 5),
        Sample(family, [3, Video(), 4], 4),
        Sample(family, [2, Image(1), 3], 6),
    ]


METHODS = {
    "index_preserving": {"ratio": 0.2, "scorer": "contrast"},
    "index_preserving-keep": {"keep": 12, "scorer": "contrast"},  # some images are smaller than that
    "random": {"block": 1, "ratio": 0.5, "seed": 1},
    "uniform": {"block": 2, "average": 5},
    "divprune": {"block": 0, "keep": 3},
    "norm_diversity": {"block": 1, "average": 0.3},
    "pooling": {"block": 1, "ratio": 0.75},
}


def attach(model: nn.Module, method: str, **changes):
    return apply_pruner(model, method.partition("-")[0], **{**METHODS[method], **changes})


def paint(samples: list[Sample]) -> list[Sample]:
    """Images that are flat behind their first two groups."""
    for sample in samples:
        for medium in sample.media:
            medium.pixels[2 * MERGE :] = 0.2
    return samples


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", QWEN)
def test_a_row_is_what_it_is_alone(family, method):
    model, samples = shared(family), paint(rows_of(family))
    with attach(model, method) as handle:
        alone = [model(**collate([sample])).logits[0] for sample in samples]
        for side in ("left", "right"):
            logits = model(**collate(samples, side)).logits
            for number, want in enumerate(alone):
                same(logits[number, columns_of(samples, number, side)], want, 2e-5)
        images = handle.last.images
    counts = [(image.tokens, len(image.kept)) for image in images]
    if method.startswith("index_preserving"):
        most = {n: 12 if method.endswith("keep") else round(0.8 * n) for n, _ in counts}
        assert all(kept <= most[n] for n, kept in counts) and any(kept < min(n, most[n]) for n, kept in counts)
    else:
        want = {"random": 0.5, "pooling": 0.25, "norm_diversity": 0.3}.get(method)
        want = {n: {"divprune": 3, "uniform": 5}.get(method) if want is None else round(want * n) for n, _ in counts}
        assert all(kept == want[n] for n, kept in counts)


@pytest.mark.parametrize("method", ["index_preserving", "random", "pooling"])
@pytest.mark.parametrize("family", QWEN)
def test_what_reaches_the_decoder_is_what_the_tower_made_of_the_survivors(family, method):
    """The model with the same tokens cut at projected, and the encoder run by hand in the place of its own."""
    model, plain, inputs = shared(family), build(family), collate(paint(rows_of(family)[:3]))
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    with attach(model, method) as handle:
        ours, images, vision = model(**inputs).logits, handle.last.images, handle._engine.vision
        made = model.model.visual(pixels, grid_thw=grids)
        take, vision.take_alive = vision.take_alive, lambda: alive.append(take()) or alive[-1]
        alive = []
        model.model.visual(pixels, grid_thw=grids)
    chosen = torch.cat([torch.zeros(i.tokens).index_fill(0, i.kept, 1) for i in images])
    _, order = calls_of(plain.model.visual, pixels, grids)
    assert torch.equal(alive[0].unflatten(0, (-1, MERGE))[order], chosen[:, None].expand(-1, MERGE))

    def replace(module, args, out):
        out.pooler_output = made.pooler_output
        if hasattr(out, "deepstack_features"):
            out.deepstack_features = made.deepstack_features
        return out

    plain.model.visual.register_forward_hook(replace)
    given = Given([image.kept for image in images], [image.tokens for image in images])
    with apply_pruner(plain, given, ratio=METHODS[method]["ratio"]):
        same(ours, plain(**inputs).logits, 2e-5)
    assert given.rows == len(images)


@dataclass
class Given(Reducer):
    """Keeps the groups it is told to, at projected."""

    kept: list = field(repr=False)
    sizes: list = field(repr=False)
    adaptive = True
    name = "given"

    def reduce(self, tokens, keep):
        self.rows = len(tokens.mask)
        chosen = torch.zeros_like(tokens.mask, dtype=torch.float32)
        for row, index in enumerate(self.kept):
            chosen[row, index] = 1
        assert tokens.mask.sum(1).tolist() == self.sizes
        return Reduction(*topk_indices(chosen, [max(keep)] * self.rows, tokens.mask & (chosen > 0)))


@pytest.mark.parametrize("family", QWEN)
def test_nothing_to_prune_is_bit_identical(family):
    model, samples = shared(family), rows_of(family)
    inputs, before = collate(samples), fingerprint(model)
    plain = pristine(family)(**inputs).logits
    for method in METHODS:
        budget = {name: None for name in ("ratio", "keep", "average")}
        with attach(model, method, **{**budget, "ratio": 0}):
            assert torch.equal(model(**inputs).logits, plain)
        with attach(model, method) as handle:
            with handle.disabled():
                assert torch.equal(model(**inputs).logits, plain)
            assert not torch.allclose(model(**inputs).logits, plain, atol=1e-2)
        assert not changed(before, fingerprint(model))
    assert torch.equal(model(**inputs).logits, plain)


def priced(model, method: str, samples: list[Sample]):
    """What torch counts in the tower's blocks and altogether, the same for an un-hooked tower, and the accounts."""
    inputs, found = collate(samples), []
    width = inputs["input_ids"].shape[1]
    with attach(model, method) as handle:
        for disabled in (False, True):
            with handle.disabled() if disabled else nullcontext(), FlopCounterMode(display=False) as counter:
                model(**inputs)
            of = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
            blocks = sum(flops for name, flops in of.items() if re.search(r"\.visual\.blocks\.\d+$", name))
            found.append((blocks, counter.get_total_flops()))
            if not disabled:
                prices = [price(model, handle.last, inputs, width) for price in (account, account_full)]
    return *found, *prices


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", QWEN)
def test_flops_are_counted_exactly(family, method):
    """One image, equal images, and the blocks for images of several sizes in several rows."""
    model = shared(family)
    for sample in (Sample(family, [4, Image(0), 6], 1), Sample(family, [4, Image(0), 3, Image(0), 6], 1)):
        (_, pruned), (_, plain), (cut,), (full,) = priced(model, method, paint([sample]))
        assert (cut.prefill, full.prefill) == (pruned, plain) and cut.tower < full.tower
    several = [Sample(family, [3, Image(1), 4, Image(2), Image(0), 5], 3), Sample(family, [2, Image(1), 3], 6)]
    (pruned, _), (plain, _), cut, full = priced(model, method, paint(several))
    if not any(one.selection for one in cut):  # which is padded, and counted among the blocks
        assert sum(one.tower for one in full) - sum(one.tower for one in cut) == plain - pruned


@pytest.mark.parametrize("method", ["index_preserving", "divprune"])
@pytest.mark.parametrize("family", QWEN)
def test_cached_generation_is_recomputation(family, method):
    model, steps = shared(family), 4
    samples = paint(rows_of(family))
    inputs = collate(samples)
    settings = dict(max_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL, output_logits=True)
    with attach(model, method):
        out = model.generate(**inputs, **settings, return_dict_in_generate=True)
        for number, sample in enumerate(samples):
            answer = out.sequences[number, inputs["input_ids"].shape[1] :].tolist()
            again = model(**collate([sample.then(answer[:-1])]), use_cache=False).logits[0, -steps:]
            same(torch.stack([step[number] for step in out.logits]), again, 2e-5)
        beams = model.generate(**inputs, **settings | {"output_logits": False}, num_beams=2)
        slow = model.generate(**inputs, **settings | {"output_logits": False}, num_beams=2, use_cache=False)
        assert torch.equal(beams, slow)


def test_the_budget_may_change_between_forwards():
    model, inputs = shared("qwen2_5_vl"), collate(rows_of("qwen2_5_vl"))
    with apply_pruner(model, "divprune", block=1, keep=3) as handle:

        def kept():
            model(**inputs)
            return [len(image.kept) for image in handle.last.images]

        assert kept() == [3] * 9
        handle.budget = Budget(ratio=0.5)
        assert kept() == [image.tokens // 2 for image in handle.last.images]
        handle.budget = Budget(average=6)
        assert kept() == [6] * 9
        handle.budget = Budget(flops=0.5)
        with pytest.raises(BudgetError, match="flops= counts the prompt"):
            model(**inputs)
        handle.budget = Budget(keep=3)
        assert kept() == [3] * 9


@pytest.mark.parametrize("family", QWEN)
def test_a_later_stage_in_the_decoder(family):
    model, samples = shared(family), paint(rows_of(family))
    method = Compose(get_method("index_preserving", scorer="contrast"), get_method("fastv", layer=2))
    with apply_pruner(model, method, ratio=0.8) as handle:
        alone = [model(**collate([sample])).logits[0] for sample in samples]
        logits = model(**collate(samples)).logits
        images = handle.last.images
    for number, want in enumerate(alone):
        same(logits[number, columns_of(samples, number)], want, 2e-5)
    assert all([*image.stages] == ["projected", "decoder:2"] for image in images)
    assert all(len(image.kept) == max(1, round(0.2 * image.tokens)) for image in images)


def test_an_adaptive_stage_before_a_fixed_one():
    """Fewer may be left than the second stage was to keep: it has nothing to do."""
    model, samples, found = shared("qwen2_vl"), rows_of("qwen2_vl"), []
    first, second = Some(0, 0, adaptive=True), Some(1, 1)
    for method in (first, Compose(first, second)):
        with apply_pruner(model, method, ratio=0.2) as handle:
            outputs = [model(**collate([sample])) for sample in samples]
            columns, (image,) = outputs[-1].past_key_values.layers[0].keys.shape[2], handle.last.images
            assert columns == len(samples[-1].ids) - image.tokens + len(image.kept)  # nothing is padding
            found.append([out.logits[0] for out in outputs])
            logits, images = model(**collate(samples)).logits, handle.last.images
    for number, (alone, want) in enumerate(zip(*found)):
        same(alone, want, 2e-5)
        same(logits[number, columns_of(samples, number)], want, 2e-5)
    assert all(len(image.kept) < round(0.8 * image.tokens) for image in images)
    assert all((tokens.mask.sum(1) == reduction.valid.sum(1)).all() for tokens, reduction in second.seen)


@dataclass
class Bounded(Method):
    """A first stage that may keep all."""

    first: Reducer
    second: Reducer
    name = "bounded"

    def plan(self, geometry, keep):
        stages = (self.first, geometry.visual_tokens), (self.second, keep)
        return tuple(Stage(Site.parse(reducer.site), reducer, n) for reducer, n in stages)


def test_an_adaptive_stage_on_the_way_to_fewer_has_all_as_its_bound():
    model, first, second = shared("qwen2_5_vl"), Some(0, 0, adaptive=True), Some(2, 1)
    tower, pixels = pristine("qwen2_5_vl").model.visual, pixels_of(model.model.visual, MIXED)
    with apply_pruner(model, Bounded(first, second), ratio=0.75):
        out = model.model.visual(pixels, grid_thw=MIXED)
    cuts = {spy.layer: left(spy.seen[-1], MIXED) for spy in (first, second)}
    assert cuts[2].sum() < cuts[0].sum() < len(cuts[0])
    compare(out, by_hand(tower, pixels, MIXED, cuts))


# -------------------------------------------------------------------------------------------------- robustness
@pytest.mark.parametrize("family", QWEN)
def test_grads_are_those_of_the_tower_by_hand(family):
    model, other, spy = build(family), build(family), Some(1, 0, adaptive=True)
    pixels = [pixels_of(model.model.visual, MIXED).requires_grad_() for _ in range(2)]
    with apply_pruner(model, spy, ratio=0.5):
        out = model.model.visual(pixels[0], grid_thw=MIXED).pooler_output
    kept = left(spy.seen[-1], MIXED)
    want = by_hand(other.model.visual, pixels[1], MIXED, {1: kept})[1]
    for x in (out, want):
        x[kept].square().sum().backward()
    same(pixels[0].grad, pixels[1].grad, 1e-4)
    for ours, theirs in zip(model.model.visual.parameters(), other.model.visual.parameters()):
        if theirs.grad is not None:
            same(ours.grad, theirs.grad, 1e-3)


def test_grads_with_checkpointing_are_the_same_or_refused():
    model, pixels, found = build("qwen2_5_vl").train(), None, []
    tower = model.model.visual
    pixels = pixels_of(tower, MIXED)
    replays = type(tower.blocks[0]).__call__ is not nn.Module.__call__
    with apply_pruner(model, Some(1, 0), ratio=0.5):
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable()
            if on and replays:
                with pytest.raises(InputError, match="checkpointing"):
                    tower(pixels, grid_thw=MIXED)
                return
            tower.zero_grad()
            tower(pixels, grid_thw=MIXED).pooler_output.square().sum().backward()
            found.append([p.grad.clone() for p in tower.parameters()])
    for ours, theirs in zip(*found):
        same(ours, theirs)


@pytest.mark.parametrize("family", QWEN)
def test_bfloat16(family):
    model, exact, spy = build(family, dtype=torch.bfloat16), shared(family), Some(1, 0)
    pixels = pixels_of(model.model.visual, MIXED)
    with apply_pruner(model, spy, ratio=0.5):
        out = model.model.visual(pixels.bfloat16(), grid_thw=MIXED).pooler_output
    with apply_pruner(exact, spy, ratio=0.5):
        want = exact.model.visual(pixels, grid_thw=MIXED).pooler_output
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).norm() / want.norm() < 0.03


def test_an_exception_leaves_nothing_behind():
    model, inputs = shared("qwen2_5_vl"), collate(rows_of("qwen2_5_vl"))
    with attach(model, "random") as handle:
        want = model(**inputs).logits
        vision = handle._engine.vision

        def fail(*args):
            raise RuntimeError("out of memory")

        for block in (0, 1, 3):
            hook = model.model.visual.blocks[block].mlp.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(**inputs)
            hook.remove()
            assert vision.place.run is None and vision.place.alive is None
        assert torch.equal(model(**inputs).logits, want)
        assert vision.place.run is None and vision.place.alive is None


def test_threads_do_not_meet():
    model, results = shared("qwen2_5_vl"), {}
    batches = [collate([sample]) for sample in rows_of("qwen2_5_vl")]

    def work(number):
        with torch.no_grad():
            results[number] = [model(**batches[number]).logits for _ in range(3)]

    with attach(model, "divprune"):
        want = [model(**batch).logits for batch in batches]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, logits in results.items():
        for one in logits:
            same(one, want[number])


def test_a_copy_carries_its_own_pruner():
    model, inputs = build("qwen3_vl"), collate(rows_of("qwen3_vl"))
    with attach(model, "divprune") as handle:
        want = model(**inputs).logits
        twin = copy.deepcopy(model)
        handle.remove()
        assert torch.equal(twin(**inputs).logits, want)
        assert not torch.allclose(model(**inputs).logits, want, atol=1e-2)


def test_output_hidden_states_are_of_all_patches():
    model, spy = build("qwen2_5_vl"), Some(1, 0)
    tower, pixels = model.model.visual, pixels_of(model.model.visual, MIXED)
    tower(pixels, grid_thw=MIXED, output_hidden_states=True)
    with apply_pruner(model, spy, ratio=0.5):
        out = tower(pixels, grid_thw=MIXED, output_hidden_states=True)
    assert {len(states) for states in out.hidden_states[2:]} == {len(pixels)}
    same(out.hidden_states[-1], out.last_hidden_state)


def test_changed_states_between_blocks_are_refused():
    model = build("qwen2_vl")
    pixels = pixels_of(model.model.visual, MIXED)
    with apply_pruner(model, Some(0, 0), ratio=0.5):
        model.model.visual.blocks[1].register_forward_hook(lambda module, args, out: out + 1)
        with pytest.raises(InputError, match="changes hidden states between the blocks"):
            model.model.visual(pixels, grid_thw=MIXED)


@dataclass
class Odd(Some):
    signals: tuple = ()
    place: str = "input"
    needs_projector: bool = False
    reconstructs: bool = False


@dataclass
class Chain(Method):
    """Stages at two blocks; the second one moves with the size of the image, which no method may do."""

    first: int
    second: int
    moves: bool = False
    name = "chain"

    def plan(self, geometry, keep):
        second = self.second + (self.moves and geometry.visual_tokens < 100)
        stages = (self.first, (geometry.visual_tokens + keep) // 2), (second, keep)
        return tuple(Stage(Site.parse(f"block:{layer}"), Some(layer), n) for layer, n in stages)


def test_stages_that_move_are_refused_in_the_forward():
    model = shared("qwen2_5_vl")
    with apply_pruner(model, Chain(0, 1, moves=True), ratio=0.5):
        with pytest.raises(ConfigError, match="plan moved to block:2"):
            model(**collate(rows_of("qwen2_5_vl")))


REFUSED = {
    "inside": (Odd(1, place="inside"), {}, UnsupportedMethodError, "at their input only"),
    "block": (Odd(1, signals=("block",)), {}, UnsupportedMethodError, "reads block, which cannot be had"),
    "keys": (Odd(1, signals=("keys", "values")), {}, UnsupportedMethodError, "reads keys, values"),
    "tower": (Odd(1, reads=("received_attention",)), {}, UnsupportedMethodError, "reads received_attention"),
    "projector": (Odd(1, needs_projector=True), {}, UnsupportedMethodError, "reads the projector"),
    "reconstruction": (Odd(1, reconstructs=True), {}, UnsupportedMethodError, "reconstruction of its own"),
    "proportional": (Some(1), {"proportional": True}, UnsupportedMethodError, "attention takes no mask"),
    "tome": ("tome", {}, UnsupportedMethodError, "methods that work there: .*divprune.*index_preserving.*uniform"),
    "expedit": ("expedit", {}, UnsupportedMethodError, "methods that work there"),
    "fastv": ("fastv", {"block": 2}, UnsupportedMethodError, "reads last_token_attention"),
    "block 9": ("random", {"block": 9}, ConfigError, "blocks 0 to"),
    "out of range": (Some(7), {}, ConfigError, "acts at block:7, and this vision encoder has blocks 0 to"),
    "order": (Chain(2, 1), {}, ConfigError, "must ascend, got block:2, block:1"),
    "flops": ("random", {"block": 1, "ratio": None, "flops": 0.5}, BudgetError, "flops="),
    "restore": ("random", {"block": 1, "restore": True}, ConfigError, "restore=True"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("family", QWEN)
def test_refused_before_hooks_go_on(family, why):
    method, options, error, message = REFUSED[why]
    model = shared(family)
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        apply_pruner(model, method, **{"ratio": 0.5, **options})
    assert not changed(before, fingerprint(model))


def test_the_methods_named_as_working_do():
    model, inputs = shared("qwen2_5_vl"), collate(rows_of("qwen2_5_vl"))
    names = works_inside(find_parts(model))
    assert {"index_preserving", "random", "uniform", "divprune", "norm_diversity"} <= set(names)
    for name in names:
        block = {} if name == "index_preserving" else {"block": 1}
        with apply_pruner(model, name, ratio=0.5, **block) as handle:
            model(**inputs)
            assert all(len(image.kept) <= round(image.tokens / 2) for image in handle.last.images), name


def test_towers_of_other_kinds_are_refused_as_before():
    with pytest.raises(UnsupportedMethodError, match="CLIP, SigLIP and Qwen-VL only"):
        apply_pruner(shared("internvl"), "index_preserving", ratio=0.5)
