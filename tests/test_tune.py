"""`prune tune`: the objective is what it says, a search ends the same however often it was stopped, and what is saved
is what was measured."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from test_cli import failure, run

from prune import ConfigError, Scorer, apply_pruner, registry
from prune.config import PrunerConfig
from prune.evals import space, tune
from prune.evals.grid import Cell, Spec
from prune.evals.space import TuneError, parse_ranges, search_space
from prune.evals.subject import Subject
from prune.evals.tasks import load_task
from prune.evals.tune import STUDY, Drift, Search, finished

ITEMS, TRIALS, SHARE = 8, 11, Fraction(1, 9)  # the first nine trials beside the default are drawn at random


@pytest.fixture(scope="module")
def subject():
    return Subject("scenes-llava", "cpu")


def search(subject, output, **changes) -> Search:
    settings = dict(
        method="hiprune",
        space=search_space("hiprune", 5),
        task=load_task("scenes", split="train", limit=2 * ITEMS),
        items=ITEMS,
        share=SHARE,
        trials=TRIALS,
        batch_size=5,
        output=Path(output),
    )
    return Search(subject, **{**settings, **changes})


def trials(folder) -> list[tuple]:
    """What was tried, in order, and what came out."""
    import optuna

    study = optuna.load_study(study_name="prune", storage=f"sqlite:///{folder / STUDY}")
    return [(trial.params, trial.value if trial.state.name == "COMPLETE" else None) for trial in finished(study)]


@pytest.fixture(scope="module")
def whole(subject, tmp_path_factory):
    """The folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    search(subject, folder).run()
    return folder


# -------------------------------------------------------------------------------------------------------- objective
@torch.inference_mode()
def test_the_objective_is_what_plain_code_says(subject):
    """One item after the other, without padding, from the model's own output."""
    items, model, drift = load_task("scenes", limit=7).items, subject.model, []
    for item in items:
        inputs = subject.answer([item], 1).inputs
        whole = model.model(**inputs).last_hidden_state[0, -1]
        with apply_pruner(model, "hiprune", average=16, alpha=0.5):
            pruned = model.model(**inputs).last_hidden_state[0, -1]
        drift.append(1 - whole @ pruned / whole.norm() / pruned.norm())
    cell = Cell(Spec("hiprune", {"alpha": 0.5}), "average", SHARE)
    said = Drift(subject, items, 3)
    assert len({len(item.question.split()) for item in items}) > 1  # some are padded
    assert said(cell) == pytest.approx(torch.stack(drift).mean().item(), abs=1e-5) and said(cell) > 0.01
    assert said(Cell(Spec("hiprune"), "average", Fraction(1))) == pytest.approx(0, abs=1e-6)
    assert said.average_tokens(cell) == 16


# ----------------------------------------------------------------------------------------------------------- result
def test_what_is_saved_is_what_was_measured(subject, whole):
    config = PrunerConfig.from_pretrained(whole)
    found = config.metrics
    options, default = config.options, found["default_options"]
    best = min(value for _, value in trials(whole))
    assert found["calibration"]["best"] == min(best, found["calibration"]["default"])
    assert found["average_tokens"] == {"default": 16, "best": 16} and found["trials"] == TRIALS == len(trials(whole))

    items = load_task("scenes", split="train", limit=2 * ITEMS)
    for key, part in (("calibration", items.items[:ITEMS]), ("held_out", items.items[ITEMS:])):
        measured = Drift(subject, part, 5)
        for name, used in (("default", default), ("best", options)):
            assert found[key][name] == measured(Cell(Spec("hiprune", used), "average", SHARE))
    assert found["calibration"]["best"] < found["calibration"]["default"]
    assert found["task"]["digest"] == load_task("scenes", split="train", limit=ITEMS).digest

    inputs = subject.answer(items.items[:5], 1).inputs
    with torch.inference_mode():
        logits = []
        for method, given in ((whole, {}), ("hiprune", {"average": float(SHARE), **options})):
            with apply_pruner(subject.model, method, **given) as handle:
                logits.append(subject.model(**inputs).logits)
                assert handle.last.tokens_per_layer[0] == [16] * 5
    assert torch.equal(*logits) and config.families == ("LLaVA-1.5",)


def test_a_seed_gives_one_search(subject, whole, tmp_path):
    for seed in (0, 1):
        search(subject, tmp_path / str(seed), seed=seed, trials=2).run()
    assert trials(tmp_path / "0") == trials(whole)[:2]
    assert all(trial not in trials(whole) for trial in trials(tmp_path / "1"))


# ---------------------------------------------------------------------------------------------------------- resumed
def test_a_killed_search_ends_like_a_whole_one(subject, whole, tmp_path):
    """SIGKILL, then the same in another process."""
    words = ["--items", str(ITEMS), "--trials", str(TRIALS), "--batch-size", "5", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import prune.cli; prune.cli.main()", "tune", "hiprune", *words, "-o", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    file, deadline = tmp_path / STUDY, time.monotonic() + 120

    def count() -> int:
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
                return base.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
        except sqlite3.Error:  # not made yet
            return 0

    while process.poll() is None and count() < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    before = trials(tmp_path)
    assert 2 <= len(before) < TRIALS
    search(subject, tmp_path).run()
    assert trials(tmp_path)[: len(before)] == before
    assert trials(tmp_path) == trials(whole)
    assert PrunerConfig.from_pretrained(tmp_path) == PrunerConfig.from_pretrained(whole)


def test_an_interrupt_costs_one_trial_and_repeats_cost_nothing(subject, whole, tmp_path, monkeypatch):
    calls, measure = [], tune.last_state

    def interrupted(model, inputs):
        calls.append(1)
        if len(calls) == 2 + 2 + 2 * 10 + 1:  # un-pruned, default, ten trials, half of the last one
            raise KeyboardInterrupt
        return measure(model, inputs)

    monkeypatch.setattr(tune, "last_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(subject, tmp_path).run()
    assert trials(tmp_path) == trials(whole)[:10] and not (tmp_path / "pruner_config.json").exists()
    assert not subject.model._forward_pre_hooks and not subject.model.get_output_embeddings()._forward_pre_hooks
    search(subject, tmp_path).run()
    assert trials(tmp_path) == trials(whole)

    spent = len(calls)
    search(subject, tmp_path, trials=TRIALS + 3, space=search_space("hiprune", 5)).run()  # more trials: the same search
    once, three = 2 + 4 + 2 + 4, 3 * 2  # un-pruned, tokens, held out twice; three trials
    assert len(calls) - spent == once + three and trials(tmp_path)[:TRIALS] == trials(whole)
    for changes, what in (
        ({"share": Fraction(1, 3)}, "budget"),
        ({"seed": 1}, "seed"),
        ({"items": 4}, "task"),
        ({"fixed": {"compat": True}}, "options"),
    ):
        with pytest.raises(TuneError, match=rf"another search \(another {what}\); give another -o, or --fresh"):
            search(subject, tmp_path, **changes).run()

    calls.clear()
    narrow = search_space("hiprune", 5, {"object_layer": 0.5}, {"alpha": (0.3, 0.3)})
    search(subject, tmp_path / "narrow", space=narrow, trials=5).run()
    assert len(calls) == once + 2 + 2  # the default and the only other choice, once each


def test_early_gives_up_on_bad_trials_only(subject, whole, tmp_path):
    config = search(subject, tmp_path, early=True, trials=9, batch_size=2).run()
    full = dict((str(params), value) for params, value in trials(whole)[:9])  # drawn at random: the same options
    found = [(full[str(params)], value) for params, value in trials(tmp_path)]
    given_up = [value for value, said in found if said is None]
    assert 0 < len(given_up) < 5 and min(given_up) > config.metrics["calibration"]["best"]
    assert all(said == pytest.approx(value, abs=1e-5) for value, said in found if said is not None)
    assert config.metrics["impossible_trials"] == 0


# ------------------------------------------------------------------------------------------------------- impossible
def test_impossible_trials_are_passed_over(subject, tmp_path):
    """At 2/9 of 144 tokens over 5 layers only layer 1 can be reached."""
    given = dict(method="dart", items=4, share=Fraction(2, 9), trials=6)
    space = search_space("dart", 5, {"text_pivots": 4}, {"layer": (1, 4)})
    made = search(subject, tmp_path / "a", space=space, **given)
    made.default["layer"] = 4
    config = made.run()
    found = config.metrics
    values = [(params["layer"], value is None) for params, value in trials(tmp_path / "a")]
    assert all(impossible == (layer > 1) for layer, impossible in values) and len(set(values)) > 2
    assert found["impossible_trials"] == sum(impossible for _, impossible in values)
    assert config.options["layer"] == 1 and found["average_tokens"]["best"] == pytest.approx(32, abs=0.5)
    assert found["calibration"]["default"] is None is found["held_out"]["default"]

    given["share"] = SHARE
    with pytest.raises(TuneError, match=r"(?s)none of 6 trials was possible.*out of reach.*29\.6|86\.8|58\.2|115"):
        search(subject, tmp_path / "b", space=space, **given).run()
    assert not (tmp_path / "b" / "pruner_config.json").exists()


# ------------------------------------------------------------------------------------------------------------ ranges
@pytest.mark.parametrize(
    "name,layers,fixed,given,expected",
    [
        ("dart", 32, {}, {}, {"layer": (1, 31), "image_pivots": (1, 16), "text_pivots": (1, 16)}),
        ("dart", 5, {"layer": 1}, {"image_pivots": (2, 3)}, {"text_pivots": (1, 16), "image_pivots": (2, 3)}),
        ("hiprune", 5, {}, {"alpha": (0, 1)}, {"object_layer": (0.0, 1.0), "alpha": (0.0, 1.0)}),
        ("hiprune", 5, {"alpha": 0.1}, {"object_layer": (1, 4)}, {"object_layer": (1, 4)}),
        (
            "pyramiddrop",
            32,
            {},
            {"layers.0": (2, 6), "layers.1": (7, 12), "layers.2": (13, 20)},
            {f"shares.{i}": (0.0, 1.0) for i in range(3)}
            | {"layers.0": (2, 6), "layers.1": (7, 12), "layers.2": (13, 20)},
        ),
        ("random", 5, {}, {"layer": (1, 4), "seed": (0, 9)}, {"layer": (1, 4), "seed": (0, 9)}),
        (
            "vflowopt",
            5,
            {"alpha": 0.0, "cell": 3.0, "threshold": 1.0},
            {"recycle": (True, False)},
            {"shares.0": (0.1, 1.0), "shares.1": (0.1, 1.0), "recycle": (True, False)},
        ),
        (
            "transprune",
            32,
            {},
            {},
            {"layers.0": (1, 8), "layers.1": (9, 10), "layers.2": (11, 31), "alpha": (0.0, 1.0)},
        ),
    ],
)
def test_the_search_space(name, layers, fixed, given, expected):
    assert search_space(name, layers, fixed, given) == expected
    for where in search_space(name, layers, fixed, given).values():
        space.distribution(where)


def test_generic_ranges_hold_the_default_in_their_middle():
    assert {value: space.around(value) for value in (3, 0, 0.5, 0.1, 1.0)} == {
        3: (1, 12), 0: (0, 4), 0.5: (0.0, 1.0), 0.1: (0.0, 1.0), 1.0: (0.0, 1.0)
    }  # fmt: skip
    assert space.around(0.03) == pytest.approx((0.003, 0.3)) and space.around(-2.0) == (-8.0, -0.5)
    assert space.around(0.0) == (0.0, 1.0)
    assert space.around(16.0) == (4.0, 64.0) and space.distribution((4.0, 64.0)).log
    assert not space.distribution((0.0, 1.0)).log and space.distribution(("a", "b")).choices == ("a", "b")


def test_a_method_declares_its_own_ranges(monkeypatch):
    @dataclass
    class Declared(Scorer):
        layers: tuple[int, ...] = (3, 9)
        power: float = 1.0
        kind: str = "a"
        width: int = 4
        name = "declared"
        search = {"layers.0": (1, 8), "layers.1": (9, 27), "power": (-2.0, 2.0), "kind": ("a", "b")}

        def score(self, tokens):
            return tokens.features[..., 0].float()

    monkeypatch.setitem(registry._REGISTRY, "declared", Declared)
    assert search_space("declared", 32) == Declared.search
    assert search_space("declared", 12)["layers.1"] == (9, 11)
    assert set(search_space("declared", 32, {"layers": (3, 9)}, {"width": (2, 8)})) == {"power", "kind", "width"}
    options = space.with_params({"layers": (3, 9), "power": 1.0}, {"layers.1": 7, "power": 2.0})
    assert options == {"layers": (3, 7), "power": 2.0}
    assert space.with_params({"layers": None}, {"layers.1": 7, "layers.0": 2}) == {"layers": (2, 7)}


@pytest.mark.parametrize(
    "name,ranges,fixed,match",
    [
        ("dart", ["leyer=1:2"], {}, "no option 'leyer'. Did you mean 'layer'"),
        ("dart", [], {"pivots": 3}, "no option 'pivots'.*image_pivots"),
        ("dart", ["layer=1:2"], {"layer": 1}, "range or a fixed value"),
        ("dart", ["layer=1.5:2"], {}, "the option holds int"),
        ("dart", ["layer=a,b"], {}, "the option holds int"),
        ("hiprune", ["alpha=a,b"], {}, "the option holds float"),
        ("dart", ["layer.0=1:2"], {}, "layer has no entries"),
        ("vflowopt", ["layers=1:2"], {}, r"write layers\.0="),
        ("vflowopt", ["layers.1=1:2"], {}, "from 0, without gaps"),
        ("dart", ["layer=2:1"], {}, "the lower one first"),
        ("dart", ["layer=1:2:3"], {}, "two numbers"),
        ("dart", ["layer=a:b"], {}, "two numbers"),
        ("dart", ["layer=1,2"], {}, "write layer=1:2"),
        ("dart", ["layer"], {}, "write KEY=LOW:HIGH"),
        ("dart", ["layer="], {}, "write KEY=LOW:HIGH"),
        ("dart", ["=1:2"], {}, "write KEY=LOW:HIGH"),
        ("dart", [], {"layer": "x"}, "layer='x' must be a whole number"),
        ("random", [], {}, "no option left to search.*seed, layer"),
        ("divprune", [], {}, "no option left to search.*newlines"),
        ("hiprune", [], {"alpha": 0.1, "object_layer": 0.5}, "no option left to search"),
    ],
)
def test_bad_ranges(name, ranges, fixed, match):
    with pytest.raises(ConfigError, match=match):
        search_space(name, 32, fixed, parse_ranges(ranges))


# ----------------------------------------------------------------------------------------------------------- command
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["tune", "dart", "--items", 4, "--trials", 3, "--by", "keep", "--range", "image_pivots=1:3", "--early"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "calibration (4)" in done.stdout and "held out (4)" in done.stdout
    assert done.stdout.splitlines()[-1] == str(Path("prune-tune") / "dart")
    assert "searching layer=1:4, text_pivots=1:16, image_pivots=1:3" in done.stderr
    assert "--fix the layer" in done.stderr  # under --by keep
    config = PrunerConfig.from_pretrained("prune-tune/dart")
    assert config.budget.ratio == pytest.approx(8 / 9) and config.metrics["task"]["options"]["split"] == "train"

    def stop(*anything):
        raise KeyboardInterrupt

    monkeypatch.setattr(Drift, "__call__", stop)
    stopped = run(*words, "--trials", 50)
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr and stopped.stdout == ""
    other = run(*words, "--seed", 3)
    assert other.exit_code == 1 and "another seed" in other.stderr.splitlines()[-1]
    assert run(*words, "--seed", 3, "--fresh").exit_code == 130  # past the check: the old study is gone


@pytest.mark.parametrize(
    "words,code,match",
    [
        (["drat"], 1, "unknown method 'drat'. Did you mean 'dart'"),
        (["random"], 2, "no option left to search"),
        (["dart", "--range", "layer=1"], 1, "none of 2 trials was possible"),
        (["dart", "--fix", "layer"], 2, "write KEY=VALUE"),
        (["dart", "--budget", "3"], 2, "share of the tokens"),
        (["dart", "--model", "nope"], 1, "there is no model 'nope'"),
        (["dart", "--task", "nope"], 1, "there is no task"),
        (["dart", "--column", "x"], 2, "--column KEY=NAME"),
        (["dart", "--trials", "0"], 2, "greater than or equal to 1"),
    ],
)
def test_the_command_says_what_is_wrong(words, code, match, tmp_path):
    done = run("tune", *words, "--items", 2, *([] if "--trials" in words else ["--trials", 2]), "-o", tmp_path / "x")
    assert done.exit_code == code and done.stdout == "" and "Traceback" not in done.stderr
    assert match in " ".join(done.stderr.replace("│", " ").split())


def test_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert 'pip install "prune-vlm[tune]"' in failure("tune", "dart", "-o", tmp_path)


def test_a_broken_study_file(subject, tmp_path):
    (tmp_path / STUDY).write_bytes(b"no database" * 500)
    with pytest.raises(TuneError, match="cannot use the study file .*not a database.*--fresh"):
        search(subject, tmp_path).run()
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneError, match="cannot write to .*file.*another -o"):
        search(subject, tmp_path / "file").run()
