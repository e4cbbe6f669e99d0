"""What one sample costs: visual tokens per layer, prefill and decode FLOPs by part, bytes of KV cache.

Closed formulas over the model's own modules, so that nothing is run; tests hold them against
`torch.utils.flop_counter.FlopCounterMode` on real forwards. Counted is what it counts: matrix products, convolutions
and attention, two FLOPs per multiply-add, attention over all pairs (a causal mask is not subtracted). An account is of
the sample alone, at the start of a conversation: padding in a batch costs FLOPs too and is left out, and so is the
attention to an earlier turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil

import torch
from torch import nn

from prune.adapters import Engine, attached
from prune.adapters.images import PIXELS
from prune.adapters.structure import Parts, find_parts
from prune.budget import Geometry
from prune.errors import ConfigError, InputError, UnsupportedModelError
from prune.kernels.rows import important_rows
from prune.report import ImageReport, Report


@dataclass(frozen=True)
class Account:
    """The prefill of one sample, without padding.

    Args:
        tokens_per_layer: visual tokens entering each decoder layer.
        text_tokens: all other tokens of the sample.
        tower, projector: FLOPs of the vision encoder, and of what maps its output to the decoder's width.
        attention: FLOPs of the decoder's q, k, v, o projections and of attention over all T x T pairs.
        mlp: FLOPs of the decoder's gated MLPs.
        selection: FLOPs of choosing the tokens: signals computed for the method, and the method's own products.
        head: FLOPs of the LM head, on as many positions as `account` was told.
        kv_bytes: bytes of keys and values the cache holds afterwards.
        geometry: the decoder's sizes.
        vocabulary: outputs of the LM head; 0 for a model without one.
    """

    tokens_per_layer: tuple[int, ...]
    text_tokens: int
    tower: int
    projector: int
    attention: int
    mlp: int
    selection: int
    head: int
    kv_bytes: int
    geometry: Geometry = field(repr=False)
    vocabulary: int = field(repr=False)

    @property
    def average_tokens(self) -> float:
        """Mean over the decoder layers of the visual tokens alive."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of the prefill by part."""
        return {part: getattr(self, part) for part in PARTS}

    @property
    def prefill(self) -> int:
        """FLOPs of the prefill, all parts."""
        return sum(self.flops.values())

    def decode(self, new_tokens: int) -> int:
        """FLOPs of the decoder and LM head for `new_tokens` tokens after the first, which the prefill gives.

        Every step sees what the pruned cache holds and all steps before it.

        Raises:
            ConfigError: a negative number.
        """
        if new_tokens < 0:
            raise ConfigError(f"new_tokens={new_tokens} must be >= 0: tokens after the first")
        g = self.geometry
        weights = g.layers * (_attention_weights(g) + _mlp_weights(g)) + g.hidden_size * self.vocabulary
        cached = sum(self.tokens_per_layer) + g.layers * self.text_tokens
        pairs = new_tokens * cached + g.layers * (new_tokens * (new_tokens + 1) // 2)
        return 2 * new_tokens * weights + 4 * pairs * g.heads * g.head_dim


PARTS = tuple(f.name for f in fields(Account))[2:8]
"""The parts of a prefill, `Account.flops`: "tower", "projector", "attention", "mlp", "selection", "head"."""


def account(model: nn.Module, report: Report, inputs: Mapping[str, object], head_positions: int = 1) -> list[Account]:
    """What the prefill that `report` tells of costs, one account per sample, in order.

    Args:
        model: carries the pruner that made the report.
        report: `handle.last`.
        inputs: the keyword arguments of that call: token ids, pixel values, grids, image sizes, and so on.
        head_positions: positions per sample the LM head computes: 1 in `generate`, all of them in a plain forward.

    Raises:
        InputError: `inputs` are not those of the report.
        ConfigError: the pruner is gone, or another one is there.
        UnsupportedModelError: the model is of no known family.
    """
    parts = find_parts(model)
    encodings = _encodings(parts, report, inputs)
    engine = _engine(model, report) if any(image.stages for image in report.images) else None
    inside = [(0, 0)] * len(encodings)
    if engine is not None and engine.vision is not None:
        from prune.evals.tower_accounting import inside_tower  # which prices blocks with what is here

        inside = inside_tower(engine, encodings)
    head = model.get_output_embeddings()
    vocabulary = 0 if head is None else head.out_features
    accounts = []
    for sample, (alive, text) in enumerate(zip(report.tokens_per_layer, report.text_tokens)):
        images = [image for image in report.images if image.sample == sample]
        encoded = [encoding for encoding, image in zip(encodings, report.images) if image.sample == sample]
        saved = [found for found, image in zip(inside, report.images) if image.sample == sample]
        g, totals = replace(report.geometry, text_tokens=text), [n + text for n in alive]
        accounts.append(
            Account(
                tokens_per_layer=tuple(alive),
                text_tokens=text,
                tower=sum(_tower_flops(parts.tower, encoding) for encoding in encoded) - sum(x for x, _ in saved),
                projector=sum(_projector_flops(parts, encoding) for encoding in encoded),
                attention=sum(2 * t * _attention_weights(g) + 4 * t * t * g.heads * g.head_dim for t in totals),
                mlp=sum(2 * t * _mlp_weights(g) for t in totals),
                selection=0 if engine is None else _selection(engine, images, encoded, g) + sum(x for _, x in saved),
                head=2 * head_positions * g.hidden_size * vocabulary,
                kv_bytes=g.kv_bytes(alive, report.bytes_per_value),
                geometry=g,
                vocabulary=vocabulary,
            )
        )
    return accounts


def account_full(
    model: nn.Module, report: Report, inputs: Mapping[str, object], head_positions: int = 1
) -> list[Account]:
    """What the same prefill costs un-pruned; see `account`. The pruner may be gone."""
    visual = [0] * len(report.tokens_per_layer)
    for image in report.images:
        visual[image.sample] += image.tokens
    unpruned = replace(
        report,
        images=[replace(image, stages={}) for image in report.images],
        tokens_per_layer=[[n] * report.geometry.layers for n in visual],
    )
    return account(model, unpruned, inputs, head_positions)


def _attention_weights(g: Geometry) -> int:
    """Weights of the q, k, v and o projections of a decoder layer."""
    return 2 * g.hidden_size * (g.heads + g.kv_heads) * g.head_dim


def _mlp_weights(g: Geometry) -> int:
    """Weights of the gated MLP of a decoder layer."""
    return 3 * g.hidden_size * g.intermediate_size


# ------------------------------------------------------------------------------------------------ selection
def _projection(g: Geometry, tokens: int) -> int:
    """Keys or values of the whole sequence."""
    return 2 * tokens * g.hidden_size * g.kv_heads * g.head_dim


def _last_token_attention(g: Geometry, tokens: int) -> int:
    """Keys of the whole sequence, the query of one token, their products."""
    return _projection(g, tokens) + 2 * (g.hidden_size + tokens) * g.heads * g.head_dim


def _attention_inputs(g: Geometry, tokens: int) -> int:
    """Queries, keys and values of the whole sequence."""
    return 2 * tokens * g.hidden_size * (g.heads + 2 * g.kv_heads) * g.head_dim


SIGNAL_FLOPS: dict[str, Callable[[Geometry, int], int]] = {
    "keys": _projection,
    "values": _projection,
    "last_token_attention": _last_token_attention,
    "attention": _attention_inputs,
    "entry_attention": _attention_inputs,
}
"""Signal -> its cost for a sequence of so many tokens. Every function of `adapters.signals.CAPTURES` works alone, so
costs add up. Signals that are not here need no matrix product."""


def _one_row(encoding: Encoding, layer: int, width: int) -> int:
    return 2 * encoding.tokens * width


def _all_rows(encoding: Encoding, layer: int, width: int) -> int:
    return 2 * encoding.pairs[layer] * width


def _important_rows(encoding: Encoding, layer: int, width: int, threshold: float) -> int:
    length = round(encoding.pairs[layer] / encoding.tokens)  # of a sequence
    return 2 * encoding.tokens * important_rows(length, threshold) * width


TOWER_SIGNAL_FLOPS: dict[str, Callable[..., int]] = {
    "cls_attention": _one_row,
    "joint_cls_attention": _one_row,
    "cls_value_similarity": _one_row,
    "received_attention": _all_rows,
    "important_attention": _important_rows,
}
"""The same for kinds of `prune.tokens.Tower`, whose q, k and v the encoder has computed anyway: products of one row
per tile with all others, of some rows, or of all. The last argument is the threshold, if there is one. What pads
windows of different sizes is left out."""

MADE_OF = {"important_attention": "received_attention"}
"""Kinds that need another one, which a layer makes once for all of them."""


def _engine(model: nn.Module, report: Report) -> Engine:
    """The engine of the pruner that made the report.

    Raises:
        ConfigError: the model carries no pruner, or another one.
    """
    engine = attached(model)
    if engine is None or repr(engine.method) != report.method:
        carried = "no pruner" if engine is None else repr(engine.method)
        raise ConfigError(
            f"the report is of {report.method}, and the model carries {carried}; call account before handle.remove()"
        )
    return engine


def _selection(engine: Engine, images: Sequence[ImageReport], encodings: Sequence[Encoding], geometry: Geometry) -> int:
    """FLOPs of all stages of one sample. Its images are rows of one batch, so each costs what the largest does."""
    flops, parts = 0, engine.parts
    if engine.tower is not None:
        width = patch_embedding(parts.tower).out_channels
        keys = engine.tower.keys
        for kind, layer, *options in {*keys, *((MADE_OF[key[0]], key[1]) for key in keys if key[0] in MADE_OF)}:
            if price := TOWER_SIGNAL_FLOPS.get(kind):
                flops += sum(price(encoding, layer, width, *options) for encoding in encodings)
    reducers = {str(stage.site): stage.reducer for stage in engine.planner.plan(parts.geometry(100), 10)}
    counts = [image.tokens for image in images]
    for site in images[0].stages if images else ():
        reducer, total = reducers[site], sum(counts) + geometry.text_tokens
        flops += sum(SIGNAL_FLOPS[name](geometry, total) for name in reducer.signals if name in SIGNAL_FLOPS)
        left = [len(image.stages[site]) for image in images]
        seen = replace(geometry, visual_tokens=max(counts), text_tokens=total - min(counts))
        flops += len(images) * reducer.selection_flops(seen, max(left))
        if reducer.merges and reducer.needs_projector:  # what was merged before the projector goes through it again
            flops += len(images) * max(left) * geometry.projector_flops
        counts = left
    return flops


# ------------------------------------------------------------------------------------------------ vision encoder
@dataclass(frozen=True)
class Encoding:
    """What the vision encoder computes for one image or video.

    Args:
        patches: through the patch embedding.
        sequences: attended separately (tiles, frames).
        tokens: through the encoder's layers, class tokens included.
        pairs: query-key pairs in each layer.
        projected: tokens through the projector, as it sees them (after merging of neighbours).
    """

    patches: int
    sequences: int
    tokens: int
    pairs: tuple[int, ...]
    projected: int


@dataclass(frozen=True)
class Encoder:
    """How a family encodes.

    Args:
        encode: (parts, inputs, reports of the modality's images, modality) -> an `Encoding` for each image.
        projector: its modules, by their names in `parts.core`.
    """

    encode: Callable[[Parts, Mapping, Sequence[ImageReport], str], list[Encoding]]
    projector: tuple[str, ...] = ("multi_modal_projector",)


def _encodings(parts: Parts, report: Report, inputs: Mapping) -> list[Encoding]:
    """The encoding of every image of the report, in its order.

    Raises:
        InputError: the inputs hold another number of samples or images than the report.
        UnsupportedModelError: the family has no row in `ENCODERS`.
    """
    if parts.family.name not in ENCODERS:
        raise UnsupportedModelError(
            f"nothing says what the vision encoder of {type(parts.core).__name__} computes; known are "
            f"{', '.join(ENCODERS)}; add a row to ENCODERS in evals/accounting.py"
        )
    encode = ENCODERS[parts.family.name].encode
    prompt = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if prompt is not None:
        _check_same("samples", len(report.tokens_per_layer), len(prompt))
    encodings = {}
    for modality, pixels in PIXELS.items():
        numbers = [number for number, image in enumerate(report.images) if image.layout.modality == modality]
        images = [report.images[number] for number in numbers]
        found = encode(parts, inputs, images, modality) if inputs.get(pixels) is not None else []
        _check_same(f"{modality}s", len(images), len(found))
        encodings.update(zip(numbers, found))
    return [encodings[number] for number in range(len(report.images))]


def _check_same(what: str, reported: int, given: int) -> None:
    if reported != given:
        raise InputError(
            f"the report is of {reported} {what}, the inputs hold {given}; pass the inputs of the call that "
            "handle.last tells of"
        )


def _tiles(parts: Parts, count: int, height: int, width: int) -> Encoding:
    """Tiles of so many pixels, each a sequence of its own, with a class token if the tower has one."""
    rows, columns = patch_embedding(parts.tower).kernel_size
    patches = (height // rows) * (width // columns)
    names = [name for name, _ in parts.tower.named_parameters()]
    tokens = patches + any(name.endswith(("class_embedding", "cls_token")) for name in names)
    return Encoding(
        patches=count * patches,
        sequences=count,
        tokens=count * tokens,
        pairs=(count * tokens**2,) * len(_layers(parts.tower)),
        projected=count * tokens,
    )


def _cropped(parts: Parts, inputs: Mapping, encoding: Encoding) -> Encoding:
    """Without the first token of every sequence, if that is what the model drops before the projector."""
    strategy = inputs.get("vision_feature_select_strategy") or parts.core.config.vision_feature_select_strategy
    return replace(encoding, projected=encoding.tokens - encoding.sequences * (strategy == "default"))


def _single(parts: Parts, inputs: Mapping, images: Sequence[ImageReport], modality: str) -> list[Encoding]:
    """LLaVA-1.5: one tile per image, as large as the image for a tower of native resolution (Pixtral). Pixtral joins
    all images of a call to one masked sequence; what that adds is left out, as padding is."""
    pixels, sizes = inputs["pixel_values"], inputs.get("image_sizes")
    shapes = [pixels.shape[-2:]] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
    return [_cropped(parts, inputs, _tiles(parts, 1, *shape)) for shape in shapes]


def _anyres(parts: Parts, inputs: Mapping, images: Sequence[ImageReport], modality: str) -> list[Encoding]:
    """LLaVA-NeXT and OneVision: the tiles an image's size asks for (what pads the batch is not encoded), and all frames
    of a video. OneVision pools frames after the projector, NeXT-Video (it has a `vision_resampler`) before it."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = parts.core.config
    if modality == "video":
        videos, frames, _, *shape = inputs["pixel_values_videos"].shape
        video = _cropped(parts, inputs, _tiles(parts, frames, *shape))
        if hasattr(parts.core, "vision_resampler"):
            side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
            video = replace(video, projected=frames * side**2)
        return [video] * videos
    sizes, groups = torch.as_tensor(inputs["image_sizes"]).tolist(), inputs.get("batch_num_images")
    tiled = [True] * len(sizes)
    if groups is not None:  # OneVision tiles an image only if its sample has no other
        tiled = [n == 1 for n in torch.as_tensor(groups).tolist() for _ in range(n)]
    edge, shape = config.vision_config.image_size, inputs["pixel_values"].shape[-2:]
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, edge) if many else 1
        for size, many in zip(sizes, tiled)
    ]
    return [_cropped(parts, inputs, _tiles(parts, count, *shape)) for count in counts]


def _shuffled(parts: Parts, inputs: Mapping, images: Sequence[ImageReport], modality: str) -> list[Encoding]:
    """InternVL: an image has as many tiles as its tokens fill; neighbours are merged before the projector."""
    pixels = inputs["pixel_values"]
    merged = round(_tiles(parts, 1, *pixels.shape[-2:]).patches * parts.core.config.downsample_ratio**2)
    counts = [len(image.layout.coordinates) // merged for image in images]
    _check_same("tiles", sum(counts), len(pixels))
    return [replace(_tiles(parts, count, *pixels.shape[-2:]), projected=count * merged) for count in counts]


def _native(parts: Parts, inputs: Mapping, images: Sequence[ImageReport], modality: str) -> list[Encoding]:
    """Qwen-VL: every frame attends within itself, or (Qwen2.5) within windows of it in all but a few layers."""
    config = parts.tower.config
    merge, layers = config.spatial_merge_size, len(_layers(parts.tower))
    window, whole = getattr(config, "window_size", None), range(layers)
    if window:
        window, whole = window // merge // config.patch_size, config.fullatt_block_indexes
    out = []
    for frames, height, width in torch.as_tensor(inputs[f"{modality}_grid_thw"]).tolist():
        patches = height * width
        rows, columns = _windows(height // merge, window), _windows(width // merge, window)
        inside = merge**4 * sum(r * r for r in rows) * sum(c * c for c in columns)
        out.append(
            Encoding(
                patches=frames * patches,
                sequences=frames,
                tokens=frames * patches,
                pairs=tuple(frames * (patches**2 if layer in whole else inside) for layer in range(layers)),
                projected=frames * patches // merge**2,
            )
        )
    return out


def _windows(length: int, window: int | None) -> list[int]:
    """Lengths of the stretches of at most `window` that `length` falls into."""
    window = window or length
    return [min(window, length - start * window) for start in range(ceil(length / window))]


ENCODERS = {
    "LLaVA-1.5": Encoder(_single),
    "LLaVA-NeXT": Encoder(_anyres),
    "LLaVA-NeXT-Video": Encoder(_anyres),
    "LLaVA-OneVision": Encoder(_anyres),
    "Qwen2-VL": Encoder(_native, ("visual.merger",)),
    "Qwen2.5-VL": Encoder(_native, ("visual.merger",)),
    "Qwen3-VL": Encoder(_native, ("visual.merger", "visual.deepstack_merger_list")),
    "InternVL": Encoder(_shuffled),
}
"""By the family's name in `adapters.families.FAMILIES`."""


def _tower_flops(tower: nn.Module, encoding: Encoding) -> int:
    """Patch embedding, all layers (whichever of them is read: the towers run to the end), and pooling heads, which
    some SigLIP towers compute though nobody reads the result."""
    embedding = patch_embedding(tower)
    width = embedding.out_channels
    flops = 2 * embedding.weight.numel() * encoding.patches
    for layer, pairs in zip(_layers(tower), encoding.pairs):
        flops += 2 * linear_weights(layer) * encoding.tokens + 4 * width * pairs
    for head in (module for module in tower.modules() if hasattr(module, "probe")):
        once = linear_weights(head) + width**2  # the probe's query, output projection and MLP
        flops += 2 * once * encoding.sequences + 4 * width * (width + 1) * encoding.tokens  # keys, values, attention
    return flops


def _projector_flops(parts: Parts, encoding: Encoding) -> int:
    modules = [parts.core.get_submodule(name) for name in ENCODERS[parts.family.name].projector]
    return 2 * sum(map(linear_weights, modules)) * encoding.projected


def patch_embedding(tower: nn.Module) -> nn.Conv2d | nn.Conv3d:
    return next(module for module in tower.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))


def _layers(tower: nn.Module) -> nn.ModuleList:
    return next(module for module in tower.modules() if isinstance(module, nn.ModuleList))


def linear_weights(module: nn.Module) -> int:
    """By the sizes the layers state: quantised weights are packed."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
