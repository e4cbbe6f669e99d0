"""The one table that knows how vision transformers are built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from torch import nn

from prune.adapters.vit_heads import heads_of
from prune.budget import Geometry
from prune.errors import UnsupportedModelError


@dataclass(frozen=True)
class VitFamily:
    """How the models of a library are built. All paths are attribute paths.

    Args:
        name: as the documentation says it.
        trunks: qualified names of the classes that hold the blocks; their subclasses count.
        cells: qualified names of the block classes whose arithmetic is
            `x = x + attention(...)`, `x = x + after(branch(... norm(x)))`; subclasses with a `forward` of their own
            do not count.
        blocks: the list of blocks in the trunk.
        attention: the attention module in a block; the first path that exists.
        norm, mlp: second norm and MLP in a block.
        branch: the last module of the MLP branch before the residual is added.
        after: what the branch goes through next, if attention goes through the same module.
        patch: the patch embedding in the trunk.
        final: norm after the last block in the trunk.
        prefix: trunk -> tokens before the patches.
        cls: trunk -> whether the first of them is a CLS token.
        cls_only: (model, trunk) -> whether what comes out depends on the prefix tokens alone.
        checkpointing: flags of gradient checkpointing, in the trunk.
        batch_first: path in the trunk of a flag; None means blocks take `[B, T, D]`.
        example: a model's name.
    """

    name: str
    trunks: tuple[str, ...]
    cells: tuple[str, ...]
    blocks: str
    attention: tuple[str, ...]
    norm: str
    branch: str
    patch: str
    final: str
    prefix: Callable[[nn.Module], int]
    cls: Callable[[nn.Module], bool]
    cls_only: Callable[[nn.Module, nn.Module], bool]
    after: str = ""
    mlp: str = "mlp"
    checkpointing: str = ""
    batch_first: str | None = None
    example: str = ""

    def __reduce__(self):  # a row of the table, whose functions have no names to pickle them by
        return family_named, (self.name,)


def family_named(name: str) -> VitFamily:
    return next(family for family in VIT_FAMILIES if family.name == name)


def _timm_pools_prefix(model: nn.Module, trunk: nn.Module) -> bool:
    return trunk.global_pool == "token" and getattr(trunk, "attn_pool", None) is None


TIMM = dict(
    blocks="blocks",
    attention=("attn",),
    norm="norm2",
    branch="drop_path2",
    patch="patch_embed",
    final="norm",
    prefix=lambda trunk: trunk.num_prefix_tokens,
    cls=lambda trunk: getattr(trunk, "cls_token", None) is not None,
    cls_only=_timm_pools_prefix,
    checkpointing="grad_checkpointing",
)
DINO = dict(
    blocks="encoder.layer",
    attention=("attention.attention", "attention"),  # transformers 5.16 has the first, 5.23 the second
    norm="norm2",
    branch="layer_scale2",
    after="drop_path",
    patch="embeddings.patch_embeddings",
    final="layernorm",
    cls=lambda trunk: True,
    cls_only=lambda model, trunk: model is trunk,  # the classifiers read the mean of the patches too
)
ENCODER = dict(
    blocks="encoder.layers",
    attention=("self_attn",),
    norm="layer_norm2",
    branch="mlp",
    patch="embeddings.patch_embedding",
)
HF = "transformers.models."

VIT_FAMILIES = (
    VitFamily(
        "timm ViT",
        ("timm.models.vision_transformer.VisionTransformer",),
        ("timm.models.vision_transformer.Block",),
        example="vit_base_patch16_224",
        **TIMM,
    ),
    VitFamily(
        "timm EVA",
        ("timm.models.eva.Eva",),
        ("timm.models.eva.EvaBlock",),
        example="eva02_base_patch14_224",
        **TIMM,
    ),
    VitFamily(
        "open_clip",
        ("open_clip.transformer.VisionTransformer",),
        ("open_clip.transformer.ResidualAttentionBlock",),
        blocks="transformer.resblocks",
        attention=("attn",),
        norm="ln_2",
        branch="ls_2",
        patch="conv1",
        final="ln_post",
        prefix=lambda trunk: 1,
        cls=lambda trunk: True,
        cls_only=lambda model, trunk: trunk.pool_type == "tok" and trunk.attn_pool is None,
        checkpointing="transformer.grad_checkpointing",
        batch_first="transformer.batch_first",
        example="ViT-B-16",
    ),
    VitFamily(
        "ViT",
        (HF + "vit.modeling_vit.ViTModel",),
        (HF + "vit.modeling_vit.ViTLayer",),
        blocks="layers",
        attention=("attention",),
        norm="layernorm_after",
        branch="mlp",
        after="dropout",
        patch="embeddings.patch_embeddings",
        final="layernorm",
        prefix=lambda trunk: 1,
        cls=lambda trunk: True,
        cls_only=lambda model, trunk: True,
        example="google/vit-base-patch16-224",
    ),
    VitFamily(
        "CLIP",
        (HF + "clip.modeling_clip.CLIPVisionModel",),
        (HF + "clip.modeling_clip.CLIPEncoderLayer",),
        final="post_layernorm",
        prefix=lambda trunk: 1,
        cls=lambda trunk: True,
        # CLIPForImageClassification averages the patches
        cls_only=lambda model, trunk: not hasattr(model, "classifier"),
        example="openai/clip-vit-base-patch16",
        **ENCODER,
    ),
    VitFamily(
        "SigLIP",
        (HF + "siglip.modeling_siglip.SiglipVisionModel",),
        (HF + "siglip.modeling_siglip.SiglipEncoderLayer",),
        final="post_layernorm",
        prefix=lambda trunk: 0,
        cls=lambda trunk: False,
        cls_only=lambda model, trunk: False,
        example="google/siglip-base-patch16-224",
        **ENCODER,
    ),
    VitFamily(
        "DINOv2",
        (HF + "dinov2.modeling_dinov2.Dinov2Model",),
        (HF + "dinov2.modeling_dinov2.Dinov2Layer",),
        prefix=lambda trunk: 1,
        example="facebook/dinov2-base",
        **DINO,
    ),
    VitFamily(
        "DINOv2 with registers",
        (HF + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",),
        (HF + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer",),
        prefix=lambda trunk: 1 + trunk.config.num_register_tokens,
        example="facebook/dinov2-with-registers-base",
        **DINO,
    ),
)

WITHIN = ("", "visual", "visual.trunk", "trunk", "vision_model", "vit", "dinov2", "dinov2_with_registers")
"""Where the trunk is in a model that wraps one: open_clip's CLIP, CLIPModel, SiglipModel, ViTForImageClassification."""


@dataclass
class BlockParts:
    """The modules of one block the engine hooks into; see `VitFamily`."""

    block: nn.Module
    attention: nn.Module
    norm: nn.Module
    branch: nn.Module
    after: nn.Module | None
    mlp: nn.Module

    @cached_property
    def mask_argument(self) -> str | None:
        """The keyword of the attention module's mask; None if it takes none (DINOv2 in transformers 5.16)."""
        known = inspect.signature(self.attention.forward).parameters
        return next((name for name in ("attn_mask", "attention_mask") if name in known), None)

    @cached_property
    def mask_position(self) -> int:
        return list(inspect.signature(self.attention.forward).parameters).index(self.mask_argument)

    @cached_property
    def heads(self) -> int:
        return heads_of(self.attention)[0]

    @property
    def flash(self) -> bool:
        """Whether attention runs in Flash Attention, which takes no additive mask."""
        kind = getattr(getattr(self.attention, "config", None), "_attn_implementation", None) or ""
        return "flash" in kind

    @property
    def checkpointed(self) -> bool:
        return getattr(self.block, "gradient_checkpointing", False) and self.block.training


@dataclass
class VitParts:
    """A vision transformer as the engine sees it: `model` is what the user gave, `trunk` holds the blocks."""

    model: nn.Module
    trunk: nn.Module
    family: VitFamily
    blocks: list[BlockParts]

    @property
    def prefix(self) -> int:
        return self.family.prefix(self.trunk)

    @property
    def cls(self) -> bool:
        return self.family.cls(self.trunk)

    @property
    def cls_only(self) -> bool:
        return self.family.cls_only(self.model, self.trunk)

    @property
    def batch_first(self) -> bool:
        return self.family.batch_first is None or attrgetter(self.family.batch_first)(self.trunk)

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on: it runs hooks within a block again in the backward pass."""
        flag = self.family.checkpointing
        return bool(flag and attrgetter(flag)(self.trunk)) or any(part.checkpointed for part in self.blocks)

    @property
    def patch(self) -> nn.Module:
        return attrgetter(self.family.patch)(self.trunk)

    @cached_property
    def convolution(self) -> nn.Conv2d | None:
        """What turns pixels into patches; None where it is no single convolution over disjoint squares."""
        found = [module for module in self.patch.modules() if isinstance(module, nn.Conv2d)]
        only = found[0] if len(found) == 1 else None
        return only if only is not None and tuple(only.kernel_size) == tuple(only.stride) else None

    def final(self, x):
        """The norm after the last block, of any tokens."""
        return attrgetter(self.family.final)(self.trunk)(x)

    def geometry(self, visual_tokens: int) -> Geometry:
        part = self.blocks[0]
        heads, kv_heads, head_dim = heads_of(part.attention)
        linear = [module for module in part.mlp.modules() if isinstance(module, nn.Linear)]
        width = part.norm.weight.shape[0]
        # Read off the widths alone: adapters such as LoRA bring narrow layers of their own.
        inner = max(module.in_features for module in linear if module.out_features == width)
        wide = sum(m.out_features for m in linear if m.in_features == width and m.out_features >= inner)
        return Geometry(
            visual_tokens=visual_tokens,
            text_tokens=self.prefix,
            layers=len(self.blocks),
            hidden_size=width,
            intermediate_size=inner,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tower_width=width,
            tower_heads=heads,
            tower_features=width,
            gated=wide > inner,
        )


def find_vit(model: nn.Module) -> VitParts | None:
    """The vision transformer a model is or wraps; None if it is none the table knows.

    Raises:
        UnsupportedModelError: its blocks are built in a way the table does not know.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(base, "_orig_mod", base)  # torch.compile
    for path in WITHIN:
        trunk = _at(base, path)
        family = next((row for row in VIT_FAMILIES if set(row.trunks) & _names(trunk)), None)
        if family is not None:
            cells = list(attrgetter(family.blocks)(trunk))
            return VitParts(base, trunk, family, [_block(family, cell, base) for cell in cells])
    return None


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
    return module


def _names(module: nn.Module | None) -> set[str]:
    """Qualified names of the classes a module is an instance of."""
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}


def _block(family: VitFamily, cell: nn.Module, model: nn.Module) -> BlockParts:
    own = next(cls for cls in type(cell).__mro__ if "forward" in vars(cls))
    if f"{own.__module__}.{own.__qualname__}" not in family.cells:
        raise UnsupportedModelError(
            f"cannot attach to {type(model).__name__}: its blocks are {type(cell).__name__}, and {family.name} is "
            f"known with {', '.join(name.rpartition('.')[2] for name in family.cells)} only (attention, then MLP, "
            "each behind a norm)"
        )
    attention = next(found for path in family.attention if (found := _at(cell, path)) is not None)
    norm, branch, mlp = (attrgetter(path)(cell) for path in (family.norm, family.branch, family.mlp))
    return BlockParts(cell, attention, norm, branch, attrgetter(family.after)(cell) if family.after else None, mlp)
