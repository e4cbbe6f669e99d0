"""Tiny checkpoints with tokenizer, processor and chat template, made from their configs. Nothing is downloaded.

vLLM's attention on CPUs wants 32 channels a head. Weights are drawn wide, so that pictures and pruning change the text.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE, VIDEO, START, END = "<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
LINES = [
    "What is shown in the picture?",
    "USER: ASSISTANT: a red house beside a blue lake",
    "How many birds are there?",
]
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def make(family: str, folder: Path) -> Path:
    """Write the checkpoint of "llava" or "qwen" into `folder`."""
    {"llava": _llava, "qwen": _qwen}[family](folder)
    return folder


def _tokenizer(special: list[str], template: str) -> hf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", *special], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES * 10, trainer)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = template
    return fast


def _llava(folder: Path) -> None:
    tokenizer = _tokenizer([IMAGE], TEMPLATE.replace("IMAGE", IMAGE))
    vision = hf.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=48,
        patch_size=8,
        projection_dim=48,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(vocab_size=512, **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=36,
    )
    _save(hf.LlavaForConditionalGeneration(config), folder)
    _published_names(folder / "model.safetensors")
    pixels = dict(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(**pixels),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def _qwen(folder: Path) -> None:
    image = "<|image_pad|>"
    tokenizer = _tokenizer([image, VIDEO, START, END], TEMPLATE.replace("IMAGE", START + image + END))
    ids = tokenizer.convert_tokens_to_ids
    text = hf.Qwen2_5_VLTextConfig(
        vocab_size=512,
        **{name: value for name, value in TEXT.items() if name != "head_dim"} | {"hidden_size": 128},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    )
    vision = dict(
        depth=4,
        hidden_size=48,
        intermediate_size=64,
        num_heads=3,
        out_hidden_size=128,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=16,
        fullatt_block_indexes=[1, 3],
    )
    config = hf.Qwen2_5_VLConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        image_token_id=ids(image),
        video_token_id=ids(VIDEO),
        vision_start_token_id=ids(START),
        vision_end_token_id=ids(END),
    )
    _save(hf.Qwen2_5_VLForConditionalGeneration(config), folder)
    pixels = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
    size = {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
    hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size, **pixels),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def _save(model: torch.nn.Module, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                wide = 1.0 if "embed_tokens" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * wide)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def _published_names(file: Path) -> None:
    """transformers 5 drops a level that published LLaVA checkpoints, and so vLLM, have."""
    tensors = load_file(file)
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model.")
        if "vision_tower." in name and "vision_model" not in name
        else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
