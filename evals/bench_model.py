"""What pruning saves of whole models of published sizes, random weights: first token, decoding speed, memory."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from prune import Geometry, Handle, apply_pruner
from prune.adapters.structure import find_parts
from prune.errors import PruneError
from prune.evals.accounting import Account, account, account_full
from prune.evals.bench_geometries import GEOMETRIES, TEXT, BenchGeometry
from prune.evals.bench_model_rows import FULL, SHORT, Row, draw, table
from prune.evals.bench_paired import exit_if_broken, quartiles_ms, reason, setting, timed
from prune.evals.csv_file import write_csv
from prune.evals.grid import fitted, parse_share
from prune.registry import get_method, list_methods
from prune.report import ImageReport, Layout, Report

RATIOS = ("2/3", "7/9", "8/9", "17/18")
WIDTH = 140  # of a table
SELECTIONS = 3  # prefills in which the reducers are timed


@dataclass
class Cell:
    """A row in the making: how it is run, and what was seen.

    Args:
        attach: puts the pruner on; nothing for rows without one.
        prefill: -> the model's output.
        layers: share of the decoder's layers that see the full sequence.
    """

    row: Row
    prefill: Callable[[], object]
    attach: Callable[[], object] = nullcontext
    layers: float = 0.0
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


def model(
    pattern: str = typer.Argument("*", help="Wildcard over names of methods."),
    geometry: Annotated[list[str], typer.Option(help=f"Repeat; of {', '.join(GEOMETRIES)}.")] = tuple(GEOMETRIES),
    ratio: Annotated[list[str], typer.Option(help="Share of the visual tokens removed; repeat.")] = RATIOS,
    batch: Annotated[list[int], typer.Option(help="Batch size; repeat.")] = (1, 8, 32),
    scale: str = typer.Option("full", help="full, or small: same depths and lengths, 64 channels."),
    steps: int = typer.Option(32, help="Tokens decoded after the first."),
    rounds: int = typer.Option(5, help="Measured rounds."),
    threads: int = typer.Option(0, help="CPU threads; 0: as torch chooses. On a busy machine 1 is steadier."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    dtype: str = typer.Option("bfloat16", help="Of weights and cache: float32, bfloat16 or float16."),
    csv: str = typer.Option("", help="Write the rows, with device and versions, to this file after every group."),
    plots: str = typer.Option("", help="Draw speed-ups against ratios into this folder."),
    flops: bool = typer.Option(False, "--flops", help="Count FLOPs instead of running anything; full scale."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Time to first token, decoding speed and memory of every method, against the un-pruned model and the short one.

    One image and 64 text tokens per prompt. All cases of a geometry, batch size and ratio take turns, in random order
    within every round. A case that does not fit, or breaks, is a row that says so; the exit
    code is 1 if one breaks.
    """
    try:
        shares, names = {text: 1 - parse_share(str(1 - Fraction(text))) for text in ratio}, list_methods(pattern)
        found = [GEOMETRIES[name] for name in geometry]
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    except (PruneError, ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(f"--ratio: {error}") from None
    except KeyError as error:
        raise typer.BadParameter(f"{error} is unknown; see --help") from None
    if scale not in ("full", "small"):
        raise typer.BadParameter(f"--scale {scale!r} must be full or small")
    if not names:
        raise typer.BadParameter(f"no method is called {pattern!r}; see `prune list`")
    if flops:
        Console(width=WIDTH).print(flops_table(found, shares))
        return
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    for each in found:
        try:
            net = each.build(scale, kind, device)
        except torch.OutOfMemoryError:
            record(rows, [Row(each.name, scale, 0, dtype, "0", FULL, 0, note="out of memory")], csv, as_json, device)
            continue
        for size in batch:
            for text, share in shares.items():
                group = measure(net, each, scale, size, text, share, names, rounds, steps)
                record(rows, group, csv, as_json, device)
        del net
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    if plots:
        draw([asdict(row) | setting(device) for row in rows], Path(plots))
    exit_if_broken(rows)


def record(rows: list[Row], group: list[Row], csv: str, as_json: bool, device: str) -> None:
    """Add a group to the rows, write the file anew, and show the group."""
    rows += group
    if csv:
        write_csv(csv, [asdict(row) | setting(device) for row in rows])
    if as_json:
        for row in group:
            print(json.dumps(asdict(row)), flush=True)
    else:
        Console(width=WIDTH).print(table(group, device))


# ------------------------------------------------------------------------------------------------------ measuring
@torch.inference_mode()
def measure(
    net: nn.Module,
    geometry: BenchGeometry,
    scale: str,
    batch: int,
    text: str,
    ratio: Fraction,
    names: list[str],
    rounds: int,
    steps: int,
) -> list[Row]:
    """The rows of one group: un-pruned, short, then the methods by their names."""
    start = partial(Row, geometry.name, scale, batch, str(net.dtype).removeprefix("torch."))
    try:
        inputs = geometry.inputs(net, batch)
        visual = inputs["input_ids"].shape[1] - TEXT
        kept = max(1, round(visual * (1 - ratio)))
        full = partial(net, **inputs, use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return [start(text, FULL, 0, note="out of memory")]
    cells = [
        Cell(start("0", FULL, visual, visual), full, layers=1.0),
        Cell(start(text, SHORT, visual, kept), partial(short_prefill, net, inputs, kept)),
    ]
    layers = len(net.model.language_model.layers)
    for name in names:
        method = get_method(name, **fitted(name, layers))
        attach = partial(apply_pruner, net, method, ratio=float(ratio))
        cells.append(Cell(start(text, name, visual), full, attach))
    length = inputs["input_ids"].shape[1]
    alive = [cell for cell in tqdm(cells, desc="one run each", disable=None, leave=False) if _try(net, cell, inputs)]
    order = random.Random(0)
    for _ in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for cell in order.sample(alive, len(alive)):
            try:
                with cell.attach():
                    took = _timed(net, cell.prefill, length, steps)
            except Exception as error:  # a row must not end the run
                cell.row.note = reason(error)
                alive = [other for other in alive if other is not cell]
                continue
            cell.prefills.append(took[0])
            cell.decodes.append(took[1])
    for cell in alive:
        _summarise(cell, cells[0], cells[1], batch * steps)
    return [cell.row for cell in cells]


def short_prefill(net: nn.Module, inputs: dict, kept: int):
    """The limit: the image is encoded whole, and the un-hooked decoder sees the first `kept` of its tokens."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    given = {name: inputs[name] for name in names if name in inputs}
    features = net.model.get_image_features(**given, return_dict=True).pooler_output
    visual = torch.stack([one[:kept] for one in features])
    ids, half = inputs["input_ids"], TEXT // 2
    embed = net.get_input_embeddings()
    embeds = torch.cat([embed(ids[:, :half]), visual.to(net.dtype), embed(ids[:, -half:])], 1)
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(ids), -1)
    if "image_grid_thw" in inputs:
        positions = positions.expand(3, -1, -1)
    return net(inputs_embeds=embeds, position_ids=positions, use_cache=True, logits_to_keep=1)


def _timed(net: nn.Module, prefill: Callable[[], object], length: int, steps: int) -> tuple[float, float]:
    """Seconds of a prefill, and of `steps` greedy steps behind it."""
    out = []
    first = timed(lambda: out.append(prefill()))
    return first, timed(lambda: decode(net, out[0], length, steps))


def decode(net: nn.Module, out, length: int, steps: int) -> None:
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    axes = (3, *token.shape) if hasattr(net.model, "rope_deltas") else token.shape
    for step in range(steps):
        positions = torch.full(axes, length + step, device=token.device)
        out = net(input_ids=token, past_key_values=cache, position_ids=positions, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)


def _try(net: nn.Module, cell: Cell, inputs: dict) -> bool:
    """Run a cell, first watching memory and then the reducers; False and a note if it does not work."""
    row, cuda = cell.row, net.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with cell.attach() as handle:
            out = cell.prefill()
            row.kv_mib = round(_bytes(out.past_key_values) / 2**20, 3)
            decode(net, out, inputs["input_ids"].shape[1], 2)
            del out
            if cuda:
                row.peak_mib = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            if isinstance(handle, Handle):
                found = []
                for _ in range(SELECTIONS):
                    with watched_reducers(handle.method, cuda) as seconds:
                        cell.prefill()
                    found.append(seconds())
                row.selection_ms = round(1e3 * statistics.median(found), 3)
                _read_report(net, cell, handle, inputs)
    except Exception as error:  # whatever breaks is a row, not the end
        row.note = reason(error)
        if cuda:
            torch.cuda.empty_cache()
        return False
    return True


def _read_report(net: nn.Module, cell: Cell, handle: Handle, inputs: dict) -> None:
    """Tokens kept, the share of layers that saw all, and FLOPs."""
    report = handle.last
    alive, visual = report.tokens_per_layer[0], report.images[0].tokens
    cell.row.kept = kept = len(report.images[0].kept)
    if kept < visual:
        cell.layers = sum(n - kept for n in alive) / (len(alive) * (visual - kept))
    pruned = sum(one.prefill for one in account(net, report, inputs))
    whole = sum(one.prefill for one in account_full(net, report, inputs))
    cell.row.flops_speedup = round(whole / pruned, 3)


def _bytes(cache) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


@contextmanager
def watched_reducers(method, cuda: bool) -> Iterator[Callable[[], float]]:
    """Within this context the reducers of a method are timed; calling what it yields gives their seconds.

    On a GPU by events, so that nothing waits: launching may hide behind what the device still does.
    """
    found: list[tuple] = []
    mark = partial(torch.cuda.Event, enable_timing=True) if cuda else time.perf_counter

    def watch(reduce):
        def wrapped(*args):
            start = mark()
            if cuda:
                start.record()
            out = reduce(*args)
            end = mark()
            if cuda:
                end.record()
            found.append((start, end))
            return out

        return wrapped

    def seconds() -> float:
        if cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in found) / 1e3
        return sum(end - start for start, end in found)

    with ExitStack() as stack:
        classes = {type(stage.reducer) for stage in method.plan(Geometry(100), 10)}
        for cls in classes:
            stack.enter_context(patch.object(cls, "reduce", watch(cls.reduce)))
        yield seconds


def _summarise(cell: Cell, full: Cell, short: Cell, tokens: int) -> None:
    row = cell.row
    row.ttft_low, row.ttft_ms, row.ttft_high = quartiles_ms(cell.prefills)
    slow, middle, fast = (tokens * 1e3 / ms for ms in reversed(quartiles_ms(cell.decodes)))
    row.tokens_low, row.tokens_per_s, row.tokens_high = (round(n, 2) for n in (slow, middle, fast))
    if full.prefills and not full.row.note:
        row.ttft_speedup = _ratio(full.prefills, cell.prefills)
        row.decode_speedup = _ratio(full.decodes, cell.decodes)
        if row.selection_ms is not None:
            row.selection_share = round(row.selection_ms / quartiles_ms(full.prefills)[1], 4)
    if short.prefills and not short.row.note and (full.prefills or not cell.layers):
        whole = full.prefills or short.prefills
        limit = [cell.layers * f + (1 - cell.layers) * s for f, s in zip(whole, short.prefills)]
        row.ttft_to_short = _ratio(cell.prefills, limit)


def _ratio(upper: list[float], lower: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(upper, lower)), 3)


# ----------------------------------------------------------------------------------------------------------- FLOPs
def accounts(geometry: BenchGeometry, ratio: Fraction) -> tuple[Account, Account]:
    """What one prompt costs un-pruned, and with its visual tokens cut at `projected` for nothing. Nothing is run."""
    net = geometry.build("full", torch.bfloat16, "meta")
    with torch.device("cpu"):
        inputs = {
            name: torch.empty(x.shape, device="meta") if name == "pixel_values" else x
            for name, x in geometry.inputs(_OnHost(net), 1).items()
        }
    visual = inputs["input_ids"].shape[1] - TEXT
    counts = visual, max(1, round(visual * (1 - ratio)))
    return tuple(account(net, _report(net, visual, n), inputs)[0] for n in counts)


@dataclass
class _OnHost:
    """A model on `meta` whose inputs lie on the host: their sizes are read."""

    net: nn.Module

    @property
    def config(self):
        return self.net.config

    device, dtype = torch.device("cpu"), torch.float32


def _report(net: nn.Module, visual: int, alive: int) -> Report:
    geometry = find_parts(net).geometry(0)
    layout = Layout(((1, 1, visual),), torch.zeros(visual, 4, dtype=torch.long))
    images = [ImageReport(0, 0, layout, layout.coordinates, {})]
    return Report("none", "none", images, [[alive] * geometry.layers], [TEXT], geometry, 2)


def flops_table(found: list[BenchGeometry], shares: dict[str, Fraction]) -> Table:
    """Where the FLOPs of a prefill are, and what is left to win: Amdahl's limit at every ratio."""
    table = Table(title="FLOPs of one prefill: one image, 64 text tokens, LM head on one position")
    for heading in ("geometry", "visual", "TFLOPs", "encoder", "decoder", "KV MiB"):
        table.add_column(heading, justify="left" if heading == "geometry" else "right")
    for text in shares:
        table.add_column(f"limit at {text}", justify="right")
    for each in found:
        limits = []
        for share in shares.values():
            full, cut = accounts(each, share)
            limits.append(f"{full.prefill / cut.prefill:.2f}x")
        encoder = (full.tower + full.projector) / full.prefill
        decoder = (full.attention + full.mlp) / full.prefill
        table.add_row(
            each.name,
            str(full.tokens_per_layer[0]),
            f"{full.prefill / 1e12:.2f}",
            f"{encoder:.1%}",
            f"{decoder:.1%}",
            f"{full.kv_bytes / 2**20:.0f}",
            *limits,
        )
    return table
