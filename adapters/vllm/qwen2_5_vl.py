"""Qwen2.5-VL in vLLM, images. Imported by vLLM only."""

from __future__ import annotations

import torch
from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from prune.adapters.families import SIGNAL_TOWERS
from prune.adapters.vllm import mrope
from prune.adapters.vllm.options import OPTION, Pruning, Served
from prune.adapters.vllm.processing import KEEP, TEXT, PrunedProcessor, UnprunedProcessor, pruning_of
from prune.adapters.vllm.tower import TowerReader
from prune.adapters.vllm.worker import Pruner, check_engine, project_with, rows_of
from prune.errors import ConfigError

TOWER = "qwen2_5_vl_vision"


def served(config) -> Served:
    """What vLLM makes of a Qwen2.5-VL checkpoint."""
    count = config.vision_config.depth
    heads = config.vision_config.num_heads
    return Served("Qwen2.5-VL", "original", SIGNAL_TOWERS[TOWER], TOWER, count, count, count - 1, heads)


def configured(model_config) -> Pruning | None:
    """As `pruning_of`, and the switch vLLM needs to ask a model for the positions of what is left.

    Raises:
        ConfigError: the switch is off.
    """
    pruning = pruning_of(model_config, served)
    if pruning is not None and not model_config.multimodal_config.is_multimodal_pruning_enabled():
        raise ConfigError(
            f"{OPTION} on Qwen2.5-VL needs --video-pruning-rate 0.5 too (video_pruning_rate=0.5 for LLM): vLLM asks a "
            "model for the positions of pruned tokens with that switch only; any rate will do, videos are refused"
        )
    return pruning


class ImagesOnly(stock.Qwen2_5_VLProcessingInfo):
    """Videos would be pruned by vLLM's own method, at the rate of the switch."""

    def get_supported_mm_limits(self):
        return {"image": None}


class UnprunedQwenProcessor(UnprunedProcessor, stock.Qwen2_5_VLMultiModalProcessor):
    pass


class PrunedQwenProcessor(PrunedProcessor, stock.Qwen2_5_VLMultiModalProcessor):
    served = staticmethod(served)
    text_around = True

    def image_counts(self, processed) -> list[int]:
        if "image_grid_thw" not in processed:
            return []
        side = self.info.get_hf_config().vision_config.spatial_merge_size
        return (torch.as_tensor(processed["image_grid_thw"]).prod(-1) // side**2).tolist()


def _info(ctx):
    return (stock.Qwen2_5_VLProcessingInfo if configured(ctx.model_config) is None else ImagesOnly)(ctx)


def _processor(info, dummy_inputs):
    return (PrunedQwenProcessor if isinstance(info, ImagesOnly) else UnprunedQwenProcessor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=stock.Qwen2_5_VLDummyInputsBuilder)
class PrunedQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, whose images are pruned between merger and language model; positions stay what they were.

    vLLM's own ways of placing pruned tokens are not used: `recompute_mrope_positions` in
    `vllm/multimodal/video_prune/evs.py` of 0.32 and 0.33 misplaces the text after an image that is higher than wide,
    and leaves un-pruned positions when a prompt begins in the prefix cache.
    """

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._pruner = None
        pruning = configured(vllm_config.model_config)
        if pruning is None:
            return
        check_engine(pruning, vllm_config)
        if vllm_config.speculative_config is not None:
            raise ConfigError(f"{OPTION} on Qwen2.5-VL does not go with speculative decoding; switch it off")
        if pruning.reducer.tower and "FLASHINFER" in str(self.visual.attn_backend):
            raise ConfigError(f"{pruning.method.name} does not go with FlashInfer in the encoder; choose another one")
        self._side = self.visual.spatial_merge_size
        self._pruner = Pruner(
            pruning,
            vllm_config.scheduler_config.max_num_encoder_input_tokens,
            # The merger's first module: vLLM calls the merger itself past its hooks.
            TowerReader(pruning, self.visual, "qkv", self.visual.merger.ln_q, self._side**2),
            project_with(self.visual.merger, self._side**2, vllm_config.model_config.dtype),
            self.language_model.embed_input_ids,
        )

    # on the worker
    def embed_multimodal(self, **kwargs):
        keep, texts = kwargs.pop(KEEP, None), rows_of(kwargs.pop(TEXT, None))
        if self._pruner is None or keep is None:
            return super().embed_multimodal(**kwargs)
        grid = kwargs["image_grid_thw"]
        shapes = [(high // self._side, wide // self._side) for _, high, wide in grid.tolist()]
        pixels = kwargs["pixel_values"].split(grid.prod(-1).tolist())

        def encode(part: slice):
            image = {"pixel_values": torch.cat(pixels[part]), "image_grid_thw": grid[part]}
            return self._process_image_input(self._parse_and_validate_image_input(**image))

        left = self._pruner.run(shapes, keep.tolist(), texts, encode)
        return tuple(mrope.attach(rows, index, shape) for (rows, index), shape in zip(left, shapes))

    def get_mrope_input_positions(self, input_tokens, mm_features):
        if self._pruner is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        images = []
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            _, high, wide = feature.data["image_grid_thw"].data.tolist()
            at = feature.mm_position
            images.append((at.offset, at.length, (high // self._side, wide // self._side)))
        return mrope.prompt_positions(len(input_tokens), images)

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        if self._pruner is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        features, positions, device = [], mrope_positions, mrope_positions.device
        with stock.gpu_sync_allowed():
            if len(multimodal_embeddings):
                pairs = [mrope.detach(rows) for rows in multimodal_embeddings]
                features = [rows for rows, _ in pairs]
                places = torch.cat([place for _, place in pairs], 1).to(device)
                tokens = torch.as_tensor(input_ids, device=device)
                positions = mrope.place(tokens, self.config.image_token_id, positions, places, num_computed_tokens)
            # The prompt ends in text, whose position is the largest there is.
            return features, positions, int(positions[0, -1]) + 1 - positions.shape[1]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, **kwargs):
        if self._pruner is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            width = self.config.get_text_config().hidden_size
            if multimodal_embeddings[0].shape[-1] != width:
                raise ConfigError(
                    "vLLM did not ask for the positions of pruned tokens (its runner on CPUs never does); Qwen2.5-VL "
                    "cannot be pruned there"
                )
        return super().embed_input_ids(input_ids, multimodal_embeddings, **kwargs)
