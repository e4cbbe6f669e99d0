"""Golden cases of FiCoCo: L (in the decoder) as a method; V (in the encoder) as the released code has it."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import Reduction, VisualTokens, get_method
from prune.kernels.recipients import recipients
from prune.reducers.ficoco import Logits, ficoco_l
from prune.reducers.ficoco_v import released_v
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
    """One compressed layer of the released code."""
    method = Released(data, params)
    if "att_score" in data:
        torch.testing.assert_close(method.attention(), data["att_score"], rtol=1e-4, atol=1e-5)
    found = method.run(data["hidden"], params["r"])
    assert torch.equal(found.spared, data["state_out"][0].isinf())
    alive = found.score.shape[0]
    hit = (found.spared & ~data["state_in"][0].isinf())[:alive].nonzero()[:, 0]
    assert set(data["penalised"].tolist()) >= set(hit.tolist())
    torch.testing.assert_close(found.score, data["dst_score_after_penalty"], rtol=1e-4, atol=1e-6)
    order = torch.cat([found.merged, found.remain])
    assert torch.equal(order, data["order_indices"][0])
    assert torch.equal(found.merged, data["merge_indices"][0]) and torch.equal(found.remain, data["remain_indices"][0])
    assert torch.equal(found.target, data["target_indices"][0])
    torch.testing.assert_close(found.share, shares(data)[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.size, data["out_size"][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.out, data["out"][0], rtol=1e-4, atol=1e-5)
    yield Check(method, VisualTokens(data["hidden"]), data["keep"], "the released code is for one image")


class Released:
    """The choice of one compressed layer of the encoder."""

    def __init__(self, data: dict[str, Tensor], params: dict):
        self.data, self.params = data, params

    def attention(self) -> Tensor:
        return (self.data["q"] @ self.data["k"].mT).mean(0)

    def run(self, hidden: Tensor, remove: int):
        spared, params = self.data["state_in"][0].isinf(), self.params
        return released_v(
            self.attention(), hidden[0], spared, remove, params["grid"], params["beta"], params["quantile"]
        )

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        remain = self.run(tokens.features, tokens.features.shape[1] - keep[0]).remain
        return Reduction(remain.sort().values[None])
