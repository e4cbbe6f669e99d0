"""The tower of Qwen2.5-VL with dropped patches hidden: the reference for pruning that keeps the places of the others.

`hidden_tower` runs all patches, and hides the dropped ones as keys in every block, windowed or full. Pruning before
the tower must give kept patches the same features.
"""

import tiny
import torch
from torch import Tensor, nn

MERGE = 4  # patches in a group: 2 x 2
GRIDS = torch.tensor([[1, 8, 8], [1, 4, 12], [2, 12, 6]])  # frames, rows, columns, in patches


def tower_and_pixels(grids: Tensor = GRIDS) -> tuple[nn.Module, Tensor]:
    tower = tiny.build("qwen2_5_vl").model.visual.eval()
    patch = tower.patch_embed
    values = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
    count = int(grids.prod(1).sum())
    return tower, torch.randn(count, values, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden_tower(tower: nn.Module, pixels: Tensor, grids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The tower on all patches, with the groups that are not kept hidden from all others.

    Everything that depends on places (windows, rotary embedding, the order of windows) is taken from the model's own
    run on the full images; the blocks are then run by hand, with one dense mask each.

    Args:
        tower: of Qwen2.5-VL.
        pixels: `[S, P]`, as the processor makes them: the four patches of a group one after the other.
        grids: `[images, 3]`.
        kept: `[S / 4]` bool, per group, in the order of `pixels`.

    Returns:
        Features `[S / 4, 4, D]` of the last block and `[S / 4, D_out]` of the merger, in the order of `pixels`; rows of
        hidden groups mean nothing.
    """
    calls, entered = [], []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in tower.blocks
    ]
    hooks.append(tower.patch_embed.register_forward_hook(lambda module, args, out: entered.append(out)))
    try:
        tower(pixels, grid_thw=grids)
    finally:
        for hook in hooks:
            hook.remove()
    x = calls[0][0][0]
    order = places(entered[0], x)  # of the patches among the windows, for each position of the tower's sequence
    shown = kept.repeat_interleave(MERGE)[order]
    for block, (_, kwargs) in zip(tower.blocks, calls):
        segment = torch.bucketize(torch.arange(len(x)), kwargs["cu_seqlens"][1:], right=True)
        mask = (segment[:, None] == segment) & shown
        x = x + attention(block.attn, block.norm1(x), mask, *kwargs["position_embeddings"])
        x = x + block.mlp(block.norm2(x))
    merged = tower.merger(x)
    back = order.argsort()
    return x[back].unflatten(0, (-1, MERGE)), merged[order[::MERGE].div(MERGE, rounding_mode="floor").argsort()]


def places(rows: Tensor, permuted: Tensor) -> Tensor:
    """The index in `rows` of every row of `permuted`, a permutation of them."""
    order = torch.cdist(permuted.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(rows[order], permuted) and order.unique().numel() == len(rows)
    return order


def attention(module: nn.Module, x: Tensor, mask: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Softmax attention over the keys the mask shows to each query; 0 where it shows none."""
    query, key, value = module.qkv(x).view(len(x), 3, module.num_heads, -1).unbind(1)
    query, key = (turned(part, cosine[:, None], sine[:, None]) for part in (query, key))
    logits = torch.einsum("qhd,khd->hqk", query, key) * module.head_dim**-0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return module.proj(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def some_groups(share: float, grids: Tensor = GRIDS) -> Tensor:
    count = int(grids.prod(1).sum()) // MERGE
    return torch.rand(count, generator=torch.Generator().manual_seed(1)) < share


@torch.no_grad()
def test_nothing_hidden_is_the_tower():
    tower, pixels = tower_and_pixels()
    features, merged = hidden_tower(tower, pixels, GRIDS, torch.ones(len(pixels) // MERGE, dtype=torch.bool))
    out = tower(pixels, grid_thw=GRIDS)
    torch.testing.assert_close(merged, out.pooler_output, atol=1e-5, rtol=0)
    entered = []
    with tower.merger.register_forward_pre_hook(lambda _, args: entered.append(args[0])):
        tower(pixels, grid_thw=GRIDS)
    inside = entered[0].unflatten(0, (-1, MERGE)).flatten(1)  # in the windows' order
    nearest = torch.cdist(features.flatten(1), inside).argmin(1)
    assert nearest.unique().numel() == len(inside)
    torch.testing.assert_close(features.flatten(1), inside[nearest], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kept_groups_do_not_depend_on_hidden_ones():
    tower, pixels = tower_and_pixels()
    kept = some_groups(0.5)
    features, merged = hidden_tower(tower, pixels, GRIDS, kept)
    other = torch.where(kept.repeat_interleave(MERGE)[:, None], pixels, torch.randn_like(pixels))
    changed, merged_too = hidden_tower(tower, other, GRIDS, kept)
    torch.testing.assert_close(features[kept], changed[kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(merged[kept], merged_too[kept], atol=1e-6, rtol=0)
    whole, _ = hidden_tower(tower, pixels, GRIDS, torch.ones_like(kept))
    assert (features[kept] - whole[kept]).abs().max() > 1e-2  # but they do depend on the hiding


@torch.no_grad()
def test_hiding_whole_images_leaves_the_others_alone():
    tower, pixels = tower_and_pixels()
    first = int(GRIDS[0].prod())
    kept = torch.arange(len(pixels) // MERGE) < first // MERGE
    _, merged = hidden_tower(tower, pixels, GRIDS, kept)
    alone = tower(pixels[:first], grid_thw=GRIDS[:1]).pooler_output
    torch.testing.assert_close(merged[kept], alone, atol=1e-5, rtol=0)
