"""The plots of a report, with matplotlib's figures alone: `pyplot` and its global state stay out of it.

Every method has a colour and a marker of its own; the colours (Okabe and Ito's, without yellow and black) differ for
colour-blind readers, the markers in grey.
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prune.evals.results import REFERENCE
from prune.evals.summary import UNPRUNED, Comparison, Line, ReportError, clean, share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195")
MARKERS = "osD^vP<>Xph"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
LEGEND_WIDTH = 30  # characters of a line


class Plot(NamedTuple):
    """A picture: its name in file names, its title, and a PNG."""

    name: str
    title: str
    png: bytes


def draw(group: Comparison) -> list[Plot]:
    """The plots for which the lines of a comparison have numbers.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ReportError("the plots of a report need matplotlib; `pip install matplotlib`") from None
    plots = []
    for name, title, figure in (
        ("tokens", "Accuracy against average tokens", _against_tokens(group)),
        ("flops", "Accuracy against FLOPs", _against_flops(group)),
        ("latency", "Prefill time relative to un-pruned", _latency(group)),
        ("kinds", "Accuracy by kind of question", _kinds(group)),
    ):
        if figure is not None:
            figure.suptitle(_wrapped(f"{title}\n{group.title}", int(figure.get_figwidth() * 10)), fontsize=11)
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
            plots.append(Plot(name, title, data.getvalue()))
    return plots


# ------------------------------------------------------------------------------------------- accuracy against cost


def _against_tokens(group: Comparison) -> Figure | None:
    figure = _scatter(group, lambda line: line.cost("average_tokens"))
    if figure:
        axes = figure.axes[0]
        _ticks(axes, "{x:g}")
        axes.set_xlabel("average visual tokens per layer (curves are set apart a little)")
    return figure


def _against_flops(group: Comparison) -> Figure | None:
    figure = _scatter(group, lambda line: line.prefill_share and 100 * line.prefill_share)
    if figure:
        axes = figure.axes[0]
        _ticks(axes, "{x:g} %")
        axes.set_xlabel("FLOPs of the prefill, share of un-pruned (curves are set apart a little)")
    return figure


def _scatter(group: Comparison, cost: Callable[[Line], float | None]) -> Figure | None:
    """One curve per method; curves are moved aside a little, as points at equal cost would hide each other."""
    curves = {}
    for label, cells in group.methods.items():
        found = [(cost(line), line.accuracy) for line in cells.values() if line.accuracy and cost(line)]
        if found:
            curves[label] = sorted(found)
    if not curves:
        return None
    listed = sum(1 + _legend(label).count("\n") for label in [*curves, *(line.method for line in group.baseline)])
    figure, axes = _figure(9, max(5, 1.2 + 0.2 * listed))
    step = _aside(group, cost) / len(curves)
    for at, (label, found) in enumerate(curves.items()):
        x = [cost * math.exp(step * (at - (len(curves) - 1) / 2)) for cost, _ in found]
        y = [100 * accuracy.mean for _, accuracy in found]
        below = [100 * max(0, accuracy.mean - accuracy.low) for _, accuracy in found]
        above = [100 * max(0, accuracy.high - accuracy.mean) for _, accuracy in found]
        style = _style(group, label)
        lines = axes.errorbar(x, y, yerr=(below, above), elinewidth=0.8, markersize=6, label=_legend(label), **style)
        lines[2][0].set_alpha(0.45)
    for line, dash in zip((line for line in group.baseline if line.accuracy), DASHES[1:]):
        mean, low, high = (100 * value for value in line.accuracy)
        axes.axhline(mean, color="black", linestyle=dash, linewidth=1.2, label=_legend(line.method))
        axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_ylabel("accuracy in %, 95 % interval")
    axes.grid(alpha=0.25)
    last = {_legend(label): found[0][1].mean for label, found in curves.items()}
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda at: -last.get(labels[at], math.inf))
    figure.legend(
        [handles[at] for at in order],
        [labels[at] for at in order],
        loc="outside right center",
        fontsize=8,
        title="by accuracy at the least cost",
        title_fontsize=8,
        handlelength=3.2,
    )
    return figure


def _aside(group: Comparison, cost: Callable[[Line], float | None]) -> float:
    """By how much the logarithm of a cost may be moved in all without leaving a budget for the next."""
    found = []
    for share in group.shares:
        costs = [cost(cells[share]) for cells in group.methods.values() if share in cells]
        found += [math.log(statistics.median(known))] if (known := [each for each in costs if each]) else []
    found.sort()
    return min([0.26, *((high - low) / 2 for low, high in zip(found, found[1:]))])


def _ticks(axes: Axes, form: str) -> None:
    """Round numbers on a logarithmic axis, more of them if it covers little."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = axes.get_xlim()
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    ticks = [2.0**power * step for power in powers for step in (1, 1.5)]
    if high / low < 4:
        ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter(form))


# ----------------------------------------------------------------------------------------------------------- time


def _latency(group: Comparison) -> Figure | None:
    labels = [
        label
        for label, cells in group.methods.items()
        if any(line.prefill_ratio is not None for line in cells.values())
    ]
    if not labels:
        return None
    figure, axes = _figure(9, 1.8 + _height(labels))
    axes.axvline(1, color="black", linestyle="--", linewidth=1.2, label=UNPRUNED)
    for at, share in enumerate(group.shares):
        found = [(row, group.methods[label].get(share)) for row, label in enumerate(labels)]
        points = [(line.prefill_ratio, row) for row, line in found if line and line.prefill_ratio is not None]
        if points:
            colour = _shade(at, len(group.shares))
            axes.plot(
                *zip(*points),
                linestyle="none",
                marker=MARKERS[at % len(MARKERS)],
                color=colour,
                markeredgecolor="black",
                markeredgewidth=0.5,
                label=share_text(share),
                zorder=3,
            )
    axes.set_yticks(range(len(labels)), [_legend(label) for label in labels], fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("prefill time, un-pruned = 1 (pixels to the first token, median)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", fontsize=8, title="budget", title_fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------- kinds


def _kinds(group: Comparison) -> Figure | None:
    from matplotlib import colormaps

    kinds = group.kinds
    if not kinds:
        return None
    labels = [*(line.method for line in group.baseline), *group.methods]
    shares = group.shares or (None,)
    panels = []
    for share in shares:
        lines = [*group.baseline, *(cells.get(share) for cells in group.methods.values())]
        panels.append([[line.kinds.get(kind) if line else None for kind in kinds] for line in lines])
    across = max(1, min(len(panels), 26 // len(kinds)))
    down = math.ceil(len(panels) / across)
    figure, _ = _figure(2.6 + 0.42 * len(kinds) * across, 1.9 + down * (0.9 + _height(labels)), axes=False)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    lowest = min(value for panel in panels for row in panel for value in row if value is not None)
    lowest = min(90, 10 * math.floor(10 * lowest))
    colours = colormaps["cividis"].with_extremes(bad="0.85")
    for axes, share, panel in zip(grid.flat, shares, panels):
        values = [[math.nan if value is None else 100 * value for value in row] for row in panel]
        image = axes.imshow(values, cmap=colours, vmin=lowest, vmax=100, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                ink = "white" if value < (lowest + 100) / 2 else "black"
                text = "-" if math.isnan(value) else f"{value:.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
        if group.baseline and group.methods:
            axes.axhline(len(group.baseline) - 0.5, color="white", linewidth=2)
        if share is not None:
            axes.set_title(f"budget {share_text(share)}", fontsize=9)
        axes.set_xticks(range(len(kinds)), [_legend(kind) for kind in kinds], rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels)), [_legend(label) for label in labels], fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="accuracy in %", fraction=0.03, aspect=30)
    return figure


# ---------------------------------------------------------------------------------------------------------- looks


def _figure(width: float, height: float, axes: bool = True) -> tuple[Figure, Axes | None]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot() if axes else None


def _style(group: Comparison, label: str) -> dict:
    """The same for a method in every plot of a comparison; black and dotted for the reference."""
    pruned = [label for label, cells in group.methods.items() if next(iter(cells.values())).name != REFERENCE]
    if label not in pruned:
        at = list(group.methods).index(label)
        return {"color": "black", "marker": "x+*1234"[at % 7], "linestyle": DASHES[2], "linewidth": 1.5}
    at = pruned.index(label)
    return {
        "color": COLOURS[at % len(COLOURS)],
        "marker": MARKERS[at % len(MARKERS)],
        "linestyle": DASHES[at // len(MARKERS) % len(DASHES)],
        "linewidth": 1.1,
    }


def _shade(at: int, count: int) -> tuple:
    """From dark (the largest budget) to light."""
    from matplotlib import colormaps

    return colormaps["cividis"](at / max(1, count - 1))


def _legend(label: str) -> str:
    return _wrapped(clean(label), LEGEND_WIDTH)


def _height(labels: Sequence[str]) -> float:
    """Inches for equally high rows that hold these labels."""
    return len(labels) * (0.12 + 0.15 * max(1 + _legend(label).count("\n") for label in labels))


def _wrapped(text: str, width: int) -> str:
    """In lines of `width` characters, with dollars that stay dollars: two would be a formula."""
    lines = (textwrap.fill(line, width) for line in text.split("\n"))
    return "\n".join(lines).replace("$", r"\$")
