"""LLaVA with other decoders: right, or refused."""

import pytest
import tiny
import torch
import transformers as hf
from tiny import Image, Sample, collate

from prune import PruneError, UnsupportedMethodError, UnsupportedModelError, apply_pruner, get_handle
from prune.adapters.families import SIGNAL_DECODERS


def llava(text_config):
    config = hf.LlavaConfig(
        vision_config=tiny.shared("llava").config.vision_config, text_config=text_config, image_token_index=tiny.IMAGE
    )
    model = hf.LlavaForConditionalGeneration(config)
    tiny._fill(model, 0)
    return model.eval()


def decoder(name, **changes):
    return getattr(hf, f"{name}Config")(**tiny.text_config(**changes))


def attention_row(model, layer, inputs):
    """The last token's eager attention in a layer, mean over heads."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = model(**inputs, output_attentions=True).attentions[layer].mean(1)[:, -1]
    model.set_attn_implementation("sdpa")
    return rows


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite"])
def test_attention_signal_is_right_on_the_decoders_that_are_allowed(name):
    changes = {"sliding_window": None} if name == "Mistral" else {}
    model = llava(decoder(name, head_dim=8, **changes))
    assert model.config.text_config.model_type in SIGNAL_DECODERS
    inputs = collate([Sample("llava", [4, Image(0), 5])])
    expected = attention_row(model, 1, inputs)[0, 4:20]
    with apply_pruner(model, "fastv", keep=5) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.last.images[0].kept
    assert kept.tolist() == sorted(expected.argsort(descending=True)[:5].tolist())


@pytest.mark.parametrize("name", ["Cohere", "Phi", "Glm", "Olmo2"])
def test_signals_are_refused_on_decoders_laid_out_otherwise(name):
    model = llava(decoder(name))
    with pytest.raises(UnsupportedMethodError, match="random"):
        apply_pruner(model, "fastv", ratio=0.5)
    assert get_handle(model) is None
    apply_pruner(model, "random", ratio=0.5).remove()  # needs no signal


@pytest.mark.parametrize("name", ["Mistral", "Phi3", "Starcoder2"])
def test_sliding_windows_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="sliding_window=None"):
        apply_pruner(llava(decoder(name, sliding_window=8)), "random", ratio=0.5)
    apply_pruner(llava(decoder(name, sliding_window=None)), "random", ratio=0.5).remove()


def test_a_wrapper_is_named():
    with pytest.raises(UnsupportedModelError, match="model.module"):
        apply_pruner(torch.nn.DataParallel(tiny.build("llava")), "random", ratio=0.5)


def test_native_resolution_llava_keeps_its_grid_in_generate():
    """Pixtral's image sizes reach the tower only; both ways must see the same grid."""
    vision = hf.PixtralVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=decoder("Llama"),
        image_token_index=tiny.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.tensor([[3, 4, *[tiny.IMAGE] * 16, 5, 6]]),
        "pixel_values": torch.randn(1, 3, 8, 32),
        "image_sizes": torch.tensor([[8, 32]]),
    }
    tiles = []
    with apply_pruner(model, "uniform", keep=4) as handle, torch.no_grad():
        for run in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=1)):
            run()
            tiles.append(handle.last.images[0].layout.tiles)
    assert tiles == [((1, 2, 8),)] * 2


def test_every_failure_is_of_our_hierarchy():
    with pytest.raises(PruneError):
        apply_pruner(llava(decoder("Phi")), "dart", ratio=0.5)
