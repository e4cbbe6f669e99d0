"""Rows of numbers to a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """One line per row, under a line of all their names; no rows, no file. Folders are made, an old file goes."""
    path = Path(path)
    if not rows:
        return path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
