"""lmms-eval's `huggingface` class on any model `prune eval` loads.

Of lmms-eval 0.7.3's own two things fail under transformers 5: it loads vision-language models with `AutoModel`, which
cannot generate, and calls processors with `audios`, which they refuse.
"""

from __future__ import annotations

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.chat import huggingface

from prune.loading import load_model


class Processor:
    """A processor called with lists of media, of which empty ones are left out; else the processor's own."""

    def __init__(self, processor):
        self._own = processor

    def __getattr__(self, name: str):
        return getattr(self._own, name)

    def __call__(self, images=None, videos=None, audios=None, **inputs):
        media = {"images": images, "videos": videos, "audio": audios}
        return self._own(**{name: given for name, given in media.items() if given}, **inputs)


class Huggingface(huggingface.Huggingface):
    """lmms-eval's loop over a model and processor loaded as `prune eval` loads them, one device per process.

    Args:
        pretrained: "scenes-llava" (built in), a folder or a hub name.
        device: None takes the GPU if there is one, and each of several processes its own.
        dtype, attn_implementation: as `dtype` and `attention` of `prune.loading.load_model`.
        batch_size: requests per call of `generate`, padded on the left.
        system_prompt: text, or a file with it, put before every conversation.
        use_cache: whether to generate with a KV cache.

    Raises:
        UserError: no such model or device.
    """

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int = 1,
        system_prompt: str | None = None,
        use_cache: bool = True,
    ):
        lmms.__init__(self)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = str(self.accelerator.device) if self._world_size > 1 else device
        self._model, processor = load_model(pretrained, device, dtype, attn_implementation)
        processor.tokenizer.padding_side = "left"  # generation goes on at the right end
        self.processor, self._tokenizer = Processor(processor), processor.tokenizer
        self._config, self._device, self.device_map = self._model.config, self._model.device, ""
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.batch_size_per_gpu, self.use_cache = int(batch_size), use_cache
