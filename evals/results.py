"""The results file of a sweep: JSON lines, one row per cell, only ever appended to.

A row says what was run (`model`, `task`, `method`, `budget`, `run`: enough to run it again), how it ended (`status`),
what came out (`result`: the same on every run; `cost`: tokens, FLOPs, bytes), and what belongs to the day and the
machine (`measured`, `versions`, `device`). `SCHEMA` is raised whenever the meaning of a field changes.

    {"schema": 1,
     "cell": "9b1c6f0a2d3e4f50",          # of everything up to "run": equal cells are the same work
     "model": {"name": "scenes-llava", "revision": "53a1...", "dtype": "float32", "attention": "sdpa"},
     "task": {"name": "scenes", "options": {"split": "test", "seed": 0, ...}, "items": 400, "digest": "5e2660bf46b2"},
     "method": {"name": "dart", "options": {"layer": 2, ...}, "positions": "original"},   # name "none": un-pruned
     "budget": {"by": "average", "share": 0.1111111111111111},                            # null for "none"
     "run": {"batch_size": 50, "max_new_tokens": 3},
     "status": "ok",                      # or "failed" (see "error"), or "out of reach" (the budget, for this method)
     "error": null,
     "result": {"items": 400, "accuracy": 0.84, "interval": [0.81, 0.87], "scores": [1.0, 0.0, ...],
                "kinds": {"count": {"items": 67, "accuracy": 0.91}, ...},
                "majority": 0.2},       # what always giving the most frequent answer of each kind would score
     "cost": {"visual_tokens": 144.0,     # all of these: means over the items
              "kept_tokens": 16.0,        # after the last stage
              "average_tokens": 67.2,     # over decoder layers
              "tokens_per_layer": [144.0, 16.0, ...], "text_tokens": 14.1, "new_tokens": 2.0,
              "flops": {"tower": 0.0, "projector": 0.0, "attention": 0.0, "mlp": 0.0, "selection": 0.0, "head": 0.0},
              "prefill_flops": 0.0,       # the sum of these
              "prefill_flops_full": 0.0,  # un-pruned
              "decode_flops": 0.0,        # of all new tokens but the first
              "kv_bytes": 0.0, "kv_bytes_full": 0.0},
     "measured": {"prefill_ms": 1.9,      # per item, median over batches: pixels to the first token
                  "decode_ms": 0.4,       # per further token of an item
                  "seconds": 8.1, "finished": "2026-11-23T08:00:00+00:00"},
     "versions": {"prune": "0.1.0", "torch": "2.15.0", "transformers": "5.23.0", ..., "python": "3.11.2"},
     "device": "cpu (x86_64, AVX512, 2 threads)"}

Rows of a task of classes differ in a few fields: "run" has "decided_by" ("head", "zero-shot" or "knn") and no
"max_new_tokens", "result" has "probes" ({"knn": 0.97, "linear": 0.98}), "cost" counts patches and blocks, its parts of
FLOPs are embedding, attention, mlp, selection and head, and it has no text, decoding and KV; "prefill_ms" is the time
of a forward per picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from prune.errors import PruneError

SCHEMA = 1
BASELINE = "none"  # the name of "not pruned" in a row's method
REFERENCE = "random"  # what paired differences are taken to
STARTS = ('{"schema": ', '{"cell": ')  # of a row, and of a line of a journal


class ResultsError(PruneError):
    """A results file that cannot be read or written; names the file and the line."""


def read_rows(path: Path) -> list[dict]:
    """All rows of a results file, in order; of several rows of one cell the last one counts.

    A last line that was cut off, which a killed run leaves, is passed over.

    Raises:
        ResultsError: no such file, a line that is no row, or another schema version.
    """
    rows = {}
    for number, row in read_lines(path):
        if not isinstance(row, dict) or not {"schema", "cell", "status"} <= set(row):
            raise ResultsError(f"{path}, line {number}: not a row of `prune eval`")
        if row["schema"] != SCHEMA:
            raise ResultsError(
                f"{path}, line {number}: schema version {row['schema']}, this prune reads {SCHEMA}; "
                "use the prune that wrote it, or another results file"
            )
        if not all(isinstance(row.get(part), dict) for part in ("model", "task", "method")):
            raise ResultsError(f"{path}, line {number}: the row lacks its model, task or method; delete the line")
        rows[row["cell"]] = row
    return list(rows.values())


def read_lines(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, JSON value) of every line that is not blank, but for a last one that was cut off.

    Raises:
        ResultsError: no such file, or a line that is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except FileNotFoundError:
        raise ResultsError(f"there is no results file {path}; `prune eval -o {path}` makes one") from None
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                if number == len(lines) and is_torn(line):
                    return
                raise ResultsError(f"{path}, line {number}: not JSON ({error}); delete the line to go on") from None


def is_torn(line: str) -> bool:
    """Whether a line without its end can be the beginning of one that `append_line` wrote."""
    return any(line.startswith(start) or start.startswith(line) for start in STARTS)


def mend(path: Path) -> None:
    """Make a file that `read_lines` accepts ready for more lines: a cut-off last line goes, a whole one gets its end.

    Raises:
        ResultsError: the file cannot be written.
    """
    try:
        with open(path, "ab"):
            pass
        whole, newline, last = path.read_bytes().rpartition(b"\n")
        if not last.strip():
            return
        try:
            json.loads(last)
        except ValueError:
            os.truncate(path, len(whole + newline))
        else:
            with open(path, "ab") as file:
                file.write(b"\n")
    except OSError as error:
        raise ResultsError(f"cannot write to {path}: {error.strerror}; give another -o") from None


def append_line(path: Path, record: dict) -> None:
    """Add one JSON line and wait until it is on the disk; if that fails the file is what it was.

    Raises:
        ResultsError: no space left, or not writable.
    """
    line = (json.dumps(record) + "\n").encode()
    try:
        with open(path, "ab") as file:
            before = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, before)
                raise
    except OSError as error:
        raise ResultsError(f"cannot write to {path}: {error.strerror}; the lines before are kept") from None
