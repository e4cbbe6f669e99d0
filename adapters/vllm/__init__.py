"""Pruning inside vLLM, as a plug-in: `hf_overrides={"visual_pruning": {"method": "divprune", "ratio": 0.75}}`.

    options     what is asked for, and what this model can do            no vLLM in here
    reduction   visual tokens and signals of a batch -> the tokens left   "
    mrope       positions of what is left, for models with M-RoPE         "
    tower       signals of the vision encoder, by hooks                   "
    processing  prompts: fewer placeholders, caches that do not mix       vLLM's classes from here on
    llava, qwen2_5_vl    the models
    guard       what vLLM asks for these by name: ours, or its own where ours does not fit the vLLM that is installed

vLLM imports the last one itself, in every process, by the names given in `register`.
"""

from __future__ import annotations

import warnings

OLDEST = (0, 32)
"""Of vLLM. The classes build on methods of its processors and models that older versions have not."""
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "prune.adapters.vllm.guard:PrunedLlava",
    "Qwen2_5_VLForConditionalGeneration": "prune.adapters.vllm.guard:PrunedQwen2_5_VL",
}
"""vLLM's name of a model -> the class that serves it. Without the option both are vLLM's own in all they do."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, maybe more than once."""
    try:
        from vllm import ModelRegistry
        from vllm.version import __version_tuple__ as found

        if (0, 0) != tuple(found[:2]) < OLDEST:  # 0.0 is a development version
            raise ImportError(f"it is {'.'.join(map(str, found[:3]))}, and {'.'.join(map(str, OLDEST))} is the oldest")
        for architecture, target in ARCHITECTURES.items():
            ModelRegistry.register_model(architecture, target)
    except Exception as error:  # vLLM calls this for every model: no failure of ours may stop it
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"prune does not prune in this vLLM ({reason}); install another version", stacklevel=2)
