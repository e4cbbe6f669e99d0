"""Small untrained checkpoints with processors, on disk, for lmms-eval's model classes that the built-in model is not.

Every tower is made small and every decoder has few layers; the tokenizer has one token per byte.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from prune.evals.demo import _CHAT, _initialise, _text_config, _tokenizer, load_demo

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def qwen2_5_vl():
    return load_demo("qwen2.5-vl")


def qwen3_vl():
    tokenizer = _tokenizer()
    config = hf.Qwen3VLConfig(
        vision_config=dict(
            depth=4,
            hidden_size=64,
            out_hidden_size=128,
            intermediate_size=128,
            num_heads=4,
            deepstack_visual_indexes=[0, 1, 2],
        ),
        text_config=_text_config(tokenizer, head_dim=32, rope_parameters=ROPE),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=16),
        tokenizer,
        hf.Qwen3VLVideoProcessor(),
        chat_template=_CHAT.replace("IMAGE_SLOT", "<vision><image></vision>"),
    )
    return hf.Qwen3VLForConditionalGeneration(config), processor


def internvl():
    tokenizer = _tokenizer()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    config = hf.InternVLConfig(
        vision_config=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=[32, 32],
            patch_size=[4, 4],
        ),
        text_config=hf.Qwen2Config(**_text_config(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=16,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        hf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=16,
        chat_template=_CHAT.replace("IMAGE_SLOT", "<image>"),
    )
    return hf.InternVLForConditionalGeneration(config), processor


def save(build, folder: Path) -> str:
    """Write what `build` makes, with seeded weights; returns the folder's path."""
    torch.manual_seed(0)
    model, processor = build()
    _initialise(model)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
