"""A small sweep on the built-in model, in this process or in others that can be killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import torch

ITEMS, BATCH = 18, 4  # the last batch is a short one
BATCHES = -(-ITEMS // BATCH)


def sweep(output: Path, **changes):
    """`random`, `divprune` and `dart` (out of reach at 1/9), 18 items."""
    from prune.evals.grid import Spec, parse_share
    from prune.evals.runner import Sweep
    from prune.evals.tasks import load_task
    from prune.evals.team import Team

    settings = dict(
        models=["scenes-llava"],
        tasks=[load_task("scenes", limit=ITEMS)],
        output=output,
        methods=[Spec("random"), Spec("divprune"), Spec("dart")],
        shares=[parse_share("1/3"), parse_share("1/9")],
        batch_size=BATCH,
        team=Team("cpu"),
    )
    return Sweep(**{**settings, **changes})


def rows(path: Path) -> dict[str, dict]:
    """Rows of a results file by cell, without what belongs to the day and the machine."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["cell"] for row in found}) == len(found)
    changing = ("measured", "device")
    return {row["cell"]: {key: value for key, value in row.items() if key not in changing} for row in found}


def context():
    """Processes with everything imported, but no threads and no models: they start at once."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["sweeps", "prune.evals.runner", "prune.evals.tasks", "sklearn.datasets"])
    return made


def run(output: str, environment: dict[str, str]) -> None:
    """Target of a process."""
    os.environ |= environment
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        sweep(Path(output)).run()


def ranks(size: int) -> list[dict[str, str]]:
    """The environment `accelerate launch` (torchrun) gives each of `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
