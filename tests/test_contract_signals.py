"""What a method is shown, where it acts, and what the report says about it."""

from dataclasses import dataclass

import pytest
import torch
from matrix import COMPACT, ENGINE, PROJECTED, cells, engine_cells
from reference import assert_close, check_counts, expect, of_sample, places, trace
from tiny import (
    ATTENTION,
    FAMILIES,
    IMAGE,
    LAYERS,
    VIDEO,
    VIDEO_FAMILIES,
    Image,
    Sample,
    Video,
    build,
    collate,
    columns_of,
    mixed_batch,
    pristine,
    shared,
    with_positions,
)
from transformers import DynamicCache

from prune import Budget, Compose, ConfigError, Scorer, UnsupportedMethodError, apply_pruner, get_method
from prune.kernels import row_attention
from prune.tokens import SIGNALS


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# --------------------------------------------------------------------------------------------------------- signals
@dataclass
class Probe(Scorer):
    """Asks for every signal and keeps what it is shown."""

    layer: int = 2
    signals = SIGNALS

    @property
    def transition_layers(self):
        return tuple(range(LAYERS))  # those from the site on have not run yet

    @property
    def site(self):
        return f"decoder:{self.layer}"

    def score(self, tokens):
        self.seen = tokens
        return tokens.features.float().norm(dim=-1)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_signals(family, attn, side, layer):
    """Every signal, of every image of a ragged batch, against the eager model's own tensors."""
    model, oracle, samples = shared(family, attn), pristine(family, "eager"), mixed_batch(family)
    probe = Probe(layer)
    with apply_pruner(model, probe, keep=2):
        model(**with_positions(collate(samples, side)))
    seen, row = probe.seen, 0
    for sample in samples:
        want = expect(oracle, sample)
        cache = DynamicCache(config=oracle.config.get_text_config())
        oracle(**collate([sample]), past_key_values=cache)
        before = cache.layers[layer - 1]
        keys, values = (x[0].transpose(0, 1) for x in (before.keys, before.values))  # [L, heads, d]
        hidden, norm = want.entering[layer], oracle.model.language_model.norm
        spans = places(oracle, sample, trace(oracle, collate([sample])).embeds)
        text = [c for c, token in enumerate(sample.ids) if token not in (IMAGE, VIDEO)]
        for span in spans:
            real = seen.mask[row]
            assert real.sum() == len(span)
            assert seen.columns[row][real].tolist() == span
            assert_close(seen.features[row][real], hidden[span])
            assert_close(seen.normed_features[row][real], norm(hidden[span]))
            assert_close(seen.keys[row][real], keys[span])
            assert_close(seen.values[row][real], values[span])
            assert_close(seen.last_token_attention[row][real], want.attention[layer - 1][:, -1, span].mean(0))
            after, question = [c for c in text if c > span[-1]], seen.text_mask[row]
            assert seen.text_columns[row][question].tolist() == after
            assert_close(seen.text_features[row][question], hidden[after])
            assert_close(seen.text_keys[row][question], keys[after])
            assert_close(seen.normed_text[row][question], norm(hidden[after]))
            assert_close(seen.inputs[row][real], want.entering[0][span])
            assert_close(seen.text_inputs[row][question], want.entering[0][after])
            for inputs, number in ((seen.attention, layer - 1), (seen.entry_attention, layer)):
                check_attention(inputs, row, real, number, want, cache, span, after)
            measured = transitions_by_hand(oracle, sample, layer)
            assert_close(seen.transition[row][real], measured[span])
            assert_close(seen.transition_sums[row], (1 - measured[..., 1::2]).exp().sum(0))
            row += 1
    assert row == len(seen.mask)


def check_attention(inputs, row, real, number, want, cache, span, after):
    """`AttentionInputs` of decoder layer `number`, image by image, against eager attention weights."""
    sample = int(inputs.sample[row])
    valid, length = inputs.valid[sample], inputs.queries.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & valid
    weights = row_attention(inputs.queries[[sample]], inputs.keys[[sample]], inputs.scale, mask[None])[0]
    assert_close(weights[:, valid][:, :, valid], want.attention[number])
    assert_close(inputs.values[sample][valid], cache.layers[number].values[0].transpose(0, 1))
    first = int(valid.long().argmax())
    assert (inputs.slots[row][real] - first).tolist() == span
    assert (inputs.text_slots[row][inputs.text_mask[row]] - first).tolist() == after
    assert inputs.last[sample] == valid.nonzero().max()


def transitions_by_hand(model, sample, layer):
    """`[L, layer, 4]` norm ratios and cosines of the modules of the layers before `layer`."""
    seen, hooks = [], []

    def measure(module, args, kwargs, output):
        x, y = (args[0] if args else kwargs["hidden_states"])[0], (output[0] if isinstance(output, tuple) else output)
        y = y[0] if y.dim() == 3 else y
        seen.append(torch.stack([y.norm(dim=-1) / x.norm(dim=-1), torch.cosine_similarity(x, y, dim=-1)], -1))

    for block in model.model.language_model.layers[:layer]:
        hooks += [m.register_forward_hook(measure, with_kwargs=True) for m in (block.self_attn, block.mlp)]
    try:
        model(**collate([sample]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(pair, -1) for pair in zip(seen[::2], seen[1::2])], 1)


@dataclass
class Late(Probe):
    """A probe whose name tells it from another one."""

    name = "late"


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_signals_across_stages(family, attn):
    """The second stage in the decoder: attention over what is left, transitions of layers before and after the cut."""
    model, oracle, samples = shared(family, attn), pristine(family, "eager"), mixed_batch(family)
    first, late = Probe(1), Late(3)
    with apply_pruner(model, Compose(first, late, budgets=[Budget(keep=6), Budget(keep=2)])) as handle:
        model(**with_positions(collate(samples, "right")))
        report = handle.last
    row = 0
    for number, sample in enumerate(samples):
        images = of_sample(report, number)
        for image in images:
            image.stages.pop("decoder:3")
        want = expect(oracle, sample, images)
        spans = places(oracle, sample, trace(oracle, collate([sample])).embeds)
        for image, span in zip(images, spans):
            columns = [span[i] for i in image.stages["decoder:1"]]
            seen, real = late.seen, late.seen.mask[row]
            valid = seen.attention.valid[number]
            length = len(valid)
            mask = torch.ones(length, length, dtype=torch.bool).tril() & valid
            for inputs, at in ((seen.attention, 2), (seen.entry_attention, 3)):
                q, k = inputs.queries[[number]], inputs.keys[[number]]
                weights = row_attention(q, k, inputs.scale, mask[None])[0]
                assert_close(weights[:, valid][:, :, valid], want.attention[at])
            assert_close(seen.inputs[row][real], want.entering[0][columns])
            before = first.seen.transition[row][image.stages["decoder:1"]]
            assert torch.equal(seen.transition[row][real][:, :1], before)
            assert seen.transition.shape[2] == 3
            assert torch.equal(seen.transition_sums[row][:1], first.seen.transition_sums[row])
            assert_close(seen.transition[row][real][:, 1], first_after_cut(oracle, want, 1, columns))
            row += 1


def first_after_cut(model, want, layer, columns):
    """Norm ratios and cosines `[columns, 4]` of a layer's modules, run by hand on the survivors alone."""
    block, kept = model.model.language_model.layers[layer], want.kept[layer]
    h = want.entering[layer]
    normed = block.input_layernorm(h)
    heads = want.attention[layer]
    v = block.self_attn.v_proj(normed).unflatten(-1, (-1, block.self_attn.head_dim)).repeat_interleave(2, 1)
    out = block.self_attn.o_proj(torch.einsum("hqk,khd->qhd", heads, v).flatten(1))
    after = block.post_attention_layernorm(h + out)
    measured = []
    for x, y in ((normed, out), (after, block.mlp(after))):
        measured += [y.norm(dim=-1) / x.norm(dim=-1), torch.cosine_similarity(x, y, dim=-1)]
    return torch.stack(measured, -1)[[kept.index(c) for c in columns]]


@pytest.mark.parametrize("site", ["projected", "decoder:0"])
@pytest.mark.parametrize("signal", ["attention", "entry_attention", "transition"])
def test_signals_of_layers_need_a_layer(signal, site):
    with pytest.raises(UnsupportedMethodError, match="layer>=1"):
        apply_pruner(shared("llava"), At(site, signal), keep=2)


@dataclass
class At(Scorer):
    """Reads one signal at a site."""

    site: str = "projected"
    signal: str = "attention"
    layers: tuple = (0,)
    name = "at"

    @property
    def signals(self):
        return (self.signal,)

    @property
    def transition_layers(self):
        return self.layers

    def score(self, tokens):
        return tokens.features.float().norm(dim=-1)


@pytest.mark.parametrize("layers", [(), (2, 3), (0, LAYERS), (-1,)])
def test_transition_layers_are_checked(layers):
    with pytest.raises(ConfigError, match="transition"):
        apply_pruner(shared("llava"), At("decoder:2", "transition", layers), keep=2)


def test_transition_after_an_exception():
    """A layer that fails half-way leaves no measurement for the next call."""
    model, sample = build("llava"), Sample("llava", [4, Image(), 6], 1)
    with apply_pruner(model, probe := Probe(2), keep=3) as handle:
        model(**collate([sample]))
        want = probe.seen.transition

        def fail(*args):
            raise RuntimeError("on purpose")

        hook = model.model.language_model.layers[0].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**collate([sample]))
        hook.remove()
        assert handle._engine.transition.place.run is None
        model(**collate([sample]))
    assert torch.equal(probe.seen.transition, want)


def test_signals_after_an_earlier_cut():
    """The second stage is shown what the first one left over, and attention is over that."""
    family = "llava"
    model, sample, probe = shared(family), Sample(family, [4, Image(), 6], 1), Probe(2)
    method = Compose(get_method("random"), probe, budgets=[Budget(keep=6), Budget(keep=2)])
    with apply_pruner(model, method) as handle:
        model(**collate([sample]))
        image = handle.last.images[0]
    first = image.stages["projected"].tolist()
    image.stages.pop("decoder:2")
    want = expect(pristine(family, "eager"), sample, [image])
    span = [sample.spans()[0][i] for i in first]
    slots = [want.kept[1].index(c) for c in span]
    assert probe.seen.columns[0].tolist() == span
    assert_close(probe.seen.features[0], want.entering[2][slots])
    assert_close(probe.seen.last_token_attention[0], want.attention[1][:, -1, slots].mean(0))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_attention_over_a_cached_first_turn(family):
    """In a later turn the attention is shared with all that the cache holds."""
    model, sample, probe = shared(family), Sample(family, [7], 1), Probe(2)
    second = Sample(family, [2, Image(0), 5], 2)
    with apply_pruner(model, probe, keep=3):
        cache = model(**collate([sample]), use_cache=True).past_key_values
        inputs = collate([second])
        del inputs["attention_mask"]
        model(**inputs, past_key_values=cache)
    whole, oracle = sample.then(second), pristine(family, "eager")
    want = expect(oracle, whole)
    span = places(oracle, whole, trace(oracle, collate([whole])).embeds)[0]
    assert_close(probe.seen.last_token_attention[0], want.attention[1][:, -1, span].mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_keeps_the_most_attended(family):
    model, oracle, samples = shared(family), pristine(family, "eager"), mixed_batch(family)
    with apply_pruner(model, "fastv", keep=3, layer=2) as handle:
        model(**collate(samples))
        report = handle.last
    for number, sample in enumerate(samples):
        spans = places(oracle, sample, trace(oracle, collate([sample])).embeds)
        attention = expect(oracle, sample).attention[1][:, -1].mean(0)
        for image, span in zip(of_sample(report, number), spans):
            assert image.kept.tolist() == sorted(attention[span].topk(3).indices.tolist())


# --------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_coordinates(family, generate):
    """(tile, frame, row, column) of every token, counted off by hand."""
    oracle, model = pristine(family), shared(family)
    samples = mixed_batch(family)
    if family in VIDEO_FAMILIES:
        samples.append(Sample(family, [5, Image(1), 2, Video(), 3], 5))
    with apply_pruner(model, "random", keep=2) as handle:
        model.generate(**collate(samples), max_new_tokens=1) if generate else model(**collate(samples))
        report = handle.last
    for number, sample in enumerate(samples):
        embeds = trace(oracle, collate([sample])).embeds
        for modality in ("image", "video"):
            media = [(m, s) for m, s in zip(sample.media, sample.spans()) if m.modality == modality]
            images = [image for image in of_sample(report, number) if image.layout.modality == modality]
            assert len(images) == len(media)
            for image, (medium, span) in zip(images, media):
                want = _count_off(family, medium, [_is_newline(oracle, embeds[c]) for c in span])
                assert image.layout.coordinates.tolist() == want
                assert image.places.tolist() == [place for place in want if place[0] >= 0]


def _is_newline(model, embedding):
    newline = getattr(model.model, "image_newline", None)
    return newline is not None and torch.equal(embedding, newline)


def _count_off(family, medium, newlines):
    if family.startswith("qwen"):
        frames, rows, columns = medium.size
        return [[0, f, r, c] for f in range(frames) for r in range(rows // 2) for c in range(columns // 2)]
    if medium.modality == "video":
        grid = [[0, f, r, c] for f in range(medium.size) for r in range(2) for c in range(2)]
        return grid + [[-1] * 4] * newlines[-1]
    if family in ("llava", "internvl"):
        tiles = range(1 if family == "llava" else medium.size)
        return [[tile, 0, r, c] for tile in tiles for r in range(4) for c in range(4)]
    coordinates, row, column = [[0, 0, r, c] for r in range(4) for c in range(4)], 0, 0
    for newline in newlines[16:]:
        coordinates.append([-1] * 4 if newline else [1, 0, row, column])
        row, column = (row + 1, 0) if newline else (row, column + 1)
    return coordinates


# ----------------------------------------------------------------------------------------------------------- sites
@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_0_is_projected(family, attn):
    """A method that looks at features only does the same thing before the decoder and at its first layer."""
    model, samples, outs = shared(family, attn), mixed_batch(family), []
    for layer in (None, 0):
        with apply_pruner(model, "random", ratio=0.7, layer=layer) as handle:
            out = model(**collate(samples))
            outs.append((out, [image.kept.tolist() for image in handle.last.images]))
    (a, kept_a), (b, kept_b) = outs
    assert kept_a == kept_b
    for number in range(len(samples)):
        columns = columns_of(samples, number)
        assert_close(a.logits[number, columns], b.logits[number, columns])
    for one, other in zip(a.past_key_values.layers, b.past_key_values.layers):
        assert one.keys.shape == other.keys.shape


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_at_every_layer(family, attn):
    """Before the decoder and at each of its layers, inside the range of deepstack and outside."""
    model, oracle, samples = shared(family, attn), pristine(family, attn), mixed_batch(family)
    members = [get_method("random", layer=layer) for layer in (None, *range(1, LAYERS))]
    with apply_pruner(model, Compose(*members), keep=2) as handle:
        logits = model(**collate(samples)).logits
        report = handle.last
    for number, sample in enumerate(samples):
        want = expect(oracle, sample, of_sample(report, number))
        assert_close(logits[number, columns_of(samples, number)], want.logits)
    counts = report.tokens_per_layer[0]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == LAYERS


# ---------------------------------------------------------------------------------------------------------- report
@cells(rows=ENGINE, attention=("sdpa",))
def test_report_tells_what_the_cache_holds(row, family, attn):
    model, sample = shared(family), mixed_batch(family)[2]
    with row.attach(model) as handle:
        cache = model(**collate([sample])).past_key_values
        report = handle.last
    want = expect(pristine(family), sample, report.images, row.policy)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [len(kept) for kept in want.kept]
    text = len(sample.ids) - sum(image.tokens for image in report.images)
    assert report.text_tokens == [text]
    assert report.tokens_per_layer == [[len(kept) - text for kept in want.kept]]
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert report.kv_bytes == [held]
    assert report.average_tokens == [sum(report.tokens_per_layer[0]) / LAYERS]
    assert report.flops[0] < report.flops_full[0]
    assert str(report)


@engine_cells()
def test_flops_budget(row, family):
    """Met per sample as nearly as whole tokens allow: one of 16 is worth 3 % of a short sample's FLOPs."""
    model, samples = shared(family), mixed_batch(family)
    with row.attach(model, flops=0.9) as handle:
        model(**collate(samples))
        report = handle.last
    for number, sample in enumerate(samples):
        if sample.media:
            assert abs(report.flops[number] / report.flops_full[number] - 0.9) < 0.04


@engine_cells(rows=(PROJECTED, COMPACT))
def test_average_budget(row, family):
    model, samples = shared(family), mixed_batch(family)
    with row.attach(model, average=11.5) as handle:
        model(**collate(samples))
        report = handle.last
    for image in report.images:
        assert len(image.kept) in ((11, 12) if image.tokens > 11 else (image.tokens,))


@engine_cells(rows=(PROJECTED,))
def test_keep_is_per_image(row, family):
    model, samples = shared(family), mixed_batch(family)
    with row.attach(model, keep=9) as handle:
        model(**collate(samples))
        report = handle.last
    check_counts(report, {"keep": 9})
    assert [len(of_sample(report, number)) for number in range(3)] == [1, 0, 3]
