"""What the engine for vision transformers does beside the contract: signals, restoration, entry points, refusals."""

import copy
import pickle
import threading
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from fingerprint import changed, fingerprint
from reference_vit import attend
from tiny_vit import (
    DEPTH,
    PATCHES,
    ROWS,
    TIMM,
    VITS,
    Fold,
    Folds,
    Loud,
    LoudThenFold,
    Reads,
    Spread,
    build,
    images,
    kept_of,
    needs_masks,
    run,
    takes_masks,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune import (
    AlreadyAttachedError,
    Budget,
    Compose,
    ConfigError,
    Geometry,
    InputError,
    Merge,
    Method,
    Reduction,
    Site,
    Stage,
    Tower,
    UnsupportedMethodError,
    UnsupportedModelError,
    apply_pruner,
    get_handle,
    get_method,
)
from prune.adapters.vit import works_on
from prune.adapters.vit_families import VIT_FAMILIES, find_vit
from prune.adapters.vit_run import new_sizes, went_to
from prune.kernels.attention import row_attention


@pytest.fixture(autouse=True)
def old_transformers(request):
    """DINOv2 before transformers took masks is built in another way, too; the contract covers what it can do."""
    name, row = (
        getattr(request.node, "callspec", None) and request.node.callspec.params.get(key) for key in ("name", "row")
    )
    if name and not takes_masks(name) and (row is None or needs_masks(row)):
        pytest.skip("this attention takes no mask in this version of transformers")


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("grad" in request.node.name):
        yield


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def outputs_of_blocks(model, name, pixels):
    """What every block of a bare model gives, `[B, T, D]`."""
    parts, found = find_vit(model), []
    hooks = [part.block.register_forward_hook(lambda m, a, out: found.append(out)) for part in parts.blocks]
    run(name, model, pixels)
    for hook in hooks:
        hook.remove()
    found = [out[0] if isinstance(out, tuple) else out for out in found]
    return found if parts.batch_first else [out.transpose(0, 1) for out in found]


def attention_by_hand(model, name, pixels, index):
    """(q, k, v, weights) of one block for each image, on a bare model; `[H, T, d]` and `[H, T, T]`."""
    found = {}

    def keep(module, args, kwargs):
        found["x"] = args[0] if args else next(iter(kwargs.values()))
        found["rope"] = kwargs.get("rope")

    parts = find_vit(model)
    part = parts.blocks[index]
    hook = part.attention.register_forward_pre_hook(keep, with_kwargs=True)
    run(name, model, pixels)
    hook.remove()
    x = found["x"] if parts.batch_first else found["x"].transpose(0, 1)
    numbers = list(range(PATCHES))
    return [attend(part.attention, row, None, found["rope"], VITS[name].prefix, numbers)[1:] for row in x]


# ------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("place", ["input", "inside"])
@pytest.mark.parametrize("name", VITS)
def test_block_signal_is_the_attention_that_ran_last(name, place):
    model, prefix = build(name), VITS[name].prefix
    by_hand = attention_by_hand(model, name, images(), 1)
    reader = Reads(signals=("block", "keys", "values"), layer=2 if place == "input" else 1, place=place)
    with apply_pruner(model, reader, keep=9):
        run(name, model, images())
    (tokens,) = reader.seen
    block = tokens.block
    assert (block.prefix, block.cls, block.bias) == (prefix, VITS[name].cls, None)
    assert block.valid.all() and block.valid.shape == (3, prefix + PATCHES)
    for row, (q, k, v, weights) in enumerate(by_hand):
        close(block.queries[row].transpose(0, 1), q)
        close(block.keys[row].transpose(0, 1), k)
        close(block.values[row].transpose(0, 1), v)
        close(row_attention(block.queries, block.keys, block.scale)[row], weights)
        close(tokens.keys[row].transpose(0, 1), k[:, prefix:])
        close(tokens.values[row].transpose(0, 1), v[:, prefix:])
    assert tokens.prefix_features.shape == (3, prefix, tokens.features.shape[-1])


def test_raw_keys_come_before_norm_and_rotation():
    for name in ("timm-qknorm", "eva", "eva-split"):
        model = build(name)
        attention = find_vit(model).blocks[1].attention
        found = []
        hook = (
            find_vit(model).blocks[1].attention.register_forward_pre_hook(lambda m, a, found=found: found.append(a[0]))
        )
        reader = Reads(signals=("block",))
        with apply_pruner(model, reader, keep=9):
            run(name, model, images())
        hook.remove()
        x, raw = found[0], reader.seen[0].block.raw_keys
        if name == "eva-split":
            want = attention.k_proj(x)
        else:
            bias = attention.qkv.bias
            if bias is None:
                bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            want = F.linear(x, attention.qkv.weight, bias).chunk(3, -1)[1]
        close(raw.flatten(2), want)
        assert not torch.allclose(raw, reader.seen[0].block.keys)
    reader = Reads(signals=("block",))
    with apply_pruner(model := build("timm"), reader, keep=9):
        run("timm", model, images())
    assert reader.seen[0].block.raw_keys is None


LIKE_A_DECODER = ("timm", "timm-map", "timm-registers", "eva", "open_clip", "CLIPVisionModel", "SiglipModel")


@pytest.mark.parametrize("name", LIKE_A_DECODER)
def test_signals_written_for_language_models(name):
    model, prefix, cls = build(name), VITS[name].prefix, VITS[name].cls
    spec = {
        "received": Tower("received_attention"),
        "early": Tower("received_attention", 0),
        "share": Tower("keys", 0.4),
        "features": Tower("features"),
        "first": Tower("features", 0),
        "pixels": Tower("pixels"),
    }
    if cls:
        spec["cls"] = Tower("cls_attention", -1)
    signals = ("last_token_attention", "normed_features", *(("attention",) if cls else ()))
    by_hand = {index: attention_by_hand(model, name, images(), index) for index in (0, 1)}
    blocks = outputs_of_blocks(model, name, images())
    reader = Reads(signals=signals, tower=spec)
    with apply_pruner(model, reader, keep=9):
        run(name, model, images())
    (tokens,) = reader.seen
    for row in range(3):
        weights = {index: by_hand[index][row][3].mean(0) for index in (0, 1)}
        close(tokens.tower["received"][row], weights[1].mean(0)[prefix:])
        close(tokens.tower["early"][row], weights[0].mean(0)[prefix:])
        if cls:
            close(tokens.last_token_attention[row], weights[1][0, prefix:])
            close(tokens.tower["cls"][row], weights[1][0, prefix:])
        else:
            close(tokens.last_token_attention[row], weights[1].mean(0)[prefix:])
    close(tokens.tower["features"], blocks[1][:, prefix:])
    close(tokens.tower["first"], blocks[0][:, prefix:])
    close(tokens.normed_features, find_vit(model).final(blocks[1][:, prefix:]))
    if name != "eva":  # its raw keys are tested above
        close(tokens.tower["share"], torch.stack([row[1].transpose(0, 1)[prefix:] for row in by_hand[0]]))
    pixels = F.unfold(images(), 4, stride=4).transpose(1, 2)
    assert torch.equal(tokens.tower["pixels"], pixels)
    assert tokens.coordinates[0].tolist() == [[0, 0, n // 5, n % 5] for n in range(PATCHES)]
    if cls:
        at = tokens.attention
        assert not at.causal and at.text_mask.shape == (3, 0)
        last = at.queries[torch.arange(3), at.last][:, None]
        seen = row_attention(last, at.keys, at.scale)[:, :, 0].mean(1)
        close(seen.gather(1, at.slots), tokens.last_token_attention)


def test_vatp_reads_cls():
    model = build("timm")
    by_hand = attention_by_hand(model, "timm", images(), 1)
    with apply_pruner(model, "vatp", keep=6) as handle:
        run("timm", model, images())
    for row, (_, _, v, weights) in enumerate(by_hand):
        score = (weights[:, 0, 1:] * v[:, 1:].abs().sum(-1)).mean(0)
        assert kept_of(handle)[row] == score.topk(6).indices.sort().values.tolist()


@pytest.mark.parametrize("name", ["SiglipVisionModel", "timm-map", "timm-registers"])
def test_vatp_reads_what_patches_receive(name):
    model, prefix = build(name), VITS[name].prefix
    by_hand = attention_by_hand(model, name, images(), 1)
    with apply_pruner(model, get_method("vatp", rows="received"), keep=6) as handle:
        run(name, model, images())
    for row, (_, _, v, weights) in enumerate(by_hand):
        score = (weights[:, prefix:, prefix:].mean(1) * v[:, prefix:].abs().sum(-1)).mean(0)
        assert kept_of(handle)[row] == score.topk(6).indices.sort().values.tolist()


def test_grid_is_rows_by_columns():
    model = timm.models.VisionTransformer(**{**TIMM, "img_size": (12, 24)}, dynamic_img_size=True).eval()
    reader = Reads(tower={"pixels": Tower("pixels")})
    for height, width in ((12, 24), (24, 12), (8, 20)):
        pixels = torch.randn(2, 3, height, width)
        reader.seen.clear()
        with apply_pruner(model, reader, ratio=0.5) as handle:
            model(pixels)
            (tile,) = handle.last.images[0].layout.tiles
        assert tile == (1, height // 4, width // 4)
        (tokens,) = reader.seen
        assert tokens.patch[0, -1].tolist() == [height // 4 - 1, width // 4 - 1]
        assert torch.equal(tokens.tower["pixels"][1, 1].view(3, 4, 4), pixels[1, :, :4, 4:8])


def test_later_stages_see_survivors():
    """Order of the kept tokens, sizes, memory and signals follow a merge; "block" at the input has its tokens too."""
    model = build("timm")

    reader = Reads(signals=("block",), tower={"early": Tower("received_attention", 0)}, layer=2)
    whole = Reads(tower={"early": Tower("received_attention", 0)}, layer=2)
    with apply_pruner(model, whole, keep=9):
        run("timm", model, images())
    method = Compose(Fold(1), reader, budgets=[Budget(keep=12), Budget(keep=5)])
    with apply_pruner(model, method) as handle:
        run("timm", model, images())
    (tokens,) = reader.seen
    assert tokens.features.shape[1] == 12 and not torch.equal(tokens.index, tokens.index.sort(1).values)
    close(tokens.sizes.sum(1), torch.full((3,), float(PATCHES)))
    early = whole.seen[0].tower["early"].gather(1, tokens.index)
    assert torch.equal(tokens.tower["early"], early)
    assert tokens.block.queries.shape[1] == 13
    assert kept_of(handle) == tokens.index.sort(1).values[:, :5].tolist()
    first = reader.seen[0].block
    by_hand = attention_by_hand(model, "timm", images(), 1)  # block 1 ran on all, then was cut
    for row in range(3):
        close(first.keys[row, 1:].transpose(0, 1), by_hand[row][1][:, 1:][:, tokens.index[row]])


def test_merging_nothing_leaves_every_block_alone():
    """r = 0 with LayerScale, whose branch the blocks scale themselves: also what blocks hand on is bit-identical."""
    model = build("timm")
    bare = outputs_of_blocks(model, "timm", images())
    for budget in ({"ratio": 0}, {"keep": PATCHES}):
        with ROWS["tome"].attach(model, **budget) as handle:
            found = outputs_of_blocks(model, "timm", images())
            assert kept_of(handle) == [list(range(PATCHES))] * 3
        assert all(torch.equal(x, y) for x, y in zip(found, bare, strict=True))


# ------------------------------------------------------------------------------------------------- sizes and padding
@pytest.mark.parametrize("name", ["timm", "open_clip", "open_clip-length-first", "CLIPVisionModel", "eva-mixed"])
def test_proportional_attention_is_log_size(name):
    """What attention gives with the engine's mask equals softmax(logits + log size) by hand (also in the contract)."""
    model = build(name)
    with apply_pruner(model, Folds(), keep=6) as handle:
        with_sizes = run(name, model, images())
        assert handle._engine.proportional
    with apply_pruner(model, Folds(), keep=6, proportional=False):
        without = run(name, model, images())
    with apply_pruner(model, get_method("divprune"), keep=6, proportional=True):
        dropped = run(name, model, images())
    with apply_pruner(model, get_method("divprune"), keep=6):
        assert torch.equal(run(name, model, images()), dropped)  # sizes of one change nothing
    assert not torch.allclose(with_sizes, without, atol=1e-5)


def test_copies_of_one_token_count_as_many():
    """Images of one colour without position embedding: all patches are equal, and merging them changes nothing."""
    model = timm.models.VisionTransformer(**TIMM, pos_embed="none").eval()
    pixels = torch.ones(2, 3, 20, 20) * torch.tensor([0.3, -0.7])[:, None, None, None]
    plain = model(pixels)
    with apply_pruner(model, Folds(), keep=4):
        close(model(pixels), plain, 1e-5)
    with apply_pruner(model, Folds(), keep=4, proportional=False):
        assert not torch.allclose(model(pixels), plain, atol=1e-4)


def test_ragged_rows_need_cls_or_restore():
    for name in ("timm-avg", "timm-map", "SiglipVisionModel", "Dinov2ForImageClassification"):
        if not takes_masks(name):
            continue
        model = build(name)
        with pytest.raises(UnsupportedMethodError, match="restore=True"):
            apply_pruner(model, Loud(), keep=20)
        with apply_pruner(model, Loud(), keep=20, restore=True) as handle:
            run(name, model, images())
            assert len({len(kept) for kept in kept_of(handle)}) > 1, "the test wants ragged rows"


# ------------------------------------------------------------------------------------------------------- restoration
@pytest.mark.parametrize("name", ["timm", "timm-avg", "eva", "open_clip-length-first", "SiglipVisionModel"])
def test_restored_blocks_are_copies_and_what_was_dropped(name):
    model, prefix = build(name), VITS[name].prefix
    bare = outputs_of_blocks(model, name, images())
    with apply_pruner(model, "divprune", keep=9, block=2) as handle:
        short = outputs_of_blocks(model, name, images())
    with apply_pruner(model, "divprune", keep=9, block=2, restore=True) as handle:
        full = outputs_of_blocks(model, name, images())
        kept = handle.last
    assert [x.shape[1] - prefix for x in short] == [25, 25, 9, 9]
    assert [x.shape[1] - prefix for x in full] == [25] * 4
    for row, image in enumerate(kept.images):
        numbers = image.order
        dropped = [n for n in range(PATCHES) if n not in numbers.tolist()]
        for index in (2, 3):
            assert torch.equal(full[index][row, :prefix], short[index][row, :prefix])
            assert torch.equal(full[index][row, prefix:][numbers], short[index][row, prefix:])
            close(full[index][row, prefix:][dropped], bare[1][row, prefix:][dropped])


def test_restored_merges_are_copies_of_their_group():
    model = build("timm")
    with apply_pruner(model, Folds(), keep=6) as handle:
        short = outputs_of_blocks(model, "timm", images())[-1]
    with apply_pruner(model, Folds(), keep=6, restore=True) as handle:
        full = outputs_of_blocks(model, "timm", images())[-1]
        for row, image in enumerate(handle.last.images):
            assert image.slots.min() >= 0 and image.slots.unique().numel() == 6
            assert torch.equal(full[row, 1:], short[row, 1:][image.slots])


def test_average_counts_merged_patches_only_if_restored():
    model = build("timm-avg")
    with apply_pruner(model, Folds(), keep=6) as handle:
        short = outputs_of_blocks(model, "timm-avg", images())[-1]
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
        sizes = [torch.bincount(image.slots, minlength=6).float() for image in handle.last.images]
    close(pooled, model.fc_norm(model.norm(short)[:, 1:].mean(1)))
    with apply_pruner(model, Folds(), keep=6, restore=True):
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    weighted = torch.stack([(x[1:] * size[:, None]).sum(0) / PATCHES for x, size in zip(model.norm(short), sizes)])
    close(pooled, model.fc_norm(weighted))


def test_reducers_with_a_reconstruction_of_their_own():
    model, keep = build("timm"), 9
    bare = outputs_of_blocks(model, "timm", images())
    with apply_pruner(model, Spread(), keep=keep):
        short = outputs_of_blocks(model, "timm", images())
    with apply_pruner(model, Spread(), keep=keep, restore=True):
        full = outputs_of_blocks(model, "timm", images())
    before = bare[1][:, 1:]
    after = before[:, : 2 * keep : 2]
    close(full[3][:, 1:], (-torch.cdist(before, after)).softmax(-1) @ short[3][:, 1:])
    method = Compose(Spread(1), Fold(2), budgets=[Budget(keep=12), Budget(keep=5)])
    with apply_pruner(model, method, restore=True):
        assert [x.shape[1] for x in outputs_of_blocks(model, "timm", images())] == [26] * 4


# ------------------------------------------------------------------------------------------------------ entry points
def test_timm_entry_points():
    model, pixels = build("timm"), images()
    with ROWS["fold"].attach(model, keep=7) as handle:
        tokens = model.forward_features(pixels)
        assert tokens.shape == (3, 8, 24) and [len(k) for k in kept_of(handle)] == [7, 7, 7]
        close(model.forward_head(tokens), model(pixels))
        layers = model.get_intermediate_layers(pixels, n=range(DEPTH), return_prefix_tokens=True)
        assert [patches.shape[1] for patches, _ in layers] == [25, 16, 7, 7]
    with ROWS["fold"].attach(model, keep=7, restore=True):
        final, maps = model.forward_intermediates(pixels, indices=[0, 1, 2, 3])
        assert [x.shape for x in maps] == [(3, 24, 5, 5)] * 4
        early = model.forward_intermediates(pixels, indices=[1, 2], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], maps[1]) and torch.equal(early[1], maps[2])
        assert torch.equal(final, model.forward_features(pixels))
        layers = model.get_intermediate_layers(pixels, n=2, reshape=True)
        assert torch.equal(layers[-1], maps[-1])
    with ROWS["fold"].attach(model, keep=7), pytest.raises(RuntimeError, match="shape"):
        model.forward_intermediates(pixels, indices=[3])


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "SiglipVisionModel", "Dinov2Model"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_output_hidden_states(name, before):
    """Collected whichever came first, the model's collecting hooks or ours."""
    model, prefix = build(name), VITS[name].prefix
    if before:
        model(images(), output_hidden_states=True)
    with ROWS["fold"].attach(model, keep=7):
        states = model(images(), output_hidden_states=True).hidden_states
        want = outputs_of_blocks(model, name, images())
        assert [x.shape[1] - prefix for x in states] == [25, 25, 16, 7, 7]
        assert all(torch.equal(x, y) for x, y in zip(states[1:], want))
    with ROWS["fold"].attach(model, keep=7, restore=True):
        states = model(images(), output_hidden_states=True).hidden_states
        assert [x.shape[1] - prefix for x in states] == [25] * 5
        last = states[-1] if name == "CLIPVisionModel" else find_vit(model).final(states[-1])
        close(model(images()).last_hidden_state, last)


def test_open_clip_entry_points():
    model = build("open_clip-CLIP")
    with ROWS["fold"].attach(model, keep=7) as handle:
        features = model.encode_image(images())
        close(model.visual(images()), features)
        text = torch.randint(1, 30, (2, 8))
        close(model(images(), text)[0], F.normalize(features, dim=-1))
        assert [len(k) for k in kept_of(handle)] == [7, 7, 7]


def test_whole_clip_prunes_the_image_side_only():
    model = build("CLIPModel")
    ids = torch.tensor([[1, 4, 5, 2]])
    plain = model(input_ids=ids, pixel_values=images())
    with apply_pruner(model, "fastv", keep=7):
        pruned = model(input_ids=ids, pixel_values=images())
    assert torch.equal(pruned.text_embeds, plain.text_embeds)
    assert not torch.allclose(pruned.image_embeds, plain.image_embeds, atol=1e-4)


@pytest.mark.parametrize("name", ["timm", "ViTModel"])
def test_masks_of_the_caller_are_followed(name):
    """What the caller hides is hidden behind the cut too."""
    model = build(name)
    hidden = torch.zeros(3, 1 + PATCHES, dtype=torch.bool)
    hidden[:, [3, 8, 20]] = True
    additive = torch.zeros(3, 1, 1, 1 + PATCHES).masked_fill(hidden[:, None, None], -torch.inf)
    given = {"attn_mask": additive} if name == "timm" else {"attention_mask": (~hidden).long()}

    def forward(**kwargs):
        out = model(images(), **kwargs)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state[:, 0]

    plain = forward(**given)
    with apply_pruner(model, Reads(layer=1), ratio=0):
        assert torch.equal(forward(**given), plain)
    # Removing exactly the hidden patches changes nothing for the others.
    visible = [n for n in range(PATCHES) if not hidden[0, 1 + n]]

    class Visible(Reads):
        def score(self, tokens):
            return (~hidden[:, 1:]).float().gather(1, tokens.index)

    with apply_pruner(model, Visible(layer=1), keep=len(visible)):
        close(forward(**given), plain)
    # With one of them kept, the mask must still hide it.
    wrong = torch.zeros_like(hidden[:, 1:]).float()
    wrong[:, [3 - 1, 8 - 1]] = 2

    class Some(Reads):
        def score(self, tokens):
            return ((~hidden[:, 1:]).float() + wrong).gather(1, tokens.index)

    with apply_pruner(model, Some(layer=1), keep=len(visible) + 2):
        close(forward(**given), plain)
    with apply_pruner(model, Fold(1), keep=6) as handle:
        ours = forward(**given)
        assert handle._engine.proportional and not torch.allclose(ours, forward(), atol=1e-4)


# ------------------------------------------------------------------------------------------- numbers, grads, threads
@pytest.mark.parametrize("row", ["fastv", "fold", "loud then fold", "fold and restore"])
@pytest.mark.parametrize("name", ["timm", "eva", "open_clip", "CLIPVisionModel", "Dinov2Model"])
def test_bfloat16(name, row):
    model = build(name, torch.bfloat16)
    with ROWS[row].attach(model) as handle:
        out = run(name, model, images().bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        assert all(kept for kept in kept_of(handle))
    with ROWS[row].attach(model := build(name)), torch.autocast("cpu", torch.bfloat16):
        assert run(name, model, images()).isfinite().all()


@pytest.mark.parametrize("row", ["fastv", "fold", "fold and restore"])
@pytest.mark.parametrize(
    "name", ["timm", "eva-split", "open_clip", "ViTModel", "CLIPVisionModel", "SiglipVisionModel", "Dinov2Model"]
)
def test_grads_flow(name, row):
    """Gradients of a pruned model equal finite differences along one direction, with the choice of tokens fixed."""
    model = build(name).double()
    pixels = images(2).double().requires_grad_()
    with ROWS[row].attach(model):
        value = run(name, model, pixels).square().sum()
        value.backward()
        direction = pixels.grad / pixels.grad.norm()
        with torch.no_grad():
            up, down = (run(name, model, pixels + s * 1e-4 * direction).square().sum() for s in (1, -1))
    # merging is done in fp32, and weights of a merge are constants
    torch.testing.assert_close((pixels.grad * direction).sum(), (up - down) / 2e-4, atol=1e-3, rtol=1e-3)
    weights = [part.mlp for part in find_vit(model).blocks]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for mlp in weights for p in mlp.parameters())


def test_grads_in_training_with_dropout():
    for name in ("ViTModel", "Dinov2Model", "timm-qknorm"):
        if not takes_masks(name):
            continue
        model = build(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        with ROWS["fold"].attach(model) as handle:
            run(name, model, images()).sum().backward()
            assert [len(k) for k in kept_of(handle)] == [kept_of(handle)[0].__len__()] * 3


def test_dropout_reaches_the_branch():
    """ViTLayer sends attention and MLP through one dropout; with everything dropped a block cut inside adds nothing."""
    model = build("ViTModel").train()
    for part in find_vit(model).blocks:
        part.after.p = 1.0
    blocks = outputs_of_blocks(model, "ViTModel", images())
    with apply_pruner(model, Folds(), keep=7, proportional=False, restore=False):
        cut = outputs_of_blocks(model, "ViTModel", images())
    close(cut[0], blocks[0])
    assert torch.equal(cut[1], cut[1])
    close(cut[3][:, 0], blocks[3][:, 0])


def test_gradient_checkpointing_is_refused_with_grads():
    model = build("timm").train()
    model.set_grad_checkpointing(True)
    with apply_pruner(model, "divprune", keep=9), pytest.raises(InputError, match="checkpointing"):
        model(images())
    model = build("ViTModel").train()
    model.gradient_checkpointing_enable()
    with apply_pruner(model, "divprune", keep=9), pytest.raises(InputError, match="checkpointing"):
        model(images())
    model = build("open_clip-CLIP").train()
    model.set_grad_checkpointing(True)
    with apply_pruner(model, "divprune", keep=9), pytest.raises(InputError, match="checkpointing"):
        model.encode_image(images())


def test_threads_do_not_meet():
    model, method = build("timm"), LoudThenFold()
    pixels = [images(3)[index % 3 : index % 3 + 1] * (1 + index / 8) for index in range(8)]
    with apply_pruner(model, method, keep=5):
        alone, together = [model(x) for x in pixels], [None] * 8

        def work(index):
            with torch.no_grad():
                for _ in range(5):
                    together[index] = model(pixels[index])

        threads = [threading.Thread(target=partial(work, index)) for index in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(x, y) for x, y in zip(alone, together))


def test_exception_in_the_middle():
    model = build("timm")
    plain = model(images())
    with ROWS["fold"].attach(model) as handle:
        want = model(images())

        def fail(module, args):
            raise RuntimeError("in the middle")

        for place in (model.blocks[2], model.blocks[2].mlp, model.blocks[1].attn.proj):
            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                model(images())
            hook.remove()
            with handle.disabled():  # opens no run, and must not meet the one that broke off
                assert torch.equal(model(images()), plain)
            assert torch.equal(model(images()), want)
            assert handle._engine.place.run is None


def test_nothing_is_held_after_a_forward():
    model = build("timm")
    with apply_pruner(model, "fastv", keep=9) as handle:
        model(images())
        place = handle._engine.place
        assert place.run is None and place.pixels is None and place.record is None


def test_copies_of_a_model_carry_their_own_pruner():
    model = build("timm")
    with ROWS["fastv"].attach(model) as handle:
        want = model(images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            own = get_handle(other)
            assert own is not None and torch.equal(other(images()), want)
            own.remove()
            assert not torch.equal(other(images()), want)
            assert handle._engine.attached and torch.equal(model(images()), want)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("timm", "fold and restore"),
        ("CLIPVisionModel", "fastv"),
        ("open_clip", "tome"),
        ("SiglipVisionModel", "fold"),
        ("Dinov2Model", "fastv"),
    ],
)
def test_compile_equals_eager(name, row):
    """Every hook is a graph break, and all blocks break alike: torch.compile shares the code of one with the others."""
    model = build(name)
    with ROWS[row].attach(model) as handle:
        want, kept = run(name, model, images()), kept_of(handle)
        torch._dynamo.reset()
        compiled = torch.compile(lambda pixels: run(name, model, pixels), backend="eager")
        for _ in range(2):
            close(compiled(images()), want, 1e-5)
            assert kept_of(handle) == kept and all(len(row) < PATCHES for row in kept)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------- the handle and budgets
def test_handle():
    model = build("timm")
    before = fingerprint(model)
    with apply_pruner(model, "divprune", ratio=0.6, block=1) as handle:
        assert handle.last is None and get_handle(model)._engine is handle._engine
        model(images())
        report = handle.last
        assert [image.sample for image in report.images] == [0, 1, 2]
        assert report.tokens_per_layer == [[25, 10, 10, 10]] * 3 == report.tokens_per_mlp
        assert "25 -> 10 patches (block:1)" in str(report)
        assert report.images[0].slots[report.images[0].order].tolist() == list(range(10))
        handle.budget = Budget(keep=4)
        model(images()[:1])
        assert [len(kept) for kept in kept_of(handle)] == [4]
        with pytest.raises(AlreadyAttachedError):
            apply_pruner(model, "random", ratio=0.5)
        with pytest.raises(ConfigError, match="vision-language"), handle.visual_mask(torch.ones(1, 1)):
            pass
    assert not changed(before, fingerprint(model)) and get_handle(model) is None


@pytest.mark.parametrize("place", ["input", "inside"])
@pytest.mark.parametrize("name", ["timm", "timm-avg", "eva", "open_clip", "ViTModel", "Dinov2WithRegistersModel"])
def test_flops_of_a_report_are_what_torch_counts(name, place):
    model, spent = build(name), []
    reader = Reads(layer=2, place=place)  # ranks without a product, and reads nothing
    for pruned in (False, True):
        handle = apply_pruner(model, reader, keep=7) if pruned else None
        with FlopCounterMode(display=False) as counter:
            run(name, model, images(2))
        spent.append(counter.get_total_flops())
    last = handle.last
    assert spent[0] - spent[1] == sum(last.flops_full) - sum(last.flops) > 0
    assert last.tokens_per_layer[0] == ([25, 25, 7, 7] if place == "input" else [25, 25, 25, 7])


def test_flops_budget_prices_short_mlps():
    model, kept = build("timm"), []
    for place in ("input", "inside"):
        with apply_pruner(model, Fold(2, place), flops=0.8) as handle:
            model(images(1))
            share = handle.last.flops[0] / handle.last.flops_full[0]
            kept.append(len(handle.last.images[0].kept))
        assert abs(share - 0.8) < 0.02
    assert kept[0] > kept[1], "a cut inside saves less in its block"


def test_where_methods_for_language_models_go():
    model = build("timm")
    for method, options, block in (
        ("divprune", {}, 1),  # a third of four
        ("divprune", {"block": 3}, 3),
        ("fastv", {}, 2),
        ("fastv", {"layer": 3}, 3),
        ("vatp", {"block": 1}, 1),
    ):
        with apply_pruner(model, method, keep=9, **options) as handle:
            model(images())
            assert list(handle.last.images[0].stages) == [f"block:{block}"]


def test_save_and_load(tmp_path):
    model = build("SiglipVisionModel")
    with apply_pruner(model, "divprune", keep=9, block=3, restore=True, proportional=False) as handle:
        want = run("SiglipVisionModel", model, images())
        path = handle.save_pretrained(tmp_path)
    assert '"SigLIP"' in path.read_text() and '"positions"' not in path.read_text()
    with apply_pruner(model, tmp_path) as handle:
        assert torch.equal(run("SiglipVisionModel", model, images()), want)
        assert handle.budget == Budget(keep=9) and "block:3" in handle.last.images[0].stages
    with apply_pruner(model, tmp_path, block=2) as handle:
        run("SiglipVisionModel", model, images())
        assert "block:2" in handle.last.images[0].stages
    broken = tmp_path / "pruner_config.json"
    broken.write_text(broken.read_text().replace('"block": 3', '"block": "three"'))
    with pytest.raises(ConfigError, match="vit must be"):
        apply_pruner(model, tmp_path)


# --------------------------------------------------------------------------------------------------------- refusals
REFUSED = {
    "text": ("timm", "sparsevlm", {}, UnsupportedMethodError, "acts at"),
    "question": ("timm", "greedyprune", {}, UnsupportedMethodError, "text_features.*divprune"),
    "prompt": ("timm", "cdpruner", {}, UnsupportedMethodError, "inputs.*vision-language"),
    "projector": ("timm", "zooprune", {}, UnsupportedMethodError, "projector"),
    "no CLS": ("timm-map", "fastervlm", {}, UnsupportedMethodError, "no CLS token.*hiprune"),
    "no CLS row": ("SiglipVisionModel", "vatp", {}, UnsupportedMethodError, "CLS"),
    "several stages": ("timm", "pyramiddrop", {}, UnsupportedMethodError, "at blocks, or"),
    "too deep": ("timm", "fastv", {"layer": 9}, ConfigError, "blocks 0 to 3"),
    "out of range": ("timm", "divprune", {"block": 4}, ConfigError, "blocks 0 to 3"),
    "not a number": ("timm", "divprune", {"block": True}, ConfigError, "out of range"),
    "before attention": ("timm", "fastv", {"block": 0}, UnsupportedMethodError, "block>=1"),
    "before features": ("timm", "vispruner", {"block": 0}, UnsupportedMethodError, "none runs before"),
    "positions": ("timm", "divprune", {"positions": "original"}, ConfigError, "position"),
    "places itself": ("timm", Folds(), {"block": 1}, ConfigError, "places itself"),
    "block too deep": ("timm", Folds((2, 7)), {}, ConfigError, "blocks 0 to 3"),
    "descending": ("timm", Folds((2, 1)), {}, ConfigError, "ascend"),
    "wrong place": ("timm", Fold(1, "outside"), {}, ConfigError, "place="),
    "signal too deep": ("timm", Reads(tower={"x": Tower("keys", 3)}), {}, ConfigError, "have run"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    name, method, options, error, match = REFUSED[why]
    model = build(name)
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        apply_pruner(model, method, keep=5, **options)
    assert not changed(before, fingerprint(model))


def test_refusals_list_what_works():
    model = build("timm")
    names = works_on(find_vit(model))
    assert {"divprune", "fastv", "vatp", "random", "hiprune"} <= set(names)
    for name in names:
        if not get_method(name).adaptive:
            with apply_pruner(model, name, keep=9):
                model(images())


LORA = {
    "timm": ["qkv", "fc1", "fc2"],
    "eva": ["fc1", "fc2"],
    "ViTModel": ["k_proj", "fc2"],
    "open_clip": ["c_fc", "c_proj"],
}


@pytest.mark.parametrize("name", LORA)
def test_peft(name):
    """LoRA wraps projections and brings narrow layers: signals go through it, and sizes stay what they are."""
    from peft import LoraConfig, get_peft_model

    model = build(name)
    geometry = find_vit(model).geometry(25)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=LORA[name])).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert find_vit(wrapped).geometry(25) == geometry
    before = fingerprint(wrapped)
    reader = Reads(signals=("block",))
    with apply_pruner(wrapped, reader, keep=9) as handle:
        run(name, wrapped.base_model.model, images())
        assert [len(kept) for kept in kept_of(handle)] == [9, 9, 9]
    assert not changed(before, fingerprint(wrapped))
    if name == "timm":
        part, found = find_vit(wrapped).blocks[1], []
        hook = part.attention.qkv.register_forward_hook(lambda module, args, output: found.append(output))
        run(name, wrapped.base_model.model, images())
        hook.remove()
        close(reader.seen[0].block.values.flatten(2), found[0].chunk(3, -1)[2])


def test_sizes_and_slots_of_a_merge():
    """One row of six tokens of sizes 1 to 6, written out."""
    sizes = torch.arange(1.0, 7)[None]
    keep = torch.tensor([[4, 1, 0]])
    merge = Merge(
        source=torch.tensor([[2, 2, 3, 3, 1, 5, 0]]),
        slot=torch.tensor([[0, 1, 1, 2, 1, 2, 0]]),
        #            a quarter, the rest; halves; a kept one into itself; nothing; padding
        weight=torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.5, 0.0, 0.0]]),
    )
    reduction = Reduction(keep, merge=merge)
    assert new_sizes(reduction, sizes, 6).tolist() == [[5 + 0.75, 2 + 2.25 + 2, 1 + 2]]
    assert new_sizes(reduction, None, 6).tolist() == [[1.25, 1 + 0.75 + 0.5, 1.5]]
    # 2 went to slot 1 for the most part, 3 to the first of two equals, and 5 nowhere.
    assert went_to(reduction, 6).tolist() == [[2, 1, 1, 1, 0, -1]]
    assert new_sizes(Reduction(keep), sizes, 6).tolist() == [[5, 2, 1]]
    assert new_sizes(Reduction(keep), None, 6) is None
    own = Reduction(keep, merge=merge, sizes=torch.tensor([[7, 8, 9]]))
    assert new_sizes(own, sizes, 6).tolist() == [[7, 8, 9]]
    ragged = Reduction(torch.tensor([[4, 0]]), torch.tensor([[True, False]]))
    assert went_to(ragged, 6).tolist() == [[-1, -1, -1, -1, 0, -1]]


def test_unknown_blocks_are_refused():
    model = timm.models.VisionTransformer(**TIMM, block_fn=timm.models.vision_transformer.ResPostBlock)
    with pytest.raises(UnsupportedModelError, match="ResPostBlock"):
        apply_pruner(model, "random", ratio=0.5)

    class Other(timm.models.vision_transformer.Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    model = timm.models.VisionTransformer(**TIMM, block_fn=Other)
    with pytest.raises(UnsupportedModelError, match="Other"):
        apply_pruner(model, "random", ratio=0.5)


def test_flash_attention_takes_no_sizes():
    model = build("ViTModel")
    model.config._attn_implementation = "flash_attention_2"
    for method in (Folds(), LoudThenFold()):
        with pytest.raises(UnsupportedMethodError, match="sdpa"):
            apply_pruner(model, method, keep=5)
    apply_pruner(model, Folds(), keep=5, proportional=False).remove()
    model.config._attn_implementation = "sdpa"
    with apply_pruner(model, Folds(), keep=5):
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(InputError, match="sdpa"):
            model(images())


def test_changed_states_between_blocks_and_restore():
    model = build("timm")
    hook = model.blocks[2].register_forward_hook(lambda module, args, out: out + 1)
    with apply_pruner(model, "divprune", keep=9):
        model(images())
    with apply_pruner(model, "divprune", keep=9, restore=True), pytest.raises(InputError, match="between the blocks"):
        model(images())
    hook.remove()


def test_eager_attention_equals_sdpa():
    for row in ("fold", "loud then fold"):
        outs = []
        for attention in ("eager", "sdpa"):
            model = build("CLIPVisionModel", attention=attention)
            with ROWS[row].attach(model):
                outs.append(run("CLIPVisionModel", model, images()))
        close(*outs)


@dataclass
class Chain(Method):
    """A merge, then ragged rows, then a reader."""

    reader: Reads
    name = "chain"

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        n = geometry.visual_tokens
        sites = [Site.parse(f"block:{layer}") for layer in (0, 1, 3)]
        return (
            Stage(sites[0], Fold(0), max(keep, n - 5)),
            Stage(sites[1], Loud(1), max(keep, n - 6)),
            Stage(sites[2], self.reader, keep),
        )


def test_received_attention_ignores_padding_and_counts_sizes():
    """Signals after a ragged cut and a merge: by hand over the valid tokens of every row, with log sizes."""
    model = build("timm")
    reader = Reads(signals=("block", "last_token_attention"), tower={"got": Tower("received_attention", 2)}, layer=3)
    with apply_pruner(model, Chain(reader), keep=4):
        model(images(6))
    (tokens,) = reader.seen
    block = tokens.block
    assert block.bias is not None
    for row in range(6):
        valid = block.valid[row]
        q, k = block.queries[row, valid].transpose(0, 1), block.keys[row, valid].transpose(0, 1)
        weights = (q @ k.transpose(1, 2) * block.scale + block.bias[row, valid]).softmax(-1).mean(0)
        close(tokens.last_token_attention[row][valid[1:]], weights[0, 1:])
        close(tokens.tower["got"][row][valid[1:]], weights.mean(0)[1:])
        assert not tokens.last_token_attention[row][~valid[1:]].any()
    assert not block.valid.all(), "the test wants padding"


def test_families_have_names_and_examples():
    assert len({family.name for family in VIT_FAMILIES}) == len(VIT_FAMILIES)
    assert all(family.example for family in VIT_FAMILIES)
