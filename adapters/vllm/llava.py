"""LLaVA-1.5 in vLLM. Imported by vLLM only."""

from __future__ import annotations

from vllm.model_executor.models import llava
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY

from prune.adapters.families import SIGNAL_TOWERS
from prune.adapters.vllm.options import Served
from prune.adapters.vllm.processing import KEEP, TEXT, PrunedProcessor, UnprunedProcessor, pruning_of
from prune.adapters.vllm.tower import TowerReader
from prune.adapters.vllm.worker import Pruner, check_engine, project_with, rows_of
from prune.errors import UnsupportedModelError

TOWER = "clip_vision_model"


def served(config) -> Served:
    """What vLLM makes of a LLaVA checkpoint.

    Raises:
        UnsupportedModelError: another encoder than CLIP, several feature layers, or CLS among the features.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type != TOWER or not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise UnsupportedModelError(
            "in vLLM LLaVA is pruned with a CLIP encoder, one feature layer and the select strategy 'default' only; "
            f"this one has {vision.model_type}, {layer} and {config.vision_feature_select_strategy!r}"
        )
    count = vision.num_hidden_layers
    built = layer if layer >= 0 else count + layer + 1
    return Served(
        "LLaVA-1.5", "compact", SIGNAL_TOWERS[TOWER], TOWER, count, built, built - 1, vision.num_attention_heads
    )


class UnprunedLlavaProcessor(UnprunedProcessor, LlavaMultiModalProcessor):
    pass


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    served = staticmethod(served)

    def image_counts(self, processed) -> list[int]:
        images = len(processed["pixel_values"]) if "pixel_values" in processed else 0
        return [self.info.get_max_image_tokens()] * images


def _processor(info, dummy_inputs):
    config = info.ctx.model_config
    if pruning_of(config, served) is not None:
        return PrunedLlavaProcessor(info, dummy_inputs)
    if isinstance(info, llava.LlavaProcessingInfo):
        return UnprunedLlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=llava._build_llava_or_pixtral_hf_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlava(LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose images are pruned between projector and language model."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._pruner = None
        pruning = pruning_of(vllm_config.model_config, served)
        if pruning is None:
            return
        check_engine(pruning, vllm_config)
        self._side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        self._pruner = Pruner(
            pruning,
            vllm_config.scheduler_config.max_num_encoder_input_tokens,
            TowerReader(pruning, self.vision_tower.vision_model, "qkv_proj", self.multi_modal_projector),
            project_with(self.multi_modal_projector, 1, vllm_config.model_config.dtype),
            self.language_model.embed_input_ids,
        )

    def embed_multimodal(self, **kwargs):
        keep, texts = kwargs.pop(KEEP, None), rows_of(kwargs.pop(TEXT, None))
        if self._pruner is None or keep is None:
            return super().embed_multimodal(**kwargs)
        pixels = kwargs.pop("pixel_values")
        encode = super().embed_multimodal
        shapes = [(self._side, self._side)] * len(pixels)
        left = self._pruner.run(shapes, keep.tolist(), texts, lambda part: encode(pixel_values=pixels[part], **kwargs))
        return [rows for rows, _ in left]
