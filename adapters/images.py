"""Find the images of one forward call: their placeholder columns, layouts and, where possible, encoder outputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prune.adapters.layouts import Request, guessed, layouts_of, repeat_shapes
from prune.adapters.packing import PATCH, TILE
from prune.adapters.structure import Parts
from prune.adapters.tower import PROJECTED, SIGNALS_OF
from prune.errors import InputError
from prune.report import Layout

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
SHAPES = {"grid_thw": "prune_grid_thw", "image_sizes": "prune_image_sizes"}


@dataclass
class Found:
    """The images of a call.

    Args:
        groups: per modality its `[B, L]` placeholder mask and its layouts.
        kwargs: the call's keyword arguments, maybe with the images encoded already.
        requests: by modality, what is known of the images.
        encoded: by modality, the encoder's output, if there is one yet.
    """

    groups: list[tuple[Tensor, list[Layout]]]
    kwargs: dict
    requests: dict[str, Request] = field(default_factory=dict)
    encoded: dict[str, object] = field(default_factory=dict)

    @property
    def placeholder(self) -> Tensor:
        """`[B, L]` bool: columns of any modality, separators included."""
        return torch.stack([mask for mask, _ in self.groups]).any(0)


def keep_shapes(module: nn.Module, args: tuple, kwargs: dict, output):
    """Post-hook on a native-resolution tower: let its output carry the image shapes, which `generate` drops."""
    for name, attribute in SHAPES.items():
        if kwargs.get(name) is not None and not isinstance(output, tuple):
            setattr(output, attribute, kwargs[name])


def find_images(parts: Parts, kwargs: dict, visual_mask: Tensor | None) -> Found | None:
    """The images of a call on `parts.core`, or None if it brings none.

    On transformers that allow it (>= 5.18) pixel values are encoded here and handed on as `mm_encoder_outputs`, as
    `generate` does: the result is the same, and the number of tokens per image is known before the decoder runs.

    Args:
        kwargs: the call's keyword arguments.
        visual_mask: `[B, L]` bool given by the user for `inputs_embeds` that hold image features already.

    Raises:
        InputError: an image has no tokens.
    """
    encoded = {m: out for m, out in (kwargs.get("mm_encoder_outputs") or {}).items() if out is not None}
    raw = [m for m, name in PIXELS.items() if kwargs.get(name) is not None]
    if not encoded and not raw:
        return _user_given(parts, kwargs, visual_mask)
    given = [m for m in parts.placeholders if m in encoded or m in raw]
    masks = {m: _placeholders(parts, kwargs, parts.placeholders[m]) for m in given}
    for modality, out in encoded.items():
        if out.get("last_hidden_state") is None:  # what generate leaves of them when it feeds a prompt in chunks
            raise InputError(
                f"the {modality} features are rows cut out of what the encoder returned, so images cannot be "
                "told apart; generate without prefill_chunk_size"
            )
    shapes = {m: _shapes(kwargs, encoded, m) for m in masks}
    early = {  # layouts that do not need the features: fail before anything is computed
        m: layouts_of(getattr(parts.family, m), Request(parts.core, m, masks[m], None, kwargs, **shapes[m]))
        for m in masks
        if shapes[m]["grid"] is not None and m not in encoded
    }
    if raw and parts.encodes_first and not encoded:
        kwargs, encoded = _encode(parts, kwargs, raw)
    groups, requests = [], {}
    for modality, mask in masks.items():
        features = encoded[modality].pooler_output if modality in encoded else None
        request = Request(parts.core, modality, mask, features, kwargs)
        for name, shape in shapes[modality].items():
            if shape is not None:
                setattr(request, name, repeat_shapes(torch.as_tensor(shape), request.lengths, mask))
        layouts = early.get(modality) or layouts_of(getattr(parts.family, modality) or guessed, request)
        groups.append((mask, layouts))
        requests[modality] = request
    return Found(groups, kwargs, requests, encoded)


def tower_signals(parts: Parts, found: Found, keys: list, embeds: Tensor | None = None) -> dict:
    """The captured signals of the vision encoder in the order of the call's placeholders, modality by modality.

    Args:
        keys: the signals that must be there.
        embeds: `[B, L, D]` the decoder's inputs, where the encoder's features are not known otherwise.

    Returns:
        key -> `[placeholders, ...]`, see `prune.adapters.tower`; maybe with `packing.TILE` and `packing.PATCH`.

    Raises:
        InputError: the images were encoded by hand or before the pruner was attached, or from another layer than
            the model's configuration says.
    """
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        given = found.kwargs.get(name)
        if given is not None and given != getattr(parts.core.config, name, None):
            raise InputError(f"{name}={given!r} is not the model's own; set model.config.{name} before attaching")
    parts_of: list[dict] = []
    for (modality, request), (mask, layouts) in zip(found.requests.items(), found.groups):
        output = found.encoded.get(modality)
        signals = getattr(output, SIGNALS_OF, {})
        if not set(keys) <= set(signals):
            break
        if request.features is None:
            request.features = embeds[mask.to(embeds.device)].split([len(one.coordinates) for one in layouts])
        pack = getattr(parts.family, f"pack_{modality}")
        packed = pack(request, signals, getattr(output, PROJECTED, None))
        places = torch.cat([one.coordinates for one in layouts])
        device = next(iter(packed.values())).device
        maps = {TILE: places[:, 0] + places[:, 1].clamp(min=0), PATCH: places[:, 2:]}
        parts_of.append({**{key: x.to(device, non_blocking=True) for key, x in maps.items()}, **packed})
    if not parts_of or len(parts_of) < len(found.groups):
        raise InputError(
            "the method reads the vision encoder, and these images were encoded without it; pass pixel_values (not "
            "inputs_embeds), and do not re-use encoder outputs from before the pruner was attached or enabled"
        )
    return {key: torch.cat([one[key] for one in parts_of]) for key in parts_of[0]}


def _user_given(parts: Parts, kwargs: dict, mask: Tensor | None) -> Found | None:
    embeds = kwargs.get("inputs_embeds")
    if mask is None or embeds is None:
        return None
    if embeds.shape[1] != mask.shape[1] or embeds.shape[0] % mask.shape[0]:
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():  # later calls bring text
            shapes = f"{tuple(mask.shape)} for inputs_embeds {tuple(embeds.shape[:2])}"
            raise InputError(f"visual_mask is {shapes}; it must be [B, L] as they are")
        return None
    mask = mask.to(embeds.device).bool().repeat_interleave(embeds.shape[0] // mask.shape[0], 0)
    layouts = guessed(Request(parts.core, "image", mask, None, kwargs))
    return Found([(mask, layouts)], kwargs) if layouts else None


def _placeholders(parts: Parts, kwargs: dict, token: int) -> Tensor:
    """`[B, L]` bool, the way the models find them: by id, or by the embedding of the id."""
    if (ids := kwargs.get("input_ids")) is not None:
        return ids == token
    embeds = kwargs["inputs_embeds"]
    embedding = parts.core.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == embedding.to(embeds)).all(-1)


def _shapes(kwargs: dict, encoded: dict, modality: str) -> dict:
    """What is known of the shapes of the images: grids in patches, or sizes in pixels."""
    sizes = kwargs.get("image_sizes") if modality == "image" else None
    found = {"grid": kwargs.get(f"{modality}_grid_thw"), "sizes": sizes}
    for key, attribute in zip(found, SHAPES.values()):
        if found[key] is None:
            found[key] = getattr(encoded.get(modality), attribute, None)
    return found


def _encode(parts: Parts, kwargs: dict, modalities: list[str]) -> tuple[dict, dict]:
    kwargs, encoded = dict(kwargs), {}
    for modality in modalities:
        encode = getattr(parts.core, f"get_{modality}_features")
        wanted = [name for name in inspect.signature(encode).parameters if name != "kwargs"]
        given = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
        encoded[modality] = encode(**given, return_dict=True)
    for modality in modalities:
        kwargs[PIXELS[modality]] = None
    kwargs["mm_encoder_outputs"] = dict(encoded)
    return kwargs, encoded
