"""Engines of the real vLLM on tiny checkpoints, and what Hugging Face's models say under `apply_pruner`."""

from __future__ import annotations

import gc
import os
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image

from prune import apply_pruner

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: several of them, a few seconds each
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
os.environ.update(SETTINGS)  # before vLLM is imported

NEW = 10
TOLERANCE = 1e-4
PROMPT = {
    "llava": "USER: {image}\n{question} ASSISTANT:",
    "qwen": "USER: {image}\n{question} ASSISTANT:",
}
LONG = "How many birds are there beside the blue lake, and of what colour is the house with the red roof?"
IMAGE = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}
POSITIONS = {"llava": "compact", "qwen": "original"}
CLASSES = {"llava": hf.LlavaForConditionalGeneration, "qwen": hf.Qwen2_5_VLForConditionalGeneration}
SWITCH = {"llava": {}, "qwen": {"video_pruning_rate": 0.5}}


@cache
def checkpoint(family: str) -> Path:
    """Made once; `PRUNE_VLLM_CHECKPOINTS` shares them between processes."""
    from vllm_checkpoints import make

    folder = Path(os.environ.setdefault("PRUNE_VLLM_CHECKPOINTS", tempfile.mkdtemp())) / family
    return folder if (folder / "model.safetensors").exists() else make(family, folder)


def photo(seed: int, width: int = 48, height: int = 48) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def prompt(family: str, question: str = "What is shown?", images: int = 1) -> str:
    return PROMPT[family].format(image=" and ".join([IMAGE[family]] * images), question=question)


def request(text: str, images, ratio: float | None = None, **budget) -> dict:
    """What `LLM.generate` takes. `budget` holds further `mm_processor_kwargs`."""
    asked = {**budget, **({} if ratio is None else {"prune_ratio": ratio})}
    return {"prompt": text, "multi_modal_data": {"image": images}, **({"mm_processor_kwargs": asked} if asked else {})}


class Answer:
    """Greedy tokens with their log-probabilities, and the length of the prompt."""

    def __init__(self, tokens: list[int], logprobs: list[float], length: int, cached: int = 0):
        self.tokens, self.logprobs, self.length, self.cached = tokens, logprobs, length, cached

    def check(self, other: Answer, tolerance: float = TOLERANCE) -> float:
        """Equal tokens, and log-probabilities within the tolerance; returns the largest difference."""
        assert self.tokens == other.tokens, f"{self.tokens} is not {other.tokens}"
        worst = max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs))
        assert worst <= tolerance, f"log-probabilities differ by {worst}"
        WORST.append(worst)
        return worst


WORST: list[float] = []
"""Differences of all comparisons of this run."""


@contextmanager
def engine(family: str, pruning: dict | None, **settings):
    """A vLLM engine, as a function from requests to answers."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {} if pruning is None else {"hf_overrides": {"visual_pruning": pruning}, **SWITCH[family]}
    defaults = dict(dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4, block_size=32, seed=0)
    ask = Engine()
    try:
        ask.llm = LLM(str(checkpoint(family)), **{**defaults, **options, **settings})
        if family == "qwen" and pruning is not None:
            _as_on_gpu(ask.llm)
        yield ask
    finally:
        ask.llm = None  # or it ends with the caller's variable, and takes what the next engine has set up with it
        gc.collect()
        cleanup_dist_env_and_memory()


def _as_on_gpu(llm) -> None:
    """vLLM's runner on CPUs forgets to read the switch that its runner on GPUs reads after loading a model."""
    runner = runner_of(llm)
    assert runner.is_multimodal_pruning_enabled is False
    runner.is_multimodal_pruning_enabled = True


def runner_of(llm):
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


class Engine:
    llm = None

    def __call__(self, *requests: dict) -> list[Answer]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True)
        return [read(one) for one in self.llm.generate(list(requests), sampling, use_tqdm=False)]


def read(output) -> Answer:
    tokens = list(output.outputs[0].token_ids)
    logprobs = [found[token].logprob for found, token in zip(output.outputs[0].logprobs, tokens)]
    return Answer(tokens, logprobs, len(output.prompt_token_ids), output.num_cached_tokens or 0)


@cache
def _loaded(family: str):
    model = CLASSES[family].from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    return model, hf.AutoProcessor.from_pretrained(checkpoint(family))


def hugging_face(family: str, method: str | None, text: str, images, ratio: float = 0.0, **options) -> Answer:
    """Greedy answer of the Hugging Face model, pruned by `apply_pruner`; `options` may hold keep= in place of ratio."""
    model, processor = _loaded(family)
    inputs = processor(text=text, images=images, return_tensors="pt")
    budget = {} if "keep" in options else {"ratio": ratio}

    def run():
        found = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        tokens = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, [score.log_softmax(-1)[0, token].item() for score, token in zip(found.scores, tokens)]

    length = inputs["input_ids"].shape[1]
    if method is None:
        return Answer(*run(), length)
    with apply_pruner(model, method, positions=POSITIONS[family], **budget, **options) as handle:
        tokens, logprobs = run()
        dropped = sum(image.tokens - len(image.kept) for image in handle.last.images)
    return Answer(tokens, logprobs, length - dropped)


def same(family: str, method: str, options: dict, ask, *cases) -> None:
    """Every case (text, images, ratio), asked alone, is answered as Hugging Face's model answers it."""
    for text, images, ratio in cases:
        expected = hugging_face(family, method, text, images, ratio, **options)
        (answer,) = ask(request(text, images, ratio))
        assert answer.length == expected.length
        answer.check(expected)
