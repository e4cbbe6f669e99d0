"""Find the parts of a vision-language model the engine hooks into, or say what is missing."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from prune.adapters.families import FAMILIES, Family, family_of
from prune.budget import Geometry
from prune.errors import UnsupportedModelError

TOWERS = ("vision_tower", "visual", "vision_model")


@dataclass
class Parts:
    """The modules of one model: `core` merges image features into the prompt and calls `decoder`."""

    core: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    tower: nn.Module
    family: Family

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """modality -> id of the token that stands for one visual token."""
        config = self.core.config
        found = {}
        for modality in ("image", "video"):
            token = getattr(config, f"{modality}_token_id", None)
            token = getattr(config, f"{modality}_token_index", None) if token is None else token
            if token is not None:
                found[modality] = token
        return found

    @cached_property
    def encodes_first(self) -> bool:
        """Whether `core.forward` accepts ready-made encoder outputs (transformers >= 5.18)."""
        return "mm_encoder_outputs" in inspect.signature(self.core.forward).parameters

    @property
    def replays_hooks(self) -> bool:
        """Whether gradient checkpointing is on and would run the hooks of a decoder layer again in the backward pass
        (transformers whose `GradientCheckpointingLayer` wraps `__call__`)."""
        layer = self.layers[0]
        on = layer.training and getattr(layer, "gradient_checkpointing", False)
        return on and type(layer).__call__ is not nn.Module.__call__

    def geometry(self, visual_tokens: int, text_tokens: int = 0) -> Geometry:
        config = self.decoder.config
        heads = config.num_attention_heads
        return Geometry(
            visual_tokens=visual_tokens,
            text_tokens=text_tokens,
            layers=len(self.layers),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def find_parts(model: nn.Module) -> Parts:
    """Locate core, decoder, layers and tower.

    A model class outside the family table is accepted with a warning if it has the same structure.

    Raises:
        UnsupportedModelError: a part is missing, or the decoder does not use full attention throughout.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    supported = f"Supported families: {', '.join(family.name for family in FAMILIES)}"

    def fail(reason: str):
        raise UnsupportedModelError(f"cannot attach to {type(base).__name__}: {reason}. {supported}")

    core = next((m for m in (getattr(base, "model", None), base) if hasattr(m, "language_model")), None)
    if core is None and isinstance(getattr(base, "module", None), nn.Module):
        fail("it wraps another model; pass that one (model.module)")
    if core is None:
        fail("no .language_model in it or in its .model (a text-only or vision-only model?)")
    tower = next((getattr(core, name) for name in TOWERS if isinstance(getattr(core, name, None), nn.Module)), None)
    if tower is None:
        fail(f"no vision tower (looked for {', '.join(TOWERS)})")
    decoder = core.language_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(layers[0], "self_attn"):
        fail("its language_model has no .layers with .self_attn")
    kinds = set((getattr(decoder.config, "layer_types", None) or ["full_attention"])[: len(layers)])
    window = getattr(decoder.config, "sliding_window", None)
    if (
        window
        and not getattr(decoder.config, "layer_types", None)
        and getattr(decoder.config, "use_sliding_window", True)
    ):
        kinds = {"sliding_attention"}
    if kinds != {"full_attention"}:
        fail(
            f"its decoder has {', '.join(sorted(kinds - {'full_attention'}))} layers, whose windows count columns; "
            "config.sliding_window=None would switch them off"
        )
    family = family_of(getattr(core.config, "model_type", ""))
    parts = Parts(core, decoder, layers, tower, family)
    if "image" not in parts.placeholders:
        fail("its config has no image_token_id")
    if family.name == "unknown":
        warnings.warn(
            f"{type(base).__name__} is not in the family table; attaching by structure alone. {supported}", stacklevel=4
        )
    return parts
