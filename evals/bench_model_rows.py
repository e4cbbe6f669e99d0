"""What `bench model` measures: its rows, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.table import Table

from prune.evals.bench_paired import setting_line

FULL, SHORT = "un-pruned", "short sequence"


@dataclass
class Row:
    """One cell of the benchmark.

    Args:
        geometry, scale, batch, dtype, ratio, method: what was run; `ratio` is the share of the visual tokens removed.
        visual, kept: visual tokens of an image before the first and after the last stage.
        ttft_ms, ttft_low, ttft_high: time to first token: encoder, selection, prefill and LM head of one position;
            median and quartiles of the rounds.
        ttft_speedup: the un-pruned time by this one, per round, median.
        ttft_to_short: this time by that of the physical limit, per round, median: the un-hooked model's encoder, and
            its decoder fed as many columns in every layer as the method leaves there (for a method that acts at layer k
            interpolated between the full and the short sequence).
        tokens_per_s, tokens_low, tokens_high: decoding, of all sequences of the batch together.
        decode_speedup: per round, median.
        selection_ms, selection_share: time in reducers in one prefill, the median of three, and its share of the
            un-pruned time to first token.
        peak_mib: largest memory allocated on the device during prefill and decoding, weights included; None on a CPU.
        kv_mib: of the cache behind the prefill.
        flops_speedup: un-pruned FLOPs of encoder, prefill and head by this row's, selection counted: the speed-up if
            only FLOPs counted.
        note: why numbers are missing.
    """

    geometry: str
    scale: str
    batch: int
    dtype: str
    ratio: str
    method: str
    visual: int
    kept: int | None = None
    ttft_ms: float | None = None
    ttft_low: float | None = None
    ttft_high: float | None = None
    ttft_speedup: float | None = None
    ttft_to_short: float | None = None
    tokens_per_s: float | None = None
    tokens_low: float | None = None
    tokens_high: float | None = None
    decode_speedup: float | None = None
    selection_ms: float | None = None
    selection_share: float | None = None
    peak_mib: float | None = None
    kv_mib: float | None = None
    flops_speedup: float | None = None
    note: str = ""


def table(rows: list[Row], device: str) -> Table:
    """For the terminal."""
    first = rows[-1]
    title = f"{first.geometry} ({first.scale}), batch {first.batch}, {first.dtype}, ratio {first.ratio}"
    out = Table(title=title, caption=setting_line(device))
    headings = ("method", "kept", "TTFT ms", "quartiles", "speed-up", "to short", "FLOPs", "tok/s", "speed-up")
    for heading in (*headings, "select", "KV MiB", "peak MiB"):
        out.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        if row.ttft_ms is None:
            out.add_row(row.method, row.note)
            continue
        out.add_row(
            row.method,
            str(row.kept),
            f"{row.ttft_ms:.1f}",
            f"{row.ttft_low:.1f}-{row.ttft_high:.1f}",
            *(_text(value, "{:.2f}x") for value in (row.ttft_speedup, row.ttft_to_short, row.flops_speedup)),
            f"{row.tokens_per_s:.1f}",
            _text(row.decode_speedup, "{:.2f}x"),
            _text(row.selection_share, "{:.1%}"),
            _text(row.kv_mib, "{:.1f}"),
            _text(row.peak_mib, "{:.0f}"),
        )
    return out


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """One picture per geometry and batch size: speed-up of the first token and of decoding against the ratio.

    Args:
        rows: as the CSV has them.
    """
    from matplotlib.figure import Figure

    from prune.evals.plots import COLOURS, MARKERS

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    groups = sorted({(row["geometry"], row["scale"], int(row["batch"])) for row in rows})
    for geometry, scale, batch in groups:
        ours = [r for r in rows if (r["geometry"], r["scale"], int(r["batch"])) == (geometry, scale, batch)]
        figure = Figure((11, 4.5), layout="constrained")
        for axes, key, title in zip(
            figure.subplots(1, 2), ("ttft_speedup", "decode_speedup"), ("time to first token", "decoding")
        ):
            for number, name in enumerate(dict.fromkeys(row["method"] for row in ours if row["method"] != FULL)):
                points = [(float(Fraction(r["ratio"])), float(r[key])) for r in ours if r["method"] == name and r[key]]
                if points:
                    look = dict(color="black", lw=2) if name == SHORT else dict(color=COLOURS[number % len(COLOURS)])
                    axes.plot(*zip(*sorted(points)), marker=MARKERS[number % len(MARKERS)], ms=4, label=name, **look)
            axes.axhline(1.0, color="grey", lw=0.8)
            axes.set(title=title, xlabel="visual tokens removed", ylabel="speed-up over un-pruned")
        if handles := figure.axes[0].get_legend_handles_labels()[0]:
            figure.legend(handles=handles, loc="outside right center", fontsize=6, ncols=1 + len(handles) // 24)
        figure.suptitle(f"{geometry}, {scale} scale, batch {batch}, {ours[0].get('device', '')}")
        path = folder / f"{geometry}-{scale}-batch{batch}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
