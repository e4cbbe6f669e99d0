"""Golden cases of VFlowOpt."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.kernels.rows import important_attention
from prune.reducers.vflowopt import PRESETS, VFlowOpt, entropy, stage_counts


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    yield from KINDS[params["kind"]](data, params)


def importance(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    attention = data["attn"]
    # The softmax of its logarithm over unit vectors as keys is the recorded attention, which may hold zeros.
    q = attention.clamp(min=1e-38).log().transpose(1, 2)
    k = torch.eye(attention.shape[-1])[None, :, None].expand_as(q)
    attended = important_attention(q, k, 1.0, params["t"])
    if "received" in data:
        assert torch.equal(data["received"] > params["t"] / attention.shape[-1], data["important_mask"])
        attended_chunked = important_attention(q, k, 1.0, params["t"], chunk=13)
        torch.testing.assert_close(attended, attended_chunked, rtol=1e-5, atol=1e-8)
    else:  # no important row: NaN there, the attention received here
        assert data["importance"].isnan().all()
        torch.testing.assert_close(attended, attention.mean((1, 2)), rtol=1e-4, atol=1e-7)
        yield Check(get_method("vflowopt", recycle=False), tokens(attended, attended), data["keep"])
        return
    pixels = F.unfold(data["pixel_values"], params["patch"], stride=params["patch"]).transpose(1, 2)
    torch.testing.assert_close(entropy(pixels), data["entropy"], rtol=1e-5, atol=1e-5)
    method = get_method("vflowopt", recycle=False, alpha=params["alpha"])
    given = tokens(attended, attended)
    given.tower["pixels"] = pixels
    torch.testing.assert_close(method.importance(given), data["importance"], rtol=1e-4, atol=1e-7)
    given.memory = Forgetful()
    yield Check(method, given, data["keep"])


def progressive(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    side, width = params["G"], params["local_w"]
    base, local = torch.arange(side**2), torch.arange(params["L"] - side**2)
    lines = local % width == width - 1
    places = torch.cat(
        [
            torch.stack([base * 0, base * 0, base // side, base % side], 1),
            torch.stack([local * 0 + 1, local * 0, local // width, local % width], 1).masked_fill(lines[:, None], -1),
        ]
    )
    given = tokens(data["aligned_features"][None], data["aligned_importance"][None], places[None])
    method = Nominal(cell=params["grid_side"], compat=True, newlines=True)
    method.nominal = {params["kept_after_stage1"]: params["nominal_budget"]}
    reduction = method.reduce(given, [len(data["keep"][0])])
    merged = reduction.apply(given.features)[reduction.valid]
    torch.testing.assert_close(merged, data["out"], rtol=1e-4, atol=1e-5)
    kept = method.importance(given).gather(1, reduction.keep)[reduction.valid]
    torch.testing.assert_close(kept, data["out_importance"])
    yield Check(method, given, data["keep"])
    later = get_method("vflowopt", recycle=False, newlines=True)
    for before, after in (("keep", "keep_stage2"), ("keep_stage2", "keep_stage3")):
        survivors = data[before][0]
        carried = tokens(data["aligned_features"][None, survivors], data["aligned_importance"][None, survivors])
        carried.index = survivors[None]
        yield Check(later, carried, torch.searchsorted(survivors, data[after]))
    if params["R"] in [list(shares) for _, shares in PRESETS]:
        counts = stage_counts(params["L"], round_down(params["L"], params["R"]))
        assert counts[0] == params["nominal_budget"]


def topk(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    features, scores = data["tile_features"], data["tile_importance"]
    if params["kind"] == "topk_video":
        features, scores = pooled(features, params["G"]), pooled(scores[..., None], params["G"])[..., 0]
        features, scores = features.flatten(0, 1)[None], scores.flatten()[None]
        newline = torch.ones_like(scores[:, :1])  # the separator of the video, importance 1
        features, scores = torch.cat([features, features[:, :1]], 1), torch.cat([scores, newline], 1)
    yield Check(get_method("vflowopt", recycle=False, newlines=True), tokens(features, scores), data["keep"])


def pooled(x: Tensor, side: int) -> Tensor:
    """Frames `[F, side * side, D]` at half the resolution, as the code for videos makes them."""
    grid = x.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, size=(-(-side // 2),) * 2, mode="bilinear").flatten(2).transpose(1, 2)


KINDS = {
    "importance": importance,
    "prune_recycle_progressive": progressive,
    "topk_video": topk,
    "topk_multi_image": topk,
}


class Nominal(VFlowOpt):
    """The counts of the recorded cases are what was kept; the code starts from the nominal ones."""

    def reduce(self, tokens, keep):
        return super().reduce(tokens, [self.nominal.get(count, count) for count in keep])


class Forgetful(dict):
    """A memory that a case leaves as it was."""

    def __setitem__(self, name, value):
        pass


def tokens(features: Tensor, scores: Tensor, places: Tensor | None = None) -> VisualTokens:
    features = features if features.dim() == 3 else features[..., None]
    if places is None:
        place = torch.arange(scores.shape[1]).expand_as(scores)
        places = torch.stack([place * 0, place * 0, place * 0, place], -1)
    pixels = torch.zeros(*scores.shape, 3 * 14 * 14)
    return VisualTokens(features, coordinates=places, tower={"attention": scores, "pixels": pixels})


def round_down(n: int, shares: list[float]) -> int:
    for share in shares:
        n -= round(n * (1 - share))
    return n
