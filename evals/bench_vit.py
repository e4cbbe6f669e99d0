"""What pruning inside a vision transformer saves: pictures per second beside FLOPs."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from prune import apply_pruner
from prune.evals.bench_engine import DTYPES
from prune.evals.bench_paired import Case, paired, quartiles_ms, setting, setting_line
from prune.evals.csv_file import write_csv
from prune.evals.vision import import_library
from prune.evals.vit_accounting import account, account_full, vit_parts


@dataclass
class VitRow:
    """One line of the benchmark.

    Args:
        case: what ran.
        keep: patches left after the last block.
        median_ms, low_ms, high_ms: of a batch, median and quartiles of the rounds.
        images_per_second: by the median.
        speedup: images per second as a ratio to the un-hooked model, per round, median.
        flops_ratio: FLOPs of the un-pruned model by those of this one: the speed-up if only FLOPs counted.
        gflops: of one picture.
    """

    case: str
    keep: int
    median_ms: float
    low_ms: float
    high_ms: float
    images_per_second: float
    speedup: float
    flops_ratio: float
    gflops: float


def vit(
    methods: Annotated[list[str] | None, typer.Option("--method", "-m", help="Repeat; tome without it.")] = None,
    r: int = typer.Option(13, help="Patches removed per block, on average: every method keeps N - r * blocks."),
    model_name: str = typer.Option("vit_base_patch16_224", "--model", help="timm's name; the weights are random."),
    batch: int = typer.Option(8, help="Batch size."),
    rounds: int = typer.Option(10, help="Measured rounds."),
    threads: int = typer.Option(0, help="CPU threads; 0: as torch chooses. On a busy machine 1 is steadier."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    csv: str = typer.Option("", help="Write the rows, with device and versions, to this file."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Pictures per second of a vision transformer: un-hooked, with a pruner that removes nothing, and pruned.

    The ratio to the un-hooked model stands beside the ratio of FLOPs (selection counted), which it would be if time
    went by FLOPs alone.
    """
    if threads:
        torch.set_num_threads(threads)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    timm = import_library("timm")
    torch.manual_seed(0)
    model = timm.create_model(model_name, pretrained=False).to(device, DTYPES[dtype]).eval()
    side = timm.data.resolve_model_data_config(model)["input_size"]
    pixels = torch.randn(batch, *side, device=device, dtype=DTYPES[dtype])
    parts = vit_parts(model)
    n = _patches(model, pixels)
    keep = n - r * len(parts.blocks)
    if keep < 1:
        raise typer.BadParameter(f"r={r} in {len(parts.blocks)} blocks leaves none of {n} patches", param_hint="--r")

    def forward() -> None:
        model(pixels)

    cases = {
        "un-hooked": Case(forward),
        "random, ratio 0": Case(forward, partial(apply_pruner, model, "random", ratio=0)),
    }
    kept, flops = {"un-hooked": n, "random, ratio 0": n}, {}
    with torch.inference_mode():
        for name in methods or ["tome"]:
            with apply_pruner(model, name, keep=keep) as handle:
                model(pixels[:1])
                (flops[name],) = (one.total for one in account(model, handle.last))
                (full,) = (one.total for one in account_full(model, handle.last))
                kept[name] = len(handle.last.images[0].kept)
            cases[name] = Case(forward, partial(apply_pruner, model, name, keep=keep))
        times = paired(cases, rounds)
    rows = []
    for name, seconds in times.items():
        low, median, high = quartiles_ms(seconds)
        ratio = statistics.median(full_time / time for full_time, time in zip(times["un-hooked"], seconds))
        cost = flops.get(name, full)
        rows.append(
            VitRow(
                case=name,
                keep=kept[name],
                median_ms=median,
                low_ms=low,
                high_ms=high,
                images_per_second=round(1e3 * batch / median, 2),
                speedup=round(ratio, 3),
                flops_ratio=round(full / cost, 3),
                gflops=round(cost / 1e9, 3),
            )
        )
    sizes = {"model": model_name, "r": r, "batch": batch, "dtype": dtype, "rounds": rounds}
    if csv:
        write_csv(csv, [sizes | asdict(row) | setting(device) for row in rows])
    if as_json:
        for row in rows:
            print(json.dumps({**asdict(row), **sizes, **setting(device)}))
        return
    _print(rows, f"{model_name}, random weights, r={r}, batch {batch}, {dtype}\n{setting_line(device)}")


def _patches(model: torch.nn.Module, pixels: torch.Tensor) -> int:
    with torch.inference_mode(), apply_pruner(model, "random", ratio=0) as handle:
        model(pixels[:1])
        return handle.last.images[0].tokens


def _print(rows: list[VitRow], note: str) -> None:
    table = Table(title=note, caption="speed-up: images/s to un-hooked, paired by round; FLOPs: un-pruned to pruned")
    for heading in ("case", "patches left", "ms", "quartiles", "images/s", "speed-up", "FLOPs ratio", "GFLOPs"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        table.add_row(
            row.case,
            str(row.keep),
            f"{row.median_ms:.1f}",
            f"{row.low_ms:.1f}-{row.high_ms:.1f}",
            f"{row.images_per_second:.1f}",
            f"{row.speedup:.3f}",
            f"{row.flops_ratio:.3f}",
            f"{row.gflops:.2f}",
        )
    Console().print(table)
