"""Reductions that fold dropped tokens into kept ones, through the engine."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from tiny import Image, Sample, collate

from prune import Merge, Reducer, Reduction, apply_pruner


@dataclass
class KeepFirst(Reducer):
    """Keep the first tokens; with `merge`, replace the first one by the mean of all."""

    merge: bool = True
    layer: int | None = None
    name = "keep_first"
    merges = True

    @property
    def site(self):
        return "projected" if self.layer is None else f"decoder:{self.layer}"

    def reduce(self, tokens, keep):
        batch, n = tokens.mask.shape
        most = max(keep)
        index = torch.arange(most).expand(batch, most)
        valid = index < torch.tensor(keep)[:, None]
        if not self.merge:
            return Reduction(index, valid)
        weight = tokens.mask / tokens.mask.sum(1, keepdim=True)
        scale = torch.ones(batch, most)
        scale[:, 0] = 0
        return Reduction(
            index,
            valid,
            Merge(torch.arange(n).expand(batch, n), torch.zeros(batch, n, dtype=torch.long), weight, scale),
        )


def test_apply_is_the_weighted_sum():
    x = torch.randn(2, 5, 3, dtype=torch.bfloat16)
    merge = Merge(
        source=torch.tensor([[1, 2], [0, 4]]),
        slot=torch.tensor([[0, 0], [1, 0]]),
        weight=torch.tensor([[0.5, 0.25], [2.0, 0.0]]),
        scale=torch.tensor([[0.25, 1.0], [1.0, 3.0]]),
    )
    out = Reduction(torch.tensor([[0, 3], [1, 2]]), merge=merge).apply(x)
    f = x.float()
    want = [
        torch.stack([0.25 * f[0, 0] + 0.5 * f[0, 1] + 0.25 * f[0, 2], f[0, 3]]),
        torch.stack([f[1, 1], 3 * f[1, 2] + 2 * f[1, 0]]),
    ]
    assert torch.equal(out, torch.stack(want).to(torch.bfloat16))


@pytest.mark.parametrize("layer", [None, 2])
def test_merged_features_enter_the_model(layer):
    """With identical patches the mean changes nothing; with different ones it must."""
    model = tiny.shared("llava")
    inputs = collate([Sample("llava", [3, Image(), 4]), Sample("llava", [1, Image(), 2, Image(), 6], 1)])

    def logits(merge):
        with apply_pruner(model, KeepFirst(merge=merge, layer=layer), keep=3), torch.no_grad():
            return model(**inputs).logits

    assert not torch.allclose(logits(True), logits(False))
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    tower = model.model.vision_tower
    position = getattr(tower, "vision_model", tower).embeddings.position_embedding.weight
    before = position.detach().clone()
    try:  # without position embeddings all patches of a blank image are equal
        position.data[1:] = position.data[1:2]
        torch.testing.assert_close(logits(True), logits(False), rtol=1e-5, atol=1e-5) if layer is None else None
    finally:
        position.data.copy_(before)
