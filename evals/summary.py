"""The numbers all parts of a report share: one `Line` per cell of a results file, and which lines are compared.

Nothing is printed or drawn here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from prune.errors import PruneError
from prune.evals.results import BASELINE, REFERENCE
from prune.evals.stats import Estimate, paired_difference

UNPRUNED = "un-pruned"
LARGEST_DENOMINATOR = 64  # of a share that is written as a fraction
SLACK = 0.02  # of a budget, by which a cell may miss it without a note
LONGEST_VALUE = 24  # characters of an option's value in a label
_BUDGETS = {
    "average": "at equal average tokens per layer",
    "keep": "at equal numbers of tokens kept",
    "flops": "at equal FLOPs of the layers",
}


class ReportError(PruneError):
    """No rows to report on, or a report that cannot be written."""


@dataclass(frozen=True)
class Line:
    """One cell.

    Args:
        row: the row of the results file, see `prune.evals.results`.
        model, task, method: what to call them. Of several variants of one name, `name(key=value)` with the options
            that differ between them. Free of control characters.
        accuracy: share in [0, 1] with its 95 % interval; None if the cell has none.
        difference: `accuracy` minus that of `reference`, paired by item, with its 95 % interval; None without one.
        reference: the cell (its key in the results file) of `REFERENCE` with the same model, task, items, budget and
            seed.
        prefill_ratio: prefill time divided by the un-pruned one on the same device at the same batch size.
    """

    row: dict
    model: str
    task: str
    method: str
    accuracy: Estimate | None
    difference: Estimate | None
    reference: str | None
    prefill_ratio: float | None

    @property
    def name(self) -> str:
        """The method's name, without options."""
        return self.row["method"]["name"]

    @property
    def by(self) -> str | None:
        """What the budget equalises ("average", "keep", "flops"); None for the un-pruned model."""
        return (self.row["budget"] or {}).get("by")

    @property
    def share(self) -> float | None:
        """Of the un-pruned amount; None for the un-pruned model."""
        return (self.row["budget"] or {}).get("share")

    @property
    def status(self) -> str:
        """`ok`, `failed`, `out of reach`; `no items` where an ok cell has no accuracy."""
        return "no items" if self.row["status"] == "ok" and self.accuracy is None else self.row["status"]

    @property
    def kinds(self) -> dict[str, float]:
        """Accuracy by kind of question, those without items left out."""
        kinds = (self.row.get("result") or {}).get("kinds") or {}
        return {kind: found["accuracy"] for kind, found in kinds.items() if _number(found.get("accuracy")) is not None}

    @property
    def probes(self) -> dict[str, float]:
        """Accuracy of what else was fitted to the features, by name; empty for questions."""
        return (self.row.get("result") or {}).get("probes") or {}

    def cost(self, key: str) -> float | None:
        """A number of the row's `cost`; None where there is none."""
        return _number((self.row.get("cost") or {}).get(key))

    def measured(self, key: str) -> float | None:
        """A number of the row's `measured`; None where there is none."""
        return _number((self.row.get("measured") or {}).get(key))

    @property
    def prefill_share(self) -> float | None:
        """Prefill FLOPs divided by the un-pruned ones."""
        return _ratio(self.cost("prefill_flops"), self.cost("prefill_flops_full"))

    @property
    def kv_share(self) -> float | None:
        """KV bytes divided by the un-pruned ones."""
        return _ratio(self.cost("kv_bytes"), self.cost("kv_bytes_full"))


@dataclass(frozen=True)
class Comparison:
    """The lines that belong into one table: of one model and task, with budgets of one sort.

    Args:
        by: what the budgets equalise; None if nothing but the un-pruned model was run.
        shares: the budgets, largest first.
        baseline: the un-pruned lines.
        methods: label -> share -> line; the reference comes first, then by name.
    """

    model: str
    task: str
    by: str | None
    shares: tuple[float, ...]
    baseline: tuple[Line, ...]
    methods: dict[str, dict[float, Line]]

    @property
    def title(self) -> str:
        budgets = "" if self.by is None else ", " + _BUDGETS.get(self.by, f"budgets by {clean(self.by)}")
        return f"{self.model} on {self.task}{budgets}"

    @property
    def of_classes(self) -> bool:
        """Whether pictures were sorted into classes, by a vision transformer; else questions were answered."""
        return any("decided_by" in (line.row.get("run") or {}) for line in self.lines)

    @property
    def lines(self) -> list[Line]:
        return [*self.baseline, *(line for cells in self.methods.values() for line in cells.values())]

    @property
    def troubles(self) -> list[Line]:
        """Cells without an accuracy."""
        return [line for line in self.lines if line.status != "ok"]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for line in self.lines for kind in line.kinds))

    @cached_property
    def best(self) -> set[str]:
        """The keys of the cells with the highest accuracy of their budget; none where there is nothing to beat."""
        found = set()
        for share in self.shares:
            column = [cells[share] for cells in self.methods.values() if share in cells and cells[share].accuracy]
            top = max((line.accuracy.mean for line in column), default=None)
            if len(column) > 1:
                found |= {line.row["cell"] for line in column if line.accuracy.mean == top}
        return found

    @cached_property
    def notes(self) -> list[str]:
        """What stands in the way of comparing the lines with each other."""
        return _notes(self)


def summarise(rows: Sequence[dict]) -> list[Line]:
    """The numbers of every row, in order.

    Raises:
        ReportError: there are no rows.
    """
    if not rows:
        raise ReportError("no rows to report on; `prune eval` writes some")
    models = _labels(rows, lambda row: _flat(row["model"]))
    tasks = _labels(rows, lambda row: (row["task"]["name"], row["task"].get("options") or {}))
    methods = _labels(rows, _method, within=lambda row: (models[row["cell"]], tasks[row["cell"]]))
    baselines, references = {}, {}
    for row in rows:
        if row["method"]["name"] == BASELINE:
            baselines.setdefault(_same_machine(row), row)
        if row["method"]["name"] == REFERENCE and _scores(row):
            references.setdefault(_same_work(row), row)
    lines = []
    for row in rows:
        reference = references.get(_same_work(row))
        if row["method"]["name"] in (BASELINE, REFERENCE) or not _scores(row):
            reference = None
        if reference and len(_scores(row)) != len(_scores(reference)):
            reference = None
        unpruned = baselines.get(_same_machine(row), {})
        times = [_number((each.get("measured") or {}).get("prefill_ms")) for each in (row, unpruned)]
        lines.append(
            Line(
                row=row,
                model=models[row["cell"]],
                task=tasks[row["cell"]],
                method=methods[row["cell"]],
                accuracy=_accuracy(row),
                difference=reference and paired_difference(_scores(row), _scores(reference)),
                reference=reference and reference["cell"],
                prefill_ratio=_ratio(*times),
            )
        )
    return lines


def comparisons(lines: Iterable[Line]) -> list[Comparison]:
    """The lines sorted into tables, in the order in which models, tasks and sorts of budget first come."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.model, line.task), []).append(line)
    found = []
    for (model, task), group in groups.items():
        baseline = tuple(line for line in group if line.name == BASELINE)
        pruned = [line for line in group if line.name != BASELINE]
        for by in dict.fromkeys(line.by for line in pruned) or [None]:
            methods: dict[str, dict[float, Line]] = {}
            for line in sorted(pruned, key=lambda line: (line.name != REFERENCE, line.method.casefold())):
                if line.by == by:
                    methods.setdefault(line.method, {})[line.share] = line
            shares = sorted({share for cells in methods.values() for share in cells}, reverse=True)
            found.append(Comparison(model, task, by, tuple(shares), baseline, methods))
    return found


def share_text(share: float | None) -> str:
    """`1/9` where the share is a simple fraction, else a decimal; `un-pruned` for None."""
    if share is None:
        return UNPRUNED
    simple = Fraction(share).limit_denominator(LARGEST_DENOMINATOR)
    return str(simple) if abs(simple - Fraction(share)) < 1e-9 else f"{share:.6g}"


def clean(text: object) -> str:
    """Text of a row as one line without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def options_text(options: dict) -> str:
    """`key=value, ...`, whole."""
    return ", ".join(f"{clean(key)}={clean(_value(value))}" for key, value in options.items())


def _method(row: dict) -> tuple[str, dict]:
    """All that makes two lines of one method, budgets aside."""
    options = dict(row["method"].get("options") or {})
    rest = {"positions": row["method"].get("positions"), **(row.get("run") or {}), "items": row["task"].get("items")}
    for key, value in rest.items():
        options[f"run_{key}" if key in options else key] = value
    return (UNPRUNED if row["method"]["name"] == BASELINE else row["method"]["name"]), options


def _flat(found: dict) -> tuple[str, dict]:
    return found["name"], {key: value for key, value in found.items() if key != "name"}


def _labels(
    rows: Sequence[dict],
    identity: Callable[[dict], tuple[str, dict]],
    within: Callable[[dict], Hashable] = lambda row: None,
) -> dict[str, str]:
    """Cell -> name, or `name(key=value)` with the options that differ among equal names of one group (`within`)."""
    variants: dict[Hashable, dict[str, dict]] = {}
    for row in rows:
        name, options = identity(row)
        variants.setdefault((within(row), name), {})[_key(options)] = options
    labels: dict[Hashable, str] = {}
    for (group, name), found in variants.items():
        keys = dict.fromkeys(key for options in found.values() for key in options)
        differing = [key for key in keys if len({_key(options.get(key)) for options in found.values()}) > 1]
        taken: Counter[str] = Counter()
        for key, options in found.items():
            shown = ", ".join(f"{clean(each)}={_short(options[each])}" for each in differing if each in options)
            label = f"{clean(name)}({shown})" if shown else clean(name)
            taken[label] += 1  # values that differ in their middle only
            labels[group, name, key] = label if taken[label] == 1 else f"{label} #{taken[label]}"
    return {row["cell"]: labels[within(row), name, _key(options)] for row in rows for name, options in [identity(row)]}


def _short(value: object) -> str:
    text = clean(_value(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}…{text[1 - LONGEST_VALUE // 2 :]}"


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _same_work(row: dict) -> str:
    """Rows that differ in the method only."""
    return _key([row["model"], row["task"], row.get("budget")])


def _same_machine(row: dict) -> str:
    """Rows whose times may be compared: one model and task, on one device, with one batch size."""
    task = [row["task"]["name"], row["task"].get("options")]
    return _key([row["model"], task, row.get("device"), (row.get("run") or {}).get("batch_size")])


def _scores(row: dict) -> list[float]:
    return (row.get("result") or {}).get("scores") or []


def _accuracy(row: dict) -> Estimate | None:
    result = row.get("result") or {}
    numbers = [_number(value) for value in (result.get("accuracy"), *(result.get("interval") or (None, None)))]
    return None if row["status"] != "ok" or None in numbers else Estimate(*numbers)


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _ratio(value: float | None, full: float | None) -> float | None:
    return value / full if value is not None and full else None


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    ran = [line.row for line in comparison.lines if line.row["status"] == "ok"]
    if counts := _several(row.get("device") for row in ran):
        notes.append(f"Cells of several devices ({counts}): prefill times are compared within one device only.")
    if counts := _several((row.get("run") or {}).get("batch_size") for row in ran):
        notes.append(f"Cells of several batch sizes ({counts}): prefill times are compared within one of them only.")
    versions = [row.get("versions") or {} for row in ran]
    for package in dict.fromkeys(name for found in versions for name in found):
        if counts := _several(found[package] for found in versions if package in found):  # older rows say less
            notes.append(f"Cells of several versions of {clean(package)} ({counts}): times may differ for that reason.")
    alone = "differences are taken between equal items only, the accuracies are not of the same questions."
    if counts := _several(row["task"].get("items") for row in ran):
        notes.append(f"Cells of several numbers of items ({counts}): {alone}")
    elif _several(_key(row["task"]) for row in ran):
        notes.append(f"Cells of several states of the task's data: {alone}")
    if off := _off_budget(comparison):
        notes.append(f"Not at equal cost, counts being whole numbers: {off}.")
    if comparison.methods:
        references = {line.reference for line in comparison.lines if line.reference}
        named = dict.fromkeys(line.method for line in comparison.lines if line.row["cell"] in references)
        variants = [
            label for label, cells in comparison.methods.items() if {REFERENCE} == {x.name for x in cells.values()}
        ]
        if not variants:
            notes.append(f"No cells of {REFERENCE}: there is nothing to take differences to.")
        elif len(variants) > 1 and named:
            notes.append(f"Differences are to {', '.join(named)}.")
    return notes


def _off_budget(comparison: Comparison) -> str:
    """`vflowopt at 1/3: 50.8 for 48`, the cells whose average tokens miss their budget by more than `SLACK`."""
    full = next((line.cost("average_tokens") for line in comparison.baseline if line.cost("average_tokens")), None)
    if comparison.by != "average" or not full:
        return ""
    found = []
    for line in comparison.lines:
        tokens, wanted = line.cost("average_tokens"), full * (line.share or 1)
        if tokens is not None and abs(tokens - wanted) > SLACK * wanted:
            found.append(f"{line.method} at {share_text(line.share)}: {tokens:.4g} for {wanted:.4g}")
    return ", ".join(found)


def _several(values: Iterable[object]) -> str:
    """`cpu: 12, cuda: 4` if there are several values, else nothing."""
    counts = Counter(clean("unknown" if value is None else value) for value in values)
    return ", ".join(f"{value}: {count}" for value, count in counts.most_common()) if len(counts) > 1 else ""
