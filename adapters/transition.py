"""How much the attention and MLP modules of some decoder layers change every column, measured as they run."""

from __future__ import annotations

import threading
from functools import partial

import torch
from torch import Tensor, nn

from prune.adapters.visual import Running


class Place(threading.local):
    """Where the hooks inside one layer meet: modules like the MLP get nothing but the hidden states."""

    run: Running | None = None
    found: tuple[Tensor, ...] = ()

    def __reduce__(self):  # a copy of the model starts with an empty place
        return Place, ()


class Transition:
    """Measures the `indices` of `layers`; `begin` is to be called before such a layer runs."""

    def __init__(self, layers: nn.ModuleList, indices: set[int]):
        self.layers, self.indices, self.place = layers, indices, Place()

    def attach(self) -> list:
        """On every layer, for torch.compile (see `prune.adapters.tower`); only those of `indices` are begun."""
        handles = []
        for index, layer in enumerate(self.layers if self.indices else ()):
            handles += [
                layer.self_attn.register_forward_hook(self.measure, with_kwargs=True),
                layer.mlp.register_forward_hook(self.measure, with_kwargs=True),
                layer.register_forward_hook(partial(self.end, index), always_call=True),
            ]
        return handles

    @torch.compiler.disable
    def begin(self, run: Running) -> None:
        self.place.run, self.place.found = run, ()

    @torch.compiler.disable
    @torch.no_grad()
    def measure(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Length of the output over length of the input, and their cosine, `[B, L, 2]`."""
        if self.place.run is None:
            return
        before = (args[0] if args else kwargs["hidden_states"]).float()
        after = (output[0] if isinstance(output, tuple) else output).float()
        a, b = (torch.linalg.vector_norm(x, dim=-1) for x in (before, after))
        tiny = torch.finfo(torch.float32).tiny
        cosine = (before * after).sum(-1) / (a * b).clamp(min=tiny)
        self.place.found += (torch.stack([b / a.clamp(min=tiny), cosine], -1),)

    @torch.compiler.disable
    def end(self, index: int, module: nn.Module, args: tuple, output) -> None:
        """Always called, also after an exception."""
        run, self.place.run = self.place.run, None
        found, self.place.found = self.place.found, ()
        if run is None or output is None:
            return
        measured = torch.cat(found, -1)  # ratio and cosine of attention, then of the MLP
        change = (1 - measured[..., 1::2]).exp() * run.valid[..., None]
        run.transitions[index] = measured, change.sum(1)
