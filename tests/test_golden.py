"""Kept tokens equal what the authors' own code keeps, on the recorded cases, alone and in a ragged batch.

The cases lie in `tests/golden/<method>/case*.npz`, or in the folder named by PRUNE_GOLDEN. A folder without a reader
is a failure, not a skip. A new method adds one: `tests/readers/<method>.py` with `read(data, params)`, a generator of
`Check`s for one file.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import Check, batch

from prune import VisualTokens

FOLDER = Path(os.environ.get("PRUNE_GOLDEN", Path(__file__).parent / "golden"))
READERS = {path.stem for path in (Path(__file__).parent / "readers").glob("[a-z]*.py")}


def load(path: Path) -> list[Check]:
    read = import_module(f"readers.{path.parent.name}").read
    with np.load(path, allow_pickle=False) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "params"}
        return list(read(data, json.loads(str(arrays["params"]))))


def cases() -> list:
    found = []
    for folder in sorted({path.parent for path in FOLDER.glob("*/case*.npz")}):
        known = folder.name in READERS
        for path in sorted(folder.glob("case*.npz")) if known else [folder]:
            found.append(pytest.param(path, id=f"{folder.name}-{path.stem if known else 'no_reader'}"))
    return found


def kept(check: Check, tokens: VisualTokens, counts: list[int]) -> list[list[int]]:
    reduction = check.method.reduce(tokens, counts)
    return [row[valid].tolist() for row, valid in zip(reduction.keep, reduction.valid)]


def test_there_are_cases():
    assert cases(), f"no {FOLDER}/<method>/case*.npz"


@pytest.mark.parametrize("path", cases())
def test_golden(path):
    assert path.is_file(), f"no reader for {path.name}: add tests/readers/{path.name}.py"
    siblings = sorted(path.parent.glob("case*.npz"))
    other_path = siblings[(siblings.index(path) + 1) % len(siblings)]
    checks = load(path)
    assert checks, "the reader checks nothing"
    for check in checks:
        assert kept(check, check.tokens, check.counts) == check.lists, check.method
    for check, other in zip(checks, load(other_path)):
        if check.alone or other.alone:
            continue
        for parts in ([check, other], [other, check]):
            got = kept(check, batch([part.tokens for part in parts]), [n for part in parts for n in part.counts])
            mine = got[: len(check.lists)] if parts[0] is check else got[len(other.lists) :]
            assert mine == check.lists, f"{check.method} in a batch with {other_path.name}"
