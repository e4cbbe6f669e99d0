"""The table of methods and the table of families, for the terminal and for the README."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from prune.adapters.families import FAMILIES
from prune.registry import MethodInfo

NARROW = 120


def families_of(method: str) -> tuple[str, ...]:
    """Names of the model families a method works on. Today's signals exist in every one of them."""
    return tuple(family.name for family in FAMILIES)


def methods_table(infos: Sequence[MethodInfo], width: int) -> Table:
    """For a terminal of `width` columns; a narrow one gets arXiv numbers in place of titles."""
    narrow = width < NARROW
    everywhere = tuple(family.name for family in FAMILIES)
    families = {info.name: families_of(info.name) for info in infos}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = f"all families: {', '.join(everywhere)}"
    table.add_column("method", style="bold cyan", no_wrap=True)
    table.add_column("paper", no_wrap=narrow)
    table.add_column("acts at", no_wrap=True)
    table.add_column("needs", overflow="fold")
    for heading in ("merges", "adaptive", "question"):
        table.add_column(heading, justify="center", no_wrap=True)
    if not narrow or set(families.values()) != {everywhere}:
        table.add_column("families", min_width=len("families"))
    for info in infos:
        arxiv = f"arXiv:{info.arxiv}" if info.arxiv else ""
        cells = (
            info.name,
            info.arxiv or "-" if narrow else f"{info.title} {arxiv}",
            info.where,
            ", ".join(info.signals) or "-",
            *_flags(info),
            "all" if families[info.name] == everywhere else ", ".join(families[info.name]),
        )
        table.add_row(*cells[: len(table.columns)])
    return table


def methods_markdown(infos: Sequence[MethodInfo]) -> str:
    """The README's table of methods."""
    rows = []
    for info in infos:
        paper = f"[{info.title}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else info.title
        signals = ", ".join(f"`{signal}`" for signal in info.signals) or "-"
        families = families_of(info.name)
        where = "all" if len(families) == len(FAMILIES) else ", ".join(families)
        rows.append((f"`{info.name}`", paper, f"`{info.where}`", signals, *_flags(info), info.positions, where))
    headings = ("method", "paper", "acts at", "signals", "merges", "adaptive", "question", "positions", "families")
    return _markdown(headings, rows)


def families_markdown() -> str:
    """The README's table of model families."""
    rows = [
        (
            family.name,
            ", ".join(f"`{kind}`" for kind in family.model_types),
            "yes" if family.video else "-",
            family.example,
        )
        for family in FAMILIES
    ]
    return _markdown(("family", "`model_type`", "video", "example on the hub"), rows)


def _flags(info: MethodInfo) -> tuple[str, ...]:
    return tuple("yes" if flag else "-" for flag in (info.merges, info.adaptive, info.needs_question))


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
