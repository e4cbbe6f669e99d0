"""What a sweep is made of: methods with their options, budgets as shares of the tokens, and the cells of both."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fractions import Fraction

from torch import nn

from prune.apply import apply_pruner
from prune.budget import Budget
from prune.errors import BudgetError, UnsupportedMethodError
from prune.evals.results import BASELINE
from prune.method import Method
from prune.options import parse_options
from prune.registry import get_method, list_methods, method_class

SHARES = (Fraction(1, 3), Fraction(2, 9), Fraction(1, 9), Fraction(1, 18))
BLOCK_SHARES = (Fraction(3, 4), Fraction(1, 2), Fraction(2, 5))  # of a vision transformer's FLOPs
DEPTH = 32  # decoder layers of the 7B models the papers' layer numbers are meant for


@dataclass(frozen=True)
class Spec:
    """A method as it was asked for; a `layer` that `options` do not give is fitted to a shallow decoder."""

    name: str
    options: dict = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `name` or `name:option=value,option=value`.

        Raises:
            UnknownMethodError, ConfigError: no such method, option or value.
        """
        name, colon, pairs = text.partition(":")
        if name == BASELINE and not colon:
            return cls(name)
        method_class(name)
        # a comma within brackets belongs to a value
        options = parse_options(re.split(r",(?=\s*[\w-]+\s*=)", pairs)) if colon else {}
        get_method(name, **options)
        return cls(name, options)

    def method(self, layers: int) -> Method:
        """The method object for a decoder of `layers` layers."""
        return get_method(self.name, **{**fitted(self.name, layers), **self.options})


def fitted(name: str, layers: int) -> dict[str, int]:
    """The default `layer` of a method at the same relative depth of a decoder with fewer than 32 layers, at least 1.

    Layer 2 of 32 is far behind layer 2 of 5: there the first two layers would cost more than most budgets allow.
    """
    layer = next((f.default for f in fields(method_class(name)) if f.name == "layer"), None)
    if not isinstance(layer, int) or layer < 1 or layers >= DEPTH:
        return {}
    return {"layer": max(1, round(layer * layers / DEPTH))}


def parse_share(text: str) -> Fraction:
    """A share of the visual tokens from `1/9`, `0.25` or `25%`.

    Raises:
        BudgetError: no number in (0, 1].
    """
    try:
        share = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 < share <= 1:
        raise BudgetError(f"budget {text!r} must be a share of the tokens in (0, 1], such as 1/9, 0.25 or 25%")
    return share


def budget(by: str, share: Fraction) -> Budget:
    """`share` of the un-pruned tokens per layer ("average"), of the final count ("keep"), or of the FLOPs."""
    if share == 1:
        return Budget(ratio=0.0)
    if by == "keep":
        return Budget(ratio=float(1 - share))
    return Budget(**{by: float(share)})


@dataclass(frozen=True)
class Cell:
    """One method at one budget; `by` and `share` are None for the un-pruned baseline."""

    spec: Spec
    by: str | None = None
    share: Fraction | None = None

    @property
    def pruned(self) -> bool:
        return self.spec.name != BASELINE

    def __str__(self):
        return f"{self.spec.name} at {self.share}" if self.pruned else "un-pruned"


def cells(specs: Iterable[Spec], by: str, shares: Iterable[Fraction]) -> list[Cell]:
    """The baseline, then every method at every budget."""
    pruned = [spec for spec in specs if spec.name != BASELINE]
    return [Cell(Spec(BASELINE)), *(Cell(spec, by, share) for share in shares for spec in pruned)]


def applicable(model: nn.Module, layers: int) -> tuple[list[Spec], dict[str, str]]:
    """All registered methods this model can run, and why not for the others."""
    works, refused = [], {}
    for name in list_methods():
        try:
            apply_pruner(model, Spec(name).method(layers), ratio=0.5).remove()
        except UnsupportedMethodError as error:
            refused[name] = str(error)
        else:
            works.append(Spec(name))
    return works, refused


def fingerprint(description: dict) -> str:
    """A short name for what a cell does: equal descriptions are the same work."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
