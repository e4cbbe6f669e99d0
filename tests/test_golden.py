"""Kept tokens equal what the authors' own code keeps, on the recorded cases, alone and in a ragged batch.

The cases lie in `tests/golden/<method>/case*.npz`, or in the folder named by PRUNE_GOLDEN. A folder without a reader
below is a failure, not a skip. A new method adds one reader: a generator of `Check`s for one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prune import Budget, Geometry, Method, VisualTokens, get_method
from prune.kernels import farthest_point, topk_indices
from prune.reducers.dart import key_norm, set_order

FOLDER = Path(os.environ.get("PRUNE_GOLDEN", Path(__file__).parent / "golden"))


@dataclass
class Check:
    """`method` must keep `expected` `[B, K]` of `tokens`."""

    method: Method
    tokens: VisualTokens
    expected: Tensor


def read_dart(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    start, stop = params["image_start"], params["image_start"] + params["image_len"]
    keys = data["k_states"].transpose(1, 2)
    columns = torch.arange(params["seq_len"])[None]
    tokens = VisualTokens(
        features=data["hidden"][:, start:stop],
        columns=columns[:, start:stop],
        keys=keys[:, start:stop],
        normed_features=data["last_layer_state"][:, start:stop],
        text_features=data["hidden"][:, stop:],
        text_mask=torch.ones_like(columns[:, stop:], dtype=torch.bool),
        text_columns=columns[:, stop:],
        text_keys=keys[:, stop:],
        normed_text=data["last_layer_state"][:, stop:],
    )
    norm, text_norm = key_norm(tokens.keys), key_norm(tokens.text_keys)
    image, _ = topk_indices(norm, params["pivot_image"])
    text, _ = topk_indices(text_norm, params["pivot_text"])
    assert torch.equal(image[0], data["image_pivots"].sort().values)
    pivots = torch.cat([tokens.columns.gather(1, image), tokens.text_columns.gather(1, text)], 1)
    norms = torch.cat([norm.gather(1, image), text_norm.gather(1, text)], 1)
    order = set_order(pivots, norms, torch.ones_like(pivots, dtype=torch.bool), image.shape[1])
    assert torch.equal(pivots.gather(1, order)[0], data["pivot_order"])

    options = {"image_pivots": params["pivot_image"], "text_pivots": params["pivot_text"]}
    yield Check(get_method("dart", pivot_order="authors", **options), tokens, data["keep"])
    yield Check(get_method("dart", pivot_order="sorted", **options), tokens, data["keep_sorted_order"])


def read_fastv(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    image = slice(params["image_start"], params["image_start"] + params["N"])
    attention = data["attn_last"].mean(1)[:, image]
    tokens = VisualTokens(features=data["hidden"][:, image], last_token_attention=attention)
    method = get_method("fastv")
    torch.testing.assert_close(method.score(tokens), data["scores"], atol=1e-6, rtol=0)
    assert method.kept(params["N"], Budget(ratio=params["prune_ratio_r"]), Geometry(params["N"])) == params["keep_num"]
    yield Check(method, tokens, data["keep"])


def read_divprune(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    order, valid = farthest_point(data["features"], params["k"])
    assert valid.all() and torch.equal(order, data["order"])
    assert Budget(ratio=1 - params["ratio"]).solve(Geometry(params["N"]), None) == params["k"]
    yield Check(get_method("divprune"), VisualTokens(data["features"]), data["keep"])


Reader = Callable[[dict[str, Tensor], dict], Iterator[Check]]
READERS: dict[str, Reader] = {"dart": read_dart, "fastv": read_fastv, "divprune": read_divprune}


def load(path: Path) -> list[Check]:
    with np.load(path, allow_pickle=False) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "params"}
        return list(READERS[path.parent.name](data, json.loads(str(arrays["params"]))))


def cases() -> list:
    found = []
    for folder in sorted({path.parent for path in FOLDER.glob("*/case*.npz")}):
        known = folder.name in READERS
        for path in sorted(folder.glob("case*.npz")) if known else [folder]:
            found.append(pytest.param(path, id=f"{folder.name}-{path.stem if known else 'no_reader'}"))
    return found


def batch(parts: list[VisualTokens]) -> VisualTokens:
    """The rows of all parts in one batch: tokens padded with NaN or nonsense, channels (of other sizes) with zeros."""
    merged = {}
    for name in (f.name for f in fields(VisualTokens)):
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            continue
        sizes = [max(value.shape[d] for value in values) for d in range(1, values[0].dim())]
        rows = []
        for value in values:
            filler = False if value.dtype == torch.bool else float("nan") if value.is_floating_point() else -5
            padded = value.new_full((len(value), *sizes), filler)
            padded[:, : value.shape[1]] = 0
            padded[tuple(slice(n) for n in value.shape)] = value
            rows.append(padded)
        merged[name] = torch.cat(rows)
    return VisualTokens(**merged)


def kept(check: Check, tokens: VisualTokens, counts: list[int]) -> list[list[int]]:
    reduction = check.method.reduce(tokens, counts)
    return [row[valid].tolist() for row, valid in zip(reduction.keep, reduction.valid)]


def test_there_are_cases():
    assert cases(), f"no {FOLDER}/<method>/case*.npz"


@pytest.mark.parametrize("path", cases())
def test_golden(path):
    assert path.is_file(), f"no reader for {path.name}: add one to READERS in {__file__}"
    siblings = sorted(path.parent.glob("case*.npz"))
    other_path = siblings[(siblings.index(path) + 1) % len(siblings)]
    for check, other in zip(load(path), load(other_path)):
        rows, count = check.expected.shape
        assert kept(check, check.tokens, [count] * rows) == check.expected.tolist(), check.method

        more, other_count = other.expected.shape
        for parts, counts in (
            ([check, other], [count] * rows + [other_count] * more),
            ([other, check], [other_count] * more + [count] * rows),
        ):
            got = kept(check, batch([part.tokens for part in parts]), counts)
            mine = got[:rows] if parts[0] is check else got[more:]
            assert mine == check.expected.tolist(), f"{check.method} in a batch with {other_path.name}"
