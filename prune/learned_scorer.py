"""A small classifier of image patches, for `index_preserving`: weights in a folder, as config.json and safetensors."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from prune.errors import ConfigError, InputError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURE = "patch-mlp"
LIMIT = 2**26  # bytes of weights; the shipped ones have a quarter of a million
LUMA = (0.299, 0.587, 0.114)
SHIPPED = Path(__file__).parent / "weights" / "text-patches"


class LearnedScorer(nn.Module):
    """Patches to logits, one patch at a time: LayerNorm over the patch, a linear map, GELU, a linear map to a number.

    Patches of another size are resized (bilinear; smoothed where they shrink). Colours become grey if `channels` is 1.
    LayerNorm takes out a patch's mean and contrast, so it hardly matters by which mean and deviation a model's
    processor normalised the pixels. "Hardly": a processor's channels may differ from one another, which shifts the
    colour balance a little, and `eps` counts in units of the normalised pixels.

    Args:
        size: edge in pixels of the patches it looks at.
        channels: 1 (grey) or 3.
        hidden: width of the hidden layer.
        eps: of the LayerNorm; patches whose variance is far below it count as flat.

    Raises:
        ConfigError: an argument is no whole number >= 1 (`eps`: a number > 0), or channels is neither 1 nor 3.
    """

    def __init__(self, size: int = 28, channels: int = 1, hidden: int = 160, eps: float = 1e-3):
        super().__init__()
        for name, value in (("size", size), ("channels", channels), ("hidden", hidden)):
            if type(value) is not int or not 1 <= value <= 4096:
                raise ConfigError(f"{name}={value!r:.80} must be a whole number from 1 to 4096")
        if channels not in (1, 3):
            raise ConfigError(f"channels={channels} must be 1 (grey) or 3")
        if type(eps) not in (int, float) or not 0 < eps < math.inf:
            raise ConfigError(f"eps={eps!r:.80} must be a number > 0")
        self.size, self.settings = size, {"size": size, "channels": channels, "hidden": hidden, "eps": eps}
        self.norm = nn.LayerNorm([channels, size, size], eps=eps)
        self.project = nn.Linear(channels * size * size, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits `[n]` fp32 of patches `[n, 3, h, w]`, normalised pixels in RGB; > 0 is "keep"."""
        patches = patches.float()
        if self.settings["channels"] == 1:
            patches = grey(patches)
        patches = self.norm(resize(patches, self.size))
        return self.head(F.gelu(self.project(patches.flatten(1))))[:, 0]

    def flops(self) -> int:
        """FLOPs of the matrix products for one patch."""
        return 2 * (self.project.weight.numel() + self.head.weight.numel())

    # ------------------------------------------------------------------------------------------ files
    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors` (weights in fp16); the folder is made."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architecture": ARCHITECTURE, **self.settings}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.detach().half().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> LearnedScorer:
        """Read a folder that `save_pretrained` wrote; fp32 on the CPU, in eval mode. Nothing is ever un-pickled.

        Raises:
            ConfigError: a file is missing, too large or broken, or the weights do not fit the config; names the file.
        """
        folder = Path(folder).expanduser()
        file = folder / CONFIG
        try:
            with open(file, "rb") as opened:
                config = json.loads(opened.read(2**16))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}; give a folder with {CONFIG}, {WEIGHTS}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not JSON ({error!s:.200}); write it anew with save_pretrained") from None
        settings = dict(config) if isinstance(config, dict) else {}
        if (found := settings.pop("architecture", None)) != ARCHITECTURE:
            raise ConfigError(f"{file}: architecture {found!r:.80} must be {ARCHITECTURE!r}")
        try:
            scorer = cls(**settings)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        except TypeError:
            raise ConfigError(f"{file}: keys {sorted(settings)!s:.200} must be size, channels, hidden, eps") from None
        scorer.load_state_dict(_read(folder / WEIGHTS, scorer.state_dict()))
        return scorer.eval().requires_grad_(False)


def _read(file: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, held against names and shapes before any is made."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.stat().st_size > LIMIT:
            raise ConfigError(f"{file} is larger than {LIMIT} bytes: no patch scorer is; check the path")
        with safe_open(file, framework="pt") as opened:
            found = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}
            shapes = {name: list(value.shape) for name, value in wanted.items()}
            for name in sorted(set(found) | set(shapes)):
                if found.get(name) != shapes.get(name):
                    raise ConfigError(
                        f"{file}: {name:.80} is {found.get(name, 'missing')}, {CONFIG} beside it makes it "
                        f"{shapes.get(name, 'unknown')}; save both with save_pretrained"
                    )
            weights = {name: opened.get_tensor(name) for name in shapes}
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}; give the folder with the weights") from None
    except SafetensorError as error:
        raise ConfigError(f"{file}: no safetensors ({error!s:.200}); write it anew with save_pretrained") from None
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ConfigError(f"{file}: {name} has type {value.dtype}; weights must be floats")
        if not value.isfinite().all():
            raise ConfigError(f"{file}: {name} has values that are no finite numbers; train the scorer anew")
    return weights


@cache
def shipped() -> LearnedScorer:
    """The text classifier that comes with the library; see `prune/weights/text-patches/README.md`."""
    return LearnedScorer.from_pretrained(SHIPPED)


# ------------------------------------------------------------------------------------------------------- patches
def patch_images(pixels: Tensor) -> Tensor:
    """The "pixels" of tokens as pictures `[n, 3, h, w]` fp32, of rows `[n, L]`.

    `L = 3 * p * p` is one patch, channel by channel (plain vision transformers), `L = p * p` one of a model that sees
    grey, whose value all three channels get. `L = 4 * 3 * 2 * p * p` is a token of Qwen's: a 2 x 2 group of patches,
    row by row, each channel by channel with two frames, of which the mean is taken (a still image has the same frame
    twice). No other grouping is known; four patches of one frame each would look like one of twice the edge.

    Raises:
        InputError: the length is none of these.
    """
    edge = math.isqrt(pixels.shape[-1])
    if edge and edge * edge == pixels.shape[-1]:
        return pixels.float().unflatten(-1, (1, edge, edge)).expand(-1, 3, -1, -1)
    values, rest = divmod(pixels.shape[-1], 3)
    edge = math.isqrt(values)
    if not rest and edge and edge * edge == values:
        return pixels.float().unflatten(-1, (3, edge, edge))
    edge = math.isqrt(values // 8)
    if rest or not edge or 8 * edge * edge != values:
        raise InputError(
            f"{pixels.shape[-1]} pixel values per token are neither one patch, RGB or grey, nor 2 x 2 of two frames"
        )
    groups = pixels.float().unflatten(-1, (2, 2, 3, 2, edge, edge)).mean(-3)
    return groups.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def grey(patches: Tensor) -> Tensor:
    """`[n, 1, h, w]` of `[n, 3, h, w]`; of grey pixels an affine function, whatever the channels' normalisation."""
    red, green, blue = (weight * patches[:, n : n + 1] for n, weight in enumerate(LUMA))
    return red + green + blue


def resize(patches: Tensor, size: int) -> Tensor:
    """`[n, c, size, size]` of `[n, c, h, w]`, bilinear; smoothed where it shrinks."""
    if patches.shape[-2:] == (size, size):
        return patches
    shrinks = max(patches.shape[-2:]) > size
    return F.interpolate(patches, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
