"""Timing of cases against each other: in one process, in random order within every round."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import typer
from tqdm import tqdm

from prune.errors import PruneError
from prune.kernels.dispatch import choice

BROKE = "broke: "


@dataclass
class Case:
    """Something to time: `run`, within `around()`, which is not timed. `full_layers` of all layers see every token."""

    run: Callable[[], object]
    around: Callable[[], AbstractContextManager] = nullcontext
    full_layers: float = 0.0


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def paired(cases: dict[str, Case], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every case in every round; the order within a round is drawn anew."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in tqdm(range(warmup + rounds), desc="rounds", disable=None, leave=False):
        for name in order.sample(list(cases), len(cases)):
            with cases[name].around():
                seconds = timed(cases[name].run)
            if number >= warmup:
                times[name].append(seconds)
    return times


def quartiles_ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile in ms, between the fastest and the slowest; of one round its time."""
    found = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    low, median, high = (round(1e3 * value, 3) for value in found)
    return low, median, high


def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or a processor without a name
        return platform.processor() or platform.machine()


def setting(device: str | torch.device) -> dict[str, str | int]:
    """What every row of a CSV says about the machine: device name, CPU threads, versions, and `PRUNE_KERNELS`."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "prune-vlm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return {"device": device_name(device), "threads": torch.get_num_threads(), **versions, "kernels": choice()}


def setting_line(device: str | torch.device) -> str:
    """The same for the foot of a table."""
    found = setting(device)
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "transformers") if found[name])
    return f"{found['device']}, {found['threads']} CPU threads; {versions}"


def reason(error: Exception) -> str:
    """Why a case has no numbers, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return line if isinstance(error, PruneError) else BROKE + line


def exit_if_broken(rows: Sequence) -> None:
    """Exit code 1 if a case broke; one that was refused, did not fit or took too long is a result."""
    if any(row.note.startswith(BROKE) for row in rows):
        raise typer.Exit(1)
