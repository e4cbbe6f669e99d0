"""How numbers are written in all tables of a report: a `Cell` of accuracy, a row of costs, the facts of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from prune.evals.results import BASELINE, REFERENCE
from prune.evals.summary import Comparison, Line, clean, comparisons, options_text, share_text

LEGEND = (
    f"Accuracy in % with its 95 % interval, then the difference to {REFERENCE} in points, paired by item: "
    "↑ better, ↓ worse, no arrow where its 95 % interval includes 0. Best of a budget: "
)


class Costs(NamedTuple):
    """The columns of a table of costs.

    Attributes:
        headings: of all columns.
        leading: of those that narrow terminals show too.
        legend: what they mean.
    """

    headings: tuple[str, ...]
    leading: tuple[str, ...]
    legend: str


COSTS = Costs(
    ("average tokens", "kept tokens", "FLOPs %", "KV %", "prefill ms", "prefill ratio", "decode ms"),
    ("average tokens", "FLOPs %", "prefill ratio"),
    "Cost, means over the items: visual tokens averaged over the decoder layers, and kept after the last stage; "
    "prefill FLOPs and KV bytes as shares of un-pruned; prefill time per item (median over batches) and its ratio to "
    "un-pruned; decode time per further token.",
)
CLASS_COSTS = Costs(
    ("average tokens", "kept tokens", "FLOPs %", "forward ms", "time ratio", "images/s", "kNN %", "linear %"),
    ("average tokens", "FLOPs %", "time ratio"),
    "Cost, means over the pictures: patches averaged over the blocks, and kept after the last stage; FLOPs of the "
    "whole model as a share of un-pruned; time per picture (median over batches), its ratio to un-pruned, and pictures "
    "per second. kNN, linear: accuracy of scikit-learn's probes of the pooled features, fitted on the pruned model's.",
)


class Cell(NamedTuple):
    """The texts of one cell of accuracies.

    Attributes:
        status: what to write if there is no accuracy, else empty.
        accuracy, low, high: in %.
        difference, difference_low, difference_high: in points, signed; "-" and empty where there is none.
        arrow: ↑ or ↓ where the interval of the difference excludes 0.
        half, rounded, rounded_difference: half the interval, accuracy and difference in whole points.
        best: of its budget.
    """

    status: str = ""
    accuracy: str = ""
    low: str = ""
    high: str = ""
    difference: str = ""
    difference_low: str = ""
    difference_high: str = ""
    arrow: str = ""
    half: str = ""
    rounded: str = ""
    rounded_difference: str = ""
    best: bool = False


def cell(group: Comparison, line: Line | None) -> Cell:
    """The cell of a line of `group`; "-" for one that was not run."""
    if line is None or line.status != "ok":
        return Cell(status="-" if line is None else clean(line.status))
    mean, low, high = (100 * value for value in line.accuracy)
    found = Cell(
        accuracy=f"{mean:.1f}",
        low=f"{low:.1f}",
        high=f"{high:.1f}",
        half=f"{(high - low) / 2:.0f}",
        rounded=f"{mean:.0f}",
        best=line.row["cell"] in group.best,
    )
    if line.name == BASELINE:
        return found
    if line.difference is None:
        return found._replace(difference="-", rounded_difference="-")
    mean, low, high = (100 * value for value in line.difference)
    return found._replace(
        difference=f"{mean:+.1f}",
        difference_low=f"{low:+.1f}",
        difference_high=f"{high:+.1f}",
        rounded_difference=f"{mean:+.0f}",
        arrow=("↑" if mean > 0 else "↓") if line.difference.excludes_zero else "",
    )


def cost_columns(group: Comparison) -> Costs:
    """What a table of costs shows."""
    return CLASS_COSTS if group.of_classes else COSTS


def costs(line: Line, columns: Costs) -> list[str]:
    """The texts under the headings, "-" where there is no number."""
    return [_COST_TEXTS[heading](line) for heading in columns.headings]


def cost_sections(group: Comparison) -> list[tuple[str, list[Line]]]:
    """What a table of costs lists: the un-pruned lines, then those of each budget, under a heading."""
    sections = [("", list(group.baseline))]
    for share in group.shares:
        found = [cells[share] for cells in group.methods.values() if share in cells]
        sections.append((f"budget {share_text(share)}", found))
    return [(heading, lines) for heading, lines in sections if lines]


def full_cost(group: Comparison) -> str:
    """What the shares are of, in FLOPs and bytes; empty if it is not known."""
    for line in group.lines:
        flops, size = line.cost("prefill_flops_full"), line.cost("kv_bytes_full")
        if flops and size:
            return f"Un-pruned: {_unit(flops, 1000)}FLOPs of prefill, {_unit(size, 1024)}B of KV cache per item."
        if flops and group.of_classes:
            return f"Un-pruned: {_unit(flops, 1000)}FLOPs per picture."
    return ""


def remarks(group: Comparison) -> list[str]:
    """Notes on what cannot be compared, and the errors of cells without an accuracy."""
    found = [f"note: {note}" for note in group.notes]
    troubles: dict[tuple[str, str], list[Line]] = {}
    for line in group.troubles:  # what is out of reach at one budget is so at smaller ones, for one reason
        why = "" if line.status == "out of reach" else clean(line.row.get("error") or "the row gives no reason")
        troubles.setdefault((line.method, f"{clean(line.status)}: {why}"), []).append(line)
    for (method, status), lines in troubles.items():
        shares = ", ".join(share_text(line.share) for line in lines if line.share is not None)
        why = clean(lines[0].row.get("error") or "the row gives no reason")
        if lines[0].status == "out of reach":
            status = why if "out of reach" in why else f"out of reach: {why}"
        found.append(f"{method}{shares and f' at {shares}'}: {status}")
    return found


def facts(lines: Sequence[Line], command: str) -> list[tuple[str, list[str]]]:
    """What it takes to get the same numbers: heading -> lines of text."""
    rows = [line.row for line in lines]
    ended = sorted(str((row.get("measured") or {}).get("finished") or "") for row in rows)
    ended = [clean(when) for when in ended if when]
    budgets = [
        f"{clean(group.by)}: {', '.join(map(share_text, group.shares))}" for group in comparisons(lines) if group.by
    ]
    states = [line.status for line in lines]
    found = {
        "Made by": [command],
        "Cells": [f"{clean(state)}: {states.count(state)}" for state in states],
        "Models": [_with_options(row["model"]) for row in rows],
        "Tasks": [_with_options(row["task"]) for row in rows],
        "Methods": [_with_options(row["method"]) for row in rows],
        "Budgets": budgets,
        "Run": [options_text(row.get("run") or {}) for row in rows],
        "Versions": [options_text(row.get("versions") or {}) for row in rows],
        "Devices": [clean(row.get("device") or "") for row in rows],
        "Finished": [ended[0] if ended[0] == ended[-1] else f"{ended[0]} to {ended[-1]}"] if ended else [],
    }
    unique = {heading: [text for text in dict.fromkeys(texts) if text] for heading, texts in found.items()}
    return [(heading, texts) for heading, texts in unique.items() if texts]


def _with_options(found: dict) -> str:
    """`name (key=value, ...)`, options unpacked and nulls left out."""
    options = {**(found.get("options") or {}), **found}
    shown = {key: value for key, value in options.items() if key not in ("name", "options") and value is not None}
    return f"{clean(found['name'])} ({options_text(shown)})" if shown else clean(found["name"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _amount(value: float | None, digits: int = 1) -> str:
    """With `digits` decimals, fewer from 10 and from 100 on."""
    if value is None:
        return "-"
    return f"{value:.{digits if digits == 1 or value < 10 else 2 if value < 100 else 1}f}"


def _unit(value: float, base: int) -> str:
    """`12.3 G`, before the name of a unit."""
    prefixes = ["", "k", "M", "G", "T", "P"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
    power = min(int(math.log(max(value, 1), base)), len(prefixes) - 1)
    return f"{value / base**power:.3g} {prefixes[power]}"


def _per_second(line: Line) -> float | None:
    time = line.measured("prefill_ms")
    return 1000 / time if time else None


_COST_TEXTS: dict[str, Callable[[Line], str]] = {
    "average tokens": lambda line: _amount(line.cost("average_tokens")),
    "kept tokens": lambda line: _amount(line.cost("kept_tokens")),
    "FLOPs %": lambda line: _percent(line.prefill_share),
    "KV %": lambda line: _percent(line.kv_share),
    "prefill ms": lambda line: _amount(line.measured("prefill_ms"), 3),
    "forward ms": lambda line: _amount(line.measured("prefill_ms"), 3),
    "prefill ratio": lambda line: "-" if line.prefill_ratio is None else f"{line.prefill_ratio:.2f}",
    "time ratio": lambda line: "-" if line.prefill_ratio is None else f"{line.prefill_ratio:.2f}",
    "decode ms": lambda line: _amount(line.measured("decode_ms"), 3),
    "images/s": lambda line: _amount(_per_second(line)),
    "kNN %": lambda line: _percent(line.probes.get("knn")),
    "linear %": lambda line: _percent(line.probes.get("linear")),
}
