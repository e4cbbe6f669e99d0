"""The report as one HTML page that needs nothing else: no script, no request, pictures inside."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from prune.evals.cells import LEGEND, Cell, cell, cost_columns, cost_sections, costs, facts, full_cost, remarks
from prune.evals.report import majority_lines
from prune.evals.summary import Comparison, Line, share_text

# Of what rows say everything is escaped; the policy forbids scripts and requests on top of that.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>prune: accuracy and cost</title>
<style>
:root { --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d8dee4; --band: #f4f6f8;
        --up: #0a6640; --down: #b3261e; --warn: #7a5200; --warnband: #fff6dd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #0f1318; --line: #333c46; --band: #181e25;
          --up: #5fd39a; --down: #ff8f85; --warn: #f0c36a; --warnband: #2b2412; } }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; padding-top: 1rem;
     border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; }
p, li { max-width: 48rem; } .soft, small { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; vertical-align: top; }
th[scope=row], thead th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left;
  white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; max-width: 14rem; font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); }
tr.section th { background: var(--band); text-align: left; } tr.full > * { background: var(--band); }
td.best b { text-decoration: underline; text-underline-offset: .2em; } td.status { color: var(--warn); }
.up { color: var(--up); font-weight: 600; } .down { color: var(--down); font-weight: 600; }
ul.remarks { background: var(--warnband); color: var(--warn); padding: .6rem .6rem .6rem 2rem; border-radius: .4rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
dt { font-weight: 600; margin-top: .6rem; } 
dd { margin: 0 0 0 1rem; font-family: ui-monospace, monospace; font-size: .85rem; }
</style>
</head>
<body>
"""


def html_page(
    lines: Sequence[Line], groups: Sequence[Comparison], pictures: Sequence[dict[str, tuple[str, bytes]]], command: str
) -> str:
    """The whole page; `pictures` are per comparison: title -> (file name, PNG)."""
    parts = [
        _HEAD,
        "<h1>Visual-token pruning: accuracy and cost</h1>",
        _paragraph(f"{LEGEND}bold and underlined."),
    ]
    for group, drawn in zip(groups, pictures):
        parts += [f"<h2>{escape(group.title)}</h2>", _accuracy(group), *map(_paragraph, majority_lines(group))]
        if found := remarks(group):
            parts.append(f'<ul class="remarks">{_each("li", found)}</ul>')
        for title, (_, png) in drawn.items():
            source = f"data:image/png;base64,{b64encode(png).decode()}"
            parts.append(f'<figure><img src="{source}" alt="{escape(f"{title}: {group.title}")}"></figure>')
        parts += ["<h3>Cost</h3>", _paragraph(f"{cost_columns(group).legend} {full_cost(group)}"), _cost(group)]
    parts.append("<h2>How to get these numbers again</h2><dl>")
    parts += [f"<dt>{escape(heading)}</dt>{_each('dd', texts)}" for heading, texts in facts(lines, command)]
    return "\n".join([*parts, "</dl>", "</body>", "</html>", ""])


def _accuracy(group: Comparison) -> str:
    shares = group.shares or (None,)
    headings = ["method", *map(share_text, group.shares)] if group.shares else ["method", "accuracy"]
    body = []
    for line in group.baseline:
        body.append(_row(line.method, [_cell(cell(group, line))] * len(shares), "full"))
    for label, found in group.methods.items():
        body.append(_row(label, [_cell(cell(group, found.get(share))) for share in shares]))
    return _table(headings, body)


def _cell(found: Cell) -> str:
    if found.status:
        return f'<td class="status">{escape(found.status)}</td>'
    text = f"<b>{found.accuracy}</b>" if found.best else found.accuracy
    text += f" <small>[{found.low}, {found.high}]</small>"
    if found.difference:
        interval = f" <small>[{found.difference_low}, {found.difference_high}]</small>" if found.difference_low else ""
        trend = {"↑": "up", "↓": "down"}.get(found.arrow, "even")
        text += f'<br><span class="{trend}">{found.difference}{found.arrow}</span>{interval}'
    return f'<td class="best">{text}</td>' if found.best else f"<td>{text}</td>"


def _cost(group: Comparison) -> str:
    body, columns = [], cost_columns(group)
    for heading, lines in cost_sections(group):
        if heading:
            body.append(f'<tr class="section"><th colspan="{1 + len(columns.headings)}">{escape(heading)}</th></tr>')
        kind = "" if heading else "full"
        body += [
            _row(line.method, [f"<td>{escape(text)}</td>" for text in costs(line, columns)], kind) for line in lines
        ]
    return _table(["method", *columns.headings], body)


def _row(label: str, cells: Sequence[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>'


def _table(headings: Sequence[str], body: Sequence[str]) -> str:
    head = _each('th scope="col"', headings)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _each(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag.split()[0]}>" for text in texts)


def _paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>' if text else ""
