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
    assert Budget(ratio=1 - params["ratio"]).solve(Geometry(params["N"]), None) == params["k"]
    yield Check(get_method("divprune"), VisualTokens(data["features"]), data["keep"])
