"""Golden cases of SparseVLM: one stage each, or (case 7) three."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from readers._attention import ALONE, in_batch, plain_attention
from torch import Tensor

from prune import VisualTokens, get_method
from prune.kernels import topk_mask
from prune.kernels.cluster import density_peaks
from prune.reducers.sparsevlm import RATERS, SparseVLM, corrected_score, rater_attention, rater_scores

DIM = 128  # of the rotary embedding of version 2.0


class MoreClusters(SparseVLM):
    """Some counts can be made in two ways; this takes one cluster more and one other token less."""

    @staticmethod
    def split(n: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        direct, _, clusters = SparseVLM.split(n, keep)
        return direct - 1, (0.3 * (n - direct + 1).double()).long() + 1, clusters + 1


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    begin, n, text = params["image_start"], params["N"], params["text_tokens"]
    version = params["version"]
    embeds = data["embeds0"][None]
    memory: dict[str, Tensor] = {}
    method = get_method("sparsevlm", version=version)
    if "rater_scores" in data:
        everything = [torch.ones(1, count, dtype=torch.bool) for count in (n, text)]
        visual, words = embeds[:, begin : begin + n], embeds[:, begin + n :]
        share = rater_scores(visual, everything[0], words, everything[1])
        torch.testing.assert_close(share[0], data["rater_scores"], atol=1e-7, rtol=1e-5)

    for stage in [""] if "hidden" in data else ["s0_", "s1_", "s2_"]:
        found = {name.removeprefix(stage): value for name, value in data.items() if name.startswith(stage)}
        hidden, rows = found["hidden"], found["attn_text_vis"]
        n = rows.shape[2]
        tokens = VisualTokens(
            features=hidden[None, begin : begin + n],
            columns=torch.arange(begin, begin + n)[None],
            text_columns=torch.arange(begin + n, len(hidden))[None],
            text_mask=torch.ones(1, text, dtype=torch.bool),
            attention=that_gives(rows, begin, len(hidden)),
            memory=memory,
        )
        if not memory:
            tokens.inputs, tokens.text_inputs = embeds[:, begin : begin + n], embeds[:, begin + n :]
        else:
            tokens.text_columns = tokens.text_columns + params["N"] - n  # position ids of the first stage
        raters = method._raters(tokens)
        assert raters[0].nonzero()[:, 0].tolist() == data["rater_idx"].tolist()
        if version == "2.0":
            score = corrected_score(tokens, raters, method.heads, method.rope_theta)
        else:
            score = rater_attention(tokens, raters).mean(1)
        torch.testing.assert_close(score[0], found["scores"], atol=1e-7, rtol=1e-4)
        expected = found["keep"][0]
        if version == "1.0":
            expected, theirs = recycled(tokens, score, found, len(found["merged"]))
            counts = torch.tensor([n]), torch.tensor([len(expected)])
            as_theirs = method.split(*counts)[0] == found["keep"].shape[1]
            method = SparseVLM() if as_theirs else MoreClusters()
            assert [x.item() for x in method.split(*counts)] == [
                found["keep"].shape[1],
                len(found["density_noise"]),
                len(found["merged"]),
            ]
            check_merge(method, tokens, expected, found, begin, theirs)
        check = Check(method, tokens, expected[None], ALONE)
        both = in_batch(tokens)
        both.memory = {RATERS: torch.cat([memory[RATERS]] * 2)}
        reduction = method.reduce(both, [n // 2, len(expected)])
        assert reduction.keep[1][reduction.valid[1]].tolist() == check.lists[0]
        yield check


def that_gives(rows: Tensor, begin: int, length: int):
    """Queries and keys whose softmax is `rows` `[H, T, n]` at the image, and what is missing to 1 before it."""
    heads, text, n = rows.shape
    logits = rows.clamp(min=1e-30).log()
    keys = torch.full((1, length, heads, DIM), -100.0)
    keys[..., text:] = 0
    keys[0, begin : begin + n, :, :text] = logits.permute(2, 0, 1)
    keys[0, 0, :, :text] = (1 - rows.sum(-1)).log()
    queries = torch.zeros(1, length, heads, DIM)
    queries[0, begin + n :, :, :text] = torch.eye(text)[:, None]
    return plain_attention(queries, keys, torch.ones(1, length, dtype=torch.bool), begin, n, 1.0)


def recycled(tokens: VisualTokens, score: Tensor, found: dict, clusters: int) -> tuple[Tensor, bool]:
    """The places of kept tokens and of cluster centres, and whether the clusters are the authors'.

    Of two clusters the centres hang on the authors' noise, and what belongs to them may; then ours are without it.
    """
    chosen = topk_mask(score, found["keep"].shape[1])
    assert torch.equal(chosen[0].nonzero()[:, 0], found["keep"][0])
    order = score.masked_fill(chosen, -1)[0].argsort(descending=True)[: len(found["density_noise"])]
    if "recycle_idx" in found:
        assert torch.equal(order, found["recycle_idx"])
    points, every = tokens.features[:, order], torch.ones(1, len(order), dtype=torch.bool)
    count = torch.tensor([clusters])
    noisy = density_peaks(points, count, every, bonus=found["density_noise"][None] * 1e-6)[0]
    centres = noisy.unique()
    if "recycle_assign" in found:
        assert torch.equal(noisy, found["recycle_centers"][found["recycle_assign"]])
    means = torch.stack([points[0, noisy == centre].mean(0) for centre in centres])
    by_first = [rows[rows[:, 0].argsort()] for rows in (means, found["merged"])]
    torch.testing.assert_close(*by_first, atol=1e-5, rtol=1e-5)
    if clusters == 1:  # all points are equally dense; only the place of the mean hangs on the noise
        centres = order.argmin()[None]
    place = order.argsort()  # ours are clustered, and equally dense ones ordered, as they lie in the image
    plain = place[density_peaks(points[:, place], count, every)[0]][place.argsort()]
    if clusters == 2:
        centres = plain.unique()
    elif clusters > 2:
        assert torch.equal(noisy, plain)
    same = torch.equal(noisy[:, None] == noisy, plain[:, None] == plain)
    return torch.cat([found["keep"][0], order[centres]]).sort().values, same


def check_merge(method, tokens: VisualTokens, expected: Tensor, found: dict, begin: int, recycled: bool) -> None:
    """What comes out is the authors' hidden states, up to the order of the recycled; these only if `recycled`."""
    merged = method.reduce(tokens, [len(expected)]).apply(tokens.features)[0]
    kept = torch.isin(expected, found["keep"][0])
    theirs = found["hidden_out"][begin : begin + len(expected)]
    assert torch.equal(merged[kept], theirs[: int(kept.sum())])
    if not recycled:
        return
    mine, theirs = merged[~kept], theirs[int(kept.sum()) :]
    torch.testing.assert_close(mine[mine[:, 0].argsort()], theirs[theirs[:, 0].argsort()], atol=1e-5, rtol=1e-5)
