"""The file a training script goes on from: modules, optimiser, counters, torch's random state on the CPU.

The log of the run lies beside it as CSV.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .csv_file import write_csv


def save(file: Path, parts: Mapping[str, Any], log: list[dict], **counters: float) -> None:
    """Write `parts` (what has a `state_dict`) and counters to `file`, and `log` to the CSV file of that name.

    A run that is killed meanwhile leaves the last whole file.
    """
    whole = {name: part.state_dict() for name, part in parts.items()}
    part = file.with_suffix(".part")
    torch.save({**whole, **counters, "log": log, "rng": torch.get_rng_state()}, part)
    part.replace(file)
    write_csv(file.with_suffix(".csv"), log)


def load(file: Path, parts: Mapping[str, Any], device: str = "cpu") -> tuple[list[dict], dict[str, float]]:
    """Bring `parts` and the random state to where they were saved; the log and the counters."""
    saved = torch.load(file, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved.pop(name))
    torch.set_rng_state(saved.pop("rng").cpu())
    return saved.pop("log"), saved
