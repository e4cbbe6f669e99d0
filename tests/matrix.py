"""THE table of the contract suite. A new method is one row here; every core case then runs for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
from tiny import ATTENTION, FAMILIES
from torch import nn

from prune import Compose, Geometry, Handle, Method, Reduction, apply_pruner, get_method

NAMING = ("layer", "score", "pivot")
"""Options that tell rows of one method apart."""


@dataclass(frozen=True)
class Row:
    """One method as the suite runs it.

    Args:
        name: registry name.
        options: of the method; for "compose" the members: (name, options) pairs.
        budget: small enough to remove whole rows and columns of the grid.
        exclude: family -> why the method cannot work there.
        positions: the policy to run with; None is the method's own.
    """

    name: str
    options: dict | tuple = field(default_factory=dict)
    budget: dict = field(default_factory=lambda: {"ratio": 0.75})
    exclude: dict[str, str] = field(default_factory=dict)
    positions: str | None = None

    def __str__(self):
        if self.name == "compose":
            return "+".join(str(Row(*member)) for member in self.options)
        return self.name + "".join(f"@{value}" for key, value in self.options.items() if key in NAMING)

    def method(self) -> Method:
        if self.name == "compose":
            return Compose(*(get_method(name, **options) for name, options in self.options))
        return get_method(self.name, **self.options)

    def attach(self, model: nn.Module, **changes) -> Handle:
        """The row's method on a model; `changes` replace its budget or set the position policy."""
        budget = {} if set(changes) & {"ratio", "keep", "average", "flops"} else self.budget
        return apply_pruner(model, self.method(), **{"positions": self.positions, **budget, **changes})

    @contextmanager
    def watched(self) -> Iterator[list[Reduction]]:
        """Collect what the method's reducers return, if it merges: only they know what they folded into what."""
        seen: list[Reduction] = []

        def watch(reduce):
            def wrapped(*args):
                seen.append(reduce(*args))
                return seen[-1]

            return wrapped

        with ExitStack() as stack:
            if self.method().merges:
                for cls in {type(stage.reducer) for stage in self.method().plan(Geometry(100), 10)}:
                    stack.enter_context(patch.object(cls, "reduce", watch(cls.reduce)))
            yield seen

    @property
    def policy(self) -> str:
        """The position policy the row runs with by default."""
        return self.positions or self.method().positions

    @property
    def policies(self) -> tuple[str, ...]:
        """The position policies the method supports: compact ones need all pruning before the decoder."""
        projected = all(site.kind == "projected" for site in self.method().sites())
        return ("original", "compact") if projected else ("original",)


NO_CLS = {
    family: "the vision encoder has no CLS token"
    for family in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}
WITH_CLS = {family: "the method's default runs there" for family in FAMILIES if family not in NO_CLS}

ROWS = (
    Row("random", {"seed": 1}),
    Row("random", {"seed": 1, "layer": 1}),
    Row("uniform", {}, {"average": 5}),
    Row("uniform", {"layer": 3}, {"keep": 5}),
    Row("dart", {"layer": 2}),
    Row("fastv", {"layer": 2}),
    Row("divprune", {}, {"keep": 3}),
    Row("compose", (("random", {}), ("fastv", {"layer": 2})), {"ratio": 0.8}),
    Row("gprune", {"similarity": 0.3}),
    Row("pyramiddrop"),
    Row("cdpruner", {}),
    Row("script", {}),
    Row("sparsevlm"),
    Row("vatp", {"layer": 1}),
    Row("vatp", {"layer": 2, "rows": "received"}),
    Row("greedyprune", {"layer": 2, "tau": 0.3}),
    Row("transprune", {"layers": (1, 2, 3)}),
    Row("vflowopt", {"layers": (1, 2), "cell": 2.0}, {"ratio": 0.5}),
    Row("ficoco", {"layers": (1, 2, 3)}),
    Row("aim", {"merge": 0.5, "layers": (2, 3)}),
    Row("framefusion", {"similarity": 0.1}),
    Row("flowcut", {"layer": 2, "score": "received"}),
    Row("flowcut", {"layer": 3}, exclude=NO_CLS),
    Row("hiprune", {"alpha": 0.8}),
    Row("visionzip", {"contextual": 0.4, "score": "received", "space": "here"}, {"ratio": 0.6}),
    Row("vispruner", {"score": "received", "drop": 2}),
    Row("vispruner", {}, exclude=NO_CLS),
    Row("fastervlm", {}, exclude=NO_CLS),
    Row("fastervlm", {"score": "received"}, exclude=WITH_CLS),
    Row("prumerge", {"adaptive": False, "neighbours": 2, "space": "here"}, {"ratio": 0.5}, exclude=NO_CLS),
    Row("todre", {"layer": 3, "tau": 0.3}, exclude=NO_CLS),
    Row("todre", {"layer": 3, "tau": 0.3, "pivot": "random"}, exclude=WITH_CLS),
    Row("zooprune", {"directions": 4, "step": 0.1}),
    Row("norm_diversity", {}, {"keep": 3}),
    Row("pooling", {}),
)

BEFORE_PROJECTOR = (Row("visionzip", {}, {"ratio": 0.5}, exclude=NO_CLS),)
"""Rows that merge before the projector: only the core cases know what comes out of it then."""

IN_VITS = ("bat", "expedit", "index_preserving", "tome")
"""Methods that act at blocks of vision transformers, and in no family here: see test_vit_contract.py."""

PROJECTED = Row("random", {"seed": 1})
COMPACT = Row("divprune", {}, {"keep": 3}, positions="compact")
DECODER = Row("fastv", {"layer": 1})
TWO_STAGE = Row("compose", (("random", {}), ("fastv", {"layer": 2})), {"ratio": 0.8})
ENGINE = (PROJECTED, COMPACT, DECODER, TWO_STAGE)
"""What the cases that test the engine, not a method, run with."""


EAGER = ("random", "uniform", "dart", "fastv", "divprune", "compose", "hiprune", "pyramiddrop", "transprune")
"""Rows that run under eager attention too: every kind of site and signal is among them."""


def cells(rows=ROWS + BEFORE_PROJECTOR, families=FAMILIES, attention=ATTENTION):
    """Parametrize a test over (row, family, attention)."""
    table = [
        pytest.param(row, family, attn, id=f"{row}-{family}-{attn}")
        for row in rows
        for family in families
        for attn in attention
        if family not in row.exclude and (attn == "sdpa" or row.name in EAGER)
    ]
    return pytest.mark.parametrize(("row", "family", "attn"), table)


def engine_cells(rows=ENGINE, families=FAMILIES):
    """Parametrize a test of the engine over (row, family), under SDPA."""
    table = [pytest.param(row, family, id=f"{row}-{family}") for row in rows for family in families]
    return pytest.mark.parametrize(("row", "family"), table)
