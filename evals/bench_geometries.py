"""Models of published sizes with random weights, and a prompt for each: what `bench model` runs, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

IMAGE = 30  # the placeholder's id; ids below it are text
TEXT = 64  # text tokens, half before and half after the image


@dataclass(frozen=True)
class BenchGeometry:
    """A model of the sizes of a published one, and the image it sees.

    Args:
        config: (whether narrow) -> the model's configuration.
        size: of the image: (height, width) in pixels, or (frames, rows, columns) in patches.
    """

    name: str
    config: Callable
    size: tuple[int, ...]

    def build(self, scale: str, dtype: torch.dtype, device: str) -> nn.Module:
        """The model, its weights drawn on the device. `small` keeps depths and lengths of sequences, 64 channels wide
        (a head of them), so that it runs on any machine; its times say little of a wide model's."""
        import transformers

        config = self.config(scale == "small")
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return getattr(transformers, config.architectures[0])(config).eval()
        finally:
            torch.set_default_dtype(before)

    def inputs(self, model: nn.Module, batch: int) -> dict:
        """`batch` equal prompts with one image each, on the model's device, without padding."""
        vision, device, dtype = model.config.vision_config, model.device, model.dtype
        pixels: dict[str, object]
        if len(self.size) == 3:
            frames, rows, columns = self.size
            values = 3 * vision.temporal_patch_size * vision.patch_size**2
            pixels = {
                "pixel_values": torch.randn(batch * frames * rows * columns, values).to(device, dtype),
                "image_grid_thw": torch.tensor([self.size] * batch, device=device),
            }
            count = frames * rows * columns // vision.spatial_merge_size**2
        elif self.size == (vision.image_size, vision.image_size):
            pixels = {"pixel_values": torch.randn(batch, 3, *self.size).to(device, dtype)}
            count = (vision.image_size // vision.patch_size) ** 2
        else:
            tiles = [n // vision.image_size for n in self.size]
            side, edge = vision.image_size // vision.patch_size, vision.image_size
            pixels = {
                "pixel_values": torch.randn(batch, 1 + tiles[0] * tiles[1], 3, edge, edge).to(device, dtype),
                "image_sizes": torch.tensor([self.size] * batch, device=device),
            }
            count = side**2 + tiles[0] * side * (tiles[1] * side + 1)
        text = torch.arange(TEXT, device=device) % (IMAGE - 4) + 3
        ids = torch.cat([text[: TEXT // 2], torch.full((count,), IMAGE, device=device), text[TEXT // 2 :]])
        found = {"input_ids": ids.expand(batch, -1).contiguous(), **pixels}
        if "image_grid_thw" in found:
            found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long()
        return found


def _llama(small: bool, **more) -> dict:
    wide = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32064)
    narrow = dict(hidden_size=64, intermediate_size=172, num_attention_heads=1, vocab_size=256)
    return dict(num_hidden_layers=32, max_position_embeddings=8192, **(narrow if small else wide), **more)


def _clip(small: bool):
    from transformers import CLIPVisionConfig

    wide = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, projection_dim=768)
    narrow = dict(hidden_size=64, intermediate_size=256, num_attention_heads=1, projection_dim=64)
    return CLIPVisionConfig(num_hidden_layers=24, image_size=336, patch_size=14, **(narrow if small else wide))


def _llava(small: bool):
    from transformers import LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=_clip(small),
        text_config=LlamaConfig(**_llama(small)),
        image_token_index=IMAGE,
        architectures=["LlavaForConditionalGeneration"],
    )


def _llava_next(small: bool):
    from transformers import LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=_clip(small),
        text_config=LlamaConfig(**_llama(small)),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        architectures=["LlavaNextForConditionalGeneration"],
    )


def _qwen_tokens() -> dict:
    return dict(image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=1, vision_end_token_id=2)


def _qwen2_5(small: bool):
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12] if small else [16, 24, 24]}
    wide = dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
    )
    narrow = dict(hidden_size=64, intermediate_size=336, num_attention_heads=1, num_key_value_heads=1, vocab_size=256)
    tower = dict(hidden_size=64, intermediate_size=172, num_heads=1) if small else {}
    text = narrow if small else wide
    return Qwen2_5_VLConfig(
        vision_config=dict(
            depth=32,
            patch_size=14,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
            out_hidden_size=text["hidden_size"],
            **(tower or dict(hidden_size=1280, intermediate_size=3420, num_heads=16)),
        ),
        text_config=dict(num_hidden_layers=28, max_position_embeddings=32768, rope_parameters=rope, **text),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **_qwen_tokens(),
    )


def _qwen3(small: bool):
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [8, 12, 12] if small else [24, 20, 20]}
    wide = dict(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    narrow = dict(
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=256,
    )
    text = narrow if small else wide
    tower = dict(hidden_size=1152, intermediate_size=4304, num_heads=16)
    return Qwen3VLConfig(
        vision_config=dict(
            depth=27,
            patch_size=16,
            num_position_embeddings=2304,
            deepstack_visual_indexes=[8, 16, 24],
            out_hidden_size=text["hidden_size"],
            **(dict(hidden_size=64, intermediate_size=256, num_heads=1) if small else tower),
        ),
        text_config=dict(num_hidden_layers=36, max_position_embeddings=32768, rope_parameters=rope, **text),
        architectures=["Qwen3VLForConditionalGeneration"],
        **_qwen_tokens(),
    )


GEOMETRIES = {
    one.name: one
    for one in (
        BenchGeometry("llava-1.5-7b", _llava, (336, 336)),
        BenchGeometry("llava-next-7b", _llava_next, (672, 672)),
        BenchGeometry("qwen2.5-vl-7b-1k", _qwen2_5, (1, 64, 64)),
        BenchGeometry("qwen2.5-vl-7b-4k", _qwen2_5, (1, 128, 128)),
        BenchGeometry("qwen3-vl-8b", _qwen3, (1, 64, 64)),
    )
}
"""The sizes are those of the published configurations; qwen3-vl-8b sees 1024 visual tokens, llava-next-7b 2880 and 48
newlines."""
