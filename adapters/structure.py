"""Find the parts of a vision-language model the engine hooks into, or say what is missing."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from torch import Tensor, nn

from prune.adapters.families import FAMILIES, SIGNAL_TOWERS, Family, TowerShape, family_of
from prune.adapters.vit_families import VIT_FAMILIES
from prune.budget import Geometry
from prune.errors import UnsupportedModelError

TOWERS = ("vision_tower", "visual", "vision_model")


def _is_touched(module: nn.Module) -> bool:
    """Whether calling a module is more than its class says: hooks, a forward of its own (accelerate), odd weights."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(hooked) or any(type(x) is not nn.Parameter or x.is_meta for x in module.parameters())


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
    def projector(self) -> nn.Module | None:
        """What maps features of the tower to the decoder's width, in rows of the patches of one token."""
        return getattr(self.core, "multi_modal_projector", None) or getattr(self.tower, "merger", None)

    @property
    def projector_layers(self) -> tuple[nn.Linear, nn.Module, nn.Linear] | None:
        """(linear, activation, linear) if the projector is just that, as LLaVA's is; see `prune.tokens.Projector`.

        None for layers with hooks, or whose weights are somewhere else between calls.
        """
        found = self._projector_stack
        touched = found is None or "forward" in vars(self.projector) or any(map(_is_touched, found))
        return None if touched else found

    @property
    def _projector_stack(self) -> tuple[nn.Linear, nn.Module, nn.Linear] | None:
        named = [] if self.projector is None else list(self.projector.named_children())
        if [name for name, _ in named] != ["linear_1", "act", "linear_2"]:
            return None
        first, activation, last = (module for _, module in named)
        plain = type(first) is type(last) is nn.Linear and not any(True for _ in activation.parameters())
        return (first, activation, last) if plain else None

    def project(self, rows: Tensor) -> Tensor:
        """`[..., g * Dv]` -> `[..., D]`, through the projector (Qwen's wants the g patches as rows)."""
        rows = rows.to(self.core.dtype)
        if self.projector is getattr(self.tower, "merger", None):
            flat = self.projector(rows.reshape(-1, rows.shape[-1] // self.tower.spatial_merge_size**2))
            return flat.view(*rows.shape[:-1], -1)
        return self.projector(rows.reshape(-1, rows.shape[-1])).view(*rows.shape[:-1], -1)  # as 8-bit layers want it

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
            **self._tower_sizes,
        )

    @property
    def tower_shape(self) -> TowerShape | None:
        """How the vision encoder is built; None outside the table."""
        return SIGNAL_TOWERS.get(getattr(getattr(self.tower, "config", None), "model_type", None))

    @property
    def tower_blocks(self) -> nn.ModuleList:
        """The layers of a vision encoder of the table."""
        return attrgetter(self.tower_shape.layers)(self.tower)

    @property
    def read_layers(self) -> list[int]:
        """The layers of the vision encoder whose outputs the projector reads; -1 stands for the input of the first."""
        count = len(self.tower_blocks)
        chosen = getattr(self.core.config, "vision_feature_layer", None)
        chosen = [-1] if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)
        return [(n if n >= 0 else n + count + 1) - 1 for n in chosen]

    @cached_property
    def _tower_sizes(self) -> dict[str, int]:
        vision = getattr(self.tower, "config", None)
        convolutions = (m for m in self.tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        linear = [] if self.projector is None else [m for m in self.projector.modules() if isinstance(m, nn.Linear)]
        return {
            "tower_width": next((m.out_channels for m in convolutions), 0),
            "tower_layers": 0 if self.tower_shape is None else 1 + max(self.read_layers),
            "tower_heads": getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None) or 1,
            "tower_features": linear[0].in_features if linear else 0,
            "projector_flops": sum(2 * m.in_features * m.out_features for m in linear),
            "projector_hidden": 0 if self._projector_stack is None else linear[0].out_features,
        }


def find_parts(model: nn.Module) -> Parts:
    """Locate core, decoder, layers and tower.

    A model class outside the family table is accepted with a warning if it has the same structure.

    Raises:
        UnsupportedModelError: a part is missing, or the decoder does not use full attention throughout.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    supported = (
        f"Supported families: {', '.join(family.name for family in FAMILIES)}; vision transformers: "
        f"{', '.join(family.name for family in VIT_FAMILIES)}"
    )

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
