"""What the documentation takes from the code: a page per method, and tables inside hand-written pages.

mkdocs runs this when it builds the site. `python docs/_hooks.py` writes the tables of the hand-written pages anew;
`tests/test_docs_blocks.py` compares them.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from prune.registry import MethodInfo, list_methods, method_class, method_info
from prune.tables import MODELS, VITS, families_of, families_words

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
SHARES = ("1/3", "2/9", "1/9", "1/18")
UNPRUNED = "un-pruned"
_CELL = re.compile(r"(\* )?(\d+) ±(\d+)(?: +([+-]\d+)([↑↓]?))?|out of reach")


@dataclass(frozen=True)
class Cell:
    """One cell of the README's table: accuracy in %, half its interval, difference to `random`, and its arrow."""

    best: bool
    accuracy: int
    half: int
    difference: str
    arrow: str


def measured() -> dict[str, list[Cell | None]]:
    """Method -> its cells at `SHARES` as the README shows them; None is out of reach."""
    table = re.search(r"^method +1/3 .*?\n```", README.read_text(encoding="utf-8"), re.S | re.M)[0]
    header, *lines = table.splitlines()[:-1]
    assert tuple(header.split()[1:]) == SHARES, header
    rows = {}
    for line in filter(None, lines):
        name, _, rest = line.partition(" ")
        rows[name] = [
            Cell(bool(m[1]), int(m[2]), int(m[3]), m[4] or "", m[5] or "") if m[2] else None
            for m in _CELL.finditer(rest)
        ]
        assert len(rows[name]) == len(SHARES), line
    return rows


# ---------------------------------------------------------------------------------------------------- method pages
def method_page(name: str, rows: dict[str, list[Cell | None]]) -> str:
    """Markdown: what the method is, its docstring, options, where it works, and what was measured."""
    info = method_info(name)
    body, options, errors = _docstring(name)
    paper = f"[{info.title}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else info.title
    reads = ", ".join(f"`{signal}`" for signal in info.signals) or "nothing but the features"
    parts = [
        f"# {name}",
        paper,
        _table(("acts at", "reads", "merges", "adaptive", "question", "positions"), [_facts(info, reads)]),
        f'```python\nhandle = apply_pruner(model, "{name}", ratio=0.75)\n```',
        "## What it does",
        body,
        "## Options",
        _options(info, options),
    ]
    if errors:
        parts += ["Raises: " + errors]
    parts += ["## Where it works", _works(name), "## Measured", _measured(name, rows)]
    parts += [f"Code: `{_source(name)}`. See also [all methods](index.md) and [choosing a method](../choosing.md)."]
    return "\n\n".join(parts) + "\n"


def _facts(info: MethodInfo, reads: str) -> tuple[str, ...]:
    flags = ("yes" if flag else "-" for flag in (info.merges, info.adaptive, info.needs_question))
    return (f"`{info.where}`", reads, *flags, info.positions)


def _docstring(name: str) -> tuple[str, dict[str, str], str]:
    """Body (Markdown), text of every option, and text of what it raises."""
    text = inspect.getdoc(method_class(name)) or ""
    body, _, raises = text.partition("\nRaises:\n")
    body, _, args = body.partition("\nArgs:\n")
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n        .*)*)", args, re.M)
    options = {one: _flow(text) for names, text in entries for one in names.split(", ")}
    raised = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", raises, re.M)
    return _body(body), options, " ".join(f"`{error}`: {_flow(text)}" for error, text in raised)


def _body(text: str) -> str:
    """Paragraphs stay; an indented list of the docstring becomes a list of Markdown."""
    lines, in_list = [], False
    for line in text.strip().splitlines():
        starts = line.startswith("    - ")
        if starts and not in_list:
            lines.append("")
        if in_list and line and not line.startswith("    "):
            lines.append("")
        in_list = starts or (in_list and line.startswith("    "))
        lines.append(line[4:] if in_list else line.strip())
    return "\n".join(lines)


def _flow(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _options(info: MethodInfo, meaning: dict[str, str]) -> str:
    if not info.options:
        return "None."
    rows = [(f"`{name}`", f"`{value!r}`", meaning.get(name, "")) for name, value in info.options.items()]
    return _table(("option", "default", "meaning"), rows)


def _works(name: str) -> str:
    models, vits = families_words(name, MODELS), families_words(name, VITS)
    return f"- Vision-language models: {models}\n- Vision transformers by themselves: {vits}"


def _measured(name: str, rows: dict[str, list[Cell | None]]) -> str:
    if name not in rows:
        return "Not measured."
    cells = [_long(cell) for cell in rows[name]]
    plain = [_long(cell) for cell in rows[UNPRUNED]]
    table = _table(("share of the tokens left", *SHARES), [(f"`{name}`", *cells), (UNPRUNED, *plain)])
    return (
        f"{table}\n\nAccuracy in %, ± half its 95 % interval, and the difference to `random` (an arrow where its "
        "interval excludes 0): `prune eval`, 200 questions to the built-in model, which is small. "
        "[What that means](../choosing.md#measured-on-the-built-in-model)."
    )


def _long(cell: Cell | None) -> str:
    return "out of reach" if cell is None else f"{cell.accuracy} ±{cell.half} {cell.difference}{cell.arrow}".strip()


def _source(name: str) -> str:
    return method_class(name).__module__.replace(".", "/") + ".py"


def methods_page(rows: dict[str, list[Cell | None]]) -> str:
    """Markdown: the list of the methods and the matrix of what works where."""
    infos = [method_info(name) for name in list_methods()]
    names = [(f"[`{info.name}`]({info.name}.md)", info.title, f"`{info.where}`") for info in infos]
    return "\n\n".join(
        [
            "# Methods",
            f"{len(infos)} methods, built in. Every page is made from the docstring in the code: the idea, every "
            "difference from the authors' code with its reason, the cost, the options. `prune list` prints the table "
            "in a terminal.",
            _table(("method", "paper", "acts at"), names),
            "## What works where",
            "As a script found out by running every method on a small model of every family, with default options. "
            "`option`: refused as it is, works with an option that the error and the method's page name. `-`: refused, "
            "with the reason on the method's page.",
            "### Vision-language models",
            _matrix(infos, MODELS),
            "### Vision transformers by themselves",
            _matrix(infos, VITS),
        ]
    )


def _matrix(infos: list[MethodInfo], families: tuple[str, ...]) -> str:
    rows = []
    for info in infos:
        found = families_of(info.name) or {}
        rows.append((f"[`{info.name}`]({info.name}.md)", *(_short(found.get(family, "?")) for family in families)))
    return _table(("method", *families), rows)


def _short(outcome: str) -> str:
    return "yes" if outcome == "works" else "option" if "works with" in outcome else "-" if outcome != "?" else "?"


# ------------------------------------------------------------------------------------- tables in hand-written pages
def measured_table() -> str:
    """The README's table, sorted by what matters in a choice: accuracy where few tokens are left."""
    rows = measured()
    lines = []
    for name in sorted(list_methods(), key=lambda name: _rank(rows[name])):
        info = method_info(name)
        needs = ", ".join(sorted({_need(signal) for signal in info.signals} - {""})) or "-"
        question = "yes" if info.needs_question else "-"
        lines.append((f"`{name}`", f"`{info.where}`", needs, question, *(_cell(cell) for cell in rows[name])))
    return _table(("method", "acts at", "needs", "question", *SHARES), lines)


def _rank(cells: list[Cell | None]) -> tuple[int, ...]:
    """Best first: by 1/9, then by 2/9, 1/3."""
    return tuple(-(cell.accuracy if cell else -1) for cell in (cells[2], cells[1], cells[0]))


def _need(signal: str) -> str:
    """What kind of thing a method must be given, in a word or two."""
    where, _, kind = signal.rpartition(":")
    if where and "cls" in kind:
        return "CLS attention"
    if where:
        return "pixels" if kind == "pixels" else "encoder"
    if "attention" in kind:
        return "decoder attention"
    kinds = {"block": "encoder", "inputs": "text", "text_features": "text"}
    return kinds.get(kind, "decoder layer")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    text = f"**{cell.accuracy}**" if cell.best else str(cell.accuracy)
    return text + cell.arrow


TABLES = {"choosing.md": {"measured": measured_table}}


def filled(page: str, text: str) -> str:
    """The page with its tables made anew, between `<!-- name: ... -->` and `<!-- end of name -->`."""
    for name, make in TABLES.get(page, {}).items():
        pattern = rf"(<!-- {name}:[^>]*-->\n).*?(\n<!-- end of {name} -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n{m[2]}", text, flags=re.S)
        assert found == 1, f"{page} has no place for the table {name}"
    return text


def _table(headings, rows) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *rows])


# ------------------------------------------------------------------------------------------------------------ mkdocs
def on_config(config):
    """The pages of the methods go into the navigation."""
    (entry,) = [one for one in config["nav"] if "Methods" in one]
    entry["Methods"] = ["methods/index.md", *({name: f"methods/{name}.md"} for name in list_methods())]
    return config


def on_files(files, config):
    """The pages of the methods, made now."""
    from mkdocs.structure.files import File

    rows = measured()
    pages = {"index": methods_page(rows), **{name: method_page(name, rows) for name in list_methods()}}
    for name, text in pages.items():
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """In the built site the methods of a table lead to their pages."""
    if page.file.src_uri in TABLES:
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](methods/\1.md) |", markdown, flags=re.M)
    return markdown


if __name__ == "__main__":
    for page in TABLES:
        path = DOCS / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
