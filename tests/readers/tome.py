"""Golden cases of ToMe: one block, or two in a row with the sizes of the first."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import BlockAttention, VisualTokens, get_method
from prune.kernels.compaction import take


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    left = data["x"].shape[1] - params.get("r_effective", params["r"])
    first = Block(data["metric"], data["x"], data.get("size"), params, left)
    if "metric2" in data:
        first.check(data["merged1"], data["size1"])
        second = Block(data["metric2"], data["merged1"], data["size1"], params, left - params["r"])
        second.check(data["merged"], data["size_out"])
        assert torch.equal(second.group.gather(1, first.group), data["group"])
        yield second.kept()
    else:
        first.check(data["merged"], data["size_out"])
        Block(data["metric"], data["x"], None, params, left).check(data["merged_plain"])
        assert torch.equal(first.group, data["group"])
        torch.testing.assert_close(take(data["merged"], first.group), data["unmerged_back"], rtol=1e-5, atol=1e-6)
        merge, real = first.reduction.merge, first.reduction.merge.weight > 0
        for b, (source, target) in enumerate(zip(data["src"], data["dst"])):
            edges = merge.source[b, real[b]], first.reduction.keep[b].gather(0, merge.slot[b, real[b]])
            assert {*zip(*(x.add(first.prefix).tolist() for x in edges))} == {*zip(source.tolist(), target.tolist())}
        unmerged = without_cls(data["unmerged"], first.prefix)
        assert torch.equal(first.order[:, first.prefix :][:, : unmerged.shape[1]], unmerged)
    assert torch.equal(first.order.sort(1).values, data["keep"])
    yield first.kept()


def without_cls(unmerged: Tensor, prefix: int) -> Tensor:
    """CLS is among the recorded sources, and comes first."""
    return unmerged[:, 1:] if prefix else unmerged


class Block:
    """ToMe in one block; `left` counts prefix tokens. `order` and `group` do so too."""

    def __init__(self, metric: Tensor, x: Tensor, size: Tensor | None, params: dict, left: int):
        self.prefix = p = params["class_token"] + params["distill_token"]
        self.x, batch, n = x, len(x), x.shape[1]
        valid = torch.ones(batch, n, dtype=torch.bool)
        keys = metric[:, :, None]
        block = BlockAttention(keys, keys, keys, valid, None, 1.0, p, params["class_token"])
        sizes = None if size is None else size[:, p:, 0]
        self.tokens = VisualTokens(x[:, p:], sizes=sizes, block=block)
        self.method = get_method("tome")
        self.reduction = self.method.reduce(self.tokens, [left - p] * batch)
        first = torch.arange(p).expand(batch, -1)
        self.order = torch.cat([first, self.reduction.keep + p], 1)
        slots = torch.arange(left).expand(batch, -1)
        merge, group = self.reduction.merge, torch.full((batch, n), -1).scatter(1, self.order, slots)
        for b, real in enumerate(merge.weight > 0):
            group[b, merge.source[b, real] + p] = merge.slot[b, real] + p
        self.group = group

    def check(self, merged: Tensor, size: Tensor | None = None) -> None:
        assert (self.group >= 0).all() and self.reduction.valid.all()
        out = torch.cat([self.x[:, : self.prefix], self.reduction.apply(self.tokens.features)], 1)
        torch.testing.assert_close(out, merged, rtol=1e-5, atol=1e-5)
        if size is not None:
            torch.testing.assert_close(self.reduction.sizes, size[:, self.prefix :, 0], rtol=1e-5, atol=1e-5)

    def kept(self) -> Check:
        return Check(self.method, self.tokens, self.order[:, self.prefix :] - self.prefix, "tokens have a block")
