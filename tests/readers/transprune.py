"""Golden cases of TransPrune: every cut is a check of its own, with what it reads made from the recorded tensors."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.reducers.transprune import stage_counts, text_attention, transition_score, transition_variation
from prune.tokens import AttentionInputs


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    begin, text = params["n_sys"], params["n_txt"]
    alive = torch.arange(params["n_img"])  # original numbers of the tokens alive, whole columns beside
    measured, seen = {}, []
    method = get_method("transprune", compat=True)
    for layer in params["layer_list"]:
        measured[layer] = measure(data, layer)
        columns = torch.cat([torch.arange(begin), begin + alive, begin + params["n_img"] + torch.arange(text)])
        seen.append((layer, alive))
        ttv = (measured[layer][0][..., 0::2] * (1 - measured[layer][0][..., 1::2]).exp() / measured[layer][1]).sum(-1)
        torch.testing.assert_close(ttv[: len(columns)], data[f"l{layer}_ttv"], rtol=1e-4, atol=1e-7)
        if layer not in params["prune_list"]:
            continue
        stage = params["prune_list"].index(layer)
        span = slice(begin, begin + len(alive))
        rows = [measured[n][0][begin + torch.searchsorted(then, alive)] for n, then in seen]
        tokens = VisualTokens(
            features=data[f"p{stage}_hidden"][None, span],
            index=alive[None],
            transition=torch.stack(rows, 1)[None],
            transition_sums=torch.stack([measured[n][1] for n, _ in seen])[None],
            entry_attention=inputs(data, params, stage, span),
        )
        iga = text_attention(tokens.entry_attention)[0]
        torch.testing.assert_close(iga / iga.sum(), data[f"p{stage}_iga"], rtol=1e-4, atol=1e-7)
        total = transition_variation(tokens, compat=True)[0]
        torch.testing.assert_close(total / total.sum(), data[f"p{stage}_ttv_norm"], rtol=1e-4, atol=1e-7)
        score = transition_score(tokens, 0.5, compat=True)[0]
        torch.testing.assert_close(2 * score, data[f"p{stage}_score"], rtol=1e-4, atol=1e-7)
        yield Check(
            method,
            tokens,
            data[f"p{stage}_keep_local"][None],
            "heads and scale differ from case to case; ragged batches are in test_methods_g.py",
        )
        alive = alive[data[f"p{stage}_keep_local"]]
        assert torch.equal(alive, data[f"p{stage}_keep"])
    assert torch.equal(alive, data["keep"][0])
    if params["ratios"] == [0.875, 0.625, 0.125]:
        counts = [len(data[f"p{stage}_keep"]) for stage in range(3)]
        assert list(stage_counts(params["n_img"], counts[-1])) == counts


def measure(data: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """What `prune.adapters.transition` measures: `[S, 4]`, and the sums `[2]`."""
    found = []
    for module in ("attn", "ffn"):
        before, after = data[f"l{layer}_{module}_in"], data[f"l{layer}_{module}_out"]
        found += [after.norm(dim=-1) / before.norm(dim=-1), F.cosine_similarity(before, after, dim=-1)]
    measured = torch.stack(found, -1)
    return measured, (1 - measured[:, 1::2]).exp().sum(0)


def inputs(data: dict[str, Tensor], params: dict, stage: int, span: slice) -> AttentionInputs:
    """Queries and keys of the layer behind the cut, after RMS norm and RoPE."""
    hidden, heads = data[f"p{stage}_hidden"], params["H"]
    length, width = hidden.shape
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + params["rms_eps"]).rsqrt() * data[f"p{stage}_lnw"]
    half = width // heads // 2
    angle = torch.arange(length)[:, None] / params["rope_theta"] ** (torch.arange(half) / half)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def project(name: str) -> Tensor:
        x = (normed @ data[f"p{stage}_{name}"].T).view(length, heads, -1)
        return (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin)[None]

    text = torch.arange(span.stop, length)[None]
    return AttentionInputs(
        queries=project("Wq"),
        keys=project("Wk"),
        values=project("Wk"),
        valid=torch.ones(1, length, dtype=torch.bool),
        scale=(width // heads) ** -0.5,
        sample=torch.zeros(1, dtype=torch.long),
        slots=torch.arange(span.start, span.stop)[None],
        text_slots=text,
        text_mask=torch.ones_like(text, dtype=torch.bool),
        last=torch.tensor([length - 1]),
    )
