"""Golden cases of CDPruner."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.kernels.dpp import dpp_map
from prune.reducers.cdpruner import text_relevance


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    rows, k = params["batch"], params["visual_token_num"]
    text = data["text_embeds"].expand(rows, -1, -1)
    tokens = VisualTokens(
        features=data["features"],
        inputs=data["image_embeds"],
        text_inputs=text,
        text_mask=torch.ones(text.shape[:2], dtype=torch.bool),
    )
    quality = text_relevance(tokens, negate=True, joint=True)
    torch.testing.assert_close(quality, data["relevance"], atol=1e-6, rtol=1e-5)
    order, valid = dpp_map(tokens.features, quality, k)
    assert valid.all() and torch.equal(order, data["order"])
    alone = "" if rows == 1 else "relevance is scaled over the authors' whole batch"
    yield Check(get_method("cdpruner", negate=True, joint=rows > 1), tokens, data["keep"], alone)
