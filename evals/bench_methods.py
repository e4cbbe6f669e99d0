"""How long methods take to choose, as a ratio to the prefill of one decoder layer."""

from __future__ import annotations

import json
import signal
import statistics
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from prune.errors import PruneError
from prune.evals.bench_paired import Case, paired, quartiles_ms, setting, setting_line, timed
from prune.evals.csv_file import write_csv
from prune.evals.grid import parse_share
from prune.evals.naive import BASELINES, choose
from prune.evals.synthetic import Shape, Synthetic, chain
from prune.method import Method
from prune.registry import acts_at, get_method, list_methods

LAYER = "one decoder layer"
DIRECT = "direct"
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ("8x576x1024", "1x2880x4096")
SECONDS = 120  # that the measured rounds of a shape shall take, if their number is not given
ROUNDS = 20  # at most


@dataclass
class Row:
    """One line of the benchmark.

    Args:
        shape, dtype, kept, rounds, threads: what was run.
        method: registry name, or `LAYER`.
        sites: of the stages that remove something; their times are summed.
        median_ms, low_ms, high_ms: median and quartiles of the rounds; None for a method that ran out of time.
        ratio: to one decoder layer, per round, median; None likewise.
        note: why there is no time.
        direct_ms: median of the direct implementation of `prune.evals.naive`, if it was asked for.
        vs_direct: how many times as long that takes, per round, median.
    """

    shape: str
    dtype: str
    kept: int
    rounds: int
    threads: int
    method: str
    sites: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    ratio: float | None = None
    note: str = ""
    direct_ms: float | None = None
    vs_direct: float | None = None


def methods(
    pattern: str = typer.Argument("*", help="Wildcard over names of methods."),
    shape: Annotated[list[str], typer.Option(help="BATCHxTOKENSxWIDTH; may be repeated.")] = SHAPES,
    share: str = typer.Option("1/9", help="Share of the visual tokens kept."),
    rounds: int = typer.Option(0, help=f"Measured rounds; 0: as many as take {SECONDS} s, 1 to {ROUNDS}."),
    threads: int = typer.Option(0, help="CPU threads; 0: as torch chooses. On a busy machine 1 is steadier."),
    limit: float = typer.Option(60.0, help="Seconds a method may take for one selection."),
    device: str = typer.Option("cpu"),
    dtype: str = typer.Option("float32", help="Of the tokens and the layer: float32, bfloat16 or float16."),
    naive: bool = typer.Option(False, "--naive", help="Time direct implementations of the papers too."),
    csv: str = typer.Option("", help="Write the rows, with device and versions, to this file."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Time of every method's selection, with its defaults, as a ratio to one decoder layer's prefill.

    Random tokens with the signals a method declares; what it costs to take these from the model is not in it. Methods
    of several stages are planned for 32 layers, and their stages summed. The layer is a Llama's under SDPA, and sees
    all visual and 64 text tokens. `--naive` adds a column: how many times as long a direct implementation takes, which
    goes through images one by one and through a method's steps in Python.
    """
    try:
        shapes, part, names = [Shape.parse(text) for text in shape], parse_share(share), list_methods(pattern)
    except PruneError as error:
        raise typer.BadParameter(str(error)) from None
    if not names:
        raise typer.BadParameter(f"no method is called {pattern!r}; see `prune list`")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    every: list[dict] = []
    for each in shapes:
        with torch.inference_mode():
            rows = measure(each, names, part, rounds, limit, device, dtype, naive)
        if csv:
            every += [asdict(row) | setting(device) for row in rows]
            write_csv(csv, every)
        if as_json:
            for row in rows:
                print(json.dumps(asdict(row)), flush=True)
        else:
            Console().print(table(rows, each, device))


def measure(
    shape: Shape,
    names: list[str],
    share: Fraction,
    rounds: int,
    limit: float,
    device: str,
    dtype: str = "float32",
    naive: bool = False,
) -> list[Row]:
    """The rows of one shape: the layer, then the methods, slowest first; those out of time on top."""
    kind = getattr(torch, dtype)
    keep, source = max(1, round(shape.tokens * share)), Synthetic(shape, device, kind)
    found = {name: get_method(name) for name in names}
    layer = decoder_layer(shape, device, kind)
    layer()  # the first call of all allocates
    runs = {name: selection(found[name], source, keep) for name in names}
    if naive:
        runs |= {f"{DIRECT} {name}": direct(found[name], source, keep) for name in names if name not in BASELINES}
    cases, seconds = {LAYER: Case(layer)}, timed(layer)
    for name, run in tqdm(runs.items(), desc=f"{shape}, one call each", disable=None, leave=False):
        if (took := within(limit, run)) is not None:
            cases[name], seconds = Case(run), seconds + took
    rounds = rounds or min(ROUNDS, max(1, int(SECONDS / seconds)))
    times = paired(cases, rounds, warmup=0)
    common = dict(shape=str(shape), dtype=dtype, kept=keep, rounds=rounds, threads=torch.get_num_threads())
    rows = []
    for name, method in found.items():
        row = Row(**common, method=name, sites=acts_at([stage.site for stage, _ in chain(method, shape, keep)]))
        rows.append(row)
        if (slow := times.get(f"{DIRECT} {name}")) is not None:
            row.direct_ms = quartiles_ms(slow)[1]
        if (own := times.get(name)) is None:
            row.note = f"more than {limit:g} s"
            continue
        row.low_ms, row.median_ms, row.high_ms = quartiles_ms(own)
        row.ratio = statistics.median(t / one for t, one in zip(own, times[LAYER]))
        if slow is not None:
            row.vs_direct = statistics.median(theirs / t for theirs, t in zip(slow, own))
    rows.sort(key=lambda row: float("inf") if row.ratio is None else row.ratio, reverse=True)
    low, median, high = quartiles_ms(times[LAYER])
    return [Row(**common, method=LAYER, sites="", median_ms=median, low_ms=low, high_ms=high, ratio=1.0), *rows]


def selection(method: Method, source: Synthetic, keep: int) -> Callable[[], None]:
    """All stages of a method, one after the other, on tokens that exist already."""
    stages = [(stage, source.tokens(stage, n)) for stage, n in chain(method, source.shape, keep)]

    def run() -> None:
        memory: dict[str, Tensor] = {}
        for stage, tokens in stages:
            tokens.memory = memory
            stage.reducer.reduce(tokens, [stage.keep] * source.shape.batch)

    return run


def direct(method: Method, source: Synthetic, keep: int) -> Callable[[], None]:
    """The same by direct implementations."""
    stages = [(stage, source.tokens(stage, n)) for stage, n in chain(method, source.shape, keep)]

    def run() -> None:
        memory: list[dict] = [{} for _ in range(source.shape.batch)]
        for stage, tokens in stages:
            choose(stage.reducer, tokens, stage.keep, memory)

    return run


def decoder_layer(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """The prefill of one layer of a Llama of this width."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.geometry.intermediate_size,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_hidden_layers=1,
        max_position_embeddings=shape.length,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(device, dtype).eval()
    hidden = torch.randn(shape.batch, shape.length, shape.width, device=device, dtype=dtype)
    rope = LlamaRotaryEmbedding(config).to(device)(hidden, torch.arange(shape.length, device=device)[None])
    return lambda: layer(hidden, position_embeddings=rope)


class Late(BaseException):
    """The time is up. No `Exception`: what falls back on errors must not take it for one."""


def within(limit: float, run: Callable[[], object]) -> float | None:
    """Seconds of one call, or None if it was broken off after `limit` seconds.

    It ends between two operations of torch. Without signals (Windows, threads) there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return timed(run)

    def stop(*_) -> None:
        raise Late

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return timed(run)
    except Late:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def table(rows: list[Row], shape: Shape, device: str) -> Table:
    """For the terminal."""
    first, naive = rows[0], [row.vs_direct for row in rows if row.vs_direct is not None]
    note = f"{first.rounds} {'round' if first.rounds == 1 else 'rounds'}, {first.threads} threads"
    title = (
        f"Selection, {shape.batch} x {shape.tokens} tokens of width {shape.width}, {first.dtype} -> {first.kept} each"
    )
    caption = "ratio: to the prefill of one decoder layer; signals are not counted"
    if naive:
        caption += f"; vs direct: median over {len(naive)} methods {statistics.median(naive):.1f}"
    out = Table(title=f"{title}; {note}", caption=f"{caption}\n{setting_line(device)}")
    headings = ["method", "acts at", "median ms", "quartiles", "ratio", *["vs direct"] * bool(naive)]
    for heading in headings:
        out.add_column(heading, justify="left" if heading in ("method", "acts at") else "right")
    for row in rows:
        cells = [row.method, row.sites, row.note]
        if row.ratio is not None:
            cells[2:] = [f"{row.median_ms:.1f}", f"{row.low_ms:.1f}-{row.high_ms:.1f}", f"{row.ratio:.3f}"]
            cells += [f"{row.vs_direct:.1f}"] if row.vs_direct is not None else []
        out.add_row(*cells)
    return out
