"""The one table that knows model types. Everything else goes by structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prune.adapters import layouts, packing


@dataclass(frozen=True)
class Family:
    """A group of models that lay out visual tokens alike.

    Args:
        name: as the documentation says it.
        model_types: `config.model_type` of its members.
        image, video: layout functions of `prune.adapters.layouts`; None if the family has no such input.
        example: a hub model.
        pack_image, pack_video: functions of `prune.adapters.packing` that bring signals of the tower into the order
            of the tokens.
    """

    name: str
    model_types: tuple[str, ...]
    image: Callable
    video: Callable | None = None
    example: str = ""
    pack_image: Callable = packing.plain
    pack_video: Callable = packing.plain


FAMILIES = (
    Family("LLaVA-1.5", ("llava",), layouts.square, None, "llava-hf/llava-1.5-7b-hf"),
    Family("LLaVA-NeXT", ("llava_next",), layouts.anyres, None, "llava-hf/llava-v1.6-mistral-7b-hf", packing.anyres),
    Family(
        "LLaVA-NeXT-Video",
        ("llava_next_video",),
        layouts.anyres,
        layouts.pooled_frames,
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        packing.anyres,
        packing.pooled,
    ),
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        layouts.anyres,
        layouts.pooled_frames,
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        packing.anyres,
        packing.pooled,
    ),
    Family("Qwen2-VL", ("qwen2_vl",), layouts.native, layouts.native, "Qwen/Qwen2-VL-7B-Instruct"),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), layouts.native, layouts.native, "Qwen/Qwen2.5-VL-7B-Instruct"),
    Family("Qwen3-VL", ("qwen3_vl",), layouts.native, layouts.native, "Qwen/Qwen3-VL-8B-Instruct"),
    Family("InternVL", ("internvl",), layouts.tiled, layouts.tiled, "OpenGVLab/InternVL3-8B-hf"),
)

SIGNAL_DECODERS = (
    "gemma",
    "granite",
    "llama",
    "mistral",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
)
"""`config.model_type` of the decoders whose layers `prune.adapters.signals` can read: pre-norm, separate q/k/v
projections, rotary embedding of the whole head in two halves, no soft-capping. Checked against eager attention."""


@dataclass(frozen=True)
class TowerShape:
    """How a vision encoder is built, as far as `prune.adapters.tower` reads it.

    Args:
        layers, attention: paths of the list of layers, and of the attention module in a layer.
        cls: whether a CLS token comes first.
        joined: how several patches become one token: "" (they do not), "shuffle" (the model's pixel shuffle) or
            "consecutive" (patches that follow each other).
        norm: path of a norm between the last layer and the projector, applied where the projector reads that layer.
    """

    layers: str
    attention: str
    cls: bool = False
    joined: str = ""
    norm: str = ""


SIGNAL_TOWERS = {
    "clip_vision_model": TowerShape("encoder.layers", "self_attn", cls=True),
    "siglip_vision_model": TowerShape("encoder.layers", "self_attn"),
    "internvl_vision": TowerShape("encoder.layer", "attention", cls=True, joined="shuffle", norm="layernorm"),
    "qwen2_vl_vision": TowerShape("blocks", "attn", joined="consecutive"),
    "qwen2_5_vl_vision": TowerShape("blocks", "attn", joined="consecutive"),
    "qwen3_vl_vision": TowerShape("blocks", "attn", joined="consecutive"),
}
"""`config.vision_config.model_type` of the towers whose signals `prune.adapters.tower` can take. Checked against eager
attention."""

UNKNOWN = Family("unknown", (), layouts.guessed, layouts.guessed)


def family_of(model_type: str) -> Family:
    """The family of a `config.model_type`; `UNKNOWN` for one outside the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), UNKNOWN)
