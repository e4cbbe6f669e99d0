"""Which implementation of a kernel runs: the torch reference, or its Triton version.

The environment variable `PRUNE_KERNELS` decides, read at every call:

    auto     Triton for CUDA tensors, if it is installed and the kernel compiles; torch otherwise (the default). A
             fallback on CUDA is said once per kernel and type of error, at INFO, by the logger "prune.kernels".
    torch    always the reference; Triton is not imported.
    triton   Triton or an error. On CPU tensors only under TRITON_INTERPRET=1, as tests do.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

CHOICES = ("auto", "torch", "triton")
F = TypeVar("F", bound=Callable)
log = logging.getLogger("prune.kernels")
said: set[tuple[str, str, type]] = set()
"""(module, kernel, error) of the fallbacks that were said. Without the texts: they hold shapes, and would never end."""


class NotServed(Exception):
    """Raised by a Triton version, before it launches anything, for arguments it does not serve."""


def dispatched(reference: F) -> F:
    """Give a torch function its Triton version: `prune.kernels.fused.<module>.<name>` with the same arguments.

    `<module>` and `<name>` are those of the reference, which stays there as `.reference`. Triton versions have no
    backward: in auto a call that autograd would record runs in torch.
    """
    module, name = reference.__module__.rpartition(".")[2], reference.__name__
    broken: list[str] = []

    @wraps(reference)
    def run(*args, **kwargs):
        wanted = choice()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        on_cuda = bool(tensors) and tensors[0].is_cuda
        if wanted == "torch" or (wanted == "auto" and (broken or not on_cuda or torch.compiler.is_compiling())):
            return reference(*args, **kwargs)
        try:
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                raise NotServed("a gradient is wanted")
            if any(x.device != tensors[0].device for x in tensors if x.is_cuda):
                raise NotServed("the arguments are on several GPUs")
            with torch.cuda.device(tensors[0].device if on_cuda else -1):  # launches go to the current device
                return _fused(module, name)(*args, **kwargs)
        except Exception as error:
            if wanted == "triton":
                raise
            refused = error.with_traceback(None)  # whose frames hold what the Triton version has made
            refused.__context__ = refused.__cause__ = None
        found = reference(*args, **kwargs)  # raises in its turn if it was the arguments
        if not isinstance(refused, (NotServed, torch.OutOfMemoryError)):
            broken.append(name)
        if (why := (module, name, type(refused))) not in said:
            said.add(why)
            log.info(f"{name} runs in torch, not in Triton: {type(refused).__name__}: {refused}")
        return found

    run.reference = reference
    return run


def choice() -> str:
    """The value of `PRUNE_KERNELS`.

    Raises:
        ValueError: it is none of `CHOICES`.
    """
    found = os.environ.get("PRUNE_KERNELS", "auto")
    if found not in CHOICES:
        raise ValueError(f"PRUNE_KERNELS={found!r} must be one of {', '.join(CHOICES)}")
    return found


@cache
def _fused(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"prune.kernels.fused.{module}"), name)
