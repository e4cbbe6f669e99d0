"""vLLM's side of the prompt: how many placeholders an image gets, and what its caches know it by.

The number of tokens left travels with the image as a field, so that prompt and model agree by construction; vLLM itself
would cut surplus rows off without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement

from prune.adapters.vllm.options import OPTION, REQUEST, Pruning, Served, check_unpruned, strip
from prune.adapters.vllm.reduction import texts_after
from prune.budget import Budget
from prune.errors import ConfigError, InputError

KEEP, TEXT = "prune_num_keep", "prune_text"
WHOLE = {"prune_ratio": 0.0}


def pruning_of(model_config, served: Callable[[object], Served]) -> Pruning | None:
    """The server's pruning, or None without the option.

    Raises:
        ConfigError, BudgetError, UnsupportedMethodError: the option is wrong; the server does not start.
    """
    found = getattr(model_config.hf_config, OPTION, None)
    multimodal = model_config.multimodal_config
    if misplaced := [key for key in REQUEST if key in (multimodal.mm_processor_kwargs or {})]:
        raise ConfigError(f"{misplaced[0]} is for requests; the server's budget goes into {OPTION} as ratio or keep")
    if found is None:
        return None
    pruning = Pruning.parse(found, served(model_config.hf_config))
    if multimodal.enable_mm_embeds:
        raise ConfigError(f"{OPTION} does not go with enable_mm_embeds: ready-made embeddings would not be pruned")
    return pruning


class UnprunedProcessor(BaseMultiModalProcessor):
    """Mixed into vLLM's processor where the server does not prune: only refuses budgets."""

    def apply(self, inputs, timing_ctx):
        check_unpruned(inputs.hf_processor_mm_kwargs)
        return super().apply(inputs, timing_ctx)


class PrunedProcessor(BaseMultiModalProcessor):
    """Mixed into vLLM's processor of a model where the server prunes.

    A subclass gives `image_counts` and `served`, and says whether images must be followed by text.
    """

    served: Callable[[object], Served]
    text_around = False
    """Whether every image must have a text token before and the prompt one at its end (M-RoPE)."""

    def image_counts(self, processed: Mapping) -> list[int]:
        """Visual tokens of every image the Hugging Face processor returned, un-pruned."""
        raise NotImplementedError

    @cached_property
    def pruning(self) -> Pruning:
        return pruning_of(self.info.ctx.model_config, type(self).served)

    @cached_property
    def image_token(self) -> int:
        config = self.info.get_hf_config()
        token = getattr(config, "image_token_id", None)
        return config.image_token_index if token is None else token

    # requests
    def get_dummy_inputs(self, *args, **kwargs):
        """The largest image there can be: with a request of its own every image may stay whole."""
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs=WHOLE)

    def apply(self, inputs, timing_ctx):
        request = inputs.hf_processor_mm_kwargs
        if TEXT in request or KEEP in request:
            raise ConfigError(f"{TEXT} and {KEEP} are not for requests")
        budget = self.pruning.asked(request)
        if self.pruning.reads_text and budget.ratio != 0:
            images = inputs.mm_data_items.get_all_counts().get("image", 0)
            texts = texts_after(inputs.prompt, self.image_token, images)
            if not all(texts):
                raise InputError(
                    f"{self.pruning.method.name} reads the text after the image, and there is none; put the question "
                    "after the image, or send prune_ratio=0"
                )
            inputs = replace(inputs, hf_processor_mm_kwargs={**request, TEXT: texts})
        if self.text_around and request is not WHOLE:
            self._check_text(inputs.prompt)
        # Refuse nothing behind this line: what the caches of this process hold is taken to have reached the engine.
        return super().apply(inputs, timing_ctx)

    def _check_text(self, prompt: list[int]) -> None:
        image = [token == self.image_token for token in prompt]
        if image[-1:] == [True] or any(map(all, zip(image, image[1:]))):
            raise InputError(
                "with pruning every image needs text before it and the prompt text at its end, or positions are "
                "unknown; use the chat template, or put <|vision_start|> and <|vision_end|> around every image"
            )

    # caches
    def _get_mm_hashes(self, inputs):
        request = inputs.hf_processor_mm_kwargs
        budget, texts = self.pruning.asked(request), request.get(TEXT)
        plain = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=strip(request, TEXT)))
        return {
            modality: [self.pruning.stamp(one, budget, texts and texts[i]) for i, one in enumerate(hashes)]
            for modality, hashes in plain.items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs, mm_is_cached):
        request = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        if TEXT not in request:
            return request
        missing = [text for text, cached in zip(request[TEXT], mm_is_cached.get("image", [])) if not cached]
        return {**request, TEXT: missing}

    # images
    def _call_hf_processor(self, hf_data, hf_kwargs):
        return super()._call_hf_processor(hf_data, strip(hf_kwargs, TEXT))

    def _postprocess_hf_mm_data(self, mm_inputs, hf_processor_mm_kwargs, processed_data):
        request = hf_processor_mm_kwargs
        processed = super()._postprocess_hf_mm_data(mm_inputs, strip(request, TEXT), processed_data)
        if counts := self.image_counts(processed):
            budget: Budget = self.pruning.asked(request)
            processed[KEEP] = torch.tensor([self.pruning.kept(count, budget) for count in counts])
            if TEXT in request:
                processed[TEXT] = [torch.tensor(text) for text in request[TEXT]]
        return processed

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        fields = dict(super()._get_mm_fields_config(hf_inputs, strip(hf_processor_mm_kwargs, TEXT)))
        own = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (KEEP, TEXT)}
        return fields | {name: field for name, field in own.items() if name in hf_inputs}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        def kept(image: int) -> list[int]:
            return [self.image_token] * int(out_mm_kwargs["image"][image][KEEP].data)

        return [PromptReplacement(modality="image", target=[self.image_token], replacement=kept)]
