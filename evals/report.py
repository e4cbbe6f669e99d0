"""The report of a sweep: tables in the terminal, and a folder with Markdown, CSV, plots and one HTML page."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prune.evals.cells import LEGEND, Cell, cell, cost_columns, cost_sections, costs, facts, full_cost, remarks
from prune.evals.results import BASELINE
from prune.evals.summary import Comparison, Line, ReportError, comparisons, share_text, summarise

COSTS_WIDTH = 58  # of all columns of costs
LEADING_WIDTH = 26  # of those that narrow terminals show too

__all__ = ["ReportError", "summarise", "terminal_table", "write_report"]


def write_report(rows: list[dict], folder: Path, command: str = "prune report results.jsonl") -> list[Path]:
    """Write report.md, report.csv, plots/*.png and report.html into a folder, which is made if need be.

    Args:
        rows: of `prune.evals.results.read_rows`.
        folder: files of an earlier report in it are overwritten, others left alone.
        command: what the report says it was made by.

    Returns:
        The paths written.

    Raises:
        ReportError: no rows, no matplotlib, or a folder that cannot be written to.
    """
    from prune.evals.page import html_page
    from prune.evals.plots import draw

    lines = summarise(rows)
    groups = comparisons(lines)
    pictures = []  # per comparison: title -> (file name, PNG)
    for group, name in zip(groups, file_names(groups)):
        pictures.append({plot.title: (f"plots/{name}-{plot.name}.png", plot.png) for plot in draw(group)})
    files = {
        "report.md": markdown(lines, groups, pictures, command).encode(),
        "report.csv": csv_text(lines).encode(),
        **dict(chain.from_iterable(found.values() for found in pictures)),
        "report.html": html_page(lines, groups, pictures, command).encode(),
    }
    folder = Path(folder)
    try:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        raise ReportError(f"cannot write the report to {folder}: {error.strerror}; give another folder") from None
    return [folder / name for name in files]


def file_names(groups: Sequence[Comparison]) -> list[str]:
    """One name per comparison: different, and safe on every file system."""
    names: list[str] = []
    for group in groups:
        words = (group.model[-60:], group.task[-60:], group.by or BASELINE)
        name = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-") or "x" for word in words)
        clashes = sum(re.fullmatch(rf"{re.escape(name.lower())}(-\d+)?", other.lower()) is not None for other in names)
        names.append(f"{name}-{clashes + 1}" if clashes else name)
    return names


def majority_lines(group: Comparison) -> list[str]:
    """What needs no picture: one line, several if cells are of several states of the task, none if rows do not say."""
    found = dict.fromkeys((line.row.get("result") or {}).get("majority") for line in group.lines)
    what = "Always the most frequent answer" + (" of each kind" if group.kinds else "")
    return [f"{what}: {100 * share:.1f} %." for share in found if share is not None]


# ------------------------------------------------------------------------------------------------------ terminal


def terminal_table(rows: list[dict], width: int) -> Group:
    """Accuracy and cost of every comparison, for a terminal of `width` columns.

    Intervals are rounded when there is little room, and budgets that do not fit get a table of their own.

    Raises:
        ReportError: no rows.
    """
    parts, groups = [], comparisons(summarise(rows))
    for group in groups:
        parts += [Text(group.title, style="bold"), *_accuracy_tables(group, width)]
        parts += [*(Text(line, style="dim") for line in majority_lines(group)), ""] if majority_lines(group) else []
        parts += [*(Text(remark, style="yellow") for remark in remarks(group)), ""] if remarks(group) else []
        parts += [Text(f"cost of {group.title}", style="bold"), _cost_table(group, width), full_cost(group), ""]
    legends = dict.fromkeys(cost_columns(group).legend for group in groups)
    return Group(*parts, Text("\n".join([f"{LEGEND}*. ±: half the interval.", *legends]), style="dim"))


def _accuracy_tables(group: Comparison, width: int) -> list[Table | str]:
    shares = group.shares or (None,)
    labels = ["method", *(line.method for line in group.baseline), *group.methods]
    first = min(max(map(len, labels)), max(16, width // 4))  # longer labels are folded
    for write in (_everything, _intervals, _rounded):
        column = max(sum(len(text) for text, _ in write(cell(group, line))) for line in group.lines)
        fitting = (width - first) // (column + 2)
        if fitting >= len(shares):
            break
    tables = []
    for at in range(0, len(shares), max(1, fitting)):
        part = shares[at : at + max(1, fitting)]
        table = _empty_table(first)
        for share in part:
            table.add_column(" accuracy" if share is None else f" {share_text(share)}", no_wrap=True)
        for line in group.baseline:  # has no budget: the same in every column
            table.add_row(Text(line.method), *[Text.assemble(*write(cell(group, line)), style="dim") for _ in part])
        if group.baseline and group.methods:
            table.add_section()
        for label, found in group.methods.items():
            drawn = (Text.assemble(*write(cell(group, found.get(share)))) for share in part)
            table.add_row(Text(label), *drawn)
        tables += [table, ""]
    return tables


def _everything(found: Cell) -> list[tuple[str, str]]:
    interval = f" [{found.difference_low:>5}, {found.difference_high:>5}]" if found.difference_low else ""
    return [*_intervals(found), (interval, "dim")]


def _intervals(found: Cell) -> list[tuple[str, str]]:
    if found.status:
        return _no_accuracy(found)
    return [
        ("*" if found.best else " ", ""),
        (f"{found.accuracy:>5}", "bold" if found.best else ""),
        (f" [{found.low:>4}, {found.high:>5}]", "dim"),
        (f" {found.difference:>5}{found.arrow:1}", _colour(found)),
    ]


def _rounded(found: Cell) -> list[tuple[str, str]]:
    if found.status:
        return _no_accuracy(found)
    return [
        ("*" if found.best else " ", ""),
        (f"{found.rounded:>3}", "bold" if found.best else ""),
        (f" ±{found.half:<2}", "dim"),
        (f"{found.rounded_difference:>3}{found.arrow:1}", _colour(found)),
    ]


def _no_accuracy(found: Cell) -> list[tuple[str, str]]:
    return [(f" {found.status}", "dim" if found.status == "-" else "yellow")]


def _colour(found: Cell) -> str:
    return {"↑": "green", "↓": "red"}.get(found.arrow, "")


def _cost_table(group: Comparison, width: int) -> Table:
    sections, columns = cost_sections(group), cost_columns(group)
    labels = [text for heading, lines in sections for text in (heading, *(line.method for line in lines))]
    longest = max(map(len, labels))
    roomy = width >= min(longest, 16) + COSTS_WIDTH
    shown = [at for at, heading in enumerate(columns.headings) if roomy or heading in columns.leading]
    first = min(longest, max(8, width - (COSTS_WIDTH if roomy else LEADING_WIDTH)))  # longer labels are folded
    table = _empty_table(first)
    for at in shown:
        table.add_column(columns.headings[at].replace(" ", "\n"), justify="right", no_wrap=True)
    for heading, lines in sections:
        if heading:
            table.add_row(Text(heading, style="bold not cyan"))
        for line in lines:
            texts = costs(line, columns)
            table.add_row(Text(line.method), *(texts[at] for at in shown))
        table.add_section()
    return table


def _empty_table(first: int) -> Table:
    """With the column of methods, `first` wide; further columns take their own width and 2."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", style="bold cyan", overflow="fold", min_width=first, max_width=first)
    return table


# ------------------------------------------------------------------------------------------------------ Markdown


def markdown(
    lines: Sequence[Line], groups: Sequence[Comparison], pictures: Sequence[dict[str, tuple[str, bytes]]], command: str
) -> str:
    """The report as GitHub renders it; `pictures` are per comparison: title -> (file name, PNG)."""
    parts = ["# Visual-token pruning: accuracy and cost", f"{LEGEND}**bold**."]
    for group, drawn in zip(groups, pictures):
        parts.append(f"## {_escape(group.title)}")
        headings = ["method", *map(share_text, group.shares)] if group.shares else ["method", "accuracy"]
        body = [
            [_escape(line.method), *[_markdown_cell(cell(group, line))] * (len(headings) - 1)]
            for line in group.baseline
        ]
        for label, found in group.methods.items():
            body.append([_escape(label), *(_markdown_cell(cell(group, found.get(share))) for share in group.shares)])
        parts += [_table(headings, body), *majority_lines(group)]
        if found := remarks(group):
            parts.append("\n".join(f"- {_escape(remark)}" for remark in found))
        parts += [f"![{title}]({name})" for title, (name, _) in drawn.items()]
        columns, body = cost_columns(group), []
        parts.append(f"### Cost\n\n{columns.legend} {full_cost(group)}".rstrip())
        for heading, found in cost_sections(group):
            body += [
                [_escape(line.method), heading.removeprefix("budget ") or "-", *costs(line, columns)] for line in found
            ]
        parts.append(_table(["method", "budget", *columns.headings], body))
    parts.append("## How to get these numbers again")
    listed = [f"- {heading}: {'; '.join(map(_escape, texts))}" for heading, texts in facts(lines, command)]
    parts.append("\n".join(listed))
    return "\n\n".join(parts) + "\n"


def _markdown_cell(found: Cell) -> str:
    if found.status:
        return _escape(found.status)
    accuracy = f"**{found.accuracy}**" if found.best else found.accuracy
    text = f"{accuracy} [{found.low}, {found.high}]"
    if found.difference_low:
        text += f"<br>{found.difference}{found.arrow} [{found.difference_low}, {found.difference_high}]"
    return text + ("<br>-" if found.difference == "-" else "")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, marks, *rows))


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, links, emphasis or further columns."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", text)


# ----------------------------------------------------------------------------------------------------------- CSV


def csv_text(lines: Sequence[Line]) -> str:
    """One line per cell under flat column names; numbers as in the rows, tables and lists as JSON."""
    records = [_record(line) for line in lines]
    columns = list(dict.fromkeys(column for record in records for column in record))
    columns.sort(key=lambda column: column.startswith("kind_"))  # they differ between tasks: last
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(line: Line) -> dict[str, object]:
    row = line.row
    accuracy = line.accuracy or (None,) * 3
    difference = line.difference or (None,) * 3
    record = {
        "cell": row["cell"],
        "status": row["status"],
        "error": row.get("error"),
        **_flat("model", row["model"]),
        **_flat("task", row["task"]),
        "label": line.method,
        **_flat("method", row["method"]),
        "budget_by": line.by,
        "budget_share": line.share,
        **_flat("run", row.get("run")),
        **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy)),
        **dict(zip(("difference", "difference_low", "difference_high"), difference)),
        "difference_to": line.reference,
        "prefill_share": line.prefill_share,
        "kv_share": line.kv_share,
        "prefill_ratio": line.prefill_ratio,
    }
    for key, value in (row.get("cost") or {}).items():
        record |= _flat("flops", value) if key == "flops" else {key: _plain(value)}
    record |= {key: _plain(value) for key, value in (row.get("measured") or {}).items()}
    record |= _flat("version", row.get("versions"))
    record["device"] = row.get("device")
    record |= {f"probe_{name}": value for name, value in line.probes.items()}
    return record | {f"kind_{_snake(kind)}": value for kind, value in line.kinds.items()}


def _flat(prefix: str, found: dict | None) -> dict[str, object]:
    """`prefix` for the name in it, `prefix_key` for the others."""
    items = (found or {}).items()
    return {prefix if key == "name" else f"{prefix}_{_snake(key)}": _plain(value) for key, value in items}


def _snake(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _plain(value: object) -> object:
    return json.dumps(value) if isinstance(value, (dict, list)) else value
