"""Golden cases of VisPruner, and of FasterVLM, which is VisPruner with `important_ratio` 1."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.reducers.vispruner import vispruner

DROP = 8
"""Of the authors' code, for tiles of every size."""


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    attention, features = data["attn_cls"].mean(1), data["features"]
    torch.testing.assert_close(attention, data["scores"])
    tokens = VisualTokens(features, tower={"attention": attention, "features": features})
    ratio, budget = params["important_ratio"], params["visual_token_num"]
    found = vispruner(attention, features, tokens.tile, tokens.mask, [budget] * len(features), ratio, DROP)
    for rank, order in zip(found, (data["important"], data["diverse_in_order"])):
        assert torch.equal(rank.argsort(1)[:, : order.shape[1]], order)
        assert ((rank < params["N"]).sum(1) == order.shape[1]).all()
    yield Check(get_method("vispruner", important_ratio=ratio, drop=DROP), tokens, data["keep"])
    if ratio == 1:
        yield Check(get_method("fastervlm"), tokens, data["keep"])
