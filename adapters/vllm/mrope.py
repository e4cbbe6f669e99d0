"""Positions of the tokens left of an image, for models with M-RoPE. Tensors only, no vLLM.

A kept token has the (t, h, w) position it had. Which tokens are kept is known on the worker only, after the image was
encoded: `attach` puts the place on the grid behind the features, `detach` and `place` move it into the positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = 6
"""High and low byte of t, h and w: whole numbers up to 256 are exact in bfloat16."""


def attach(rows: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[K, D]` -> `[K, D + CHANNELS]` in the dtype of `rows`.

    Args:
        index: `[K]` int64 among the tokens of the image.
        shape: (rows, columns) of its grid, below 65536 each.
    """
    row, column = index // shape[1], index % shape[1]
    place = torch.stack([torch.zeros_like(row), row, column], 1)
    bytes_ = torch.stack([place // 256, place % 256], 2).flatten(1)
    return torch.cat([rows, bytes_.to(rows)], 1)


def detach(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`[K, D + CHANNELS]` -> features `[K, D]` and places `[3, K]` int64."""
    bytes_ = rows[:, -CHANNELS:].long().unflatten(1, (3, 2))
    return rows[:, :-CHANNELS], (bytes_[..., 0] * 256 + bytes_[..., 1]).T


def prompt_positions(length: int, images: Sequence[tuple[int, int, tuple[int, int]]]) -> tuple[Tensor, int]:
    """Positions of a prompt before its images are encoded: right for text, the image's first position for images.

    Args:
        length: L, of the prompt with what is left of its images.
        images: (first slot, slots, (rows, columns) of the whole grid) of every image, in order.

    Returns:
        `[3, L]` int64, and what is to be added to a later token's number to get its position.
    """
    positions = torch.empty(length, dtype=torch.long)
    at = following = 0
    for first, slots, shape in images:
        positions[at:first] = torch.arange(following, following + first - at)
        following += first - at
        positions[first : first + slots] = following
        at, following = first + slots, following + max(shape)
    positions[at:] = torch.arange(following, following + length - at)
    return positions.expand(3, -1).clone(), following - at


def place(tokens: Tensor, image_token: int, positions: Tensor, places: Tensor, start: int) -> Tensor:
    """The positions with those of some kept tokens filled in. Filling them in again changes nothing.

    Args:
        tokens: `[L]` int64 ids of the prompt.
        positions: `[3, L]` of `prompt_positions`, or what this function returned before.
        places: `[3, M]` int64 of `detach`, for the first M image slots at or after `start`, maybe from several images.
        start: the first slot that is not computed yet.

    Every image must have a text token right before it, or begin the prompt.
    """
    image = tokens == image_token
    slots = torch.arange(len(tokens), device=tokens.device)
    text = torch.where(image, -1, slots).cummax(0).values  # the last text slot at or before every slot
    chosen = image & (slots >= start)
    chosen = chosen & (chosen.cumsum(0) <= places.shape[1])
    before = torch.where(text < 0, -1, positions[0][text.clamp(min=0)])
    out = positions.clone()
    out[:, chosen] = before[chosen] + 1 + places
    return out
