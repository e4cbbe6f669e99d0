"""What the hub of the tests has under the names that README and docs/ use: small untrained models, a few questions."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
from fake_hub import FakeHub
from PIL import Image
from test_docs_blocks import DEPTH

LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"
VIT = "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
ASKED = "Is there a house in the picture? Answer yes or no."


def fill(hub: FakeHub, served: bool) -> None:
    """Put it all there. `served`: models that vLLM can run on a CPU, in place of those of `prune show`, and no data."""
    for name, family, demo in ((LLAVA, "llava", "llava"), (QWEN, "qwen", "qwen2.5-vl")):
        with tempfile.TemporaryDirectory() as folder:
            _servable(family, folder) if served else save_demo(demo, folder)
            hub.put(name, {file.name: file.read_bytes() for file in Path(folder).iterdir()})
    if served:
        return
    hub.put(VIT, {"model.safetensors": _vit(), "config.json": b'{"architecture": "vit_base_patch16_224"}'})
    asked = [{"question": ASKED, "answer": answer, "category": "existence"} for answer in ("yes", "no") * 3]
    pictures = [photo(seed) for seed in range(len(asked))]
    popes = [{"image": picture} | row for picture, row in zip(pictures, asked)]
    _put(hub, "lmms-lab/POPE", "test", default=popes)
    pairs = [  # MME asks two questions of a picture, and scores perception and cognition
        row | {"question_id": f"{kind}/{i // 2}.png", "image": pictures[i // 2], "category": kind}
        for kind in ("existence", "code_reasoning")
        for i, row in enumerate(asked)
    ]
    _put(hub, "lmms-lab-encoder/MME", "test", default=pairs)
    shown = [{"id": str(i), "image": picture} for i, picture in enumerate(pictures)]
    told = [row | {"id": str(i), "imageId": str(i), "fullAnswer": row["answer"]} for i, row in enumerate(asked)]
    gqa = {"testdev_balanced_images": shown, "testdev_balanced_instructions": told}
    _put(hub, "lmms-lab-encoder/GQA", "testdev", **gqa)


def photo(seed: int, size: int = 224) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BILINEAR)


def save_demo(family: str, folder: str | Path) -> None:
    """A model of `prune show` and its processor, as `from_pretrained` wants them."""
    from prune.evals import demo

    demo._LAYERS = DEPTH  # as in the models they stand for: methods that act in the decoder reach every budget
    for one in demo.load_demo(family):
        one.save_pretrained(folder)


def _servable(family: str, folder: str) -> None:
    from vllm_checkpoints import make

    make(family, Path(folder))


def _vit() -> bytes:
    import timm
    from safetensors.torch import save

    return save(timm.create_model("vit_base_patch16_224").state_dict())


def _put(hub: FakeHub, name: str, split: str, **configurations: list[dict]) -> None:
    """A dataset of one split, with a card that names its configurations."""
    files, card = {}, []
    for config, rows in configurations.items():
        file = io.BytesIO()
        datasets.Dataset.from_list(rows).to_parquet(file)
        path = f"{config}/{split}-00000-of-00001.parquet"
        files[path] = file.getvalue()
        card.append({"config_name": config, "data_files": [{"split": split, "path": path}]})
    files["README.md"] = f"---\n{json.dumps({'configs': card})}\n---\n".encode()  # JSON is YAML
    hub.put(f"datasets/{name}", files)
