"""Pruning before the first block: what is kept sees what it would see among all patches with the dropped ones hidden.

So absolute embeddings and rotary positions are those of the full image. Images are half flat: `contrast` drops that.
"""

import pytest
import torch
from tiny_vit import HEADS, PATCH, PATCHES, SIDE, VITS, build, images, kept_of, run
from torch import Tensor

from prune import apply_pruner

BLOCKS = {  # where the blocks are, and what they call their mask
    "timm": ("blocks", "attn_mask"),
    "eva-split": ("blocks", "attn_mask"),
    "eva-mixed": ("blocks", "attn_mask"),
    "open_clip": ("transformer.resblocks", "attn_mask"),
    "ViTModel": ("layers", "attention_mask"),
    "CLIPVisionModel": ("encoder.layers", "attention_mask"),
}


def pages() -> Tensor:
    """Images that are drawn on in different places, so that different numbers of patches are kept."""
    x = torch.full((3, 3, SIDE, SIDE), 1.8)
    for number, (top, left, bottom, right) in enumerate([(0, 0, 7, SIDE), (5, 9, 10, 15), (0, 0, SIDE, SIDE)]):
        x[number, :, top:bottom, left:right] = images()[number, :, top:bottom, left:right]
    return x


def hidden(name: str, pixels: Tensor, kept: list[list[int]]) -> Tensor:
    """The model's output with all other patches hidden as keys, in every block."""
    model, vit = build(name), VITS[name]
    mask = torch.full((len(pixels), 1, 1, vit.prefix + PATCHES), -torch.inf)
    mask[..., : vit.prefix] = 0
    for row, some in enumerate(kept):
        mask[row, ..., vit.prefix + torch.tensor(some)] = 0
    mask = mask.expand(-1, -1, mask.shape[-1], -1)
    if name == "open_clip":  # nn.MultiheadAttention's
        mask = mask.repeat_interleave(HEADS, 0)[:, 0]
    path, argument = BLOCKS[name]
    blocks = next(module for at, module in model.named_modules() if at.endswith(path))
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: (args[:1], kwargs | {argument: mask}), with_kwargs=True)
    return run(name, model, pixels)


@torch.no_grad()
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_kept_keeps_its_place(name, adaptive):
    model, pixels = build(name), pages()
    with apply_pruner(model, "index_preserving", ratio=0.1, scorer="contrast", adaptive=adaptive) as handle:
        found, kept = run(name, model, pixels), kept_of(handle)
        alone = torch.cat([run(name, model, one[None]) for one in pixels])
    torch.testing.assert_close(found, hidden(name, pixels, kept), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    most = round(0.9 * PATCHES)
    if adaptive:
        assert len(kept[0]) < most and len(kept[1]) < most and len({*map(len, kept)}) > 1
    else:
        assert [*map(len, kept)] == [most] * 3
    assert not torch.allclose(found, run(name, model, pixels), atol=1e-3)  # pruning does change it


@torch.no_grad()
def test_drawn_patches_and_their_neighbours_are_kept():
    model, pixels = build("timm"), pages()
    with apply_pruner(model, "index_preserving", ratio=1 / PATCHES, scorer="contrast") as handle:
        run("timm", model, pixels)
        kept = kept_of(handle)
    side = SIDE // PATCH
    drawn = [row * side + column for row in range(0, 3) for column in range(side)]  # 7 pixels are 2 rows, dilated 3
    assert kept[0] == drawn
    assert kept[1] == [row * side + column for row in range(0, 4) for column in range(1, 5)]
