"""Golden cases of G-Prune."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.reducers.gprune import gprune


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    """The authors always keep newlines and do not count them; here they are text, and no tokens of the method."""
    base, rows, columns = data["base_features"], params["row_num"], params["col_num"]
    grid = data["grid_features_with_newline"].view(rows, columns + 1, -1)[:, :-1].flatten(0, 1)
    places = [
        torch.tensor([[tile, 0, row, column] for row in range(high) for column in range(wide)])
        for tile, (high, wide) in enumerate([(params["base_h"], params["base_w"]), (rows, columns)])
    ]
    tokens = VisualTokens(torch.cat([base, grid])[None], coordinates=torch.cat(places)[None])
    expected = torch.cat([data["keep_base"], data["keep_grid_raster"] + len(base)], 1)
    raster = data["keep_grid_raster"]
    assert torch.equal(raster + raster // columns, data["keep_grid"])

    options = {name: params[name] for name in ("similarity", "temperature", "iterations")}
    score, degree = gprune(tokens.features, tokens.coordinates[..., 0], tokens.mask, **options)
    assert torch.equal(degree[0], torch.cat([data["base_degree"], data["grid_degree"]]))
    torch.testing.assert_close(score[0], torch.cat([data["base_score"], data["grid_score"]]), atol=0, rtol=1e-5)
    yield Check(get_method("gprune", **options), tokens, expected)
