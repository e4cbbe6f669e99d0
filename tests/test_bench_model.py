"""`bench model` measures every case, turns what breaks into a row, and counts FLOPs without running anything."""

import csv
import json
from fractions import Fraction

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from prune import apply_pruner, get_method
from prune.evals import bench_model
from prune.evals.accounting import account, account_full
from prune.evals.bench import app
from prune.evals.bench_geometries import GEOMETRIES, IMAGE, TEXT, BenchGeometry


def _config(small):
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=64
        ),
        image_token_index=IMAGE,
        architectures=["LlavaForConditionalGeneration"],
    )


TINY = BenchGeometry("tiny", _config, (16, 16))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)


def run(*arguments):
    start = ["model", *arguments, "--geometry", "tiny", "--batch", "2", "--dtype", "float32", "--device", "cpu"]
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, [*start, "--rounds", "2", "--steps", "2", "--threads", "1"])
    torch.set_num_threads(threads)
    return result


def rows(*arguments, code=0):
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return {row["method"]: row for row in map(json.loads, result.stdout.splitlines())}


def test_a_group_has_the_model_its_limit_and_the_methods(tmp_path):
    found = rows("[uf]*v*", "--ratio", "3/4", "--csv", str(tmp_path / "a" / "b.csv"), "--plots", str(tmp_path))
    assert list(found)[:2] == ["un-pruned", "short sequence"] and "fastv" in found
    full, short, fastv = found["un-pruned"], found["short sequence"], found["fastv"]
    assert (full["visual"], full["kept"], short["kept"], fastv["kept"]) == (16, 16, 4, 4)
    assert full["ttft_speedup"] == full["ttft_to_short"] == short["ttft_to_short"] == full["decode_speedup"] == 1
    per_token = 4 * 2 * 16 * 4 * 2 / 2**20  # layers x (k, v) x channels x bytes x batch
    assert full["kv_mib"] == pytest.approx((16 + TEXT) * per_token, abs=1e-3)
    assert fastv["kv_mib"] == pytest.approx((4 + TEXT + 12 / 4) * per_token, abs=1e-3)  # one layer of four sees all
    assert fastv["selection_ms"] > 0 and fastv["flops_speedup"] > 1 and fastv["peak_mib"] is None
    assert fastv["tokens_low"] <= fastv["tokens_per_s"] <= fastv["tokens_high"]
    assert fastv["ttft_low"] <= fastv["ttft_ms"] <= fastv["ttft_high"]
    with (tmp_path / "a" / "b.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == list(found)
    keys = ("geometry", "scale", "batch", "dtype", "ratio", "device", "threads", "torch", "transformers")
    assert all(line[key] for line in lines for key in keys)
    assert (tmp_path / "tiny-full-batch2.png").stat().st_size > 1000


def test_what_breaks_is_a_row(monkeypatch):
    def full(self, tokens, keep):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(self, tokens, keep):
        raise ValueError("no such thing")

    monkeypatch.setattr(type(get_method("uniform")), "reduce", full)
    monkeypatch.setattr(type(get_method("divprune")), "reduce", broken)
    found = rows("[ud]*", "--ratio", "3/4", code=1)
    assert (found["uniform"]["note"], found["uniform"]["ttft_ms"]) == ("out of memory", None)
    assert found["divprune"]["note"] == "broke: ValueError: no such thing"
    assert found["dart"]["ttft_ms"] > 0 and found["dart"]["note"] == ""
    assert "out of memory" in run("u*", "--ratio", "3/4").output


def test_a_model_too_large_is_a_row(monkeypatch, tmp_path):
    def build(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(TINY), "build", build)
    assert "out of memory" in run("uniform", "--csv", str(tmp_path / "a.csv")).output
    with (tmp_path / "a.csv").open() as file:
        assert [line["note"] for line in csv.DictReader(file)] == ["out of memory"]


def test_flops_are_those_of_a_run():
    net = TINY.build("full", torch.bfloat16, "cpu")
    inputs = TINY.inputs(net, 1)
    with apply_pruner(net, "uniform", ratio=0.75) as handle, torch.inference_mode():
        net(**inputs)
        (pruned,), (full,) = (count(net, handle.last, inputs) for count in (account, account_full))
    assert bench_model.accounts(TINY, Fraction(3, 4)) == (full, pruned)


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES])
def test_published_sizes(geometry):
    """Parameters of the published checkpoints, in billions, and the placeholders the prompt must hold."""
    net = GEOMETRIES[geometry].build("full", torch.bfloat16, "meta")
    billions, visual = {
        "llava-1.5-7b": (7.06, 576),
        "llava-next-7b": (7.06, 2928),
        "qwen2.5-vl-7b-1k": (8.29, 1024),
        "qwen2.5-vl-7b-4k": (8.29, 4096),
        "qwen3-vl-8b": (8.77, 1024),
    }[geometry]
    assert sum(x.numel() for x in net.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert bench_model.accounts(GEOMETRIES[geometry], Fraction(0))[0].tokens_per_layer[0] == visual


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--ratio", "1"), "share"), (("nothing*",), "no method"), (("--scale", "big"), "scale")]
)
def test_wrong_usage(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr
