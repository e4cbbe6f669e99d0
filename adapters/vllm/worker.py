"""vLLM's side of the model: which images are encoded together, and the choice among their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from prune.adapters.vllm.options import OPTION, Pruning
from prune.adapters.vllm.reduction import reduce_images
from prune.adapters.vllm.tower import TowerReader
from prune.errors import ConfigError


def check_engine(pruning: Pruning, vllm_config) -> None:
    """Refuse settings of the engine under which a method would see something else, or nothing.

    Raises:
        ConfigError: names the setting.
    """
    compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
    reads_tower = bool(pruning.reducer.tower) or pruning.reducer.needs_projector
    refused = {
        "tensor parallelism: every rank holds some of the heads": vllm_config.parallel_config.tensor_parallel_size > 1
        and reads_tower,
        "compile_mm_encoder: a compiled encoder runs no hooks": compilation.compile_mm_encoder and reads_tower,
        "cudagraph_mm_encoder: a graph goes past the pruning": compilation.cudagraph_mm_encoder,
        "LoRA on the tower or connector: vLLM counts their tokens by what is left": lora is not None
        and getattr(lora, "enable_tower_connector_lora", False),
    }
    if found := [reason for reason, on in refused.items() if on]:
        raise ConfigError(f"{OPTION} with {pruning.method.name} does not go with {found[0]}; switch it off")


class Pruner:
    """Prunes what a model's encoder and projector give.

    Args:
        pruning: of the server.
        limit: un-pruned visual tokens encoded at a time. vLLM's scheduler counts what is left of them.
        reader: of the encoder's signals.
        project: `[..., g * Dv]` -> `[..., D]`.
        embed: ids `[T]` -> `[T, D]`, the language model's input embeddings.
    """

    def __init__(
        self,
        pruning: Pruning,
        limit: int,
        reader: TowerReader,
        project: Callable[[Tensor], Tensor],
        embed: Callable[[Tensor], Tensor],
    ):
        self.reducer, self.limit, self.reader = pruning.reducer, limit, reader
        self.project, self.embed = project, embed

    def run(
        self,
        shapes: Sequence[tuple[int, int]],
        keep: Sequence[int],
        texts: Sequence[Tensor] | None,
        encode: Callable[[slice], Sequence[Tensor]],
    ) -> list[tuple[Tensor, Tensor]]:
        """Rows and indices left of every image; see `reduce_images`.

        Args:
            shapes: (rows, columns) of every image's grid of tokens.
            keep: tokens left of every image.
            texts: ids `[T]` of the text after every image, if the method reads them.
            encode: images of a slice -> their features `[N, D]` each.
        """
        out = []
        for part in batches([high * wide for high, wide in shapes], self.limit):
            prunes = any(count < high * wide for count, (high, wide) in zip(keep[part], shapes[part]))
            if not prunes:
                signals, features = {}, encode(part)
            else:
                with self.reader.taken():
                    features = encode(part)
                signals = self.reader.split(shapes[part])
            device = features[0].device
            told = None if texts is None else [self.embed(text.to(device)) for text in texts[part]]
            out += reduce_images(
                self.reducer, features, keep[part], shapes[part], signals, told, self.project if prunes else None
            )
        for (rows, _), count in zip(out, keep):
            assert len(rows) == count, f"{len(rows)} rows for {count} placeholders"
        return out


def batches(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Consecutive images of at most `limit` tokens together, at least one at a time."""
    first = total = 0
    for at, size in enumerate(sizes):
        if at > first and total + size > limit:
            yield slice(first, at)
            first, total = at, 0
        total += size
    if len(sizes):
        yield slice(first, len(sizes))


def rows_of(texts) -> list[Tensor] | None:
    """The texts of a batch as vLLM hands them on: a list, or one tensor if they are of equal length."""
    return None if texts is None else list(texts.unbind(0) if isinstance(texts, Tensor) else texts)


def project_with(module: nn.Module, merge: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A projector as a function of the patches of one token in a row."""

    def project(rows: Tensor) -> Tensor:
        rows = rows.to(dtype)
        if merge == 1:
            return module(rows)
        flat = module(rows.reshape(-1, rows.shape[-1] // merge))
        return flat.view(*rows.shape[:-1], -1)

    return project
