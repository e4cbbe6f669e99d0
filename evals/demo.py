"""Demo models: the embedded default of `prune show`, so that it works with no download and no network.

They have the architecture and the real processors of LLaVA-1.5, LLaVA-NeXT and Qwen2.5-VL at a few million parameters,
and SEEDED RANDOM WEIGHTS. Untrained: they show the mechanism (which tokens a method drops, where, how many), they do
not understand a picture and their answers are noise. What makes the pictures meaningful nevertheless: a random
projection keeps distances (Johnson-Lindenstrauss), and the residual branches are kept small, so that two visual tokens
are as similar as their patches of pixels are. Methods that compare features behave as they would on a real tower;
what attention-based methods prefer is arbitrary.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

IMAGE, VIDEO, VISION_START, VISION_END, END = "<image>", "<video>", "<vision>", "</vision>", "</s>"
_WIDTH, _LAYERS = 128, 6
_CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE_SLOT\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_demo(family: str = "llava", seed: int = 0):
    """A demo model and its processor, as `from_pretrained` would give them.

    Args:
        family: one of `DEMOS`: "llava" (336 pixels, one 24 x 24 grid), "llava-next" (tiles), "qwen2.5-vl" (native
            resolution).
        seed: of the weights; the caller's random state is left alone.

    Returns:
        (model, processor): an fp32 CPU model in eval mode, and a processor with a chat template.

    Raises:
        ValueError: no such demo.
    """
    if family not in DEMOS:
        raise ValueError(f"no demo model {family!r}; there are {', '.join(DEMOS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = DEMOS[family]()
        _initialise(model)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Random weights under which features follow pixels: unit-gain projections, small residual branches."""
    for name, parameter in sorted(model.named_parameters()):
        if "norm" in name.lower() or "ln_q" in name:
            parameter.fill_(float(name.endswith("weight")))
        elif name.endswith("bias"):
            parameter.zero_()
        elif "position_embedding" in name:
            parameter.normal_(std=0.02)
        elif parameter.dim() < 2 or "embed_tokens" in name:
            parameter.normal_()
        else:
            branch_end = any(end in name for end in ("out_proj", "o_proj", "fc2", "down_proj", "attn.proj"))
            parameter.normal_(std=(0.2 if branch_end else 1.0) / math.sqrt(parameter[0].numel()))


def _tokenizer():
    """Every byte is a token: any text, no vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": VIDEO,
            "vision_start_token": VISION_START,
            "vision_end_token": VISION_END,
        },
    )


def _text_config(tokenizer, **more) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 16384,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _clip_config() -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": _WIDTH,
    }


def _clip_llava(name: str):
    """LLaVA-1.5 ("Llava", one crop) or LLaVA-NeXT ("LlavaNext", tiles): the same sizes, other classes."""
    import transformers

    tokenizer = _tokenizer()
    config = getattr(transformers, f"{name}Config")(
        vision_config=_clip_config(),
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=576,
    )
    images = transformers.LlavaNextImageProcessor if name == "LlavaNext" else transformers.CLIPImageProcessor
    processor = getattr(transformers, f"{name}Processor")(
        images(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT.replace("IMAGE_SLOT", IMAGE),
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _qwen2_5_vl():
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "out_hidden_size": _WIDTH,
            "num_heads": 4,
            "fullatt_block_indexes": [3],
        },
        text_config=_text_config(tokenizer, rope_parameters=rope),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=_CHAT.replace("IMAGE_SLOT", VISION_START + IMAGE + VISION_END),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


DEMOS = {
    "llava": partial(_clip_llava, "Llava"),
    "llava-next": partial(_clip_llava, "LlavaNext"),
    "qwen2.5-vl": _qwen2_5_vl,
}
