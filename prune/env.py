"""What bug reports need: versions, devices, attention back-ends."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "accelerate",
    "peft",
    "timm",
    "open-clip-torch",
    "triton",
    "flash-attn",
    "vllm",
    "sglang",
    "lmms-eval",
    "numpy",
    "pillow",
    "scikit-learn",
    "typer",
    "rich",
)


def environment() -> dict[str, dict]:
    """The machine and its software, as plain JSON values.

    Returns:
        Sections "versions" (None for what is not installed), "devices", "attention" (back-end -> usable here) and
        "prune" (methods, plug-ins, environment variables).
    """
    return {
        "versions": _versions(),
        "devices": _devices(),
        "attention": _attention(),
        "prune": _ours(),
    }


def _versions() -> dict[str, str | None]:
    from prune._version import __version__

    found: dict[str, str | None] = {"prune": __version__}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _devices() -> dict[str, object]:
    import torch

    devices: dict[str, object] = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}",
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
    }
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            devices[f"cuda:{number}"] = (
                f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}"
            )
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return devices


def _attention() -> dict[str, bool]:
    """By name of `attn_implementation`, then the kernels PyTorch may choose from for SDPA on a GPU."""
    import torch
    from transformers import utils

    def usable(check: str) -> bool:  # the checks come and go between versions
        return bool(getattr(utils, check, lambda: False)())

    gpu = torch.cuda.is_available()
    return {
        "eager": True,
        "sdpa": True,
        "flash_attention_2": usable("is_flash_attn_2_available"),
        "flash_attention_3": usable("is_flash_attn_3_available"),
        "flex_attention": usable("is_torch_flex_attn_available"),
        "sdpa: flash kernel": gpu and torch.backends.cuda.flash_sdp_enabled(),
        "sdpa: memory-efficient kernel": gpu and torch.backends.cuda.mem_efficient_sdp_enabled(),
        "sdpa: cuDNN kernel": gpu and torch.backends.cuda.cudnn_sdp_enabled(),
    }


def _ours() -> dict[str, object]:
    from prune.registry import ENTRY_POINT_GROUP, list_methods

    switches = {name: value for name, value in os.environ.items() if name.startswith("PRUNE_")}
    return {
        "installed in": os.path.dirname(os.path.abspath(__file__)),
        "interpreter": sys.executable,
        "methods": len(list_methods()),
        "plug-ins": [f"{entry.name} = {entry.value}" for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)],
        "switches": switches,
    }
