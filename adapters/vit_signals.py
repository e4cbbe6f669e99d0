"""What the signals of decoders and vision encoders mean at a block of a vision transformer."""

from __future__ import annotations

import math

from prune.adapters.tower import CLS_KINDS
from prune.adapters.vit_families import VitParts
from prune.errors import ConfigError, UnsupportedMethodError
from prune.method import Stage
from prune.tokens import Tower

Key = tuple  # (kind, block), and the threshold if there is one; ("pixels", None)

OF_ATTENTION = {"block", "keys", "values", "last_token_attention", "attention"}
"""Signals of the attention that ran last before the site: "keys" (after rotary embedding), "values", "attention" (the
CLS token stands for the last token of a prompt) and "last_token_attention" (what CLS gives; what patches receive on
average where there is no CLS)."""

AT_BLOCKS = OF_ATTENTION | {"normed_features"}
"""Signals that exist at a block. All others are made of text, or of what only a decoder layer has."""


def layers_ran(stage: Stage) -> int:
    """Blocks whose attention ran before the stage."""
    return stage.site.layer + (stage.reducer.place == "inside")


def resolve(parts: VitParts, spec: Tower, stage: Stage) -> Key:
    """The kind, block and maybe threshold a `Tower` means at a block.

    Layer None is the last block that ran before the site, a float a share of those that ran, an int a block.

    Raises:
        UnsupportedMethodError: the model has no CLS token, or none of its blocks has run.
        ConfigError: the block has not run yet at the site.
    """
    name, kind = stage.reducer.name, spec.kind
    if kind == "pixels":
        if parts.convolution is None:
            raise UnsupportedMethodError(f"{name} reads pixels, and this model's patches are no plain squares of them")
        return "pixels", None
    if kind in CLS_KINDS and not parts.cls:
        raise UnsupportedMethodError(f"{name} reads {kind}, and {parts.family.name} has no CLS token")
    ran = stage.site.layer if kind == "features" else layers_ran(stage)
    if ran == 0:
        raise UnsupportedMethodError(f"{name} reads {kind} of a block before {stage.site}, and none runs before it")
    layer = ran - 1 if spec.layer is None else spec.layer
    if isinstance(layer, float):
        layer = math.ceil(layer * ran - 1e-9) - 1
    if not -ran <= layer < ran:
        raise ConfigError(
            f"{name} reads {kind} of block {layer}, and at {stage.site} blocks 0 to {ran - 1} have run; act at a later "
            "block, such as block=..."
        )
    options = () if spec.threshold is None else (float(spec.threshold),)
    return kind, layer % ran, *options
