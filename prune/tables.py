"""The table of methods and the table of families, for the terminal and for the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

from rich import box
from rich.table import Table

from prune.adapters.families import FAMILIES
from prune.adapters.vit_families import VIT_FAMILIES
from prune.registry import MethodInfo

NARROW = 160
FLAGS = ("merges", "adaptive", "question")
MODELS = tuple(family.name for family in FAMILIES)
VITS = tuple(family.name for family in VIT_FAMILIES)


@cache
def _probed() -> dict[str, dict[str, str]]:
    return json.loads(files("prune").joinpath("capabilities.json").read_text(encoding="utf-8"))


def families_of(method: str) -> dict[str, str] | None:
    """Model family -> "works", or why a method refuses it, as `tests/capabilities.py` found out by running it.

    None for a method that was not probed, such as one of another package.
    """
    return _probed().get(method)


def families_words(method: str, families: Sequence[str]) -> str:
    """The same of some families in a few words: "all", "all but A, B (why)", "none (why)", or "not probed"."""
    found = families_of(method)
    if found is None:
        return "not probed"
    found = {family: found[family] for family in families}
    refused: dict[str, list[str]] = {}
    for family, outcome in found.items():
        if outcome != "works":
            refused.setdefault(outcome, []).append(family)
    if not refused:
        return "all"
    if len(refused) == 1 and "works" not in found.values():
        return f"none ({next(iter(refused))})"
    return "all but " + ", ".join(f"{', '.join(names)} ({why})" for why, names in refused.items())


def _count(method: str, families: Sequence[str]) -> str:
    """How many of some families a method works on: "all", "5 of 8"."""
    found = families_of(method)
    if found is None:
        return "?"
    works = [found[family] for family in families].count("works")
    return "all" if works == len(families) else f"{works} of {len(families)}"


def methods_table(infos: Sequence[MethodInfo], width: int) -> Table:
    """For a terminal of `width` columns.

    A narrow one gets arXiv numbers in place of titles, properties in one column, and how many families work.
    """
    narrow = width < NARROW
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.caption = f"models: {', '.join(MODELS)}; vision transformers (ViTs): {', '.join(VITS)}"
    table.add_column("method", style="bold cyan", no_wrap=True)
    table.add_column("paper", no_wrap=narrow)
    table.add_column("acts at", no_wrap=not narrow, overflow="fold")
    table.add_column("needs", overflow="fold")
    for heading in ("is",) if narrow else FLAGS:
        table.add_column(heading, justify="left" if narrow else "center")
    table.add_column("models", no_wrap=narrow)
    table.add_column("ViTs", no_wrap=narrow)
    for info in infos:
        describe: Callable[[str, Sequence[str]], str]
        flags: Sequence[str]
        flags, describe = _flags(info), families_words
        if narrow:
            words = [name for name, flag in zip(FLAGS, flags) if flag == "yes"]
            paper, flags, describe = info.arxiv or "-", [", ".join(words) or "-"], _count
            table.caption = "`prune list --json` says which models and vision transformers refuse a method, and why"
        else:
            paper = f"{info.title} arXiv:{info.arxiv}" if info.arxiv else info.title
        works = describe(info.name, MODELS), describe(info.name, VITS)
        table.add_row(info.name, paper, info.where, ", ".join(info.signals) or "-", *flags, *works)
    return table


def methods_markdown(infos: Sequence[MethodInfo]) -> str:
    """The README's table of methods."""
    rows = []
    for info in infos:
        paper = f"[{info.title}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else info.title
        signals = ", ".join(f"`{signal}`" for signal in info.signals) or "-"
        works = families_words(info.name, MODELS), families_words(info.name, VITS)
        rows.append((f"`{info.name}`", paper, f"`{info.where}`", signals, *_flags(info), info.positions, *works))
    headings = (
        "method",
        "paper",
        "acts at",
        "signals",
        "merges",
        "adaptive",
        "question",
        "positions",
        "models",
        "ViTs",
    )
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


def vits_markdown() -> str:
    """The README's table of vision transformers."""
    rows = [
        (family.name, ", ".join(f"`{name.rpartition('.')[2]}`" for name in family.trunks), family.example)
        for family in VIT_FAMILIES
    ]
    return _markdown(("family", "class, and its subclasses", "example"), rows)


def _flags(info: MethodInfo) -> tuple[str, ...]:
    return tuple("yes" if flag else "-" for flag in (info.merges, info.adaptive, info.needs_question))


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
