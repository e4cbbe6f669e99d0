"""Attention weights in rows and sums, against dense softmax in fp64."""

import math

import pytest
import torch

from prune.kernels import attention_logits, attention_pagerank, received_attention, row_attention

S, L, D = 3, 13, 8


def tensors(heads=4, kv_heads=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(S, L, heads, D, generator=generator).to(dtype)
    k = torch.randn(S, L, kv_heads, D, generator=generator).to(dtype)
    valid = torch.ones(S, L, dtype=torch.bool)
    valid[0, :4] = False  # left padding
    valid[1, -3:] = False  # right padding
    return q, k, valid


def dense(q, k, scale, mask):
    """`[S, H, L, L]` fp64; rows that may look nowhere are zero."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("sqhd,skhd->shqk", q.double(), k.double()) * scale
    return logits.masked_fill(~mask[:, None], -math.inf).softmax(-1).nan_to_num(0.0)


def full_mask(valid, causal):
    mask = valid[:, None] & torch.ones(L, L, dtype=torch.bool)
    return mask.tril() if causal else mask


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(heads, kv_heads, dtype):
    q, k, valid = tensors(heads, kv_heads, dtype)
    mask = full_mask(valid, True)
    want = dense(q, k, 0.3, mask)
    rows = torch.tensor([2, 7, 12])
    got = row_attention(q[:, rows], k, 0.3, mask[:, rows])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want[:, :, rows], rtol=0, atol=1e-6)
    logits = attention_logits(q[:, rows], k, 0.3)
    dots = torch.einsum("srhd,slhd->shrl", q[:, rows].double(), k.double().repeat_interleave(heads // kv_heads, 2))
    torch.testing.assert_close(logits.double(), dots * 0.3, rtol=0, atol=1e-5)


def test_logits_are_masked_with_minus_infinity():
    q, k, valid = tensors()
    logits = attention_logits(q, k, 1.0, valid[:, None])
    assert torch.equal(logits.isinf(), ~valid[:, None, None].expand_as(logits))


def test_a_row_that_sees_nothing_is_zero():
    q, k, _ = tensors()
    assert not row_attention(q, k, 1.0, torch.zeros(1, 1, L, dtype=torch.bool)).any()


@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_received(chunk, causal, dtype):
    q, k, valid = tensors(dtype=dtype)
    weights = dense(q, k, 0.4, full_mask(valid, causal)).mean(1) * valid[..., None]
    want = weights.sum(1) / valid.sum(1, keepdim=True)
    got = received_attention(q, k, 0.4, valid, causal=causal, chunk=chunk)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    assert torch.allclose(got.sum(1), torch.ones(S)) and not got[~valid].any()


def test_received_without_padding_and_with_a_mask_of_its_own():
    q, k, _ = tensors()
    mask = (torch.arange(L)[:, None] - torch.arange(L)).abs()[None] < 4
    for own in (None, mask):
        seen = torch.ones(1, L, L, dtype=torch.bool) if own is None else own
        want = dense(q, k, 0.4, seen).mean((1, 2))
        torch.testing.assert_close(received_attention(q, k, 0.4, mask=own, chunk=3).double(), want, rtol=0, atol=1e-6)


def test_what_padding_holds_does_not_matter():
    q, k, valid = tensors()
    want = received_attention(q, k, 0.4, valid)
    q[~valid], k[~valid] = 1e4, -1e4
    assert torch.equal(received_attention(q, k, 0.4, valid), want)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_pagerank(iterations, chunk):
    """Row vector times matrix, head by head, then the root mean square."""
    q, k, valid = tensors()
    got = attention_pagerank(q, k, 0.4, valid, iterations, 0.5, chunk=chunk)
    matrix = dense(q, k, 0.4 / 0.5, full_mask(valid, True))
    for s in range(S):
        ranks = []
        for head in range(4):
            rank = valid[s].double() / valid[s].sum()
            for _ in range(iterations):
                rank = rank @ matrix[s, head]
            ranks.append(rank)
        want = torch.stack(ranks).square().mean(0).sqrt()
        torch.testing.assert_close(got[s].double(), want, rtol=0, atol=1e-6)


def test_a_sequence_is_what_it_is_alone():
    q, k, valid = tensors()
    for kernel in (received_attention, attention_pagerank):
        together = kernel(q, k, 0.4, valid)
        for s in range(S):
            torch.testing.assert_close(
                kernel(q[s : s + 1], k[s : s + 1], 0.4, valid[s : s + 1])[0], together[s], rtol=0, atol=1e-7
            )


def test_autocast_does_not_reach_in():
    q, k, valid = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = received_attention(q, k, 0.4, valid)
    assert torch.equal(got, received_attention(q, k, 0.4, valid))
