"""Golden cases of FiCoCo: L (in the decoder) as a method; V (in the encoder) by the functions it shares with L."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import Reduction, VisualTokens, get_method
from prune.kernels import topk_indices
from prune.kernels.compaction import take
from prune.reducers.ficoco import Logits, ficoco_l, importance_v, penalise, recipients
from prune.tokens import AttentionInputs


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    yield from (in_decoder if params["kind"] == "L" else in_encoder)(data, params)


def in_decoder(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    if "prev_q" in data:
        before = given(data["prev_q"], data["prev_k"], data["prev_x"], params["V"] + params["r"])
        yield check(before, params, data["prev_keep"], data["prev_out"])
    tokens = given(data["q"], data["k"], data["x"], params["V"])
    attention = Logits.of(tokens.attention, tokens.mask)
    scores = attention.redundancy(params["g"], compat=True)
    torch.testing.assert_close(scores[:, 1:], data["scores"][:, 1:], rtol=1e-4, atol=1e-4)
    everything = torch.arange(params["V"]).expand_as(scores)
    wanted = data["con_scores"]
    found = attention.correlation(everything, params["a"], compat=True)[:, : wanted.shape[1]]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    merged = attention.correlation(data["merge_indices"], params["a"], compat=True)
    target, weight = recipients(merged, tokens.mask, params["quantile"])
    assert torch.equal(target, data["target_indices"])
    torch.testing.assert_close(weight, shares(data), rtol=1e-3, atol=1e-6)
    yield check(tokens, params, data["keep"], data["out"])


def shares(data: dict[str, Tensor]) -> Tensor:
    """Recorded are shares of a softmax over all tokens."""
    return data["target_probs"] / data["target_probs"].sum(-1, keepdim=True)


def given(q: Tensor, k: Tensor, x: Tensor, visual: int) -> VisualTokens:
    batch, length = x.shape[:2]
    slots = torch.arange(length).expand(batch, -1)
    text = slots[:, visual:]
    queries, keys = q.transpose(1, 2), k.transpose(1, 2)
    inputs = AttentionInputs(
        queries=queries,
        keys=keys,
        values=keys,
        valid=torch.ones_like(slots, dtype=torch.bool),
        scale=q.shape[-1] ** -0.5,
        sample=torch.arange(batch),
        slots=slots[:, :visual],
        text_slots=text,
        text_mask=torch.ones_like(text, dtype=torch.bool),
        last=slots[:, -1],
    )
    return VisualTokens(x[:, :visual], attention=inputs)


def check(tokens: VisualTokens, params: dict, keep: Tensor, out: Tensor) -> Check:
    counts = [keep.shape[1]] * len(keep)
    reduction = ficoco_l(tokens, counts, params["g"], params["a"], params["quantile"], compat=True)
    torch.testing.assert_close(reduction.apply(tokens.features), out, rtol=1e-4, atol=1e-5)
    method = get_method("ficoco", beta=params["g"], gamma=params["a"], quantile=params["quantile"], compat=True)
    return Check(
        method, tokens, keep, "heads and scale differ from case to case; ragged batches are in test_methods_g.py"
    )


def in_encoder(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    """The released arithmetic, whose slots name other tokens than its targets do, from our filter and recipients."""
    method = Released(data, params)
    tokens = VisualTokens(data["hidden"])
    attention = method.attention()
    if "att_score" in data:
        torch.testing.assert_close(attention[0], data["att_score"], rtol=1e-4, atol=1e-5)
    score, spared = method.score()
    assert torch.equal(spared, data["state_out"].isinf())
    torch.testing.assert_close(score[0], data["dst_score_after_penalty"], rtol=1e-4, atol=1e-6)
    rows = take(attention, data["merge_indices"])
    target, weight = recipients(rows, tokens.mask, params["quantile"])
    assert torch.equal(target, data["target_indices"])
    torch.testing.assert_close(weight, shares(data), rtol=1e-4, atol=1e-6)
    total, left = tokens.features.shape[1], tokens.features.shape[1] - params["r"]
    slot = torch.where(target < left, target, target - params["r"]).flatten(1)
    folded = take(tokens.features, data["merge_indices"]).repeat_interleave(target.shape[2], 1)
    folded = folded * weight.flatten(1)[..., None]
    out = take(tokens.features, data["remain_indices"])
    out = out.scatter_add(1, slot[..., None].expand_as(folded), folded)
    size = torch.ones(1, left).scatter_add(1, slot, weight.flatten(1))[..., None]
    torch.testing.assert_close(size, data["out_size"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out / size, data["out"], rtol=1e-4, atol=1e-5)
    assert len(data["keep"][0]) == total - params["r"]
    yield Check(method, tokens, data["keep"], "the encoder's attention is no signal of VisualTokens")


class Released:
    """The choice of one compressed layer of the encoder."""

    def __init__(self, data: dict[str, Tensor], params: dict):
        self.data, self.params = data, params

    def attention(self) -> Tensor:
        q, k = self.data["q"], self.data["k"]
        return (q @ k.mT).mean(0, keepdim=True)

    def score(self) -> tuple[Tensor, Tensor]:
        score = importance_v(self.attention(), self.params["beta"])
        return penalise(score, self.data["state_in"].isinf(), self.params["grid"])

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        first = torch.full((1, 1), torch.inf)
        return Reduction(*topk_indices(torch.cat([first, self.score()[0]], 1), keep, tokens.mask))
