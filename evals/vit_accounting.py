"""What one picture costs in a vision transformer: patches per block, FLOPs by part.

Closed formulas over the model's own modules, so that nothing is run; tests hold them against
`torch.utils.flop_counter.FlopCounterMode` on real forwards. Counted is what it counts: matrix products, convolutions
and attention, two FLOPs per multiply-add. Padding of ragged counts costs FLOPs too and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import nn

from prune.adapters import attached
from prune.adapters.heads import READS
from prune.adapters.vit_families import VitParts, find_vit
from prune.adapters.vit_heads import projections
from prune.adapters.vit_signals import layers_ran, resolve
from prune.budget import Geometry
from prune.errors import ConfigError, UnsupportedModelError
from prune.evals.accounting import MADE_OF, TOWER_SIGNAL_FLOPS, Encoding
from prune.report import BlockImage, BlockReport

HEADS = ("head", "classifier", "visual_projection", "visual.head", "pooler")
"""Where a model that wraps a trunk may have layers that pooled features go through."""

SIGNAL_READS = {"block": "", "keys": "k", "values": "v", "last_token_attention": "qk", "attention": "qkv"}
"""Signal of a block -> the projections it is made of; of "block" a reducer states them (`Reducer.block_reads`)."""


@dataclass(frozen=True)
class VitAccount:
    """One picture.

    Args:
        tokens_per_layer: patches entering each block.
        tokens_per_mlp: patches each block's MLP sees: fewer where a method cuts between attention and MLP.
        embedding: FLOPs of the patch embedding.
        attention: FLOPs of the q, k, v, o projections and of attention over all T x T pairs.
        mlp: FLOPs of the MLPs.
        selection: FLOPs of choosing the patches: signals computed for the method, and the method's own products.
        head: FLOPs of pooling, projection and classifier, as far as the model has them.
    """

    tokens_per_layer: tuple[int, ...]
    tokens_per_mlp: tuple[int, ...]
    embedding: int
    attention: int
    mlp: int
    selection: int
    head: int

    @property
    def average_tokens(self) -> float:
        """Mean over the blocks of the patches that enter them."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs by part."""
        return {part.name: getattr(self, part.name) for part in fields(self)[2:]}

    @property
    def total(self) -> int:
        """FLOPs, all parts."""
        return sum(self.flops.values())


def vit_parts(model: nn.Module) -> VitParts:
    """The vision transformer a model is or wraps.

    Raises:
        UnsupportedModelError: it is none the library knows.
    """
    parts = find_vit(model)
    if parts is None:
        raise UnsupportedModelError(f"{type(model).__name__} is no vision transformer the library knows")
    return parts


def account(model: nn.Module, report: BlockReport) -> list[VitAccount]:
    """What the forward that `report` tells of costs, one account per picture, in order.

    Args:
        model: carries the pruner that made the report.
        report: `handle.last`.

    Raises:
        ConfigError: the pruner is gone, or another one is there.
        UnsupportedModelError: no vision transformer, or one whose patches are made by more than a convolution.
    """
    parts, engine = vit_parts(model), None
    if any(image.stages for image in report.images):
        engine = attached(model)
        if engine is None or repr(engine.method) != report.method:
            carried = "no pruner" if engine is None else repr(engine.method)
            raise ConfigError(
                f"the report is of {report.method}, and the model carries {carried}; call account before "
                "handle.remove()"
            )
    geometry, found = report.geometry, []
    for image, alive, in_mlp in zip(report.images, report.tokens_per_layer, report.tokens_per_mlp):
        blocks, attention = _blocks(geometry, alive, in_mlp), _blocks(geometry, alive, None, intermediate_size=0)
        pooled = geometry.visual_tokens if engine is None or engine.restore else len(image.kept)
        found.append(
            VitAccount(
                tokens_per_layer=tuple(alive),
                tokens_per_mlp=tuple(in_mlp),
                embedding=_embedding(parts, geometry.visual_tokens),
                attention=attention,
                mlp=blocks - attention,
                selection=0 if engine is None else selection_of(engine, image, alive, geometry),
                head=_head(parts, pooled),
            )
        )
    return found


def account_full(model: nn.Module, report: BlockReport) -> list[VitAccount]:
    """What the same forward costs un-pruned; see `account`. The pruner may be gone."""
    whole = [[image.tokens] * report.geometry.layers for image in report.images]
    images = [replace(image, stages={}) for image in report.images]
    return account(model, replace(report, images=images, tokens_per_layer=whole, tokens_per_mlp=whole))


def _blocks(geometry: Geometry, alive: Sequence[int], in_mlp: Sequence[int] | None, **changes) -> int:
    return replace(geometry, **changes).prefill_flops(alive, in_mlp)


def _embedding(parts: VitParts, patches: int) -> int:
    convolutions = [module for module in parts.patch.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    if len(convolutions) > 1:
        raise UnsupportedModelError(
            f"the patches of {type(parts.trunk).__name__} go through {len(convolutions)} convolutions, whose cost is "
            "not known; plain patch embeddings have one"
        )
    weights = sum(module.weight.numel() for module in parts.patch.modules() if isinstance(module, nn.Linear))
    return 2 * patches * (weights + sum(module.weight.numel() for module in convolutions))


# ------------------------------------------------------------------------------------------------ selection
def selection_of(engine, image: BlockImage, alive: Sequence[int], geometry: Geometry) -> int:
    """FLOPs of all stages of one picture, those that removed nothing left out: they are not run.

    Each signal of a block is made once, however many stages read it.
    """
    parts, flops, before = engine.parts, 0, image.tokens
    reads: dict[int, set[str]] = {}
    kinds: set[tuple] = set()
    reducers = {str(stage.site): stage for stage in engine.planner.plan(parts.geometry(100), 10)}
    for site, kept in image.stages.items():
        stage = reducers[site]
        reducer, block = stage.reducer, layers_ran(stage) - 1
        seen = replace(geometry, visual_tokens=before, tower_features=geometry.hidden_size)
        flops += reducer.selection_flops(seen, len(kept))
        if reducer.reconstructs and engine.restore:
            handed_out = sum(engine.hands_out(layer) for layer in range(stage.site.layer, geometry.layers))
            flops += handed_out * reducer.restore_flops(seen, len(kept))
        for signal in set(reducer.signals) & set(SIGNAL_READS):
            reads.setdefault(block, set()).update(reducer.block_reads if signal == "block" else SIGNAL_READS[signal])
            if signal == "last_token_attention":
                kinds.add(("cls_attention" if parts.cls else "received_attention", block))
        for key in (resolve(parts, spec, stage) for spec in reducer.tower.values()):
            if key[0] in READS:
                kinds.add(key)
                reads.setdefault(key[1], set()).update(READS[key[0]])
        before = len(kept)
    kinds |= {(MADE_OF[key[0]], key[1]) for key in kinds if key[0] in MADE_OF}
    width = geometry.heads * geometry.head_dim
    tokens = [count + geometry.text_tokens for count in alive]
    for kind, block, *options in kinds:
        encoding = Encoding(0, 1, tokens[block], (tokens[block] ** 2,) * geometry.layers, 0)
        if price := TOWER_SIGNAL_FLOPS.get(kind):
            flops += price(encoding, block, width, *options)
    for block, letters in reads.items():
        if not _kept(parts, block):  # projections the engine makes again
            flops += len(letters) * 2 * tokens[block] * geometry.hidden_size * width
    return flops


def _kept(parts: VitParts, block: int) -> bool:
    """Whether the projections of a block can be kept as they are computed; else they are made again when read."""
    return any(not name.endswith("_norm") for name in projections(parts.blocks[block].attention))


# ------------------------------------------------------------------------------------------------ what follows
def _head(parts: VitParts, patches: int) -> int:
    """Pooling and what pooled features go through."""
    trunk, prefix = parts.trunk, parts.prefix
    inside = {id(module) for part in parts.blocks for module in part.block.modules()}
    inside |= {id(module) for module in parts.patch.modules()}
    flops = 0
    for module in trunk.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.Linear):
            flops += 2 * module.in_features * module.out_features
        if hasattr(module, "latent") and hasattr(module, "kv"):  # timm's attention pooling
            length = patches + (prefix if getattr(trunk, "pool_include_prefix", True) else 0)
            latents, width = module.latent.shape[-2:]
            pooling = sum(layer.in_features * layer.out_features for layer in (module.q, module.proj)) * (latents - 1)
            keys = module.kv.in_features * module.kv.out_features * (length - 1)
            flops += 2 * (pooling + keys) + 4 * latents * length * module.num_heads * module.head_dim
            if module.mlp is not None:
                flops += (
                    2
                    * (latents - 1)
                    * sum(layer.in_features * layer.out_features for layer in module.mlp.modules() if _is_linear(layer))
                )
        if hasattr(module, "probe"):  # SigLIP's; the output projection of its attention is one of the linear layers
            width, length = module.probe.shape[-1], patches + prefix
            flops += 2 * width**2 * (1 + 2 * length) + 4 * width * length
    own = getattr(trunk, "proj", None)
    if isinstance(own, nn.Parameter):
        flops += 2 * own.numel()
    seen = {id(module) for module in trunk.modules()}
    for path in HEADS:
        module = parts.model
        for name in path.split("."):
            module = getattr(module, name, None)
        for layer in [] if not isinstance(module, nn.Module) else module.modules():
            if _is_linear(layer) and id(layer) not in seen:
                seen.add(id(layer))
                flops += 2 * layer.in_features * layer.out_features
    return flops


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
