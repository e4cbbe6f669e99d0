"""Pruning inside vLLM, as a plug-in: `hf_overrides={"visual_pruning": {"method": "divprune", "ratio": 0.75}}`.

    options     what is asked for, and what this model can do            no vLLM in here
    reduction   visual tokens and signals of a batch -> the tokens left   "
    mrope       positions of what is left, for models with M-RoPE         "
    tower       signals of the vision encoder, by hooks                   "
    processing  prompts: fewer placeholders, caches that do not mix       vLLM's classes from here on
    llava, qwen2_5_vl    the models

vLLM imports the last three itself, in every process, by the names given in `register`.
"""

from __future__ import annotations

import warnings

OLDEST = (0, 32)
"""Of vLLM. The classes build on methods of its processors and models that older versions have not."""
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "prune.adapters.vllm.llava:PrunedLlava",
    "Qwen2_5_VLForConditionalGeneration": "prune.adapters.vllm.qwen2_5_vl:PrunedQwen2_5_VL",
}
"""vLLM's name of a model -> the class that serves it. Without the option both are vLLM's own in all they do."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.version import __version_tuple__ as found

    if (0, 0) != tuple(found[:2]) < OLDEST:  # 0.0 is a development version
        warnings.warn(
            f"prune does not prune in vLLM {'.'.join(map(str, found[:3]))}; upgrade to "
            f"{'.'.join(map(str, OLDEST))} or later",
            stacklevel=2,
        )
        return
    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)
