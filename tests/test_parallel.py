"""A model in pieces: split over devices and the disk by accelerate, or over two processes by tensor parallelism.

What is kept and what comes out must be what the same pruner does on the whole model, which the contract suite checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from matrix import DECODER, ROWS, Row
from reference import assert_close
from tiny import SPECIAL, Image, Sample, build, collate, mixed_batch, pristine, shared, with_positions
from torch import Tensor, nn

from prune import Handle, UnsupportedMethodError

SHARDED = ("llava", "qwen2_5_vl")
WORLD = 2


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def rows_for(family: str) -> list[Row]:
    return [row for row in ROWS if family not in row.exclude]


def kept_of(handle: Handle) -> list[dict]:
    return [{site: kept.tolist() for site, kept in image.stages.items()} for image in handle.last.images]


@cache
def whole(row: int, family: str) -> tuple[list[dict], Tensor]:
    """Kept tokens and logits of the model in one piece."""
    with ROWS[row].attach(shared(family)) as handle:
        logits = shared(family)(**with_positions(collate(mixed_batch(family)))).logits
        return kept_of(handle), logits


# ------------------------------------------------------------------------------------------------ accelerate's hooks
def hooks_of(model: nn.Module) -> list[tuple]:
    """`fingerprint` wants modules whose `forward` is a method, and accelerate replaces it."""
    return [(*m._forward_pre_hooks, *m._forward_hooks, getattr(m, "_hf_hook", None)) for m in model.modules()]


def _mixed(model: nn.Module, folder: Path) -> None:
    """Odd decoder layers and the head lie on the disk."""
    core = model.model
    count = len(core.language_model.layers)
    layers = {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(count)}
    names = [f"model.{name}" for name, _ in core.named_children() if name != "language_model"]
    names += [f"model.language_model.{name}" for name, _ in core.language_model.named_children() if name != "layers"]
    at = {**dict.fromkeys(names, "cpu"), **layers, "lm_head": "disk"}
    dispatch_model(model, at, offload_dir=folder)


def _disk(model: nn.Module, folder: Path) -> None:
    """Everything lies on the disk, and comes in module by module."""
    dispatch_model(model, {name: "disk" for name, _ in model.named_children()}, offload_dir=folder, main_device="cpu")


def _modules(model: nn.Module, folder: Path) -> None:
    """Weights are there only while the module that owns them runs."""
    cpu_offload(model, execution_device="cpu")


def _layers(model: nn.Module, folder: Path) -> None:
    """Weights are there only while their decoder layer runs."""
    kind = type(model.model.language_model.layers[0]).__name__
    cpu_offload(model, execution_device="cpu", preload_module_classes=[kind])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("split", [_mixed, _disk, _modules, _layers], ids=lambda split: split.__name__[1:])
def test_offloaded(split, family, tmp_path):
    model, inputs = build(family), with_positions(collate(mixed_batch(family)))
    split(model, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters()), "nothing is off-loaded"
    assert_close(model(**inputs).logits, pristine(family)(**inputs).logits)
    before = hooks_of(model)
    for row in rows_for(family):
        with row.attach(model) as handle:
            try:
                logits = model(**inputs).logits
            except UnsupportedMethodError as error:
                assert split is _layers and "preload_module_classes" in str(error)
                continue
            kept, want = whole(ROWS.index(row), family)
            assert kept_of(handle) == kept, row
            assert_close(logits, want)
        assert hooks_of(model) == before, row


# --------------------------------------------------------------------------------------------- tensor parallelism
def turns(family: str) -> tuple[dict, Tensor]:
    """A prompt with an image, and what follows it in the second turn."""
    return collate([Sample(family, [4, Image(0), 6], 1)]), torch.tensor([[9, 10, 11]])


def run_all(family: str, model: nn.Module) -> dict:
    """What every row keeps and gives, and a generation with a second turn."""
    found: dict = {}
    for row in rows_for(family):
        with row.attach(model) as handle:
            logits = model(**with_positions(collate(mixed_batch(family)))).logits
            found[str(row)] = kept_of(handle), logits
    with DECODER.attach(model):
        first, more = turns(family)
        out = model.generate(**first, max_new_tokens=3, do_sample=False, suppress_tokens=SPECIAL,
                             return_dict_in_generate=True)  # fmt: skip
        second = model(input_ids=more, past_key_values=out.past_key_values).logits
    found["two turns"] = out.sequences.tolist(), second
    return found


def work(rank: int, folder: Path) -> None:
    """One of the processes."""
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    found = {}
    for family in SHARDED:
        config = DistributedConfig(tp_size=WORLD)
        model = type(build(family)).from_pretrained(folder / family, distributed_config=config).eval()
        model.generation_config = build(family).generation_config
        weight = model.model.language_model.layers[0].self_attn.q_proj.weight
        assert 2 * len(weight.to_local()) == len(weight), "the layer is not sharded"
        with torch.no_grad():
            found[family] = run_all(family, model)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every process found."""
    pytest.importorskip("transformers.distributed")
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    for family in SHARDED:
        build(family).save_pretrained(folder / family)
    environment = [
        {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
        for rank in range(WORLD)
    ]
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for rank, env in enumerate(environment)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(text[-3000:] for text in said)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("family", SHARDED)
def test_tensor_parallel(ranks, family):
    """Every process keeps the same tokens, and they compute together what one computes alone."""
    alone = run_all(family, shared(family))
    for found in ranks:
        assert found[family].keys() == alone.keys()
        for name, (kept, logits) in alone.items():
            assert found[family][name][0] == kept, name
            assert_close(found[family][name][1], logits)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
