"""Golden cases of HiPrune."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.reducers.hiprune import anchors


def received(data: dict[str, Tensor], params: dict, layer: str) -> Tensor:
    """`[B, N]`: mean attention a token receives, from the maps or from queries and keys."""
    if f"attn_{layer}" in data:
        return data[f"attn_{layer}"].mean((1, 2))[:, 1:]
    q, k = data[f"q_{layer}"], data[f"k_{layer}"]
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean((-3, -2))
    if params["has_cls"]:
        return weights[:, 1:]
    return weights.unflatten(0, (-1, params["merge"] ** 2)).mean(-1)[data["reverse_indices"]][None]


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    n, width = params["N"], params["grid_w"]
    scores = {"object": received(data, params, "obj"), "deep": received(data, params, "deep")}
    rescale = 1 if params["has_cls"] else params["patches"]  # the code for Qwen sums over the queries
    torch.testing.assert_close(scores["object"] * rescale, data["shallow_score"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores["deep"] * rescale, data["deep_score"], rtol=1e-5, atol=1e-6)
    place = torch.arange(n)
    rows = len(data["keep"])
    tokens = VisualTokens(
        features=data.get("features", torch.zeros(rows, n, 1)),
        patch=torch.stack([place // width, place % width], -1).expand(rows, n, 2),
        tower=scores,
    )
    budget = params.get("budget_per_item", params.get("budget"))
    anchor, buffer, _ = anchors(tokens, [budget] * rows, params["alpha"], compat=True)
    for row in range(rows):
        assert anchor[row].nonzero()[:, 0].tolist() == sorted(data[f"anchor_{row}"].tolist())
        assert buffer[row].nonzero()[:, 0].tolist() == sorted(data[f"buffer_{row}"].tolist())

    method = get_method("hiprune", alpha=params["alpha"], compat=True)
    if "kept_features" in data:
        kept = method.reduce(tokens, [budget] * rows).apply(data["features"])
        assert torch.equal(kept, data["kept_features"])
    if "keep_exact_budget" not in data:
        yield Check(method, tokens, data["keep"])
        return
    yield Check(method, tokens, data["keep_exact_budget"])
    # The authors subtract 1 instead of excluding, which picks some tokens twice.
    group = (anchor | buffer)[0]
    score = data["deep_score"][0] - group.float()
    picked = group.clone()
    picked[score.topk(budget - int(group.sum())).indices] = True
    assert picked.nonzero()[:, 0].tolist() == data["keep"][0].tolist()
