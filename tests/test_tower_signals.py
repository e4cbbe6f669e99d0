"""Signals of the vision encoder, against an eager copy of it and against the model's own packing of its features."""

import copy
import math
from dataclasses import dataclass, field
from importlib import import_module

import pytest
import tiny
import torch
from fingerprint import changed, fingerprint
from reference import assert_close
from tiny import FAMILIES, VIDEO_FAMILIES, Image, Sample, Video, collate, mixed_batch, pristine, shared
from torch.nn.functional import unfold
from transformers import GenerationMixin

from prune import Budget, Compose, Merge, Reducer, Reduction, apply_pruner, get_method, list_methods
from prune.errors import ConfigError, InputError, UnsupportedMethodError
from prune.kernels.topk import topk_indices
from prune.tokens import TOWER_KINDS, Tower

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WITH_CLS = ("llava", "llava_next", "llava_next_video", "internvl")
LAYERS = (None, 0, -1, 0.5)
THRESHOLD = 1.68  # in most tiles of the tiny towers some patches receive more than that, in some of them none does
ENCODES_FIRST = hasattr(GenerationMixin, "_expand_multimodal_outputs")  # transformers >= 5.18


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@dataclass
class Spy(Reducer):
    """Reads `specs` (kind -> layer, or all of a family) and keeps what it is shown; drops by the features' norm."""

    specs: dict = field(default_factory=dict)
    layer: int | None = None
    newlines: bool = False
    needs_projector = True
    name = "spy"

    @property
    def tower(self):
        return {name: Tower(*spec) for name, spec in self.specs.items()}

    @property
    def site(self):
        return "projected" if self.layer is None else f"decoder:{self.layer}"

    def reduce(self, tokens, keep):
        self.seen = tokens
        return Reduction(*topk_indices(tokens.features.float().norm(dim=-1), keep, tokens.mask))


def all_specs(family, layers=LAYERS, threshold=THRESHOLD):
    """Name -> arguments of `Tower`."""
    kinds = [kind for kind in TOWER_KINDS if family in WITH_CLS or "cls" not in kind]
    return {
        f"{kind} {layer}": (kind, layer, *[threshold] * (kind == "important_attention"))
        for kind in kinds
        for layer in layers
    }


# ------------------------------------------------------------------------------------------------------- the oracle
def index_of(family, layer):
    """The layer a spec means, by hand."""
    count = {"internvl": 2, "qwen2_5_vl": 4, "qwen3_vl": 4}.get(family, 3)
    if layer is None:
        return count - 2 if family in ("llava", "llava_next", "llava_next_video") else count - 1
    if isinstance(layer, float):
        return math.ceil(layer * count) - 1
    return layer % count


def by_patch(family, medium, kind, layer, threshold):
    """`[tiles, patches, ...]`, in the encoder's order, without CLS; for Qwen `[tokens, g, ...]` in token order."""
    return (_qwen if family in QWEN else _fixed)(family, medium, kind, layer, threshold)


def mean_important_row(weights, threshold, cls):
    """The mean of the rows of attention `[L, L]` whose patches receive much; of all rows if none does."""
    received = weights.mean(0)
    bar = threshold * received[cls:].mean()
    assert ((received - bar).abs() > 1e-5 * bar).all()  # the oracle and the signal agree on which are important
    rows = [row for row in range(cls, len(weights)) if received[row] > bar]
    return weights[rows].mean(0) if rows else received


def _fixed(family, medium, kind, layer, threshold):
    model = pristine(family, "eager")
    core = model.model
    tower, at, pixels = core.vision_tower, index_of(family, layer), medium.pixels
    if kind == "pixels":
        return unfold(pixels, 4, stride=4).transpose(1, 2)
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    cls = int(family in WITH_CLS)
    if kind == "features":
        if layer is None and family == "internvl":
            return out.last_hidden_state[:, 1:]
        return out.hidden_states[at + 1][:, cls:]
    blocks = tower.encoder.layer if family == "internvl" else tower.encoder.layers
    block = blocks[at]
    attention = block.attention if family == "internvl" else block.self_attn
    norm = block.layernorm_before if family == "internvl" else block.layer_norm1
    normed = norm(out.hidden_states[at])
    if kind in ("keys", "values"):
        heads = getattr(attention, f"{kind[0]}_proj")(normed)
        return heads[:, cls:].unflatten(-1, (3, 8))
    if kind == "joint_cls_attention":
        q, k = attention.q_proj(normed), attention.k_proj(normed)
        return ((q[:, :1] @ k.transpose(1, 2)) * 24**-0.5).softmax(-1)[:, 0, 1:]
    if kind == "cls_value_similarity":
        v = attention.v_proj(normed).unflatten(-1, (3, 8)).transpose(1, 2)
        return (v[:, :, :1] @ v.transpose(2, 3)).softmax(-1)[:, :, 0, 1:].mean(1)
    weights = out.attentions[at]
    if kind == "important_attention":
        return torch.stack([mean_important_row(tile, threshold, cls) for tile in weights.mean(1)])[:, cls:]
    return (weights[:, :, 0] if kind == "cls_attention" else weights.mean(2)).mean(1)[:, cls:]


def _qwen(family, medium, kind, layer, threshold):
    core = pristine(family, "eager").model
    tower, at = core.visual, index_of(family, layer)
    if kind == "pixels":
        return medium.pixels.unflatten(0, (-1, 4))
    seen = {}
    block = tower.blocks[at]
    hooks = [
        block.attn.register_forward_pre_hook(lambda m, a, k: seen.update(k, hidden=a[0]), with_kwargs=True),
        block.register_forward_hook(lambda m, a, o: seen.update(out=o)),
        tower.merger.register_forward_hook(lambda m, a, o: seen.update(merged=o)),
    ]
    out = tower(medium.pixels, grid_thw=torch.tensor([medium.size]))
    for hook in hooks:
        hook.remove()
    # the order of the tokens inside the tower: where its un-ordered output has the row of the ordered one
    order = (out.pooler_output[:, None] == seen["merged"][None]).all(-1).long().argmax(1)
    if kind == "features":
        rows = seen["out"]
    else:
        heads = 2
        q, k, v = block.attn.qkv(seen["hidden"]).view(len(seen["hidden"]), 3, heads, -1).unbind(1)
        if kind in ("keys", "values"):
            rows = k if kind == "keys" else v
        else:
            module = import_module(type(tower).__module__)
            q, k = module.apply_rotary_pos_emb_vision(q, k, *seen["position_embeddings"])
            rows = []
            bounds = seen["cu_seqlens"].tolist()
            for start, end in zip(bounds, bounds[1:]):
                logits = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * q.shape[-1] ** -0.5
                weights = logits.softmax(-1).mean(0)
                rows.append(weights.mean(0) if threshold is None else mean_important_row(weights, threshold, 0))
            rows = torch.cat(rows)
    return rows.unflatten(0, (-1, 4))[order]


def by_token(family, medium, kind, layer, threshold=None):
    """`[tokens, ...]` of one image or video, separators included, by the model's own functions."""
    x = by_patch(family, medium, kind, layer, threshold)
    concat = kind in ("features", "pixels")
    if family in QWEN:
        return x.flatten(1) if concat else x.mean(1)
    if family == "internvl":
        tiles = x.unflatten(1, (4, 2, 4, 2)).transpose(2, 3).flatten(1, 2).flatten(2, 3)  # [tiles, 16, 4, ...]
        tiles = tiles.flatten(2) if concat else tiles.mean(2)
        return tiles.flatten(0, 1)
    if family == "llava":
        return x[0]
    shape = x.shape[2:]
    x = x.flatten(2) if x.dim() > 2 else x[..., None]
    return pack(family, medium, x).unflatten(1, shape) if shape else pack(family, medium, x)[:, 0]


def pack(family, medium, x, newline=0.0):
    core = pristine(family).model
    if medium.modality == "video":
        if family == "llava_onevision":
            return torch.cat([core.apply_pooling(x).flatten(0, 1), torch.full_like(x[:1, 0], newline)])
        return torch.nn.AvgPool2d(2)(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2).flatten(0, 1)
    options = {} if family == "llava_onevision" else {"vision_feature_select_strategy": "default"}
    line = torch.full((x.shape[-1],), newline)
    (packed,), _ = core.pack_image_features([x], torch.tensor([medium.size]), image_newline=line, **options)
    return packed


def origin(family, medium):
    """`[tokens, 3]` (tile, row, column), -1 for separators; nonsense where the model resizes."""
    if family in QWEN:
        frames, rows, columns = medium.size
        return torch.cartesian_prod(torch.arange(frames), torch.arange(rows // 2), torch.arange(columns // 2))
    tiles = len(medium.pixels)
    side = 2 if medium.modality == "video" else 4
    places = torch.cartesian_prod(torch.arange(tiles), torch.arange(side), torch.arange(side))
    if medium.modality == "video":
        return torch.cat([places, torch.full((int(family == "llava_onevision"), 3), -1)])
    if family in ("llava", "internvl"):
        return places
    return pack(family, medium, places.view(tiles, 16, 3).float(), -1.0).long()


def newline_rows(family, medium):
    if family in ("llava", "internvl", *QWEN):
        return torch.zeros(medium.tokens, dtype=torch.bool)
    return origin(family, medium)[:, 0] < 0


def check(family, seen, media, newlines=False):
    """Everything the spy saw, row by row."""
    assert len(seen.mask) == len(media)
    for row, medium in enumerate(media):
        real = ~newline_rows(family, medium) | newlines
        n = int(real.sum())
        assert seen.mask[row].tolist() == [True] * n + [False] * (seen.mask.shape[1] - n)
        for name, spec in all_specs(family).items():
            assert_close(seen.tower[name][row, :n], by_token(family, medium, *spec)[real])
        projected = seen.projector(seen.tower["features None"][row, :n])
        resized = (family, medium.modality) == ("llava_onevision", "video") or medium.size == (60, 62)
        if not resized and not newlines:  # a resized feature is the mean of projected ones
            assert_close(projected, seen.features[row, :n])
        if medium.size != (60, 62):
            want = origin(family, medium)[real]
            assert torch.equal(seen.tile[row, :n], want[:, 0])
            assert torch.equal(seen.patch[row, :n], want[:, 1:])
        assert seen.index[row, :n].tolist() == list(range(n))


def media_of(samples):
    images = [m for sample in samples for m in sample.of("image")]
    return images + [m for sample in samples for m in sample.of("video")]


# ------------------------------------------------------------------------------------------------------------ tests
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_signal_of_every_image(family, side):
    """A ragged batch with a text-only row, several images, tiles and a video."""
    samples = mixed_batch(family)
    if family in VIDEO_FAMILIES:
        samples.append(Sample(family, [5, Video(), 3], 5))
    spy = Spy(all_specs(family))
    with apply_pruner(shared(family), spy, keep=2):
        shared(family)(**collate(samples, side))
    check(family, spy.seen, media_of(samples))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "llava_next_video"])
def test_separators_have_zeros_and_no_tile(family):
    samples = [Sample(family, [4, Image(0), 6], 1)]
    if family in VIDEO_FAMILIES:
        samples.append(Sample(family, [5, Video(), 3], 5))
    spy = Spy(all_specs(family), newlines=True)
    with apply_pruner(shared(family), spy, keep=2):
        shared(family)(**collate(samples))
    check(family, spy.seen, media_of(samples), newlines=True)
    assert not spy.seen.tower["keys None"][0, spy.seen.tile[0] < 0].any() and (spy.seen.tile[0] < 0).any()


SIZES = [(20, 30), (30, 14), (16, 16), (60, 62), (16, 44), (47, 16), (14, 30), (33, 60), (62, 60), (48, 48)]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_of_every_size_in_generate(family):
    """`generate` encodes where nothing tells the sizes: many images of different sizes in one call, and beams."""
    samples = [Sample(family, [2, Image(size), 3], seed) for seed, size in enumerate(SIZES)]
    specs = {"features None": ("features", None), "received": ("received_attention", 1)}
    spy = Spy(specs)
    with apply_pruner(shared(family), spy, keep=2):
        shared(family).generate(**collate(samples), max_new_tokens=1, num_beams=2, suppress_tokens=tiny.SPECIAL)
    media = [medium for medium in media_of(samples) for _ in range(2)]
    for row, medium in enumerate(media):
        real = ~newline_rows(family, medium)
        n = int(real.sum())
        assert_close(spy.seen.tower["features None"][row, :n], by_token(family, medium, "features", None)[real])
        assert_close(spy.seen.tower["received"][row, :n], by_token(family, medium, "received_attention", 1)[real])


def test_tile_after_resizing_is_the_nearest():
    family, medium = "llava_onevision", Sample("llava_onevision", [Image(1)]).media[0]
    spy = Spy({"f": ("features", None)})
    with apply_pruner(shared(family), spy, keep=2):
        shared(family)(**collate([Sample(family, [2, Image(1), 3])]))
    tile, patch = spy.seen.tile[0], spy.seen.patch[0]
    high = tile > 0
    grid = math.isqrt(len(medium.pixels) - 1)  # square grids of tiles in this image
    place = torch.stack([(tile[high] - 1) // grid, (tile[high] - 1) % grid], -1) * 4 + patch[high]
    tiles = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()  # of the tiles after the base
    inside = torch.cartesian_prod(torch.arange(4), torch.arange(4)).float()
    where = torch.cat([torch.zeros(1, 16, 2), tiles[:, None] * 4 + inside])
    blended = pack(family, medium, where, math.nan)
    blended = blended[~blended.isnan().any(-1)][16:]
    assert (place - blended).abs().max() <= 0.5 + 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_beams(family):
    """Images are encoded before the model is called and repeated in groups; every beam gets its own.

    Before 5.18 `generate` repeated a LLaVA's images wrongly, pruned or not, unless every row had one.
    """
    samples = mixed_batch(family)
    if not ENCODES_FIRST and family not in QWEN:
        samples = [Sample(family, [4, Image(0), 6], 1), Sample(family, [3, Image(2), 9], 2)]
    spy = Spy(all_specs(family))
    with apply_pruner(shared(family), spy, keep=2):
        inputs = collate(samples)
        shared(family).generate(**inputs, max_new_tokens=2, num_beams=2, suppress_tokens=tiny.SPECIAL)
    groups = [sample.of("image") for sample in samples]
    check(family, spy.seen, [medium for group in groups for _ in range(2) for medium in group])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_generate_with_a_video_and_an_image(family):
    samples = [Sample(family, [5, Video(), 2, Image(1), 3], 5)]
    spy = Spy(all_specs(family))
    with apply_pruner(shared(family), spy, keep=2):
        shared(family).generate(**collate(samples), max_new_tokens=1, num_beams=2, suppress_tokens=tiny.SPECIAL)
    check(family, spy.seen, [m for modality in ("image", "video") for m in samples[0].of(modality) for _ in range(2)])


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_stage_sees_the_survivors(family, attn):
    """A stage inside the decoder is shown the same numbers, of the tokens that are left."""
    samples = mixed_batch(family)
    specs = all_specs(family, [None])
    first, second = Spy(specs), Spy(specs, layer=2)
    method = Compose(first, second, budgets=[Budget(keep=7), Budget(keep=2)])
    with apply_pruner(shared(family, attn), method) as handle:
        shared(family, attn)(**collate(samples))
        report = handle.last
    images = sorted(report.images, key=lambda image: (image.sample, image.index))
    for row, image in enumerate(images):
        index = image.stages["projected"]
        assert torch.equal(second.seen.index[row, second.seen.mask[row]], index)
        assert torch.equal(second.seen.tile[row, : len(index)], first.seen.tile[row, index])
        for name in specs:
            assert torch.equal(second.seen.tower[name][row, : len(index)], first.seen.tower[name][row, index])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    """Attention is in fp32, the rest in the model's dtype, near the fp32 model's."""
    model, samples = tiny.build(family, dtype=torch.bfloat16), mixed_batch(family)
    specs = all_specs(family, [0], threshold=0.0)  # rounding moves patches across any other
    spy = Spy(specs)
    with apply_pruner(model, spy, keep=2):
        model(**collate(samples, dtype=torch.bfloat16))
    for name, spec in specs.items():
        got = spy.seen.tower[name]
        scored = spec[0].endswith(("attention", "similarity"))
        assert got.dtype == (torch.float32 if scored else torch.bfloat16)
        for row, medium in enumerate(media_of(samples)):
            want = by_token(family, medium, *spec)[~newline_rows(family, medium)]
            assert_close(got[row, : len(want)].float(), want, 0.08)


# --------------------------------------------------------------------------------------- towers set up in other ways
def built(family, **changes):
    """A tiny model with other settings of the vision side."""
    config = tiny._config(family)
    for name, value in changes.items():
        setattr(config if hasattr(config, name) else config.vision_config, name, value)
    config._attn_implementation = "eager"
    model = tiny._CLASSES[family](config)
    tiny._fill(model, 0)
    return model.eval()


def test_norms_of_the_tower():
    """InternViT with norms over queries and keys, and one after the last layer."""
    model = built("internvl", use_mean_pooling=False, use_qk_norm=True)
    sample, spy = Sample("internvl", [4, Image(1), 6], 1), Spy(all_specs("internvl"))
    with apply_pruner(model, spy, keep=2):
        model(**collate([sample]))
    seen, tower = spy.seen, model.model.vision_tower
    assert_close(seen.projector(seen.tower["features None"]), seen.features)
    out = tower(sample.media[0].pixels, output_attentions=True, output_hidden_states=True)
    block = tower.encoder.layer[0]
    group = lambda x: x.unflatten(1, (4, 2, 4, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # noqa: E731
    for kind, rows in (
        ("cls_attention", out.attentions[0][:, :, 0]),
        ("received_attention", out.attentions[0].mean(2)),
    ):
        assert_close(seen.tower[f"{kind} 0"][0], group(rows.mean(1)[:, 1:]).mean(2).flatten())
    keys = block.attention.k_proj(block.layernorm_before(out.hidden_states[0]))[:, 1:]
    assert_close(seen.tower["keys 0"][0].flatten(1), group(keys).mean(2).flatten(0, 1))


def test_several_feature_layers():
    """Hidden state 0 is what enters the first layer."""
    model = built("llava", vision_feature_layer=[-3, 0, -1])
    model.model.multi_modal_projector.linear_1 = torch.nn.Linear(72, 32)
    sample, spy = Sample("llava", [4, Image(), 6], 1), Spy({"f": ("features", None), "k": ("keys", None)})
    with apply_pruner(model, spy, keep=2):
        model(**collate([sample]))
    out = model.model.vision_tower(sample.media[0].pixels, output_hidden_states=True)
    want = torch.cat([out.hidden_states[n][:, 1:] for n in (-3, 0, -1)], -1)
    assert torch.equal(spy.seen.tower["f"], want)
    block = model.model.vision_tower.encoder.layers[2].self_attn
    assert_close(
        spy.seen.tower["k"].flatten(2),
        block.k_proj(model.model.vision_tower.encoder.layers[2].layer_norm1(out.hidden_states[2]))[:, 1:],
    )


def test_cls_as_a_feature():
    """The "full" strategy passes CLS on; it is a separator, like `image_newline`."""
    model = built("llava", vision_feature_select_strategy="full")
    sample = Sample("llava", [4, [tiny.IMAGE] * 17, 6], 1)
    pixels = Sample("llava", [Image()], 2).media[0].pixels
    for newlines in (False, True):
        spy = Spy({"f": ("features", None), "a": ("cls_attention", 1)}, newlines=newlines)
        with apply_pruner(model, spy, keep=2):
            model(**collate([sample]), pixel_values=pixels)
        out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        want = out.attentions[1][:, :, 0].mean(1)
        want[:, 0] = 0
        assert_close(spy.seen.tower["a"], want[:, 1 - newlines :])
        assert torch.equal(spy.seen.tower["f"], out.hidden_states[2][:, 1 - newlines :])


def test_another_layer_in_the_call_is_refused():
    model, inputs = shared("llava"), collate([Sample("llava", [4, Image(), 6], 1)])
    with apply_pruner(model, Spy({"f": ("features", None)}), keep=2):
        with pytest.raises(InputError, match="vision_feature_layer=-1"):
            model(**inputs, vision_feature_layer=-1)
        model(**inputs, vision_feature_layer=-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_merges(family):
    """What is merged in the tower's space is differentiated, as the rest is."""
    model, samples = tiny.build(family), mixed_batch(family)
    tower = model.model.visual if family in QWEN else model.model.vision_tower
    weight = next(p for n, p in tower.named_parameters() if n.endswith(("k_proj.weight", "qkv.weight")))
    with torch.enable_grad(), apply_pruner(model, Average(), keep=1):
        (model(**collate(samples)).logits ** 2).sum().backward()
        slope = float((weight.grad * (direction := weight.grad / weight.grad.norm())).sum())
        values = []
        with torch.no_grad():
            for step in (1e-3, -1e-3):
                weight += step * direction
                values.append(float((model(**collate(samples)).logits.double() ** 2).sum()))
                weight -= step * direction
    assert abs((values[0] - values[1]) / 2e-3 - slope) < 0.02 * slope


# --------------------------------------------------------------------------------------------------------- lifetime
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_changes_nothing(family):
    inputs = collate(mixed_batch(family))
    want = pristine(family)(**inputs).logits
    with apply_pruner(shared(family), Spy(all_specs(family)), ratio=0.0):
        assert torch.equal(shared(family)(**inputs).logits, want)
    with apply_pruner(shared(family), Spy(all_specs(family)), keep=2) as handle, handle.disabled():
        assert torch.equal(shared(family)(**inputs).logits, want)


def test_hooks_only_on_what_signals_are_made_of():
    model = shared("llava")
    bare = fingerprint(model)
    with apply_pruner(model, Spy({"a": ("cls_attention", 1), "k": ("keys", 0)}), keep=2):
        touched = {line.split(":")[0] for line in changed(bare, fingerprint(model)) if "vision_tower." in line}
    layers = "model.vision_tower.encoder.layers"
    # On every layer alike, for torch.compile shares the code of one among all; where nothing is read they do nothing.
    ends = ("", ".self_attn", ".self_attn.q_proj", ".self_attn.k_proj")
    reads = {f"{layers}.{number}{end}" for number in range(3) for end in ends}
    assert touched == reads
    assert not changed(bare, fingerprint(model))


def test_an_exception_leaves_nothing_behind():
    model, samples = tiny.build("llava"), mixed_batch("llava")
    spy = Spy(all_specs("llava"))

    def fail(*args):
        raise RuntimeError("on purpose")

    with apply_pruner(model, spy, keep=2) as handle:
        capture = handle._engine.tower
        hook = model.model.vision_tower.encoder.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**collate(samples))
        assert capture.place.state is None
        hook.remove()
        model(**collate(samples))
        assert capture.place.state is None and (capture.place.encoded is None or capture.place.encoded() is None)
    check("llava", spy.seen, media_of(samples))


def test_a_copy_has_its_own_place():
    model, samples = tiny.build("internvl"), mixed_batch("internvl")
    with apply_pruner(model, Spy({"a": ("received_attention", None)}), keep=2):
        other = copy.deepcopy(model)
        assert torch.equal(other(**collate(samples)).logits, model(**collate(samples)).logits)


def test_threads_do_not_meet():
    from concurrent.futures import ThreadPoolExecutor

    model = shared("llava_next")
    batches = [collate([Sample("llava_next", [3, Image(n % 3), 4], n)]) for n in range(6)]
    with apply_pruner(model, AttentionOnly(), keep=5):
        alone = [model(**batch).logits for batch in batches]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda batch: _run(model, batch), batches))
    for one, other in zip(alone, together):
        assert torch.equal(one, other)


def _run(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@dataclass
class AttentionOnly(Reducer):
    """Keeps what CLS looks at."""

    newlines: bool = False
    name = "attention_only"
    tower = {"attention": Tower("cls_attention")}

    def reduce(self, tokens, keep):
        return Reduction(*topk_indices(tokens.tower["attention"], keep, tokens.mask))


@pytest.mark.parametrize("family", ["llava_next", "internvl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_what_it_is_alone(family, side):
    model, samples = shared(family), mixed_batch(family)
    with apply_pruner(model, AttentionOnly(), keep=5) as handle:
        model(**collate(samples, side))
        together = {(image.sample, image.index): image.kept.tolist() for image in handle.last.images}
        for number, sample in enumerate(samples):
            if sample.media:
                model(**collate([sample]))
                for image in handle.last.images:
                    assert image.kept.tolist() == together[number, image.index]


def test_peft():
    from peft import LoraConfig, get_peft_model

    model = tiny.build("llava")
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*(q_proj|k_proj)", r=2))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    spy, samples = Spy({"a": ("cls_attention", 1)}), [Sample("llava", [4, Image(), 6], 1)]
    with apply_pruner(wrapped, spy, keep=2):
        wrapped(**collate(samples))
    tower = wrapped.get_base_model().model.vision_tower
    tower.set_attn_implementation("eager")
    want = tower(samples[0].media[0].pixels, output_attentions=True).attentions[1][:, :, 0, 1:].mean(1)
    assert_close(spy.seen.tower["a"], want)
    assert (spy.seen.tower["a"] - by_token("llava", samples[0].media[0], "cls_attention", 1)).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- refusals
def test_unknown_kind_and_layer():
    with pytest.raises(ConfigError, match="received_attention"):
        Tower("attention")
    for layer in (1.0, 0.0, True, "last"):
        with pytest.raises(ConfigError, match="layer"):
            Tower("keys", layer)


@pytest.mark.parametrize("threshold", [None, -0.1, math.inf, math.nan, "1", True])
def test_a_threshold_is_a_number(threshold):
    with pytest.raises(ConfigError, match="threshold"):
        Tower("important_attention", threshold=threshold)
    with pytest.raises(ConfigError, match="important_attention only"):
        Tower("received_attention", threshold=1.0)


@pytest.mark.parametrize("layer", [3, -4])
def test_layer_out_of_range(layer):
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        apply_pruner(shared("llava"), Spy({"k": ("keys", layer)}), keep=2)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_CLS])
@pytest.mark.parametrize("kind", ["cls_attention", "joint_cls_attention", "cls_value_similarity"])
def test_no_cls(family, kind):
    with pytest.raises(UnsupportedMethodError, match=r"no CLS token; methods that work: .*divprune"):
        apply_pruner(shared(family), Spy({"a": (kind, None)}), keep=2)


def test_unknown_tower():
    model = tiny.build("llava")
    model.model.vision_tower.config.model_type = "home_made"
    bare = fingerprint(model)
    with pytest.raises(UnsupportedMethodError, match="clip_vision_model.*not for 'home_made'"):
        apply_pruner(model, Spy({"k": ("keys", None)}), keep=2)
    assert not changed(bare, fingerprint(model))
    apply_pruner(model, "random", keep=2).remove()


@pytest.mark.skipif(not ENCODES_FIRST, reason="mm_encoder_outputs came with transformers 5.18")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_images_encoded_without_the_pruner(family):
    model, inputs = shared(family), collate([Sample(family, [4, Image(), 6], 1)])
    pixels = {key: inputs.pop(key) for key in ("pixel_values", "image_grid_thw") if key in inputs}
    encoded = [model.model.get_image_features(**pixels, return_dict=True)]
    with apply_pruner(model, Spy({"k": ("keys", 0)}), keep=2):
        encoded.append(model.model.get_image_features(**pixels, return_dict=True))
    with apply_pruner(model, spy := Spy({"k": ("keys", None)}), keep=2):
        for given in encoded:
            with pytest.raises(InputError, match="pixel_values"):
                model(**inputs, mm_encoder_outputs={"image": given})
        given = model.model.get_image_features(**pixels, return_dict=True)
        for _ in range(2):  # the same outputs may be used again
            model(**inputs, mm_encoder_outputs={"image": given})
    assert_close(spy.seen.tower["k"][0], by_token(family, _one(family), "keys", None))


def _one(family):
    return Sample(family, [4, Image(), 6], 1).media[0]


def test_inputs_embeds_have_no_signals():
    model, inputs = shared("llava"), collate([Sample("llava", [4, Image(), 6], 1)])
    embeds = model.model.get_input_embeddings()(inputs["input_ids"])
    with apply_pruner(model, Spy({"k": ("keys", None)}), keep=2) as handle:
        with handle.visual_mask(inputs["input_ids"] == tiny.IMAGE), pytest.raises(InputError, match="inputs_embeds"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_listing_knows_tower_signals():
    from prune.registry import MethodInfo, signals_of

    assert signals_of(AttentionOnly()) == ("tower:cls_attention",)
    assert MethodInfo and "divprune" in list_methods(signals=set())


# ----------------------------------------------------------------------------------------------------------- merging
@dataclass
class Average(Reducer):
    """Folds every dropped token into the first kept one, in the tower's space."""

    site: str = "projected"
    newlines: bool = False
    name, merges, needs_projector = "average", True, True

    def reduce(self, tokens, keep):
        n, k = tokens.mask.shape[1], max(keep)
        index = torch.arange(k).expand(len(tokens.mask), -1)
        source = torch.arange(k, n).expand(len(tokens.mask), -1)
        real = tokens.mask[:, k:]
        share = real / (1 + real.sum(1, keepdim=True))
        scale = torch.ones(index.shape)
        scale[:, 0] = 1 - share.sum(1)
        self.seen = tokens
        self.reduction = Reduction(index, None, Merge(source, torch.zeros_like(source), share, scale, space="tower"))
        return self.reduction


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_before_the_projector(family):
    """Against averaging the tower's features by hand and sending the average through the projector."""
    model, samples, entered = shared(family), mixed_batch(family), {}
    if family in VIDEO_FAMILIES:  # OneVision pools after projecting: tokens that receive nothing must not notice
        samples.append(Sample(family, [5, Video(), 3], 5))
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.update(h=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        with apply_pruner(model, method := Average(), keep=4):
            model(**collate(samples))
    finally:
        hook.remove()
    core, features, row = pristine(family).model, method.seen.features, 0
    for number, sample in enumerate(samples):
        for medium in sample.media:
            real = ~newline_rows(family, medium)
            rows = by_token(family, medium, "features", None)[real]
            mean = torch.cat([rows[:1], rows[4:]]).mean(0)  # 1 to 3 are kept as they are
            if family in QWEN:
                want = core.visual.merger(mean.view(4, -1))[0]
            else:
                want = core.multi_modal_projector(mean[None])[0]
            hidden = entered["h"][number]
            assert ((hidden - want).abs().amax(-1) <= 1e-5 * want.abs().max()).any(), f"{family} row {row}"
            for slot in range(1, 4):  # the others are as they were, to the bit
                assert (hidden == features[row, slot]).all(-1).any()
            row += 1
    assert row == len(features)


def test_merging_in_the_tower_is_for_projected_only():
    with apply_pruner(shared("llava"), Average("decoder:2"), keep=4), pytest.raises(ConfigError, match="projected"):
        shared("llava")(**collate([Sample("llava", [4, Image(), 6], 1)]))


def test_memory_and_index_across_stages():
    """What an early stage stores per original token is found again by a later one."""

    @dataclass
    class Early(Reducer):
        name, tower = "early", {"a": Tower("received_attention")}

        def reduce(self, tokens, keep):
            tokens.memory["score"] = tokens.tower["a"]
            return Reduction(*topk_indices(tokens.features.float().norm(dim=-1), keep, tokens.mask))

    @dataclass
    class Late(Reducer):
        name, site, tower = "late", "decoder:2", {"a": Tower("received_attention")}

        def reduce(self, tokens, keep):
            carried = tokens.memory["score"].gather(1, tokens.index)
            self.same = torch.equal(carried[tokens.mask], tokens.tower["a"][tokens.mask])
            return Reduction(*topk_indices(carried, keep, tokens.mask))

    late = Late()
    with apply_pruner(shared("qwen2_5_vl"), Compose(Early(), late, budgets=[Budget(keep=6), Budget(keep=2)])):
        shared("qwen2_5_vl")(**collate(mixed_batch("qwen2_5_vl")))
    assert late.same
    assert get_method("random").tower == {}
