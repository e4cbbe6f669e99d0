"""Golden cases of FlowCut: the schedule inside the encoder, and the cut in the decoder."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from golden_cases import Check
from torch import Tensor

from prune import Reduction, VisualTokens
from prune.kernels import row_attention
from prune.kernels.merging import chosen_indices
from prune.reducers.flowcut import Instructed, schedule
from prune.tokens import AttentionInputs


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
    cls = params["variant"].startswith("clip")
    hidden = data["h0"] if data["h0"].dim() == 3 else data["h0"][None]
    count = len(data["Wq"] if cls else data["Wqkv"])
    layers = [Layer(data, params, number) for number in range(count)]
    target = data["keep"].shape[1]
    final = count - 3 if cls else count - 1
    result = schedule(layers, hidden, target, final, cls, shared=True)
    flows = [flow for flow in result.flows if bool((flow.alive.sum(1) > target).any())]
    names = {"cls": "attention", "sem": "similar", "vl1": "strength", "score": "score", "cum": "total"}
    for number, flow in enumerate(flows):
        for name, ours in names.items():
            if (wanted := data.get(f"L{number}_{name}")) is not None:
                found = getattr(flow, ours)[flow.alive].view(len(hidden), -1)
                torch.testing.assert_close(found, wanted.view_as(found), rtol=1e-3, atol=1e-7)
    if "out_features" in data:
        before = schedule(layers[:-1], hidden, target, final, cls, shared=True)  # LLaVA reads the last layer but one
        out = before.hidden[:, 1:][before.alive].view(len(hidden), target, -1)
        torch.testing.assert_close(out, data["out_features"], rtol=1e-3, atol=1e-5)
    method = Encoder(layers, hidden, final, cls)
    features = hidden[:, 1:] if cls else hidden
    yield Check(method, VisualTokens(features), data["keep"], "the encoder's layers are no signal of VisualTokens")


class Layer:
    """One layer of the recorded encoders: projections alone, or a whole layer."""

    def __init__(self, data: dict[str, Tensor], params: dict, number: int):
        self.weights = {name: x[number] for name, x in data.items() if name.startswith("W")}
        self.heads = params.get("heads", params.get("num_heads"))

    def __call__(self, hidden: Tensor, alive: Tensor) -> tuple[Tensor, ...]:
        w, shape = self.weights, (*hidden.shape[:2], self.heads, -1)
        if "Wqkv" in w:
            q, k, v = (hidden @ w["Wqkv"].T).view(*hidden.shape[:2], 3, self.heads, -1).unbind(2)
            return q, k, v, hidden
        width = hidden.shape[-1:]
        normed = F.layer_norm(hidden, width, eps=1e-5) if "Wo" in w else hidden
        q, k, v = ((normed @ w[name].T).view(shape) for name in ("Wq", "Wk", "Wv"))
        if "Wo" in w:
            weights = row_attention(q, k, q.shape[-1] ** -0.5, alive[:, None])
            hidden = hidden + (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2) @ w["Wo"].T
            inner = F.layer_norm(hidden, width, eps=1e-5) @ w["W1"].T
            hidden = hidden + (inner * torch.sigmoid(1.702 * inner)) @ w["W2"].T
        return q, k, v, hidden


class Encoder:
    """The schedule as a method."""

    def __init__(self, layers: list[Layer], hidden: Tensor, final: int, cls: bool):
        self.given = layers, hidden
        self.final, self.cls = final, cls

    def reduce(self, tokens: VisualTokens, keep: list[int]) -> Reduction:
        result = schedule(*self.given, keep[0], self.final, self.cls, shared=True)
        return Reduction(*chosen_indices(result.alive, keep[0]))
