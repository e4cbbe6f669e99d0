"""Tiny random-weight vision transformers of every family, and methods to prune them with. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import open_clip
import timm
import torch
import transformers as hf
from open_clip.transformer import Transformer
from open_clip.transformer import VisionTransformer as OpenClipVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor, nn

from prune import Geometry, Handle, Merge, Method, Reducer, Reduction, Scorer, Site, Stage, VisualTokens, apply_pruner
from prune.adapters.vit_families import find_vit
from prune.kernels.merging import chosen_indices

SIDE, PATCH, WIDTH, DEPTH, HEADS = 20, 4, 24, 4, 3
PATCHES = (SIDE // PATCH) ** 2
TIMM = dict(img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=7)
HF = dict(image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=DEPTH,
          num_attention_heads=HEADS, num_labels=7)  # fmt: skip
TEXT = dict(vocab_size=30, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1, num_attention_heads=HEADS,
            max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
OPEN_CLIP = dict(image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=DEPTH, heads=HEADS, mlp_ratio=2.0,
                 output_dim=10)  # fmt: skip


def _open_clip(**vision) -> nn.Module:
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": 8, **vision}
    text = {"context_length": 8, "vocab_size": 30, "width": WIDTH, "heads": HEADS, "layers": 1}
    return open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=text)


def _length_first() -> nn.Module:
    """open_clip's blocks with the tokens in dimension 0, as older models were built."""
    model = OpenClipVit(**OPEN_CLIP)
    model.transformer = Transformer(WIDTH, DEPTH, HEADS, 2.0, batch_first=False)
    return model


def _timm_backed() -> nn.Module:
    model = _open_clip()
    model.visual = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
    nn.Module.__init__(model.visual)
    model.visual.trunk = timm.models.VisionTransformer(**{**TIMM, "num_classes": 0}, global_pool="avg")
    model.visual.head = nn.Sequential(nn.Linear(WIDTH, 10))
    return model


def _logits(model, pixels):
    return model(pixels)


def _pooled(model, pixels):
    return model(pixels).pooler_output


def _image_side(model, pixels):
    return model.get_image_features(pixels).pooler_output


@dataclass(frozen=True)
class Vit:
    """How to build a model, and how to get one vector per image out of it; `cls` and `prefix` as it has them."""

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor] = _logits
    prefix: int = 1
    cls: bool = True
    cls_only: bool = True


def _hf(model, config, run=_pooled, **rest) -> Vit:
    return Vit(lambda: model(config()), run, **rest)


VITS = {
    "timm": Vit(lambda: timm.models.VisionTransformer(**TIMM, init_values=0.5)),
    "timm-qknorm": Vit(lambda: timm.models.VisionTransformer(**TIMM, qk_norm=True, drop_path_rate=0.2)),
    "timm-avg": Vit(lambda: timm.models.VisionTransformer(**TIMM, global_pool="avg"), cls_only=False),
    "timm-map": Vit(
        lambda: timm.models.VisionTransformer(**TIMM, global_pool="map", class_token=False),
        prefix=0, cls=False, cls_only=False,
    ),
    "timm-registers": Vit(lambda: timm.models.VisionTransformer(**TIMM, reg_tokens=2, init_values=0.5), prefix=3),
    "timm-distilled": Vit(lambda: VisionTransformerDistilled(**TIMM), prefix=2),
    "eva": Vit(
        lambda: Eva(**TIMM, use_rot_pos_emb=True, swiglu_mlp=True, init_values=0.5), cls_only=False
    ),
    "eva-split": Vit(
        lambda: Eva(**TIMM, use_rot_pos_emb=True, qkv_fused=False, qk_norm=True, global_pool="token",
                    rope_rotate_half=True)
    ),
    "eva-mixed": Vit(
        lambda: Eva(**TIMM, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", num_reg_tokens=2,
                    global_pool="token"),
        prefix=3,
    ),
    "eva-grouped": Vit(
        lambda: Eva(**{**TIMM, "embed_dim": 32, "num_heads": 4}, use_rot_pos_emb=True, attn_type="rope",
                    qkv_fused=False, num_kv_heads=2, class_token=False, global_pool="avg"),
        prefix=0, cls=False, cls_only=False,
    ),
    "open_clip": Vit(lambda: OpenClipVit(**OPEN_CLIP, ls_init_value=0.5)),
    "open_clip-length-first": Vit(_length_first),
    "open_clip-CLIP": Vit(_open_clip, lambda model, pixels: model.encode_image(pixels)),
    "open_clip-timm": Vit(_timm_backed, lambda model, pixels: model.encode_image(pixels), cls_only=False),
    "ViTModel": _hf(hf.ViTModel, lambda: hf.ViTConfig(**HF)),
    "ViTForImageClassification": _hf(
        hf.ViTForImageClassification, lambda: hf.ViTConfig(**HF), lambda model, pixels: model(pixels).logits
    ),
    "CLIPVisionModel": _hf(hf.CLIPVisionModel, lambda: hf.CLIPVisionConfig(**HF)),
    "CLIPVisionModelWithProjection": _hf(
        hf.CLIPVisionModelWithProjection, lambda: hf.CLIPVisionConfig(**HF, projection_dim=10),
        lambda model, pixels: model(pixels).image_embeds,
    ),
    "CLIPModel": _hf(
        hf.CLIPModel, lambda: hf.CLIPConfig(text_config=TEXT, vision_config=HF, projection_dim=10), _image_side
    ),
    "SiglipVisionModel": _hf(
        hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**HF), prefix=0, cls=False, cls_only=False
    ),
    "SiglipModel": _hf(
        hf.SiglipModel, lambda: hf.SiglipConfig(text_config=TEXT, vision_config=HF), _image_side,
        prefix=0, cls=False, cls_only=False,
    ),
    "Dinov2Model": _hf(hf.Dinov2Model, lambda: hf.Dinov2Config(**{**HF, "mlp_ratio": 2}, drop_path_rate=0.2)),
    "Dinov2ForImageClassification": _hf(
        hf.Dinov2ForImageClassification, lambda: hf.Dinov2Config(**{**HF, "mlp_ratio": 2}),
        lambda model, pixels: model(pixels).logits, cls_only=False,
    ),
    "Dinov2WithRegistersModel": _hf(
        hf.Dinov2WithRegistersModel,
        lambda: hf.Dinov2WithRegistersConfig(**{**HF, "mlp_ratio": 2}, num_register_tokens=2, use_swiglu_ffn=True),
        prefix=3,
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> nn.Module:
    """A fresh model in eval mode; equal arguments give equal weights."""
    model = VITS[name].make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() < 2 else 1.5 * parameter[0].numel() ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (parameter.dim() < 2))  # norms and layer scales around one
    if attention is not None:
        model.set_attn_implementation(attention)
    return model.eval().to(dtype)


@cache
def shared(name: str) -> nn.Module:
    """The model tests attach to; they must leave it as it was."""
    return build(name)


@cache
def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def run(name: str, model: nn.Module, pixels: Tensor) -> Tensor:
    return VITS[name].run(model, pixels)


# ---------------------------------------------------------------------------------------------------- test methods
@dataclass
class Fold(Reducer):
    """Tokens with short keys go into the kept ones whose keys are nearest, by average; the longest comes first."""

    layer: int = 1
    place: str = "inside"
    share: bool = False  # half of every source goes to the second nearest too

    name = "fold"
    signals = ("block",)
    merges = True
    proportional = True

    @property
    def site(self) -> str:
        return f"block:{self.layer}"

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        key = tokens.block.keys[:, tokens.block.prefix :].float().mean(2)
        length = key.norm(dim=-1).masked_fill(~tokens.mask, -1)
        order = length.argsort(dim=1, descending=True)
        kept, rest = order[:, : max(keep)], order[:, max(keep) :]
        key = torch.nn.functional.normalize(key, dim=-1)
        rows = torch.arange(len(key))[:, None]
        near = (key[rows, rest] @ key[rows, kept].transpose(1, 2)).topk(2, dim=2).indices
        sizes = torch.ones(length.shape) if tokens.sizes is None else tokens.sizes
        if self.share:
            source, slot, share = rest.repeat_interleave(2, 1), near.flatten(1), torch.tensor([0.75, 0.25])
            share = share.repeat(rest.shape[1]).expand(source.shape)
        else:
            source, slot, share = rest, near[..., 0], torch.ones(rest.shape)
        share = share * tokens.mask[rows, source]
        mass = sizes[rows, source] * share
        total = sizes[rows, kept].scatter_add(1, slot, mass)
        weight = mass / total.gather(1, slot)
        return Reduction(kept, merge=Merge(source, slot, weight, sizes[rows, kept] / total))


@dataclass
class Folds(Method):
    """`Fold` at several blocks."""

    layers: tuple[int, ...] = (1, 2)
    place: str = "inside"
    share: bool = False

    name = "folds"
    merges = True

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        counts = torch.linspace(geometry.visual_tokens, keep, len(self.layers) + 1).round().int().tolist()[1:]
        return tuple(
            Stage(Site.parse(f"block:{layer}"), Fold(layer, self.place, self.share), count)
            for layer, count in zip(self.layers, counts)
        )


@dataclass
class Loud(Reducer):
    """Keeps tokens longer than average, at most `keep`: another number in every image."""

    layer: int = 1
    place: str = "input"

    name = "loud"
    adaptive = True

    @property
    def site(self) -> str:
        return f"block:{self.layer}"

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        length = tokens.features.float().norm(dim=-1).masked_fill(~tokens.mask, 0)
        chosen = (length > length.sum(1, keepdim=True) / tokens.mask.sum(1, keepdim=True)) & tokens.mask
        return Reduction(*chosen_indices(chosen, max(keep)))


@dataclass
class LoudThenFold(Method):
    """Ragged rows, then a merge down to a count every row has."""

    name = "loud_then_fold"
    merges = True

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        middle = min(geometry.visual_tokens, keep * 3)
        return (
            Stage(Site.parse("block:1"), Loud(1), middle),
            Stage(Site.parse("block:2"), Fold(2), keep),
        )


@dataclass
class Spread(Reducer):
    """Keeps every other token and rebuilds the rest by their distance to the kept ones."""

    layer: int = 2

    name = "spread"
    reconstructs = True

    @property
    def site(self) -> str:
        return f"block:{self.layer}"

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        return Reduction(torch.arange(0, 2 * keep[0], 2).expand(len(tokens.features), -1))

    def restore(self, before: Tensor, after: Tensor, now: Tensor) -> Tensor:
        return (-torch.cdist(before.float(), after.float())).softmax(-1) @ now.float()


@dataclass
class Reads(Scorer):
    """Ranks by whatever it is told to read; `seen` keeps what it was shown."""

    signals: tuple[str, ...] = ()
    tower: dict = field(default_factory=dict)
    layer: int = 2
    place: str = "input"
    seen: list = field(default_factory=list)

    name = "reads"

    @property
    def site(self) -> str:
        return f"block:{self.layer}"

    def score(self, tokens: VisualTokens) -> Tensor:
        self.seen.append(tokens)
        return -tokens.index.float()


@dataclass(frozen=True)
class Row:
    """One method as the contract runs it."""

    method: Callable[[], str | Method]
    budget: dict = field(default_factory=lambda: {"keep": 9})
    options: dict = field(default_factory=dict)

    def attach(self, model: nn.Module, **changes) -> Handle:
        budget = {} if set(changes) & {"ratio", "keep", "average", "flops"} else self.budget
        return apply_pruner(model, self.method(), **{**budget, **self.options, **changes})


ROWS = {
    "random": Row(lambda: "random", options={"block": 1, "seed": 1}),
    "first block": Row(lambda: "uniform", options={"block": 0}),
    "fastv": Row(lambda: "fastv"),
    "divprune": Row(lambda: "divprune", {"ratio": 0.7}),
    "last block": Row(lambda: "divprune", {"average": 20}, {"block": DEPTH - 1}),
    "fold": Row(lambda: Folds(), {"flops": 0.7}),
    "fold at the input": Row(lambda: Folds((1, 3), "input")),
    "fold last": Row(lambda: Folds((0, DEPTH - 1), share=True)),
    "loud": Row(lambda: Loud(), options={"restore": True}),
    "loud then fold": Row(lambda: LoudThenFold(), {"keep": 5}),
    "fold and restore": Row(lambda: Folds(), options={"restore": True, "proportional": False}),
    "rebuild": Row(lambda: Spread(), options={"restore": True}),
    "tome": Row(lambda: "tome"),
    "expedit": Row(lambda: "expedit", options={"layer": 1, "restore": True}),
    "ficoco": Row(lambda: "ficoco", options={"variant": "v", "layers": (1, 3)}),
    "bat": Row(lambda: "bat", options={"layers": (1, 2)}),
    "flowcut": Row(lambda: "flowcut", options={"encoder": "inside", "layer": None}),
    "index_preserving": Row(lambda: "index_preserving", options={"scorer": "contrast", "restore": True}),
}


def takes_masks(name: str) -> bool:
    """False for DINOv2 in older transformers: methods that pad, or count sizes, are refused there."""
    return find_vit(shared(name)).blocks[0].mask_argument is not None


@cache
def needs_masks(row: str) -> bool:
    """Whether it pads, or has attention count sizes, which attention without a mask cannot."""
    with ROWS[row].attach(shared("timm")) as handle:
        return handle._engine.masks


def kept_of(handle: Handle) -> list[list[int]]:
    return [image.kept.tolist() for image in handle.last.images]
