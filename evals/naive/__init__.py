"""Every method once more, as a reader of its paper would write it: one image at a time, a Python loop wherever the
paper has steps, whole matrices of cosines and attention. What the library's versions are timed against and, because
nothing of theirs is used but options and constants, what they are tested against.

They follow the library's defaults where these differ from an authors' code; the docstrings of the methods say where.
They choose; they do not fold: what merging methods do with dropped tokens is in nobody's time but the library's.
"""

from __future__ import annotations

from collections.abc import Callable

from prune.evals.naive import attention, diverse, merging, tower
from prune.method import Reducer
from prune.reducers import (
    aim,
    bat,
    cdpruner,
    dart,
    divprune,
    expedit,
    fastervlm,
    fastv,
    ficoco,
    flowcut,
    framefusion,
    gprune,
    greedyprune,
    hiprune,
    index_preserving,
    norm_diversity,
    prumerge,
    pyramiddrop,
    script,
    sparsevlm,
    todre,
    tome,
    transprune,
    vatp,
    vflowopt,
    visionzip,
    vispruner,
    zooprune,
)
from prune.tokens import VisualTokens

DIRECT: dict[type[Reducer], Callable] = {
    aim.Merging: merging.aim,
    aim.Ranking: attention.aim_late,
    bat.BAT: merging.bat,
    cdpruner.CDPruner: diverse.cdpruner,
    dart.Dart: diverse.dart,
    divprune.DivPrune: diverse.divprune,
    expedit.Expedit: merging.expedit,
    fastervlm.FasterVLM: tower.fastervlm,
    fastv.FastV: attention.fastv,
    ficoco.FiCoCo: merging.ficoco,
    flowcut.Encoded: tower.flowcut,
    flowcut.Instructed: attention.flowcut_late,
    framefusion.Attended: attention.fastv,
    framefusion.Fusing: attention.framefusion,
    gprune.GPrune: diverse.gprune,
    greedyprune.GreedyPrune: diverse.greedyprune,
    hiprune.HiPrune: tower.hiprune,
    index_preserving.IndexPreserving: tower.index_preserving,
    norm_diversity.NormDiversity: diverse.norm_diversity,
    prumerge.PruMerge: tower.prumerge,
    pyramiddrop.PyramidDrop: attention.pyramiddrop,
    script.Script: diverse.script,
    sparsevlm.SparseVLM: attention.sparsevlm,
    todre.Diverse: diverse.todre,
    todre.DropUnseen: diverse.todre_late,
    tome.ToMe: merging.tome,
    transprune.TransPrune: attention.transprune,
    vatp.VATP: attention.vatp,
    vflowopt.VFlowOpt: tower.vflowopt,
    vispruner.VisPruner: tower.vispruner,
    visionzip.VisionZip: tower.visionzip,
    zooprune.ZooPrune: diverse.zooprune,
}
"""A stage's reducer -> `f(reducer, tokens, image, keep, memory)`, the indices it keeps; `memory` is the image's own."""

BASELINES = ("random", "uniform", "pooling")
"""Methods that are no paper's."""


def choose(reducer: Reducer, tokens: VisualTokens, keep: int, memory: list[dict]) -> list[list[int]]:
    """What a stage keeps of every image, in any order.

    Args:
        tokens: without padding, one image per sample.
        memory: a dict per image, the same ones for all stages of a method.
    """
    direct = DIRECT[type(reducer)]
    return [direct(reducer, tokens, b, keep, each) for b, each in enumerate(memory)]
