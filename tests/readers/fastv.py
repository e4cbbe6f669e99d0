"""Golden cases of FastV."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import Budget, Geometry, VisualTokens, get_method


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    image = slice(params["image_start"], params["image_start"] + params["N"])
    attention = data["attn_last"].mean(1)[:, image]
    tokens = VisualTokens(features=data["hidden"][:, image], last_token_attention=attention)
    method = get_method("fastv")
    torch.testing.assert_close(method.score(tokens), data["scores"], atol=1e-6, rtol=0)
    kept = method.kept(params["N"], Budget(ratio=params["prune_ratio_r"]), Geometry(params["N"]))
    near = params["N"] * (1 - params["prune_ratio_r"])
    assert kept == params["keep_num"] or abs(near % 1 - 0.5) < 1e-9  # binary fractions turn a tie
    yield Check(method, tokens, data["keep"])
