"""The benchmarks run and report everything; how fast anything is, no test says."""

import csv
import json
import os
import signal
import time

import pytest
import torch
from typer.testing import CliRunner

import prune.kernels
from prune import get_method, list_methods
from prune.errors import ConfigError
from prune.evals.bench import app
from prune.evals.bench_kernels import CASES, PLAIN, Held, chosen, dispatched, kernels, measure
from prune.evals.bench_methods import LAYER, selection, within
from prune.evals.bench_paired import Case, device_name, paired, quartiles_ms, setting
from prune.evals.naive import BASELINES
from prune.evals.synthetic import Shape, Synthetic, chain
from prune.method import Site, Stage
from prune.tokens import SIGNALS

SMALL, KEEP = Shape(2, 70, 64, text=6), 8


def run(*arguments):
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return result


def rows(*arguments) -> list[dict]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


# ------------------------------------------------------------------------------------------------ synthetic tokens


@pytest.fixture(scope="module")
def source():
    return Synthetic(SMALL)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_keeps_its_count_of_synthetic_tokens(name, source):
    method, memory = get_method(name), {}
    stages = list(chain(method, SMALL, KEEP))
    assert stages
    for stage, n in stages:
        tokens = source.tokens(stage, n)
        tokens.memory = memory
        before = tokens.features.clone()
        reduction = stage.reducer.reduce(tokens, [stage.keep] * SMALL.batch)
        left = reduction.valid.sum(1)
        if stage.keep == 0:
            assert method.adaptive and set(left.tolist()) <= {0, n}
        elif stage.reducer.adaptive:
            assert left.ge(1).all() and left.le(stage.keep).all()
        else:
            assert left.tolist() == [stage.keep] * SMALL.batch
        assert reduction.keep[reduction.valid].lt(n).all()
        assert torch.equal(tokens.features, before)  # the next round must find the same


@pytest.mark.parametrize("name", list_methods())
def test_a_reducer_is_given_what_it_declares_and_no_more(name, source):
    for stage, n in chain(get_method(name), SMALL, KEEP):
        tokens, declared = source.tokens(stage, n), stage.reducer.signals
        assert [name for name in SIGNALS if getattr(tokens, name) is not None] == [x for x in SIGNALS if x in declared]
        assert set(tokens.tower) == set(stage.reducer.tower)
        assert (tokens.projector is not None) == stage.reducer.needs_projector
        assert tokens.features.shape == (2, n, 64)


def test_the_columns_of_the_sequence_fit_together(source):
    stage = Stage(Site.parse("decoder:2"), get_method("sparsevlm"), KEEP)
    tokens = source.tokens(stage, 20)
    at = tokens.attention
    assert at.queries.shape[:2] == at.valid.shape == (2, 26)
    assert at.slots.tolist() == [list(range(3, 23))] * 2 and at.text_slots.tolist() == [[23, 24, 25]] * 2
    assert at.last.tolist() == [25, 25] and tokens.text_inputs.shape == (2, 3, 64)
    assert torch.equal(at.keys, source.tokens(stage, 20).attention.keys)  # the same tokens for everyone


def test_shapes():
    shape = Shape.parse("1x2880x4096")
    assert (shape.batch, shape.tokens, shape.width, shape.heads, str(shape)) == (1, 2880, 4096, 32, "1x2880x4096")
    assert Shape.parse("8x576x1024").heads == 16
    tokens = Synthetic(Shape(1, 2880, 64)).tokens(Stage(Site.parse("projected"), get_method("random"), 9), 2880)
    assert tokens.tile[0].bincount().tolist() == [576] * 5
    assert tokens.coordinates[0, 576 + 25].tolist() == [1, 0, 1, 1]
    for wrong in ("8x576", "8x576x1024x2", "ax1x64", "0x64x64", "1x8x64", "1x64x100", "-1x64x64"):
        with pytest.raises(ConfigError, match="shape"):
            Shape.parse(wrong)


# ------------------------------------------------------------------------------------------------------ `methods`


def test_methods_has_a_row_for_the_layer_and_every_method():
    layer, *others = rows("methods", "--shape", "1x32x64", "--rounds", 1, "--threads", 1)
    assert layer["method"] == LAYER and layer["ratio"] == 1
    assert sorted(row["method"] for row in others) == list_methods()
    assert [row["ratio"] for row in others] == sorted((row["ratio"] for row in others), reverse=True)
    assert all(row["median_ms"] > 0 and row["kept"] == 4 and row["rounds"] == 1 for row in others)
    (flowcut,) = (row for row in others if row["method"] == "flowcut")
    assert flowcut["sites"] == "projected + decoder:2"


def test_methods_measures_several_shapes_and_several_rounds():
    found = rows("methods", "uniform", "--shape", "1x32x64", "--shape", "2x40x64", "--rounds", 3, "--share", "1/4")
    assert [(row["shape"], row["kept"]) for row in found] == [("1x32x64", 8)] * 2 + [("2x40x64", 10)] * 2
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in found)


def test_a_method_out_of_time_is_a_row_that_says_so(monkeypatch):
    def slow(self, tokens, keep):
        time.sleep(60)

    monkeypatch.setattr(type(get_method("random")), "reduce", slow)
    layer, random, uniform = rows("methods", "[ru]*", "--shape", "1x32x64", "--rounds", 1, "--limit", 0.3)
    assert layer["method"] == LAYER and random["method"] == "random"
    assert random["note"] == "more than 0.3 s" and random["ratio"] is None and random["median_ms"] is None
    assert uniform["ratio"] > 0 and uniform["note"] == ""
    table = run("methods", "[ru]*", "--shape", "1x32x64", "--rounds", 1, "--limit", 0.3).output
    assert "more than 0.3 s" in table and "1 round," in table


def test_the_limit_leaves_no_alarm_behind():
    assert within(0.05, lambda: time.sleep(30)) is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert within(60, lambda: None) is not None
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_all_stages_are_timed_and_share_their_memory(monkeypatch):
    method, calls = get_method("sparsevlm"), []
    reduce = type(method).reduce

    def watched(self, tokens, keep):
        calls.append((tokens.features.shape[1], keep, dict(tokens.memory)))
        return reduce(self, tokens, keep)

    monkeypatch.setattr(type(method), "reduce", watched)
    once = selection(method, Synthetic(SMALL), KEEP)
    once()
    once()
    entering = [n for _, n in chain(method, SMALL, KEEP)]
    assert [n for n, _, _ in calls] == entering * 2 and len(entering) == 3
    assert calls[2][1] == [KEEP] * 2
    assert [bool(memory) for _, _, memory in calls] == [False, True, True] * 2  # every round begins anew


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--shape", "8x576"), "8x576"), (("nothing*",), "no method"), (("--share", "2"), "share")],
)
def test_methods_wrong_usage(arguments, message):
    result = run("methods", *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_methods_against_direct_implementations(tmp_path):
    path = tmp_path / "new" / "methods.csv"
    found = rows("methods", "[ru]*", "--shape", "1x32x64", "--rounds", 2, "--naive", "--csv", path)
    assert {row["method"] for row in found} & set(BASELINES) == {"random", "uniform"}
    assert all(row["vs_direct"] is None and row["direct_ms"] is None for row in found)
    (_, tome) = rows("methods", "tome", "--shape", "2x32x64", "--rounds", 3, "--naive")
    assert tome["direct_ms"] > 0 and tome["vs_direct"] == pytest.approx(tome["direct_ms"] / tome["median_ms"], rel=9)
    written = list(csv.DictReader(path.open()))
    assert [row["method"] for row in written] == [row["method"] for row in found]
    key = {
        "shape": "1x32x64",
        "dtype": "float32",
        "device": device_name("cpu"),
        "torch": torch.__version__.split("+")[0],
    }
    assert all({name: row[name].split("+")[0] for name in key} == key for row in written)
    table = run("methods", "tome", "--shape", "1x32x64", "--rounds", 1, "--naive").output
    assert "vs direct" in table and "median over 1" in " ".join(table.split())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_methods_in_half_precision(dtype, source):
    half = Synthetic(SMALL, dtype=getattr(torch, dtype))
    tokens = half.tokens(next(chain(get_method("zooprune"), SMALL, KEEP))[0], 70)
    assert (
        tokens.features.dtype == half.dtype and tokens.projector(tokens.tower["features"].float()).dtype == half.dtype
    )
    fastv = half.tokens(next(chain(get_method("fastv"), SMALL, KEEP))[0], 70)
    assert fastv.last_token_attention.dtype == torch.float32
    assert all(row["dtype"] == dtype for row in rows("methods", "zoo*", "--shape", "1x32x64", "--dtype", dtype))


# ------------------------------------------------------------------------------------------------------- `kernels`


def test_every_kernel_with_a_triton_version_is_timed():
    assert dispatched()  # found by their `.reference`
    assert set(dispatched()) | set(PLAIN) == set(CASES)


@pytest.mark.parametrize("name", dispatched())
def test_every_kernel_with_a_triton_version_is_public_and_says_what_it_costs(name):
    kernel = dispatched()[name]
    assert name in prune.kernels.__all__ and getattr(prune.kernels, name) is kernel
    said = " ".join(kernel.__doc__.split())
    assert "Cost" in said and "Bytes moved" in said and "`[" in said  # shapes


@pytest.mark.parametrize("name", CASES)
def test_kernels_has_a_row_per_provider(name):
    for dtype in ("float32", "bfloat16"):
        with torch.inference_mode():
            plain, triton = measure(name, 40, dtype, rounds=2, limit=60, device="cpu")
        assert (plain.op, plain.provider, plain.dtype, plain.note) == (name, "torch", dtype, "")
        assert 0 < plain.low_ms <= plain.median_ms <= plain.high_ms and plain.peak_mib > 0 and plain.moved_mb > 0
        assert triton.provider == "triton" and triton.median_ms is None
        assert triton.note in ("no CUDA device", "no Triton version")


def test_kernels_writes_a_csv_and_leaves_the_choice_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNE_KERNELS", raising=False)
    kernels("topk*", [33, 65], ["float32"], 2, 60.0, 0, "cpu", str(tmp_path / "kernels.csv"), False)
    written = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    keys = [(row["op"], row["provider"], row["shape"], row["dtype"]) for row in written]
    assert len(set(keys)) == len(keys) == 8 and keys[0] == ("topk_mask", "torch", "1x33", "float32")
    assert set(setting("cpu")) < set(written[0]) and "PRUNE_KERNELS" not in os.environ


def test_kernels_fails_and_runs_out_of_time_in_rows(monkeypatch):
    def broken(*_):
        raise ValueError("not today")

    monkeypatch.setitem(PLAIN, "compact", broken)
    (row, _) = measure("compact", 40, "float32", rounds=1, limit=9, device="cpu")
    assert row.note == "broke: ValueError: not today" and row.median_ms is None
    assert CliRunner().invoke(app, ["kernels", "compact", "-n", "40", "--rounds", "1"]).exit_code == 1
    monkeypatch.setitem(PLAIN, "compact", lambda *_: time.sleep(30))
    (row, _) = measure("compact", 40, "float32", rounds=1, limit=0.1, device="cpu")
    assert row.note == "more than 0.1 s" and row.peak_mib is None


def test_providers_are_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("PRUNE_KERNELS", "auto")
    with chosen("torch"):
        assert os.environ["PRUNE_KERNELS"] == "torch"
    assert os.environ["PRUNE_KERNELS"] == "auto"


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(256)
    with Held() as held:
        x.view(2, -1).mul_(2)  # what was there before: none
        y = x + 1  # 1 KiB
        z = torch.cat([y, y])  # 2 KiB more
        del y
        z.view(2, -1).add_(x)  # a view, and in place: none
        z = z * 2  # 2 KiB more, before the old one goes
        (z[:5] + 1).sum()
    assert held.most == 4 * 1024


# -------------------------------------------------------------------------------------------------------- `engine`


def test_engine_times_the_model_its_short_run_and_methods():
    found = rows("engine", "--width", 64, "--layers", 4, "--rounds", 2, "--threads", 1)
    assert [row["case"] for row in found][:3] == ["full", "short", "random @ projected"]
    assert found[0]["ratio_to_full"] == 1 and found[1]["ratio_to_short"] == 1
    assert all(row["median_ms"] > 0 and row["kept"] == 64 for row in found)


def test_paired_runs_every_case_in_every_round_and_drops_the_warmup():
    ran, inside = [], []

    class Around:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    cases = {name: Case(lambda name=name: ran.append((name, len(inside))), Around) for name in "abc"}
    times = paired(cases, rounds=4, warmup=1)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [ran[start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(each) == [("a", 1), ("b", 1), ("c", 1)] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1  # in changing order


def test_quartiles_stay_between_the_fastest_and_the_slowest():
    assert quartiles_ms([0.001, 0.002]) == (1.25, 1.5, 1.75)  # extrapolated, the lower one would be 0.75
    assert quartiles_ms([0.001, 0.003, 0.002]) == (1.5, 2, 2.5) and quartiles_ms([0.004]) == (4, 4, 4)
