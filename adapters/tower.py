"""Signals of the vision encoder, taken from what it computes anyway.

Hooks on the projections of the declared layers see q, k and v; a hook on the attention module turns them into one
number per patch and lets go of them. `generate` encodes images outside every call of the model, so the results travel
on the encoder's output. From hook to hook they lie in a thread-local place that the encoder's own hooks open and close
(InternVL's layers take no keyword arguments that could carry them).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune.adapters import packing
from prune.adapters.families import SIGNAL_TOWERS
from prune.adapters.heads import DERIVE, READS, Heads, projections
from prune.adapters.structure import Parts
from prune.errors import ConfigError, UnsupportedMethodError
from prune.method import Stage
from prune.registry import list_methods, method_info
from prune.tokens import ALIVE, SIGNALS, TOWER_KINDS, Tower

SIGNALS_OF = "prune_tower"  # attribute of the encoder's output: key -> tensor in the encoder's order
PROJECTED = "prune_projected"  # the same for what the projector gave
NORMED = "normed"  # the output of the norm after the last layer
CLS_KINDS = ("cls_attention", "joint_cls_attention", "cls_value_similarity")
Key = tuple  # (kind, layer index), and the threshold if there is one; ("features", None) is what the projector reads


# -------------------------------------------------------------------------------------------------- what is wanted
def methods_for_decoders(signals: set[str]) -> list[str]:
    """Names of the methods that need none but these signals and act at projected or in a decoder."""
    return [name for name in list_methods(signals=signals) if "block" not in method_info(name).where]


def resolve(parts: Parts, spec: Tower, reader: str) -> Key:
    """The kind, layer index and maybe threshold a `Tower` means on this model.

    Raises:
        UnsupportedMethodError: the encoder is built in an unknown way, or has no CLS token.
        ConfigError: no such layer.
    """
    shape = parts.tower_shape
    if shape is None:
        no_tower = ", ".join(methods_for_decoders(set(SIGNALS)))
        kind = getattr(getattr(parts.tower, "config", None), "model_type", type(parts.tower).__name__)
        raise UnsupportedMethodError(
            f"{reader} reads {spec.kind} of the vision encoder, which is known to be right for "
            f"{', '.join(SIGNAL_TOWERS)} only, not for {kind!r}; methods that read none: {no_tower}"
        )
    if spec.kind in CLS_KINDS and not shape.cls:
        works = set(SIGNALS) | {f"tower:{kind}" for kind in TOWER_KINDS if kind not in CLS_KINDS}
        raise UnsupportedMethodError(
            f"{reader} reads {spec.kind}, and the vision encoder {parts.tower.config.model_type} has no CLS token; "
            f"methods that work: {', '.join(methods_for_decoders(works))}"
        )
    if spec.kind in ("pixels", ALIVE) or (spec.kind == "features" and spec.layer is None):
        return spec.kind, None
    options = () if spec.threshold is None else (float(spec.threshold),)
    return spec.kind, _index(parts, spec.layer), *options


def _index(parts: Parts, layer: int | float | None) -> int:
    count = len(parts.tower_blocks)
    if layer is None:
        return max(0, *parts.read_layers)
    if isinstance(layer, float):
        return math.ceil(layer * count - 1e-9) - 1
    if not -count <= layer < count:
        raise ConfigError(f"layer={layer} is out of range: this vision encoder has layers 0 to {count - 1}")
    return layer % count


# ------------------------------------------------------------------------------------------------------- capturing
@dataclass
class State:
    """One run of the encoder: projections of the layer at hand, and signals `[tiles, patches with CLS, ...]`."""

    raw: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rows: dict[Key, Tensor] = field(default_factory=dict)
    outputs: dict[int | str, Tensor] = field(default_factory=dict)


class Place(threading.local):
    """Where the hooks of one thread meet. `encoded` is a weak reference to the output whose projection is due."""

    state: State | None = None
    encoded = None
    outputs: tuple = ()

    def __reduce__(self):  # a copy of the model starts with an empty place
        return Place, ()


class Capture:
    """Takes the signals `keys` from the tower of `parts`, while `switch.enabled`."""

    def __init__(self, parts: Parts, keys: list[Key], switch):
        self.parts, self.keys, self.switch, self.place = parts, list(dict.fromkeys(keys)), switch, Place()
        self.shape = parts.tower_shape
        self.reads = parts.read_layers
        self.vision = None  # the cuts inside the encoder, see `prune.adapters.vision_sites.cuts_of`

    def attach(self) -> list:
        """Register the hooks: on the encoder, on the projector, and on every layer if one of them is read.

        torch.compile shares the code of one layer with all others and does not look at hooks again, so what has a hook
        in some layer needs one in each; hooks of layers that are not read do nothing.
        """
        parts, layers = self.parts, self.parts.tower_blocks
        handles = [
            parts.tower.register_forward_pre_hook(self.open, with_kwargs=True),
            parts.tower.register_forward_hook(self.close, with_kwargs=True, always_call=True),
        ]
        if not parts.encodes_first:
            handles.append(parts.core.register_forward_hook(self.forget, always_call=True))
        if packing.anyres is parts.family.pack_image:
            handles.append(parts.projector.register_forward_hook(self.projected))
        derived: dict[int, list[Key]] = {}
        outputs: set[int] = set()
        for key in self.keys:
            kind, layer = key[:2]
            if kind == "features":
                outputs |= set(self.reads if layer is None else [layer])
            elif layer is not None:
                derived.setdefault(layer, []).append(key)
        for layer in range(len(layers)) if outputs else ():
            if -1 in outputs:
                hook = partial(self.keep_input, layer - 1 if layer == 0 else None)
                handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
            hook = partial(self.keep_output, layer if layer in outputs else None)
            handles.append(layers[layer].register_forward_hook(hook))
        if self.shape.norm and ("features", None) in self.keys and len(layers) - 1 in self.reads:
            norm = attrgetter(self.shape.norm)(parts.tower)
            handles.append(norm.register_forward_hook(partial(self.keep_output, NORMED)))
        letters = {letter for keys in derived.values() for kind, *_ in keys for letter in READS[kind]}
        for layer in range(len(layers)) if derived else ():
            keys = tuple(derived.get(layer, ()))
            attention = attrgetter(self.shape.attention)(layers[layer])
            needed = projections(attention, {letter for kind, *_ in keys for letter in READS[kind]}) if keys else ()
            for name in projections(attention, letters):
                hook = partial(self.keep_projection, layer if name in needed else None, name)
                handles.append(getattr(attention, name).register_forward_hook(hook))
            hook = partial(self.after_attention, layer, keys)
            handles.append(attention.register_forward_hook(hook, with_kwargs=True))
        return handles

    # the encoder
    def open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.place.state = State() if self.switch.enabled else None
        if self.place.state is not None and ("pixels", None) in self.keys:
            pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
            self.place.state.rows["pixels", None] = patches(pixels, self.parts.core.config.vision_config.patch_size)

    def close(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Always called, also after an exception (then `output` is None)."""
        state, self.place.state = self.place.state, None
        if state is None or output is None or isinstance(output, tuple):
            return
        for key in self.keys:
            if key[0] == "features":
                state.rows[key] = self._features(state, key[1])
            elif key[0] == ALIVE:
                state.rows[key] = self.vision.take_alive()
        order = None
        if hasattr(module, "window_size"):
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            order = window_order(module, grid.cpu(), kwargs)
        signals = {key: self._by_token(key, state.rows[key], order) for key in self.keys}
        setattr(output, SIGNALS_OF, signals)
        self.place.encoded = weakref.ref(output)
        if not self.parts.encodes_first:
            self.place.outputs = (*self.place.outputs[-1:], output)

    def projected(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """The projector runs after the encoder returned: add what it gave to the encoder's output."""
        encoded, self.place.encoded = self.place.encoded, None
        if encoded is not None and (out := encoded()) is not None:
            setattr(out, PROJECTED, output)

    def collected(self, modalities) -> dict[str, object]:
        """The outputs of the encoder in this call of the model, by modality in the order the model encodes them."""
        outputs, self.place.outputs = self.place.outputs, ()
        return dict(zip(modalities, outputs[-len(modalities) :]))

    def forget(self, module: nn.Module, args: tuple, output) -> None:
        """Always called after the model, also after an exception."""
        self.place.outputs = ()

    # its layers
    @torch.compiler.disable
    def keep_projection(self, layer: int | None, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if layer is not None and (state := self.place.state) is not None:
            state.raw[layer, name] = output.detach()

    @torch.compiler.disable
    def keep_input(self, layer: int | None, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if layer is not None and (state := self.place.state) is not None:
            state.outputs[layer] = args[0] if args else kwargs["hidden_states"]

    @torch.compiler.disable
    def keep_output(self, layer: int | str | None, module: nn.Module, args: tuple, output) -> None:
        if layer is not None and (state := self.place.state) is not None:
            state.outputs[layer] = output[0] if isinstance(output, tuple) else output

    @torch.compiler.disable
    @torch.no_grad()
    def after_attention(self, layer: int, keys: tuple, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        state = self.place.state
        if state is None or not keys:
            return
        raw = {name: state.raw.pop((at, name)) for at, name in list(state.raw) if at == layer}
        heads = Heads(module, raw, kwargs, self.shape.cls)
        for key in keys:
            kind, _, *options = key
            state.rows[key] = DERIVE[kind](heads, *options)

    # patches to tokens
    def _features(self, state: State, layer: int | None) -> Tensor:
        if layer is not None:
            return state.outputs[layer]
        last = len(self.parts.tower_blocks) - 1
        read = [state.outputs[NORMED if self.shape.norm and n == last else n] for n in self.reads]
        return read[0] if len(read) == 1 else torch.cat(read, -1)

    def _by_token(self, key: Key, x: Tensor, order: Tensor | None) -> Tensor:
        """`[tiles, patches with CLS, ...]` -> `[tiles, tokens, ...]`, or `[S, ...]` -> `[1, S / g, ...]`."""
        kind, core = key[0], self.parts.core
        if self.shape.joined == "consecutive":
            groups = x.unflatten(0, (-1, core.config.vision_config.spatial_merge_size**2))
            x = _join(kind, groups if order is None or kind == "pixels" else _rows(groups, order), 1)
            return x[None]
        if self.shape.cls and kind == "pixels":
            x = F.pad(x, (0, 0, 1, 0))
        if getattr(core.config, "vision_feature_select_strategy", "full") == "default":
            x = x[:, 1:]
        if self.shape.joined == "shuffle":
            x = _join(kind, x[:, shuffled(core, x.shape[1]).to(x.device, non_blocking=True)], 2)
        return x


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x[order.to(x.device, non_blocking=True)]


def _join(kind: str, groups: Tensor, dim: int) -> Tensor:
    """Several patches, in dimension `dim`, to one token."""
    return groups.flatten(dim) if kind in ("features", "pixels") else groups.mean(dim)


def tower_of(parts: Parts, stages: Sequence[Stage], switch) -> Capture | None:
    """The capture these stages need, or None."""
    readers = [stage.reducer for stage in stages]
    keys = [resolve(parts, spec, reader.name) for reader in readers for spec in reader.tower.values()]
    keys += [resolve(parts, Tower("features"), reader.name) for reader in readers if reader.needs_projector]
    return Capture(parts, keys, switch) if keys else None


# ------------------------------------------------------------------------------------------------------------ shapes
def patches(pixels: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`[tiles, 3, H, W]` -> `[tiles, patches, 3 * p * p]`; patches already (Qwen) stay as they are."""
    if pixels.dim() == 2:
        return pixels
    size = (size, size) if isinstance(size, int) else tuple(size)
    return F.unfold(pixels.float(), size, stride=size).transpose(1, 2).to(pixels.dtype)


def shuffled(core: nn.Module, count: int) -> Tensor:
    """`[tokens, g]`: the patches of every token, by the model's own pixel shuffle."""
    side = math.isqrt(count)
    number = torch.arange(count, dtype=torch.float32).view(1, side, side, 1)
    return core.pixel_shuffle(number, scale_factor=core.config.downsample_ratio).flatten(0, 2).long()


def window_order(tower: nn.Module, grid: Tensor, kwargs: dict) -> Tensor | None:
    """The place of every token among those a tower with windows (Qwen2.5-VL) works on; None if it has none.

    Args:
        grid: `[images, 3]`, on the host.
        kwargs: of the tower's call.
    """
    if not hasattr(tower, "window_size"):
        return None
    order = kwargs.get("window_index")
    if order is None:
        from transformers.vision_utils import get_vision_window_index

        order, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return order.argsort()
