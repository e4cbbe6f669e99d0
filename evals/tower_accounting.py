"""What methods that act inside the vision encoder of a vision-language model save there, and spend on choosing."""

from __future__ import annotations

from collections.abc import Sequence

from prune.evals.accounting import Encoding
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
    if record is None or not record.done:
        return [(0, 0)] * len(encodings)
    report, found = record.report(), []
    geometry = report.geometry
    full = geometry.prefill_flops([geometry.visual_tokens] * geometry.layers)
    for image, alive, in_mlp in zip(report.images, report.tokens_per_layer, report.tokens_per_mlp):
        spent = selection_of(engine.vision, image, alive, geometry)
        found.append((full - geometry.prefill_flops(alive, in_mlp), spent))
    tiles = sum(encoding.sequences for encoding in encodings)
    if len(found) != tiles:
        found = [tuple(round(sum(column) / len(found)) for column in zip(*found))] * tiles
    totals, start = [], 0
    for encoding in encodings:
        part = found[start : start + encoding.sequences]
        totals.append(tuple(map(sum, zip(*part))))
        start += encoding.sequences
    return totals
