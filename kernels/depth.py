"""Layer numbers of a paper, carried over to decoders of another depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def scale_layers(layers: Sequence[int], of: int, depth: int) -> tuple[int, ...]:
    """The layers at the same share of the depth: numbers for a decoder of `of` layers -> for one of `depth` layers.

    Args:
        layers: ascending numbers of the layers in front of which the paper cuts.
        of: number of layers of the paper's decoder.
        depth: layers of the decoder at hand, at least 2.

    Returns:
        Ascending numbers in [1, depth - 1], rounded to nearest (ties to even). Layers that would coincide move apart;
        where there is no room for all, there are fewer.
    """
    found: list[int] = []
    for layer in layers:
        found.append(max(round(layer * depth / of), found[-1] + 1 if found else 1))
    for i in reversed(range(len(found))):  # from the end, push what is too deep up again
        found[i] = min(found[i], depth - len(found) + i)
    return tuple(layer for layer in found if layer >= 1)


def ascending(layers: Iterable[int]) -> bool:
    """Whether these are one or more whole numbers >= 1, every one larger than the one before."""
    numbers = list(layers)
    whole = all(isinstance(number, int) and number >= 1 for number in numbers)
    return whole and bool(numbers) and all(a < b for a, b in zip(numbers, numbers[1:]))
