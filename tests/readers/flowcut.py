"""Golden cases of FlowCut: the schedule inside the encoder, and the cut in the decoder."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from golden_cases import Check
from torch import Tensor

from prune import Reduction, VisualTokens
from prune.kernels import row_attention
from prune.kernels.compaction import take
from prune.reducers.flowcut import Flow, Flowing, Instructed, observe
from prune.tokens import AttentionInputs, BlockAttention


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    yield from (in_decoder if "q" in data else in_encoder)(data, params)


def in_decoder(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    length = data["q"].shape[2]
    slot = torch.arange(length)
    for item, expected in zip(params.get("pruned_items", [0]), data["keep"]):
        first, count, end = (params[name][item] for name in ("visual_pos", "visual_num", "last_instruct_pos"))
        inputs = AttentionInputs(
            queries=data["q"].transpose(1, 2),
            keys=data["k"].transpose(1, 2),
            values=data["v"].transpose(1, 2),
            valid=slot < torch.tensor(params["last_instruct_pos"])[:, None],
            scale=params["head_dim"] ** -0.5,
            sample=torch.tensor([item]),
            slots=slot[None, first : first + count],
            text_slots=slot[None, first + count : end],
            text_mask=torch.ones(1, end - first - count, dtype=torch.bool),
            last=torch.tensor(params["last_instruct_pos"]) - 1,
        )
        tokens = VisualTokens(torch.zeros(1, count, 2), attention=inputs)
        score, wanted = Instructed().score(tokens), data[f"score_{item}"]
        torch.testing.assert_close(score / score.sum(), wanted / wanted.sum(), rtol=1e-4, atol=1e-8)
        yield Check(
            Instructed(),
            tokens,
            expected[None],
            "heads and scale differ from case to case; ragged batches are in test_methods_g.py",
        )


def in_encoder(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    encoder = Encoder(data, params)
    target = data["keep"].shape[1]
    steps = encoder.run(target)
    scored = [step for step in steps if step.block.queries.shape[1] - step.block.prefix > target]
    for number, step in enumerate(scored):
        flow = vars(step.flow) | {"total": step.total}
        for name, ours in NAMES.items():
            if name == "sem" and not encoder.prefix:
                continue  # the code for Qwen2-VL computes it, and does not use it
            if (wanted := data.get(f"L{number}_{name}")) is not None:
                torch.testing.assert_close(flow[ours], wanted.view_as(flow[ours]), rtol=1e-3, atol=1e-7)
    cuts = [step.kept for step in scored if step.left % 2 == 0]
    for number, kept in enumerate(cuts):
        if (wanted := data.get(f"P{number}_local_keep")) is not None:
            assert torch.equal(kept, wanted.view_as(kept))
    if encoder.prefix and "out_features" in data:  # without CLS it would be the merger's input
        torch.testing.assert_close(encoder.before_last[:, 1:], data["out_features"], rtol=1e-3, atol=1e-5)
    features = data["h0"] if data["h0"].dim() == 3 else data["h0"][None]
    tokens = VisualTokens(features[:, encoder.prefix :])
    yield Check(encoder, tokens, data["keep"], "the encoder's layers are no signal of VisualTokens")


NAMES = {"cls": "attention", "sem": "similar", "vl1": "strength", "score": "score", "cum": "total"}


class Layer:
    """One layer of the recorded encoders: projections alone, or a whole layer."""

    def __init__(self, data: dict[str, Tensor], params: dict, number: int):
        self.weights = {name: x[number] for name, x in data.items() if name.startswith("W")}
        self.heads = params.get("heads", params.get("num_heads"))

    def __call__(self, hidden: Tensor) -> tuple[Tensor, ...]:
        w, shape = self.weights, (*hidden.shape[:2], self.heads, -1)
        if "Wqkv" in w:
            q, k, v = (hidden @ w["Wqkv"].T).view(*hidden.shape[:2], 3, self.heads, -1).unbind(2)
            return q, k, v, hidden
        width = hidden.shape[-1:]
        normed = F.layer_norm(hidden, width, eps=1e-5) if "Wo" in w else hidden
        q, k, v = ((normed @ w[name].T).view(shape) for name in ("Wq", "Wk", "Wv"))
        if "Wo" in w:
            weights = row_attention(q, k, q.shape[-1] ** -0.5)
            hidden = hidden + (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2) @ w["Wo"].T
            inner = F.layer_norm(hidden, width, eps=1e-5) @ w["W1"].T
            hidden = hidden + (inner * torch.sigmoid(1.702 * inner)) @ w["W2"].T
        return q, k, v, hidden


@dataclass
class Step:
    """What happened after one layer."""

    block: BlockAttention
    left: int
    flow: Flow
    total: Tensor
    kept: Tensor


class Encoder:
    """A recorded encoder with FlowCut's steps after its layers, as a method."""

    def __init__(self, data: dict[str, Tensor], params: dict):
        self.prefix = int(params["variant"].startswith("clip"))
        count = len(data["Wq"] if self.prefix else data["Wqkv"])
        self.layers = [Layer(data, params, number) for number in range(count)]
        self.final = count - 3 if self.prefix else count - 1
        self.hidden = data["h0"] if data["h0"].dim() == 3 else data["h0"][None]

    def run(self, target: int) -> list[Step]:
        """All rows lose the same number, so that the survivors are one tensor."""
        hidden, memory, steps = self.hidden, {}, []
        n = hidden.shape[1] - self.prefix
        self.index = torch.arange(n).expand(len(hidden), -1)
        for number, layer in enumerate(self.layers):
            q, k, v, hidden = layer(hidden)
            if number == len(self.layers) - 2:  # what LLaVA reads
                self.before_last = hidden
            left, n = self.final - number, hidden.shape[1] - self.prefix
            if left < 0:
                continue
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
            block = BlockAttention(q, k, v, valid, None, q.shape[-1] ** -0.5, self.prefix, bool(self.prefix))
            tokens = VisualTokens(hidden[:, self.prefix :], index=self.index, block=block, memory=memory)
            step = Flowing(target, left, similar=bool(self.prefix), shared=True)
            reduction = step.reduce(tokens, [n if left else target] * len(hidden))
            kept = reduction.keep[:, : int(reduction.valid[0].sum())]
            assert reduction.valid.sum() == kept.numel()
            steps.append(Step(block, left, observe(block, tokens.mask, step.similar), memory["flowcut"], kept))
            self.index = self.index.gather(1, kept)
            hidden = torch.cat([hidden[:, : self.prefix], take(tokens.features, kept)], 1)
        return steps

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        self.run(keep[0])
        return Reduction(self.index)
