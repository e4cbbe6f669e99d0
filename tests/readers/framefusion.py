"""Golden cases of FrameFusion: a merging step, and the cut after it."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens
from prune.reducers.framefusion import Attended, Fusing, fuse


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    span = (data["patch_type"] >= 0).nonzero()[:, 0]
    begin, n = int(span[0]), len(span)
    place, frame = data["patch_type"][span], torch.arange(n) // params["P"]
    tokens = VisualTokens(
        features=data["hidden"][None, span],
        coordinates=torch.stack([place * 0, frame, place * 0, place], 1)[None],
        memory=Forgetful(),
    )
    survivors = data["keep"][0]
    left = (survivors >= begin) & (survivors < begin + n)
    expected = survivors[left][None] - begin
    count = expected.shape[1]
    topk = params["branch"] == "topk"
    assert count == n - int(params["sparsity_upper_bound"] * n) or not topk
    # Either branch follows from the threshold alone and the least count, not from the count asked for.
    reduction = fuse(tokens, [n], params["similarity_lower_bound"], torch.tensor([count if topk else 0]))
    assert torch.equal(reduction.keep[reduction.valid], expected[0])
    merged = reduction.apply(tokens.features)[reduction.valid]
    torch.testing.assert_close(merged, data["merged"][left], rtol=1e-4, atol=1e-5)
    yield Check(Fusing(params["similarity_lower_bound"], count / n if topk else 0.0), tokens, expected)

    if "prune_attn" in data:
        attention = data["prune_attn"].mean(1)[:, 0, left]
        pruned = VisualTokens(merged[None], last_token_attention=attention)
        after = data["prune_pos"]
        kept = torch.searchsorted(survivors[left], after[(after >= begin) & (after < begin + n)])
        yield Check(Attended(), pruned, kept[None])


class Forgetful(dict):
    """A memory that a case leaves as it was."""

    def __setitem__(self, name, value):
        pass
