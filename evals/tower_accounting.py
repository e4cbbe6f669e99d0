"""What methods that act inside the vision encoder of a vision-language model save there, and spend on choosing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prune.adapters.packed_blocks import PackedBlocks
from prune.evals.accounting import Encoding, linear_weights, patch_embedding
from prune.evals.vit_accounting import selection_of


def inside_tower(engine, encodings: Sequence[Encoding]) -> list[tuple[int, int]]:
    """FLOPs not computed in the encoder's blocks, and FLOPs of choosing the patches, for every image of a report.

    Taken from what the encoder's last run did, tile by tile; where an image and a video were encoded in two runs, the
    mean over the tiles of the last one stands for all.

    Args:
        engine: of the whole model; its `vision` cuts inside the encoder.
        encodings: of the images, in the order in which they are encoded.
    """
    record = engine.vision.record
    if isinstance(engine.vision, PackedBlocks):
        return _packed(engine.vision, encodings)
    if record is None or not record.done:
        return [(0, 0)] * len(encodings)
    report, found = record.report(), []
    geometry = report.geometry
    full = geometry.prefill_flops([geometry.visual_tokens] * geometry.layers)
    for image, alive, in_mlp in zip(report.images, report.tokens_per_layer, report.tokens_per_mlp):
        spent = selection_of(engine.vision, image, alive, geometry)
        found.append((full - geometry.prefill_flops(alive, in_mlp), spent))
    tiles = _for_all(found, sum(encoding.sequences for encoding in encodings))
    totals, start = [], 0
    for encoding in encodings:
        part = tiles[start : start + encoding.sequences]
        totals.append(tuple(map(sum, zip(*part))))
        start += encoding.sequences
    return totals


def _for_all(found: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """As many as were encoded: the mean stands for those of a run before the last."""
    if len(found) == count:
        return found
    return [tuple(round(sum(column) / len(found)) for column in zip(*found))] * count


def _packed(vision: PackedBlocks, encodings: Sequence[Encoding]) -> list[tuple[int, int]]:
    """The same for encoders that run all images as one sequence."""
    record = vision.record
    if record is None:
        return [(0, 0)] * len(encodings)
    width, found = patch_embedding(vision.parts.tower).out_channels, [[0, 0] for _ in record.sizes]
    for block, images in zip(vision.parts.tower_blocks, record.gone()):
        weights = linear_weights(block)
        for image, (tokens, pairs) in zip(found, images):
            image[0] += 2 * weights * tokens + 4 * width * pairs
    geometry = replace(vision.parts.geometry(0), hidden_size=record.group * width)
    for reducer, before, behind in record.stages.values():
        for row, n, keep in zip(record.rows, before, behind):
            found[row][1] += reducer.selection_flops(replace(geometry, visual_tokens=n), keep)
    return _for_all([tuple(image) for image in found], len(encodings))
