"""Digits: a classification benchmark for vision transformers, made from data that ships with scikit-learn. No download.

Handwritten digits (`load_digits`, 8 x 8 pixels) are enlarged, put near the middle of a 32 x 32 picture and covered with
noise: brighter or darker ink on a background of another shade. Picture i depends on (split, seed, i) alone. Test
pictures show other handwritten digits than training (every fifth one, as in `prune.evals.scenes`).

    model = load_digits_vit()                        # a timm VisionTransformer, fp32, 256 patches and CLS
    logits = model(to_pixels(images))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prune.errors import ConfigError
from prune.evals.scenes import digit_indices

SIDE = 32  # pixels along one edge of a picture
SMALLEST = 26  # pixels along the edge of the smallest digit
NOISE = 6  # standard deviation of a pixel, of 255
CHECKPOINT = Path(__file__).parent / "models" / "digits-vit"
MEAN, STD = [0.5] * 3, [0.5] * 3
ARCHITECTURE = dict(
    img_size=SIDE, patch_size=2, num_classes=10, embed_dim=64, depth=8, num_heads=4, mlp_ratio=4.0, init_values=0.1
)
"""Arguments of `timm.models.VisionTransformer`: 256 patches and CLS, LayerScale."""


class Digits(Sequence):
    """Pictures of digits with their labels, made when asked for.

    Args:
        split: "test" or "train".
        seed: another seed gives other places, shades and noise.

    Raises:
        ValueError: no such split, or a negative seed.
    """

    def __init__(self, split: str = "test", seed: int = 0):
        if split not in ("test", "train"):
            raise ValueError(f"no split {split!r}; there are test, train")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return len(drawings(self.split)[1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """([SIDE, SIDE, 3] bytes, the digit)."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        rng = np.random.default_rng(np.random.SeedSequence([7, self.split == "test", self.seed, index]))
        return render(rng, drawings(self.split)[0][index]), self.label(index)

    def label(self, index: int) -> int:
        """The digit of picture `index`, which is not drawn."""
        return int(drawings(self.split)[1][index])


def render(rng: np.random.Generator, drawing: np.ndarray, angle: float = 0.0) -> np.ndarray:
    """A picture [SIDE, SIDE, 3] of a drawing ([8, 8] bytes), turned by `angle` degrees."""
    from PIL import Image

    edge = int(rng.integers(SMALLEST, SIDE + 1))
    digit = Image.fromarray(drawing).resize((edge, edge), Image.Resampling.BICUBIC)
    if angle:
        digit = digit.rotate(angle, Image.Resampling.BICUBIC)
    ink = np.zeros((SIDE, SIDE, 1), dtype=np.int32)
    top, left = rng.integers(SIDE - edge + 1, size=2)
    ink[top : top + edge, left : left + edge, 0] = digit
    ground = rng.integers(0, 90, size=3)
    stroke = rng.integers(150, 256, size=3)
    if rng.integers(2):
        ground, stroke = stroke, ground
    noise = np.rint(rng.normal(0, NOISE, size=(SIDE, SIDE, 3))).astype(np.int32)
    return np.clip((ground * (255 - ink) + stroke * ink) // 255 + noise, 0, 255).astype(np.uint8)


@cache
def drawings(split: str) -> tuple[np.ndarray, np.ndarray]:
    """([n, 8, 8] bytes, [n] labels) of a split."""
    from sklearn.datasets import load_digits

    data, chosen = load_digits(), digit_indices(split)
    return (data.images[chosen] * 255 // 16).astype(np.uint8), data.target[chosen]


def to_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """[B, 3, H, W] fp32 normalised, from pictures of bytes."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def build_digits_vit(**arguments) -> nn.Module:
    """The untrained model, `ARCHITECTURE` with `arguments` in place of its own.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        from timm.models import VisionTransformer
    except ImportError:
        raise ConfigError("digits-vit is a timm model, and timm is not installed: pip install prune-vlm[vit]") from None
    return VisionTransformer(**{**ARCHITECTURE, **arguments})


def load_digits_vit(folder: Path = CHECKPOINT) -> nn.Module:
    """The built-in vision transformer: trained on digits, fp32, on the CPU, in eval mode.

    Raises:
        ConfigError: timm is not installed.
    """
    from safetensors.torch import load_file

    about = json.loads((folder / "config.json").read_text())
    model = build_digits_vit(**about["arguments"])
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.eval()
