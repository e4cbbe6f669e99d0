"""All benchmarks of this machine, one after the other, into one folder of CSV files."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import typer

from prune.evals.bench_paired import device_name

RESULTS = Path("evals/results")


def everything(
    out: str = typer.Option("", "--out", "-o", help="Folder; evals/results/<device> without it."),
    only: str = typer.Option("", help="Names of benchmarks, separated by commas; a wrong one lists them."),
    threads: int = typer.Option(1, help="CPU threads, where there is no GPU."),
) -> None:
    """Every benchmark, each in a process of its own, to `<out>/<name>.csv`, and the plots of `model` beside them.

    On a GPU the full models in bfloat16 (hours); on a CPU narrow ones (half an hour). A benchmark that fails
    does not keep the others from running; the exit code is 1 then.
    """
    cuda = torch.cuda.is_available()
    folder = Path(out) if out else RESULTS / (_slug(device_name("cuda")) if cuda else "cpu")
    commands = gpu_commands() if cuda else cpu_commands(threads)
    wanted = only.split(",") if only else list(commands)
    if unknown := sorted(set(wanted) - set(commands)):
        raise typer.BadParameter(f"--only: {', '.join(unknown)} unknown; known are {', '.join(commands)}")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in wanted:
        command = [*commands[name], "--csv", str(folder / f"{name}.csv")]
        if name == "model":
            command += ["--plots", str(folder)]
        typer.echo(f"$ python -m prune.evals.bench {' '.join(command)}")
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-P", "-m", "prune.evals.bench", *command])
        typer.echo(f"{name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s")
        if done.returncode:
            failed.append(name)
    if failed:
        raise typer.Exit(1)


def gpu_commands() -> dict[str, list[str]]:
    """Full size, in bfloat16."""
    return {
        "engine": ["engine", "--width", "4096", "--layers", "32", "--batch", "8", "--dtype", "bfloat16"],
        "methods": ["methods", "--device", "cuda", "--dtype", "bfloat16"],
        "kernels": ["kernels", "--device", "cuda"],
        "vit": ["vit", "--batch", "64", "--dtype", "bfloat16"],
        "model": ["model"],
    }


def cpu_commands(threads: int) -> dict[str, list[str]]:
    """Small enough for half an hour in all on one core of a quiet machine."""
    few = ["--threads", str(threads)]
    return {
        "engine": ["engine", "--rounds", "15", *few],
        "engine-1024": ["engine", "--rounds", "5", "--width", "1024", "--layers", "32", *few],
        "methods": ["methods", "--shape", "8x576x1024", "--naive", "--rounds", "2", "--limit", "200", *few],
        "methods-next": ["methods", "--shape", "1x2880x4096", "--rounds", "2", "--limit", "200", *few],
        "kernels": ["kernels", "--rounds", "3", "--limit", "10", *few],
        "vit": ["vit", "--rounds", "5", *few],
        "model": [
            *("model", "--scale", "small", "--dtype", "float32", "--batch", "1", "--rounds", "2", "--steps", "4"),
            *("--geometry", "llava-1.5-7b", "--geometry", "qwen2.5-vl-7b-1k"),
            *("--ratio", "2/3", "--ratio", "8/9", *few),
        ],
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
