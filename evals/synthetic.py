"""Random visual tokens of any size, with whatever signals a reducer declares: to run a method without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from zlib import crc32

import torch
from torch import Tensor, nn

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.method import Method, Stage
from prune.tokens import AttentionInputs, BlockAttention, Tower, VisualTokens

SIDE = 24  # tokens along one edge of a tile: CLIP-L at 336 pixels
TOWER_WIDTH = 1024
PATCH_VALUES = 3 * 14 * 14


@dataclass(frozen=True)
class Shape:
    """`batch` prompts of one image of `tokens` visual tokens and `text` others, half of them after the image.

    `width` is the decoder's; heads are 128 wide from 4096 on, 64 below.
    """

    batch: int
    tokens: int
    width: int
    text: int = 64

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `8x576x1024`.

        Raises:
            ConfigError: it is not three whole numbers, or one is too small.
        """
        sizes = text.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ConfigError(f"shape {text!r} must be batch x tokens x width, such as 8x576x1024")
        shape = cls(*map(int, sizes))
        if shape.tokens < 16 or shape.width % 64:
            raise ConfigError(f"shape {text!r} must have 16 tokens or more, and a width that 64 divides")
        return shape

    def __str__(self):
        return f"{self.batch}x{self.tokens}x{self.width}"

    @property
    def heads(self) -> int:
        return self.width // (128 if self.width >= 4096 else 64)

    @property
    def split(self) -> tuple[int, int]:
        """Heads, and the width of each."""
        return self.heads, self.width // self.heads

    @property
    def length(self) -> int:
        """Columns of a prompt."""
        return self.tokens + self.text

    @property
    def before(self) -> int:
        """Text tokens in front of the image."""
        return self.text // 2

    @property
    def after(self) -> int:
        """Text tokens behind it."""
        return self.text - self.before

    @property
    def geometry(self) -> Geometry:
        """A Llama of 32 layers."""
        return Geometry(
            visual_tokens=self.tokens,
            text_tokens=self.text,
            hidden_size=self.width,
            intermediate_size=self.width * 43 // 16,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.split[1],
        )


@dataclass
class Synthetic:
    """Tokens of one shape, the same for every reducer.

    Every signal is drawn when it is first asked for, from a seed of its own, and kept. A stage that n tokens enter gets
    the first n of them, as views. What a model gives in its own dtype is in `dtype`; attention weights are fp32.
    """

    shape: Shape
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    made: dict[str, Tensor] = field(default_factory=dict)

    def tokens(self, stage: Stage, n: int) -> VisualTokens:
        """What a stage is given when n tokens of each image are left."""
        reducer, shape, size = stage.reducer, self.shape, (self.shape.batch, n)
        number = torch.arange(n, device=self.device)
        tile, row, column = number // SIDE**2, number % SIDE**2 // SIDE, number % SIDE
        tokens = VisualTokens(
            features=self._wide("features", n),
            coordinates=torch.stack([tile, torch.zeros_like(tile), row, column], -1).expand(*size, 4),
            columns=(number + shape.before).expand(size),
            tile=tile.expand(size),
            patch=torch.stack([row, column], -1).expand(*size, 2),
        )
        for name, spec in reducer.tower.items():
            tokens.tower[name] = self._tower(spec, n)
        if reducer.needs_projector:
            tokens.projector = self._projector
        for name in reducer.signals:
            if name in ("keys", "values"):
                setattr(tokens, name, self._normal(name, shape.tokens, *shape.split)[:, :n])
            elif name in ("attention", "entry_attention"):
                setattr(tokens, name, self._attention(n))
            elif name in ("normed_features", "inputs"):
                setattr(tokens, name, self._wide(name, n))
            elif name == "block":
                tokens.block = self._block(n)
        if "last_token_attention" in reducer.signals:
            tokens.last_token_attention = self._share("last_token_attention", n)
        if "transition" in reducer.signals:
            layers = sum(layer < stage.site.layer for layer in reducer.transition_layers)
            tokens.transition = self._normal("transition", shape.tokens, layers, 4)[:, :n].float().sigmoid()
            tokens.transition_sums = self._normal("transition_sums", layers, 2).float().abs() + shape.length
        self._add_text(tokens, reducer.signals)
        return tokens

    def _add_text(self, tokens: VisualTokens, signals: tuple[str, ...]) -> None:
        shape, size = self.shape, (self.shape.batch, self.shape.after)
        if not {"text_features", "inputs"} & set(signals):
            return
        first = shape.before + shape.tokens
        tokens.text_mask = torch.ones(size, dtype=torch.bool, device=self.device)
        tokens.text_columns = torch.arange(first, first + shape.after, device=self.device).expand(size)
        if "inputs" in signals:
            tokens.text_inputs = self._normal("text_inputs", shape.after, shape.width)
        if "text_features" in signals:
            tokens.text_features = self._normal("text_features", shape.after, shape.width)
            if "keys" in signals:
                tokens.text_keys = self._normal("text_keys", shape.after, *shape.split)
            if "normed_features" in signals:
                tokens.normed_text = self._normal("normed_text", shape.after, shape.width)

    def _normal(self, name: str, *size: int) -> Tensor:
        """`[batch, *size]`, the same for the same name and size."""
        key = f"{name} {size}"
        if key not in self.made:
            generator = torch.Generator().manual_seed(crc32(key.encode()))
            self.made[key] = torch.randn(self.shape.batch, *size, generator=generator).to(self.device, self.dtype)
        return self.made[key]

    def _wide(self, name: str, n: int) -> Tensor:
        return self._normal(name, self.shape.tokens, self.shape.width)[:, :n]

    def _share(self, name: str, n: int) -> Tensor:
        """`[batch, n]`, what a softmax gives."""
        return self._normal(name, self.shape.tokens).float().softmax(-1)[:, :n]

    def _attention(self, n: int) -> AttentionInputs:
        shape, device, before, length = self.shape, self.device, self.shape.before, n + self.shape.text
        queries, keys, values = (self._normal(name, shape.length, *shape.split)[:, :length] for name in ("q", "k", "v"))
        columns = torch.arange(length, device=device).expand(shape.batch, -1)
        return AttentionInputs(
            queries=queries,
            keys=keys,
            values=values,
            valid=torch.ones(shape.batch, length, dtype=torch.bool, device=device),
            scale=shape.split[1] ** -0.5,
            sample=torch.arange(shape.batch, device=device),
            slots=columns[:, before : before + n],
            text_slots=columns[:, before + n :],
            text_mask=torch.ones_like(columns[:, before + n :], dtype=torch.bool),
            last=columns[:, -1],
        )

    def _block(self, n: int) -> BlockAttention:
        """Of a vision transformer of the decoder's width, with a CLS token."""
        shape, length = self.shape, n + 1
        queries, keys, values = (self._normal(f"block {x}", shape.tokens + 1, *shape.split)[:, :length] for x in "qkv")
        return BlockAttention(
            queries=queries,
            keys=keys,
            values=values,
            valid=torch.ones(shape.batch, length, dtype=torch.bool, device=self.device),
            bias=None,
            scale=shape.split[1] ** -0.5,
            prefix=1,
            cls=True,
        )

    def _tower(self, spec: Tower, n: int) -> Tensor:
        """A signal of a vision encoder with one patch per token; the same for every layer."""
        width = min(TOWER_WIDTH, self.shape.width)
        if spec.kind in ("keys", "values"):
            return self._normal(f"tower {spec.kind}", self.shape.tokens, width // 64, 64)[:, :n]
        if spec.kind == "features":
            return self._normal("tower features", self.shape.tokens, width)[:, :n]
        if spec.kind == "pixels":
            return self._normal("pixels", self.shape.tokens, PATCH_VALUES)[:, :n]
        return self._share(spec.kind, n)

    @cached_property
    def _projector(self) -> Projector:
        """LLaVA's."""
        width = self.shape.width
        layers = nn.Linear(min(TOWER_WIDTH, width), width), nn.GELU(), nn.Linear(width, width)
        return Projector(*layers).to(self.device, self.dtype).requires_grad_(False)


class Projector(nn.Sequential):
    """Two linear layers that take rows in any dtype. It tells them, as the engine's does."""

    @property
    def layers(self) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        return tuple(self)

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows.to(self[0].weight.dtype))


def chain(method: Method, shape: Shape, keep: int) -> Iterator[tuple[Stage, int]]:
    """The stages that remove something, and how many tokens of an image enter each."""
    before = shape.tokens
    for stage in method.plan(shape.geometry, keep):
        if stage.keep < before:
            yield stage, before
            before = stage.keep
