"""Block sizes of the Triton kernels, by architecture; no autotuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from prune.kernels.dispatch import NotServed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256
"""Largest head dimension served: a tile of queries and one of keys lie in shared memory whole."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel's tiles.

    Args:
        rows, columns: of the tile of products; powers of two, at least 16, as `tl.dot` wants.
        inner: how much of the dimension that is summed over is in shared memory at a time; a power of two.
        warps, stages: `num_warps` and `num_stages` of the launch.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """Keywords of the launch; the kernel's `WIDEN` says that operands are to be widened, see `interpreted`."""
        sizes = dict(ROWS=self.rows, COLUMNS=self.columns, INNER=self.inner)
        return sizes | dict(WIDEN=interpreted(), num_warps=self.warps, num_stages=self.stages)


# (bytes of one operand's tile, most rows, warps, stages) by compute capability: what is not listed is like the newest
# one below it. A kernel holds at most `stages + 1` operand tiles in shared memory, which 64, 100 or 228 KiB must hold.
TILES = {
    (0, 0): (8 << 10, 64, 4, 2),
    (8, 0): (16 << 10, 64, 4, 3),
    (8, 6): (16 << 10, 64, 4, 2),
    (9, 0): (16 << 10, 128, 4, 3),
}
INTERPRETED = (128, 256)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when Triton was imported).

    Its `tl.dot` misreads bf16, so kernels widen their operands to fp32 there: the products are the same, since those of
    bf16 and fp16 numbers are exact in fp32.
    """
    return bool(triton.knobs.runtime.interpret)


def blocks(x: Tensor, rows: int, width: int) -> Blocks:
    """The blocks for products of `rows` rows with any number of columns, of x's dtype, over a width held whole."""
    inner = max(16, triton.next_power_of_2(width))
    fits = max(16, triton.next_power_of_2(rows))
    if interpreted():
        return Blocks(min(fits, INTERPRETED[0]), INTERPRETED[1], inner, 4, 1)
    size, most, warps, stages = _tile(x.device.index or 0)
    block = min(most, max(16, size // (inner * x.element_size())))
    return Blocks(min(fits, block), min(64, block), inner, warps, stages)


def gemm_blocks(x: Tensor, rows: int, width: int) -> Blocks:
    """The same where the width is summed over in steps of `inner`."""
    inner = min(64 if x.element_size() == 2 else 32, max(16, triton.next_power_of_2(width)))
    return blocks(x, rows, inner)


@cache
def _tile(device: int) -> tuple[int, int, int, int]:
    found = torch.cuda.get_device_capability(device)
    return TILES[max(key for key in TILES if key <= found)]


def check(*operands: Tensor) -> None:
    """Refuse what the kernels do not multiply.

    Raises:
        NotServed: dtypes differ, or are none of `DTYPES`; nothing to work on.
    """
    dtype = operands[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype for x in operands):
        raise NotServed(f"dtypes {[str(x.dtype) for x in operands]}: one of {[str(x) for x in DTYPES]} is served")
    if any(x.numel() == 0 for x in operands):
        raise NotServed("an empty tensor")
