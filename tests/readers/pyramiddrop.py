"""Golden cases of PyramidDrop."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from readers._attention import ALONE, in_batch, plain_attention
from torch import Tensor

from prune import VisualTokens, get_method


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    hidden, heads, dim = data["hidden"], params["heads"], params["head_dim"]
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + params["rms_eps"]).rsqrt() * data["norm_weight"]
    angle = data["position_ids"][..., None] / params["rope_base"] ** (torch.arange(0, dim, 2) / dim)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, :, None] for f in (torch.cos, torch.sin))

    def project(name: str) -> Tensor:
        x = (normed @ data[name].T).unflatten(-1, (heads, dim))
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    begin, n = params["image_start"], params["N"]
    attention = plain_attention(project("Wq"), project("Wk"), data["attention_mask"], begin, n, dim**-0.5)
    tokens = VisualTokens(hidden[:, begin : begin + n], entry_attention=attention)
    ratios, stage, total = params["ratios"], params["stage"], params["image_tokens0"]
    falling = all(a > b for a, b in zip(ratios, ratios[1:]))  # the authors' may repeat: a stage that keeps all
    options = {"shares": ratios[1:], "layers": tuple(range(1, len(ratios)))} if falling else {}
    method = get_method("pyramiddrop", **options)
    torch.testing.assert_close(method.score(tokens), data["scores"], atol=1e-7, rtol=1e-5)
    if falling:
        counts = method.counts(total, int(total * ratios[-1]))
        assert abs(counts[stage] - params["keep_num"]) <= 1  # the authors round down

    check = Check(method, tokens, data["keep"], ALONE)
    reduction = method.reduce(in_batch(tokens), [max(1, n - 5), *check.counts])
    assert [row[valid].tolist() for row, valid in zip(reduction.keep, reduction.valid)][1:] == check.lists
    yield check
