"""From visual tokens and signals of a batch of images to the tokens that are left. Tensors only, no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prune.adapters.layouts import grids
from prune.kernels.compaction import take
from prune.method import Reducer
from prune.tokens import Reduction, VisualTokens

PROJECTOR_READS = "projector"
"""Key of the features the projector reads, `[N, g * Dv]` per image, beside the signals of a reducer."""


def texts_after(prompt: Sequence[int], image_token: int, images: int) -> list[list[int]]:
    """The ids of the text after each image, up to the end of the prompt, without images.

    Args:
        prompt: ids with one `image_token` per image.

    Returns:
        One list per image; empty lists where the prompt does not have `images` image tokens, which vLLM refuses itself.
    """
    places = [at for at, token in enumerate(prompt) if token == image_token]
    if len(places) != images:
        return [[] for _ in range(images)]
    return [[token for token in prompt[at + 1 :] if token != image_token] for at in places]


@torch.no_grad()
def reduce_images(
    reducer: Reducer,
    features: Sequence[Tensor],
    keep: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    signals: Mapping[str, Sequence[Tensor]],
    texts: Sequence[Tensor] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Let a reducer choose; an image that keeps all its tokens stays as it is.

    Args:
        features: `[N, D]` per image, what would enter the language model.
        keep: tokens left per image, on the host, at least 1.
        shapes: (rows, columns) of every image's grid.
        signals: name in `reducer.tower` (and `PROJECTOR_READS`) -> `[N, ...]` per image.
        texts: `[T, D]` per image, embeddings of the text after it.
        project: `[..., g * Dv]` -> `[..., D]`.

    Returns:
        Per image the rows `[keep, D]` that are left and their indices `[keep]` int64, ascending. No host
        synchronisation beyond the reducer's own.
    """
    everything = [(rows, torch.arange(len(rows), device=rows.device)) for rows in features]
    short = [i for i, (rows, count) in enumerate(zip(features, keep)) if count < len(rows)]
    if not short:
        return everything
    counts = [keep[i] for i in short]
    tokens = _tokens(reducer, short, features, shapes, signals, texts)
    tokens.projector = project if reducer.needs_projector else None
    reduction = reducer.reduce(tokens, counts)
    rows = _merged(reduction, tokens.features, signals, short, project)
    for row, (i, count) in enumerate(zip(short, counts)):
        everything[i] = rows[row, :count], reduction.keep[row, :count]
    return [(left.clone(), index) for left, index in everything]  # a view would hold the memory of the whole batch


def _padded(rows: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    return pad_sequence([rows[i] for i in chosen], batch_first=True)


def _mask(rows: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    lengths = torch.tensor([len(rows[i]) for i in chosen])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(rows[0].device, non_blocking=True)


def _tokens(reducer, chosen, features, shapes, signals, texts) -> VisualTokens:
    device = features[0].device
    places = [grids(((1, *shapes[i]),)).coordinates for i in chosen]
    coordinates = pad_sequence(places, batch_first=True, padding_value=-1).to(device, non_blocking=True)
    tokens = VisualTokens(
        features=_padded(features, chosen),
        mask=_mask(features, chosen),
        coordinates=coordinates,
        patch=coordinates[..., 2:],
        tower={name: _padded(signals[name], chosen) for name in reducer.tower},
    )
    if "inputs" in reducer.signals:
        tokens.inputs, tokens.text_inputs = tokens.features, _padded(texts, chosen)
        tokens.text_mask = _mask(texts, chosen)
    return tokens


def _merged(reduction: Reduction, features: Tensor, signals, chosen, project) -> Tensor:
    """`[B, K, D]`: as the hook engine does it, see `prune.adapters.shown.Shown.merge`."""
    merge = reduction.merge
    if merge is None or merge.space == "here":
        return reduction.apply(features)
    folded = project(reduction.apply(_padded(signals[PROJECTOR_READS], chosen))).to(features)
    receives = torch.zeros(reduction.keep.shape, device=features.device)
    receives = receives.scatter_add(1, merge.slot, (merge.weight != 0).to(receives)) > 0
    if merge.scale is not None:
        receives = receives | (merge.scale != 1)
    return torch.where(receives[..., None], folded, take(features, reduction.keep))
