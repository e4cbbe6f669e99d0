"""What vLLM loads: our class of a model, or vLLM's own where ours does not fit the vLLM that is installed.

A plug-in must not take away a model that nobody asked it to prune. Imported by vLLM only.
"""

from __future__ import annotations

import warnings
from importlib import import_module

from prune.adapters.vllm.options import OPTION
from prune.errors import ConfigError

STOCK = {
    "PrunedLlava": ("llava", "LlavaForConditionalGeneration"),
    "PrunedQwen2_5_VL": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
}
"""Our class -> the module of it, here and among vLLM's models, and the class it extends."""


def __getattr__(name: str) -> type:
    if name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, stock = STOCK[name]
    try:
        return getattr(import_module(f"prune.adapters.vllm.{module}"), name)
    except Exception as error:  # names inside vLLM move between versions
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"prune does not fit this vLLM ({reason}); {stock} is served as without it", stacklevel=2)
    return _unpruned(getattr(import_module(f"vllm.model_executor.models.{module}"), stock), reason)


def _unpruned(base: type, reason: str) -> type:
    def __init__(self, *, vllm_config, prefix: str = ""):
        if getattr(vllm_config.model_config.hf_config, OPTION, None) is not None:
            raise ConfigError(
                f"{OPTION} does not work in this vLLM ({reason}); install another version, see docs/vllm.md"
            )
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": __name__})
