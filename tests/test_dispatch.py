"""Which implementation runs: by PRUNE_KERNELS, by device, and what happens when Triton cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from prune.kernels import dispatch, received_attention
from prune.kernels.dispatch import NotServed, dispatched

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def python(code, **env):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True
    device = SimpleNamespace(type="cuda", index=-1)


class Kernel:
    """A dispatched function and a Triton version that raises what it is told to; `ran` says which of them ran."""

    def __init__(self, monkeypatch):
        self.ran, self.error, self.refuses = [], None, None

        def double(x, factor=2):
            self.ran.append("torch")
            if self.refuses:
                raise self.refuses
            return x.as_subclass(torch.Tensor) * factor

        def fused(x, factor=2):
            self.ran.append("triton")
            if self.error:
                raise self.error
            return x.as_subclass(torch.Tensor) * factor

        monkeypatch.setattr(dispatch, "_fused", lambda module, name: fused)
        monkeypatch.setattr(torch.cuda, "device", lambda index: torch.enable_grad())  # any context
        monkeypatch.setattr(dispatch, "said", set())
        self.run = dispatched(double)

    def __call__(self, x, **kwargs):
        self.ran.clear()
        assert torch.equal(self.run(x, **kwargs), torch.full((3,), 2.0))
        return self.ran


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setenv("PRUNE_KERNELS", "auto")
    return Kernel(monkeypatch)


HERE, THERE = torch.ones(3), torch.ones(3).as_subclass(OnCuda)


def test_auto_is_triton_on_cuda_and_torch_elsewhere(kernel):
    assert kernel(THERE) == ["triton"] and kernel(x=THERE) == ["triton"]
    assert kernel(HERE) == ["torch"]


def test_torch_and_triton_are_obeyed_everywhere(kernel, monkeypatch):
    for wanted in ("torch", "triton"):
        monkeypatch.setenv("PRUNE_KERNELS", wanted)
        assert kernel(HERE) == kernel(THERE) == [wanted]


def test_a_wrong_value_is_an_error(kernel, monkeypatch):
    monkeypatch.setenv("PRUNE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="PRUNE_KERNELS='cuda' must be one of auto, torch, triton"):
        kernel(HERE)


def test_auto_falls_back_and_says_so_once(kernel, caplog):
    caplog.set_level(logging.DEBUG, "prune.kernels")
    kernel.error = RuntimeError("no compiler")
    assert kernel(THERE) == ["triton", "torch"]
    assert kernel(THERE) == kernel(THERE) == ["torch"]  # not tried again
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "double runs in torch" in record.message
    assert "RuntimeError: no compiler" in record.message


@pytest.mark.parametrize("error", [NotServed("a dtype"), torch.OutOfMemoryError("full")])
def test_what_passes_is_tried_again(kernel, caplog, error):
    caplog.set_level(logging.DEBUG, "prune.kernels")
    kernel.error = error
    assert kernel(THERE) == kernel(THERE) == ["triton", "torch"]
    assert len(caplog.records) == 1
    kernel.error = None
    assert kernel(THERE) == ["triton"]


def test_every_kind_of_fallback_is_said_once_whatever_the_shape(kernel, caplog):
    caplog.set_level(logging.DEBUG, "prune.kernels")
    for kind in (NotServed, torch.OutOfMemoryError):
        for tokens in (20000, 30000):
            kernel.error = kind(f"{tokens} tokens")
            assert kernel(THERE) == ["triton", "torch"]
    refused, full = (record.message for record in caplog.records)
    assert refused.endswith("NotServed: 20000 tokens") and full.endswith("OutOfMemoryError: 20000 tokens")
    assert len(dispatch.said) == 2


def test_wrong_arguments_are_no_fault_of_triton(kernel):
    kernel.error = kernel.refuses = ValueError("no such reduce")
    with pytest.raises(ValueError, match="no such reduce"):
        kernel(THERE)
    kernel.error = kernel.refuses = None
    assert kernel(THERE) == ["triton"]


def test_triton_raises(kernel, monkeypatch):
    monkeypatch.setenv("PRUNE_KERNELS", "triton")
    for error in (RuntimeError("no compiler"), NotServed("a dtype")):
        kernel.error = error
        with pytest.raises(type(error)):
            kernel(THERE)
        assert kernel.ran == ["triton"]


def test_gradients_need_torch(kernel):
    wants = torch.ones(3, requires_grad=True).as_subclass(OnCuda)
    kernel.ran.clear()
    assert kernel.run(wants).requires_grad and kernel.ran == ["torch"]
    with torch.no_grad():
        assert kernel(wants) == ["triton"]


def test_the_reference_stays_at_hand():
    assert received_attention.reference.__name__ == received_attention.__name__ == "received_attention"
    assert received_attention.__doc__ == received_attention.reference.__doc__


def test_every_dispatched_function_has_its_triton_version():
    """Same name, same module name, same parameters."""
    pytest.importorskip("triton")
    script = """
import importlib, inspect, pkgutil, prune.kernels
for info in pkgutil.iter_modules(prune.kernels.__path__):
    module = importlib.import_module(f"prune.kernels.{info.name}")
    for name, found in vars(module).items():
        if hasattr(found, "reference") and getattr(found, "__module__", "") == module.__name__:
            fused = getattr(importlib.import_module(f"prune.kernels.fused.{info.name}"), name)
            same = [*inspect.signature(fused).parameters] == [*inspect.signature(found).parameters]
            print(f"{info.name}.{name}={same}")
"""
    found = python(script, TRITON_INTERPRET="1")
    assert "attention.received_attention=True" in found and len(found) > 5
    assert [line for line in found if not line.endswith("=True")] == []


USE = """
import sys, torch, prune
from prune.kernels import cosine_reduce, received_attention
x = torch.ones(1, 3, 2, 4)
received_attention(x, x, 1.0), cosine_reduce(x[0])
print("triton" in sys.modules)
"""


@pytest.mark.parametrize("wanted", ["torch", "auto"])
def test_torch_never_imports_triton(wanted):
    assert python(USE, PRUNE_KERNELS=wanted) == ["False"]


def test_triton_on_the_cpu_is_an_error():
    """Without its interpreter, a kernel has no driver to run on; nothing falls back."""
    pytest.importorskip("triton")
    code = (
        USE.replace("received_attention(x", "try: received_attention(x", 1).split("\ntry")[0]
        + """
try:
    received_attention(x, x, 1.0)
except Exception as error:
    print("raised")
"""
    )
    env = {"PRUNE_KERNELS": "triton", "TRITON_INTERPRET": "0"}
    assert python(code, **env) == ["raised"]


@CUDA
def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    monkeypatch.setenv("PRUNE_KERNELS", "triton")
    x = torch.randn(1, 5, 2, 16, device="cuda:1")
    torch.testing.assert_close(received_attention(x, x, 1.0), received_attention.reference(x, x, 1.0))
