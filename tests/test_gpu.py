"""What only a GPU can show: nothing waits; compiled models and CUDA graphs give the same tokens. Else skipped."""

import warnings

import pytest
import tiny_vit
import torch
from pretend_device import OURS
from tiny import SPECIAL, Image, Sample, build, collate
from transformers import StaticCache

from prune import apply_pruner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

KINDS = {
    "projected": ("uniform", {}),
    "decoder": ("fastv", {"layer": 1}),
    "stages": ("pyramiddrop", {}),
    "tower": ("hiprune", {}),
    "transition": ("transprune", {"layers": (1, 3)}),
    "block": ("uniform", {"block": 1}),
}


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad():
        yield
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()


def on_gpu(family):
    sample = Sample(family, [4, Image(0), 6], 1)
    inputs = {name: x.cuda() for name, x in collate([sample] * 2).items() if name != "attention_mask"}
    return build(family).cuda(), inputs


def greedy(model, inputs, cache=None, step=None, steps=6):
    """Tokens `[B, steps]` by hand, so that every step can be a compiled function."""
    out = model(**inputs, past_key_values=cache, use_cache=True)
    cache, tokens, length = out.past_key_values, [], inputs["input_ids"].shape[1]
    axes = (3, 2, 1) if hasattr(model.model, "rope_deltas") else (2, 1)
    for number in range(steps):
        logits = out.logits[:, -1].float()
        logits[:, SPECIAL] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        positions = torch.full(axes, length + number, device="cuda")
        if step is not None:
            torch.compiler.cudagraph_mark_step_begin()
        out = (step or model)(input_ids=tokens[-1].clone(), past_key_values=cache, position_ids=positions)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_waits_nowhere_in_our_code_and_a_step_nowhere_at_all(kind):
    model, inputs = on_gpu("llava")
    name, options = KINDS[kind]
    step = {"input_ids": torch.full((2, 1), 5).cuda(), "position_ids": torch.full((2, 1), 26).cuda()}
    with apply_pruner(model, name, ratio=0.5, **options):
        model(**inputs)  # libraries start up, kernels compile
        torch.cuda.set_sync_debug_mode("warn")  # "error" would stop at transformers' own check of placeholders
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = model(**inputs)
        found = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
        assert not [place for place in found if place.startswith(OURS)]
        torch.cuda.set_sync_debug_mode("error")
        model(**step, past_key_values=out.past_key_values)


@pytest.mark.parametrize("name", ["timm", "CLIPVisionModel", "Dinov2Model"])
@pytest.mark.parametrize("method", ["tome", "divprune"])
def test_a_vision_transformer_waits_nowhere(name, method):
    model, pixels = tiny_vit.build(name).cuda(), tiny_vit.images(2).cuda()
    with apply_pruner(model, method, ratio=0.5):
        tiny_vit.run(name, model, pixels)
        torch.cuda.set_sync_debug_mode("error")
        tiny_vit.run(name, model, pixels)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["projected", "decoder", "transition", "block"])
def test_a_compiled_model_gives_the_same_tokens(family, kind):
    model, inputs = on_gpu(family)
    name, options = KINDS[kind]
    with apply_pruner(model, name, ratio=0.5, **options):
        want = greedy(model, inputs)
        compiled = torch.compile(model)
        out = compiled(**inputs)
        torch.testing.assert_close(out.logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(greedy(model, inputs, step=compiled), want)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["projected", "decoder", "stages"])
def test_cuda_graphs_decode_a_pruned_static_cache(family, kind):
    model, inputs = on_gpu(family)
    name, options = KINDS[kind]
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    with apply_pruner(model, name, ratio=0.5, **options):
        want = greedy(model, inputs)
        for _ in range(2):  # the second run replays the graphs
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + 8)
            assert torch.equal(greedy(model, inputs, cache, step), want)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_gpu_keeps_the_tokens_a_cpu_keeps(family):
    for name, options in KINDS.values():
        model, inputs = on_gpu(family)
        with apply_pruner(model, name, ratio=0.5, **options) as handle:
            out = model(**inputs)
            there = [image.kept.tolist() for image in handle.last.images]
            model.cpu()
            here = model(**{name: x.cpu() for name, x in inputs.items()})
            assert there == [image.kept.tolist() for image in handle.last.images]
            torch.testing.assert_close(out.logits.cpu(), here.logits, rtol=1e-3, atol=1e-3)
