"""Signals of a vision encoder as vLLM builds it, by hooks on its fused projections. Tensors only, no vLLM.

The same quantities `prune.adapters.tower` takes from Hugging Face's encoders, made by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from prune.adapters.heads import DERIVE, Heads
from prune.adapters.tower import Key
from prune.adapters.vllm.options import Pruning
from prune.adapters.vllm.reduction import PROJECTOR_READS
from prune.tokens import Tower

FEATURES: Key = ("features", None)


class TowerReader:
    """Takes what a method reads of the encoder while `taken` is open.

    Args:
        pruning: the method, and the shape of the encoder.
        tower: holds the layers at `pruning.served.tower_shape.layers`.
        qkv: name of the fused projection in a layer's attention.
        projector: the module that reads the encoder's output.
        merge: patches that become one token.
    """

    def __init__(self, pruning: Pruning, tower: nn.Module, qkv: str, projector: nn.Module, merge: int = 1):
        reducer, self.served, self.merge, self.encoder = pruning.reducer, pruning.served, merge, tower
        wanted = dict(reducer.tower)
        if reducer.needs_projector:
            wanted[PROJECTOR_READS] = Tower("features")
        self.keys = {name: self.served.key(spec, reducer.name) for name, spec in wanted.items()}
        self.rows: dict[Key, Tensor] | None = None
        self.raw: dict[int, Tensor] = {}
        if FEATURES in self.keys.values():
            projector.register_forward_pre_hook(self._keep_features)
        layers = attrgetter(self.served.tower_shape.layers)(tower)
        for layer in {index for kind, index, *_ in self.keys.values() if index is not None}:
            attention = attrgetter(self.served.tower_shape.attention)(layers[layer])
            getattr(attention, qkv).register_forward_hook(partial(self._keep_projection, layer))
            attention.register_forward_hook(partial(self._after_attention, layer), with_kwargs=True)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within this context the encoder runs once, for the images `split` is asked about afterwards."""
        self.rows = {}
        try:
            yield
        finally:
            self.raw.clear()

    def split(self, shapes: Sequence[tuple[int, int]]) -> dict[str, list[Tensor]]:
        """name -> `[N, ...]` per image, in the order of its tokens.

        Args:
            shapes: (rows, columns) of every image's grid of tokens.
        """
        rows, self.rows = self.rows, None
        sizes = [high * wide for high, wide in shapes]
        order = self._order(shapes) if self.keys and self.merge > 1 else None
        by_key = {}
        for key in set(self.keys.values()):
            x = rows[key]
            if self.merge == 1:  # tiles; the projector does not see CLS
                by_key[key] = list(x if key == FEATURES else x[:, 1:] if self.served.tower_shape.cls else x)
                continue
            groups = x.unflatten(0, (-1, self.merge))
            groups = groups.flatten(1) if key == FEATURES else groups.mean(1)
            by_key[key] = list(groups[order.to(groups.device)].split(sizes))
        return {name: by_key[key] for name, key in self.keys.items()}

    def _order(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """The place of every token among those the encoder works on, window by window."""
        from transformers.vision_utils import get_vision_window_index

        side = self.encoder.spatial_merge_size
        grid = torch.tensor([(1, high * side, wide * side) for high, wide in shapes])
        return get_vision_window_index(grid, side, self.encoder.window_size, self.encoder.patch_size)[0].argsort()

    # hooks
    def _keep_features(self, module: nn.Module, args: tuple) -> None:
        if self.rows is not None:
            x = args[0].detach()
            self.rows[FEATURES] = x if self.merge == 1 else x.flatten(0, -2)

    def _keep_projection(self, layer: int, module: nn.Module, args: tuple, output: tuple) -> None:
        if self.rows is not None:
            self.raw[layer] = output[0].detach()

    @torch.no_grad()
    def _after_attention(self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if self.rows is None:
            return
        fused = self.raw.pop(layer)
        if self.merge > 1:  # packed images, [S, 1, 3 * E]
            fused = fused.flatten(0, -2)
        projections = {f"{letter}_proj": x for letter, x in zip("qkv", fused.chunk(3, -1))}
        width = projections["q_proj"].shape[-1] // self.served.heads
        shape = SimpleNamespace(num_heads=self.served.heads, scale=width**-0.5)
        heads = Heads(shape, projections, _as_transformers(kwargs), self.served.tower_shape.cls)
        for key in set(self.keys.values()):
            kind, index, *options = key
            if index == layer:
                self.rows[key] = DERIVE[kind](heads, *options)


def _as_transformers(kwargs: dict) -> dict:
    """The keyword arguments of an attention module under the names and shapes `Heads` knows."""
    out = {name: kwargs[name] for name in ("cu_seqlens",) if name in kwargs}
    if kwargs.get("rotary_pos_emb_cos") is not None:
        tables = (kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"])
        out["position_embeddings"] = tuple(torch.cat([table, table], -1) for table in tables)
    return out
