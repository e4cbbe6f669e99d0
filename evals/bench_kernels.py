"""How long kernels take, by provider: the torch references, and their Triton versions where there is a GPU."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prune.kernels
from prune.evals.bench_methods import DTYPES, within
from prune.evals.bench_paired import Case, exit_if_broken, paired, quartiles_ms, reason, setting, setting_line
from prune.evals.csv_file import write_csv
from prune.kernels.compaction import compact
from prune.kernels.graph import propagate
from prune.tokens import Merge, Reduction

SIZES = (577, 2880, 16384)  # CLIP-L at 336 with CLS, LLaVA-NeXT, a long video
WIDTH, HEADS, DIM = 1024, 16, 64
ROWS = 64  # of text, where a kernel takes some query rows
KEPT = 9  # one of so many tokens
PROVIDERS = ("torch", "triton")


@dataclass
class Row:
    """One line of the benchmark.

    Args:
        op: name of the kernel.
        provider: "torch" or "triton".
        shape: of the largest input.
        dtype: of the inputs.
        median_ms, low_ms, high_ms: median and quartiles of the rounds; None where it did not run.
        gflops: of the operation itself (closed formula), 10^9.
        moved_mb: bytes that must be read and written if nothing is read twice but what a greedy method reads again in
            every step, 10^6.
        peak_mib: most memory it held at a time beside its inputs.
        note: why there is no time.
    """

    op: str
    provider: str
    shape: str
    dtype: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    gflops: float | None = None
    moved_mb: float | None = None
    peak_mib: float | None = None
    note: str = ""


@dataclass
class Work:
    """One kernel on inputs of one size: arguments, the shape to show, FLOPs and bytes."""

    args: tuple
    shape: str
    flops: float
    moved: float


class Inputs:
    """Random inputs of N tokens of one image, made when they are asked for."""

    def __init__(self, n: int, dtype: torch.dtype, device: str):
        self.n, self.dtype, self.device, self.keep = n, dtype, device, max(1, n // KEPT)
        self.bytes = torch.empty(0, dtype=dtype).element_size()
        self.wide = f"1x{n}x{WIDTH}"
        self.split = f"1x{n}x{HEADS}x{DIM}"

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(sum(size))
        return torch.randn(*size, generator=generator).to(self.device, dtype or self.dtype)

    @property
    def x(self) -> Tensor:
        return self.normal(1, self.n, WIDTH)

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        return self.normal(1, self.n, HEADS, DIM), self.normal(1, self.n, HEADS, DIM) / 2

    @property
    def scores(self) -> Tensor:
        return self.normal(1, self.n, dtype=torch.float32)

    @property
    def all(self) -> Tensor:
        return torch.ones(1, self.n, dtype=torch.bool, device=self.device)

    @property
    def zeros(self) -> Tensor:
        return torch.zeros(1, self.n, dtype=torch.long, device=self.device)

    def greedy(self, *args) -> Work:
        """A greedy choice: one pass over the tokens per pick."""
        passes = self.keep * self.n * WIDTH
        return Work(args, self.wide, 2 * passes, self.bytes * passes)

    def square(self, *args, times: float = 1.0) -> Work:
        """Products of all pairs of tokens."""
        return Work(args, self.wide, 2 * times * self.n**2 * WIDTH, self.bytes * self.n * WIDTH)

    def attend(self, *args, rows: int, times: int = 1) -> Work:
        """Logits of `rows` query rows with all columns."""
        moved = self.bytes * (rows + self.n) * HEADS * DIM * times + 4 * self.n
        return Work(args, self.split, 2 * times * rows * self.n * HEADS * DIM, moved)

    def some_rows(self) -> tuple[Tensor, ...]:
        """Arguments of kernels that take some query rows: q, k, scale, slots, rows."""
        slots = torch.arange(self.n - min(ROWS, self.n), self.n, device=self.device)[None]
        q = self.normal(1, slots.shape[1], HEADS, DIM)
        return q, self.heads[1], DIM**-0.5, slots, torch.ones_like(slots).bool()


def _apply(i: Inputs) -> Work:
    keep = torch.arange(i.keep, device=i.device)[None] * KEPT
    source = torch.arange(i.n, device=i.device)[None]
    slot = (source // KEPT).clamp(max=i.keep - 1)
    weight = torch.full(source.shape, 1 / KEPT, device=i.device)
    reduction = Reduction(keep, merge=Merge(source, slot, weight))
    return Work((reduction, i.x), i.wide, 2 * i.n * WIDTH, i.bytes * (i.n + i.keep) * WIDTH)


def _compact(i: Inputs) -> Work:
    keep = (torch.arange(i.n, device=i.device) % KEPT == 0)[None]
    return Work((keep, int(keep.sum())), f"1x{i.n}", 0, i.n * 17)


def _mean_rows(i: Inputs) -> Work:
    return i.attend(*i.some_rows(), i.all, rows=min(ROWS, i.n))


def _any_rows(i: Inputs) -> Work:
    q, k, scale, _, rows = i.some_rows()
    return i.attend(q, k, scale, rows, i.all, rows=min(ROWS, i.n))


def _head_rows(i: Inputs) -> Work:
    columns = torch.arange(i.n, device=i.device)[None]
    return i.attend(*i.some_rows(), i.all, columns, rows=min(ROWS, i.n))


CASES: dict[str, Callable[[Inputs], Work]] = {
    "received_attention": lambda i: i.attend(*i.heads, DIM**-0.5, rows=i.n),
    "row_attention": lambda i: i.attend(i.heads[0][:, :1], i.heads[1], DIM**-0.5, rows=1),
    "attention_pagerank": lambda i: i.attend(*i.heads, DIM**-0.5, rows=i.n, times=5),
    "mean_row_attention": _mean_rows,
    "rows_to_columns": _any_rows,
    "head_attention": _head_rows,
    "cosine_reduce": lambda i: i.square(i.x),
    "cosine_topk": lambda i: i.square(i.x, i.x, 32, i.zeros, i.zeros),
    "propagate": lambda i: i.square(i.x, i.scores.abs(), i.zeros, i.all, 0.5, 0.03, 5),
    "best_match": lambda i: i.square(i.x[:, ::2], i.x[:, 1::2], i.all[:, 1::2], times=0.25),
    "farthest_point": lambda i: i.greedy(i.x, i.keep),
    "spread": lambda i: i.greedy(i.x, i.zeros[:, :1], i.keep, i.all, "sum"),
    "greedy_veto": lambda i: i.greedy(i.x, i.scores, i.keep, i.all, 0.9),
    "importance_times_distance": lambda i: i.greedy(i.x, i.scores, [i.keep], i.zeros, i.all),
    "dpp_map": lambda i: i.greedy(i.x, i.scores.sigmoid(), i.keep),
    "topk_mask": lambda i: Work((i.scores, i.keep), f"1x{i.n}", 0, 5 * i.n),
    "topk_indices": lambda i: Work((i.scores, i.keep), f"1x{i.n}", 0, 4 * i.n + 9 * i.keep),
    "compact": _compact,
    "apply": _apply,
}
"""Every kernel with a Triton version, and some without. `farthest_point` has a product of all pairs before its steps,
which its FLOPs leave out: `cosine_reduce` is that product."""

PLAIN: dict[str, Callable] = {"propagate": propagate, "compact": compact, "apply": Reduction.apply}
"""Kernels that may have no Triton version."""


def dispatched() -> dict[str, Callable]:
    """The kernels with a Triton version, by name."""
    found = {}
    for module in pkgutil.iter_modules(prune.kernels.__path__):
        if not module.ispkg:
            names = vars(importlib.import_module(f"prune.kernels.{module.name}"))
            found |= {name: value for name, value in names.items() if hasattr(value, "reference")}
    return dict(sorted(found.items()))


def kernels(
    pattern: str = typer.Argument("*", help="Wildcard over names of kernels."),
    size: Annotated[list[int], typer.Option("--tokens", "-n", help="Tokens; may be repeated.")] = SIZES,
    dtype: Annotated[list[str], typer.Option(help=f"{', '.join(DTYPES)}; may be repeated.")] = DTYPES[:2],
    rounds: int = typer.Option(10, help="Measured rounds."),
    limit: float = typer.Option(20.0, help="Seconds one call may take."),
    threads: int = typer.Option(0, help="CPU threads; 0: as torch chooses. On a busy machine 1 is steadier."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    csv: str = typer.Option("", help="Write the rows, with device and versions, to this file."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Time, FLOPs, bytes moved and peak memory of every kernel, in torch and in Triton, interleaved.

    One image of N tokens of width 1024, 16 heads of 64; greedy choices and merges leave a ninth. A kernel that
    breaks is a row that says so, and the exit code is 1.
    """
    if wrong := set(dtype) - set(DTYPES):
        raise typer.BadParameter(f"dtype {sorted(wrong)[0]!r} must be one of {', '.join(DTYPES)}")
    names = [name for name in CASES if fnmatchcase(name, pattern)]
    if not names:
        raise typer.BadParameter(f"no kernel is called {pattern!r}; there are {', '.join(CASES)}")
    if min(size) < 2:
        raise typer.BadParameter("kernels want 2 tokens or more", param_hint="--tokens")
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    for n in size:
        for kind in dtype:
            with torch.inference_mode():
                rows += [row for name in names for row in measure(name, n, kind, rounds, limit, device)]
            if csv:
                write_csv(csv, [asdict(row) | setting(device) for row in rows])
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        Console().print(table(rows, device))
    exit_if_broken(rows)


def measure(name: str, n: int, dtype: str, rounds: int, limit: float, device: str) -> Iterator[Row]:
    """The rows of one kernel on one size: one per provider."""
    work = CASES[name](Inputs(n, getattr(torch, dtype), device))
    kernel = dispatched().get(name) or PLAIN[name]
    cases, found = {}, {}
    for provider in PROVIDERS:
        row = found[provider] = Row(name, provider, work.shape, dtype)
        row.gflops, row.moved_mb = round(work.flops / 1e9, 6), round(work.moved / 1e6, 6)
        if provider == "triton":
            row.note = "no Triton version" if not hasattr(kernel, "reference") else ""
            row.note = row.note or ("no CUDA device" if torch.device(device).type != "cuda" else "")
        if row.note:
            continue
        run = partial(kernel, *work.args)
        try:
            with chosen(provider):
                if within(limit, run) is None:
                    row.note = f"more than {limit:g} s"
                    continue
                row.peak_mib = round(peak_bytes(run, device) / 2**20, 6)
            cases[provider] = Case(run, partial(chosen, provider))
        except Exception as error:  # one that fails must not take the others down
            row.note = reason(error)
    for provider, seconds in (paired(cases, rounds, warmup=1) if cases else {}).items():
        row = found[provider]
        row.low_ms, row.median_ms, row.high_ms = quartiles_ms(seconds)
    yield from found.values()


@contextmanager
def chosen(provider: str) -> Iterator[None]:
    """`PRUNE_KERNELS` for a while."""
    before = os.environ.get("PRUNE_KERNELS")
    os.environ["PRUNE_KERNELS"] = provider
    try:
        yield
    finally:
        if before is None:
            del os.environ["PRUNE_KERNELS"]
        else:
            os.environ["PRUNE_KERNELS"] = before


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most memory held at a time beside what was there before.

    By CUDA's allocator; on the CPU by the tensors that torch's operations return, what they use inside not counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Held() as held:
        run()
    return held.most


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still alive; `most` is the peak."""

    def __init__(self):
        super().__init__()
        self.most, self.given = 0, set()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        for storage in _storages((args, kwargs)):
            ref = StorageWeakRef(storage)
            if ref.cdata not in self.alive:
                self.given.add(ref)  # not made here; the reference keeps its number from being used again
        result = operation(*args, **(kwargs or {}))
        for storage in _storages(result):
            ref = StorageWeakRef(storage)
            if ref not in self.given:
                self.alive[ref.cdata] = ref, storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))


def table(rows: list[Row], device: str) -> Table:
    """For the terminal."""
    caption = "GFLOPs and MB moved by formula; peak: beside the inputs"
    out = Table(title="Kernels", caption=f"{caption}\n{setting_line(device)}")
    for heading in ("kernel", "shape", "dtype", "provider", "median ms", "quartiles", "GFLOPs", "MB moved", "peak MiB"):
        out.add_column(heading, justify="left" if heading in ("kernel", "shape", "dtype", "provider") else "right")
    for row in rows:
        cells = [row.op, row.shape, row.dtype, row.provider, row.note]
        if row.median_ms is not None:
            spread = f"{row.low_ms:.2f}-{row.high_ms:.2f}"
            cells[4:] = [
                f"{row.median_ms:.2f}",
                spread,
                f"{row.gflops:.2f}",
                f"{row.moved_mb:.1f}",
                f"{row.peak_mib:.1f}",
            ]
        out.add_row(*cells)
    return out
