"""Golden cases of VisionZip. The authors keep CLS as one of the dominant tokens; we have no place for it."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.kernels.tiles import tile_groups
from prune.reducers.visionzip import nearest_target, split


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    hidden, few = data["hidden"][:, 1:], params["contextual"]
    rows, n, _ = hidden.shape
    attention = data["attn_cls"].sum(1)[:, 1:]
    torch.testing.assert_close(attention, data["scores"])
    tokens = VisualTokens(hidden, tower={"attention": attention, "keys": data["metric"][:, 1:, None]})
    budget = params["dominant_patches"] + few

    group = tile_groups(tokens.tile, tokens.mask)
    dominant, target = split(attention, group, tokens.mask, [budget] * rows, few)
    rest = ~dominant & ~target
    home = nearest_target(data["metric"][:, 1:], rest, target, group, budget)
    for row in range(rows):
        assert torch.equal(dominant[row].nonzero()[:, 0], data["keep"][row])
        assert torch.equal(target[row].nonzero()[:, 0], data["context_target"][row])
        joined = data["context_target"][row][data["merge_assign"][row]]
        assert torch.equal(home[row][data["merge_source"][row]], joined)

    method = get_method("visionzip", contextual=few)
    reduction = method.reduce(tokens, [budget] * rows)
    merged = reduction.apply(hidden)
    for name, indices in (("dominant_tokens", data["keep"]), ("contextual_tokens", data["context_target"])):
        slots = torch.searchsorted(reduction.keep, indices)
        want = data[name][:, data[name].shape[1] - indices.shape[1] :]  # without CLS
        torch.testing.assert_close(merged.gather(1, slots[..., None].expand_as(want)), want)
    yield Check(method, tokens, torch.cat([data["keep"], data["context_target"]], 1).sort(1).values)
