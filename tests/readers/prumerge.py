"""Golden cases of PruMerge and PruMerge+. A batch of the authors' images is to us one image of as many tiles."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    images, n = params["batch"], params["N"]
    logits = (data["key"] @ data["query_cls"][..., None])[..., 0] * params["C"] ** -0.5
    attention = logits.softmax(-1)[:, 1:]
    torch.testing.assert_close(attention, data["scores"])
    join = lambda x: x.flatten(0, 1)[None]  # noqa: E731
    tokens = VisualTokens(
        join(data["features"][:, 1:]),
        tile=join(torch.arange(images)[:, None].expand(images, n)),
        tower={"attention": join(attention), "keys": join(data["key"][:, 1:])[:, :, None]},
    )
    options = {"variant": "plus" if params["function"].endswith("plus") else "base", "adaptive": params["adaptive"]}
    if options == {"variant": "plus", "adaptive": False}:
        options["ratio"] = params["reduction_ratio"]
    method = get_method("prumerge", compat=True, neighbours=params["merge_k"], **options)

    # The sum of what is dropped goes where the most attended of it was.
    dropped = attention.scatter(1, data["keep"], -1.0)
    total = dropped.argmax(1, keepdim=True)
    expected = torch.cat([data["keep"], total], 1).sort(1).values
    shifted = expected + torch.arange(images)[:, None] * n
    count = shifted.numel()
    reduction = method.reduce(tokens, [images * (n - 1) if params["adaptive"] else count])
    assert torch.equal(reduction.keep[reduction.valid], shifted.flatten())
    if len(data["order"][0]) == len(data["keep"][0]):  # else the code kept some tokens twice
        merged = reduction.apply(tokens.features)[0]
        slots = torch.cat([data["order"], total], 1)
        for image in range(images):
            at = torch.searchsorted(shifted.flatten(), slots[image] + image * n)
            torch.testing.assert_close(merged[at], data["merged"][image], rtol=1e-4, atol=1e-5)
    yield Check(method, tokens, shifted.flatten()[None])
