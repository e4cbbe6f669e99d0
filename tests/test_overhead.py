"""How often the host waits for the device because of a pruner: counted on a pretended device, against the bare model.

Kernels are left to the reference (the device is not there), and what methods do inside their own files is not asked
here, only what the engine adds to every one of them: `uniform` and readers of every kind of signal stand for all.
"""

from contextlib import nullcontext

import pytest
import tiny_vit
import torch
from pretend_device import OnDevice, PretendDevice, to_device
from tiny import Image, Sample, build, collate
from torch._dynamo.utils import counters
from transformers import StaticCache

from prune import apply_pruner
from prune.errors import InputError


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    monkeypatch.setenv("PRUNE_KERNELS", "torch")
    with torch.no_grad():
        yield


KINDS = {
    "projected": ("uniform", {}),
    "tower": ("hiprune", {}),  # reads the vision encoder
    "decoder": ("fastv", {"layer": 1}),  # reads attention and asks for a question
    "keys": ("dart", {"layer": 2}),
    "stages": ("pyramiddrop", {}),
    "transition": ("transprune", {"layers": (1, 2, 3)}),
    "block": ("uniform", {"block": 1}),  # cuts inside the vision encoder
}

# Waits of the engine in one prefill of two equal samples without padding, beyond those of the bare model. What is left:
#   Qwen      1 for the grid, which the model reads several times itself; readers of its encoder read the segments'
#             bounds (as every layer of it does), cuts inside it the grid again and which segments lost all patches
#   anyres    1 for the newlines that tell the grid (the model reads the sizes itself); readers of the encoder compare
#             one row, then one crop per image, with what the model packed
#   InternVL  1 for the runs of placeholders that tell which tiles are one image
WAITS = {
    "llava": {kind: 0 for kind in KINDS},
    "llava_next": {**{kind: 1 for kind in KINDS}, "tower": 4, "block": 5},
    "llava_onevision": {**{kind: 1 for kind in KINDS}, "tower": 4, "block": 5},
    "qwen2_vl": {**{kind: 1 for kind in KINDS}, "tower": 3, "block": 3},
    "qwen2_5_vl": {**{kind: 1 for kind in KINDS}, "tower": 4, "block": 5},
    "qwen3_vl": {**{kind: 1 for kind in KINDS}, "tower": 3, "block": 3},
    "internvl": {**{kind: 1 for kind in KINDS}, "block": None},
}


@pytest.fixture(scope="module", params=WAITS)
def model(request):
    """A model on the pretended device, its inputs, and how often the bare model waits."""
    found = to_device(build(request.param))
    sample = Sample(request.param, [4, Image(0), 6], 1)
    inputs = {name: x for name, x in collate([sample] * 2).items() if name != "attention_mask"}
    with torch.no_grad():
        with PretendDevice():
            found(**to_device(inputs))  # transformers installs hooks of its own
        with PretendDevice() as device:
            found(**to_device(inputs))
    assert not device.ours()
    return request.param, found, to_device(inputs), device.count(ours=False)


@pytest.mark.parametrize("kind", KINDS)
def test_waits_in_a_prefill_and_in_a_step(model, kind):
    family, bare, inputs, waits = model
    if WAITS[family][kind] is None:
        pytest.skip("the engine does not cut inside this encoder")
    name, options = KINDS[kind]
    with apply_pruner(bare, name, ratio=0.5, **options):
        with PretendDevice() as device:
            out = bare(**inputs)
        assert len(device.ours()) <= WAITS[family][kind] and device.count(ours=True) == WAITS[family][kind], (
            device.ours()
        )
        assert device.count(ours=False) <= waits  # nor does anything we call
        length = inputs["input_ids"].shape[1]
        step = {"input_ids": torch.full((2, 1), 5), "position_ids": torch.full((2, 1), length)}
        with PretendDevice() as device:
            bare(**to_device(step), past_key_values=out.past_key_values)
        assert device.count(ours=True) == device.count(ours=False) == 0


@pytest.fixture(scope="module")
def llava():
    return to_device(build("llava"))


def prefill(model, samples, padded=False, **more):
    inputs = collate(samples)
    if not padded:
        del inputs["attention_mask"]
    with PretendDevice() as device:
        out = model(**to_device(inputs), **more)
    return device, out


def test_the_pretended_numbers_are_the_real_ones(llava):
    """What is counted here is the computation that users run."""
    sample = Sample("llava", [4, Image(0), 6], 1)
    real = build("llava")
    inputs = {name: x for name, x in collate([sample] * 2).items() if name != "attention_mask"}
    with apply_pruner(real, "fastv", ratio=0.5, layer=1):
        want = real(**inputs).logits
    with apply_pruner(llava, "fastv", ratio=0.5, layer=1):
        _, out = prefill(llava, [sample] * 2)
    torch.testing.assert_close(out.logits.inner, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_whose_rows_the_sizes_do_not_tell_waits_once(llava, kind):
    """There is room for two images in a row: which rows have which must be asked, once for all stages."""
    name, options = KINDS[kind]
    with apply_pruner(llava, name, ratio=0.5, **options):
        device, _ = prefill(llava, [Sample("llava", [9, Image(0), 9], 1)] * 2)
    assert device.count(ours=True) == 1, device.ours()


def test_rows_with_different_numbers_of_images_are_told_apart(llava):
    """As long as each other, two images here and none there: what the shortcut by sizes must not mistake."""
    samples = [Sample("llava", [3, Image(0), Image(1), 3], 1), Sample("llava", [38], 2)]
    with apply_pruner(llava, "uniform", ratio=0.5) as handle:
        device, out = prefill(llava, samples)
        with PretendDevice():
            assert handle.last.tokens_per_layer == [[16] * 4, [0] * 4]
    assert out.past_key_values.layers[0].get_seq_length() == 38 and device.count(ours=True) == 1


def test_a_padded_batch_waits_for_lengths_only(llava):
    samples = [Sample("llava", [4, Image(0), 6], 1), Sample("llava", [2, Image(0), 3], 2)]
    for kind in ("projected", "keys", "stages"):
        name, options = KINDS[kind]
        with apply_pruner(llava, name, ratio=0.5, **options):
            device, _ = prefill(llava, samples, padded=True)
        places = {place.split(" at ")[1].split(":")[0] for place in device.ours()}
        assert places <= {"masks.py", "engine.py", "visual.py"}, device.ours()
        assert device.count(ours=True) <= 2, device.ours()  # valid columns; hidden placeholders


def test_an_adaptive_method_waits_once_a_cut(llava):
    with apply_pruner(llava, "framefusion", ratio=0.5, similarity=0.1) as handle:
        device, _ = prefill(llava, [Sample("llava", [4, Image(0), 6], 1)] * 2)
        with PretendDevice():
            cuts = len(handle.last.images[0].stages)
    places = [place for place in device.ours() if "visual.py" in place]
    assert sum(int(place.split(" x ")[0]) for place in places) <= cuts, device.ours()


def test_static_cache_steps_do_not_wait(llava):
    config = llava.config.get_text_config()
    for kind in ("projected", "decoder", "stages"):
        name, options = KINDS[kind]
        counts = {}
        for pruned in (False, True):
            handle = apply_pruner(llava, name, ratio=0.5, **options) if pruned else None
            cache = StaticCache(config=config, max_cache_len=40)
            _, out = prefill(llava, [Sample("llava", [4, Image(0), 6], 1)] * 2, past_key_values=cache)
            step = {"input_ids": torch.full((2, 1), 5), "position_ids": torch.full((2, 1), 26)}
            with PretendDevice() as device:
                llava(**to_device(step), past_key_values=cache)
            counts[pruned] = device.count(ours=False)
            assert device.count(ours=True) == 0, device.ours()
            if handle:
                handle.remove()
        assert counts[True] <= counts[False]


def test_a_prompt_without_a_question_is_refused_though_nobody_waits(llava):
    with apply_pruner(llava, "fastv", ratio=0.5, layer=1), pytest.raises(InputError, match="sample 1 has none"):
        prefill(llava, [Sample("llava", [4, Image(0), 6], 1), Sample("llava", [10, Image(0)], 1)])


@pytest.mark.parametrize("name", ["timm", "eva", "CLIPVisionModel", "SiglipVisionModel", "Dinov2WithRegistersModel"])
@pytest.mark.parametrize("method", ["tome", "uniform", "vatp"])
def test_vision_transformers_do_not_wait(name, method):
    if method == "vatp" and name.startswith("Siglip"):
        pytest.skip("no CLS token")
    vit = to_device(tiny_vit.build(name))
    pixels = OnDevice(tiny_vit.images(2))
    with PretendDevice():
        tiny_vit.run(name, vit, pixels)
    with PretendDevice() as bare:
        tiny_vit.run(name, vit, pixels)
    with apply_pruner(vit, method, ratio=0.5), PretendDevice() as device:
        tiny_vit.run(name, vit, pixels)
    assert device.count(ours=True) == 0, device.ours()
    assert device.count(ours=False) <= bare.count(ours=False)


def test_a_compiled_prefill_gives_the_same_logits():
    """With few graph breaks more than the bare model has (docs/performance.md counts them)."""
    model = build("llava")
    inputs = {name: x for name, x in collate([Sample("llava", [4, Image(0), 6], 1)] * 2).items() if "mask" not in name}
    counts = []
    for pruned in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with apply_pruner(model, "uniform", ratio=0.5) if pruned else nullcontext():
            want = model(**inputs).logits
            torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, want)
        counts.append(sum(counters["graph_break"].values()))
    torch._dynamo.reset()
    assert 0 < counts[1] <= counts[0] + 4
