"""Golden cases of DivPrune."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import Budget, Geometry, VisualTokens, get_method
from prune.kernels import farthest_point


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    order, valid = farthest_point(data["features"], params["k"])
    assert valid.all() and torch.equal(order, data["order"])
    kept = Budget(ratio=1 - params["ratio"]).solve(Geometry(params["N"]), None)
    assert kept == params["k"] or abs(params["ratio"] * params["N"] % 1 - 0.5) < 1e-9  # binary fractions turn a tie
    yield Check(get_method("divprune"), VisualTokens(data["features"]), data["keep"])
