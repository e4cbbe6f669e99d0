"""A device that is not there: CPU tensors that call themselves `cuda`, and a record of every wait for them.

A copy between host and device that is not asynchronous, or an operation whose result's shape or value the host must
know, stops the host until the device has caught up. On a real GPU `torch.cuda.set_sync_debug_mode` finds these; here
the same operations are found on any machine, with the place in the code that asked for them.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("prune", "adapters", "kernels"))
DEVICE = torch.device("cuda", 0)
WAITS = {
    "_local_scalar_dense",  # item(), int(), bool(), `if tensor`
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "bincount",
    "histc",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "linalg_cholesky_ex",
    "_linalg_eigh",
    "_linalg_svd",
    "_linalg_solve_ex",
}


class OnDevice(Tensor):
    """A tensor whose numbers are on the CPU and which says that it is on `DEVICE`."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self):
        return f"OnDevice({self.inner!r})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of PretendDevice")


class _FromList(TorchFunctionMode):
    """`torch.tensor([tensor, ...])` reads every one of them past all dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor:
            args = tree_map(lambda x: x.item() if isinstance(x, OnDevice) else x, args)
        return func(*args, **(kwargs or {}))


class Event:
    """Of a device that has always caught up."""

    def record(self, stream) -> None: ...

    def synchronize(self) -> None: ...


class PretendDevice(TorchDispatchMode):
    """Runs what is said to be on the device on the CPU; `waits` counts (operation, file:line, ours).

    `ours` is whether the innermost frame outside of torch is the library's.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[tuple[str, str, bool]] = Counter()

    def __enter__(self):
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) shows its copy
        torch._C._ensureCUDADeviceGuardSet()
        self._cuda = torch.cuda._lazy_init, torch.cuda.Event, torch.cuda.current_stream
        if not torch.cuda.is_available():  # there is nothing to start, and nothing to wait for
            torch.cuda._lazy_init = torch.cuda.current_stream = lambda *_: None
            torch.cuda.Event = Event
        self._lists = _FromList()
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        self._lists.__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        torch.cuda._lazy_init, torch.cuda.Event, torch.cuda.current_stream = self._cuda
        return super().__exit__(*exception)

    def count(self, ours: bool) -> int:
        return sum(n for (_, _, mine), n in self.waits.items() if mine == ours)

    def ours(self) -> list[str]:
        """Where the library itself waits, as text."""
        return [f"{n} x {name} at {place}" for (name, place, mine), n in sorted(self.waits.items()) if mine]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__.partition(".")[0]
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, OnDevice) for x in tensors)
        there = here
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        if _waits(func, name, args, kwargs, here, there):
            self._note(name)
        out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        if name == "_to_copy" and there != here and isinstance(out, Tensor) and out is tensors[0]:
            out = out.clone()
        if not there:
            return out
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_dressed, out)) if here else _all(out)

    def _note(self, name: str) -> None:
        place, ours = "?", False
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if "/torch/" not in file and file != __file__ and not file.startswith("<"):
                place, ours = f"{Path(file).name}:{frame.f_lineno}", file.startswith(OURS)
                break
            frame = frame.f_back
        self.waits[name, place, ours] += 1


def _waits(func, name: str, args: tuple, kwargs: dict, here: bool, there: bool) -> bool:
    if name in ("_to_copy", "copy_"):
        if args[0].numel() == 0:
            return False
        other = isinstance(args[1], OnDevice) if name == "copy_" else there
        crosses = isinstance(args[0], OnDevice) != other
        return crosses and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if not here:
        return False
    if name in ("index", "index_put", "index_put_"):
        index = [x for x in args[1] if isinstance(x, Tensor)]
        if any(not isinstance(x, OnDevice) and x.dim() for x in index):
            return True  # copied to the device
        masks = [x for x in index if x.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and (name == "index" or len(index) > 1 or args[2].numel() > 1)  # one value: masked_fill
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


def _bare(x):
    return x.inner if isinstance(x, OnDevice) else x


def _dressed(x):
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _all(out):
    return tree_map(_dressed, out)


def to_device(x):
    """Tensors of a nested structure, or a model's own, on the pretended device. A model is changed in place."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None:
                        table[name] = OnDevice(value.detach())
        return x
    return tree_map(lambda v: OnDevice(v) if isinstance(v, Tensor) else v, x)
