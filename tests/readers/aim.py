"""Golden cases of AIM: merging, and every cut of the pruning schedule."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import Budget, Geometry, VisualTokens, get_method
from prune.kernels.bipartite import bipartite_merge
from prune.reducers.aim import Merging, Ranking, halvings, pagerank
from prune.tokens import AttentionInputs


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    yield from {"merge": merge, "prune": prune}[params["kind"]](data, params)


def merge(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    x, keep = data["x"], data["keep"]
    batch, n, _ = x.shape
    metric = data.get("metric", x)
    method = Merging("keys" if "metric" in data else "features", compat=True)
    tokens = VisualTokens(x, tower={"metric": metric[:, :, None]})
    flat, mask = torch.zeros(batch, n, dtype=torch.long), tokens.mask
    target = torch.full_like(flat, keep.shape[1])
    merged = bipartite_merge(metric, flat, target, mask, halvings(n, keep.shape[1]), by_similarity=True)
    assert torch.equal(merged.into, data["origin"].gather(1, data["group"]))
    out = data["out"].gather(1, data["origin"].argsort(1)[..., None].expand_as(data["out"]))
    merges = method.reduce(tokens, [keep.shape[1]] * batch).apply(x)
    torch.testing.assert_close(merges, out, rtol=1e-4, atol=1e-5)
    yield Check(method, tokens, keep)


def prune(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    method = Ranking(params["iters"], params["tau"], compat=True)
    alive = data["attention_mask"]
    bounds = torch.tensor(params["boundaries"])
    column = torch.arange(alive.shape[1]).expand_as(alive)
    visual = (column >= bounds[:, :1]) & (column < bounds[:, 1:2])
    slots = bounds[:, :1] + torch.arange(params["n_vis"])
    for step in range(len(params["layers"])):
        q, k = (data[name][step].transpose(1, 2) for name in "qk")
        inputs = AttentionInputs(
            queries=q,
            keys=k,
            values=k,
            valid=alive,
            scale=q.shape[-1] ** -0.5,
            sample=torch.arange(len(alive)),
            slots=slots.clamp(max=alive.shape[1] - 1),
            text_slots=slots[:, :0],
            text_mask=alive[:, :0],
            last=bounds[:, 2] - 1,
        )
        found = pagerank(inputs, params["iters"], params["tau"], compat=True)
        torch.testing.assert_close(found[alive], data["importance"][step][alive], rtol=2e-3, atol=1e-7)
        after = data["mask_after"][step]
        mask = (alive & visual).gather(1, inputs.slots) & (slots < bounds[:, 1:2])
        left = (after & visual).gather(1, inputs.slots) & mask
        expected = torch.where(left, torch.arange(params["n_vis"]), -1)
        tokens = VisualTokens(torch.zeros(*slots.shape, 2), mask=mask, attention=inputs)
        yield Check(
            method,
            tokens,
            expected,
            "heads and scale differ from case to case; ragged batches are in test_methods_g.py",
        )
        alive = after
    if params["schedule"][-1] == 0 and len(params["layers"]) == 8:
        stages = get_method("aim", merge=1.0).plan(Geometry(params["n_vis"], layers=28), 1)
        assert [stage.site.layer for stage in stages[1:]] == [layer + 1 for layer in params["layers"]]
        assert Budget(keep=1).keep == stages[-1].keep
