"""The sweep: true rows, resumed after any death, shared over processes, and honest about what broke."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time

import pytest
import sweeps
from sweeps import BATCH, BATCHES, ITEMS, rows, sweep
from test_cli import failure, run

from prune import apply_pruner, get_method
from prune.evals import results, runner, scenes_model, stats, subject
from prune.evals.grid import Spec, budget, fitted, parse_share
from prune.evals.results import read_rows
from prune.evals.scenes import Scenes

ROW = '{"schema": 1, "cell": "a", "status": "failed", "model": {}, "task": {}, "method": {}}'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results file of an uninterrupted sweep."""
    path = tmp_path_factory.mktemp("whole") / "results.jsonl"
    sweep(path).run()
    return path


# ------------------------------------------------------------------------------------------------------- what it says
def test_rows_say_what_plain_code_says(whole):
    """Scores, counts and kinds against `generate` called by hand, un-pruned and pruned."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(scenes_model.CHECKPOINT, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(scenes_model.CHECKPOINT)
    items = list(Scenes(size=ITEMS))
    found = {
        (row["method"]["name"], row["budget"] and round(row["budget"]["share"], 3)): row for row in read_rows(whole)
    }
    assert set(found) == {
        ("none", None),
        *((name, s) for name in ("random", "divprune", "dart") for s in (0.333, 0.111)),
    }
    for (name, share), options, given in (
        (("none", None), {}, None),
        (("divprune", 0.333), {}, {"keep": 48}),
        (("dart", 0.333), {"layer": 1}, {"average": 48}),
    ):
        if given is None:
            said = scenes_model.answer(model, processor, items, BATCH)
        else:
            with apply_pruner(model, get_method(name, **options), **given):
                said = scenes_model.answer(model, processor, items, BATCH)
        row = found[name, share]
        assert row["result"]["scores"] == [float(text == item.answer) for text, item in zip(said, items)]
        assert row["method"]["options"].get("layer") == options.get("layer")
    cost = found["dart", 0.333]["cost"]
    assert cost["average_tokens"] == 48 == sum(cost["tokens_per_layer"]) / 5
    assert cost["tokens_per_layer"] == [144, 24, 24, 24, 24] and cost["kept_tokens"] == 24
    assert cost["new_tokens"] == 2 and cost["visual_tokens"] == 144
    assert cost["prefill_flops"] == pytest.approx(sum(cost["flops"].values()))
    assert cost["prefill_flops"] < cost["prefill_flops_full"]
    kinds = found["none", None]["result"]["kinds"]
    assert {kind: part["items"] for kind, part in kinds.items()} == dict.fromkeys(
        scenes_model.scenes.LEVELS["scenes"].answers, 3
    )
    assert found["dart", 0.111]["status"] == "out of reach" and "29.6" in found["dart", 0.111]["error"]


def test_rows_say_what_a_constant_answer_scores(whole):
    """Of the most frequent answer of each kind, as `scenes.majority` counts it."""
    shares, items = scenes_model.scenes.majority(Scenes(size=ITEMS)), list(Scenes(size=ITEMS))
    want = sum(shares[item.kind] for item in items) / ITEMS
    done = [row["result"] for row in read_rows(whole) if row["status"] == "ok"]
    assert [result["majority"] for result in done] == [pytest.approx(want)] * 6


def test_majority_counts_every_accepted_answer(tmp_path):
    from prune.evals.tasks import load_task

    Scenes(size=1)[0].images[0].save(tmp_path / "a.png")
    answers = [["car", "red car"], "bus", ["red car"], ["a red car", "van"], "bike", "bike"]
    lines = [dict(image="a.png", question="what?", answer=one, kind="ab"[n > 3]) for n, one in enumerate(answers)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert runner.majority(load_task(f"folder:{tmp_path}")) == 5 / 6


def test_rows_say_all_versions(whole, monkeypatch):
    (found,) = {json.dumps(row["versions"]) for row in read_rows(whole)}
    named = {"torch", "transformers", "timm", "open_clip_torch", "datasets", "scikit-learn", "Pillow", "numpy"}
    assert {"prune", "torch", "transformers", "scikit-learn", "Pillow", "numpy", "python"} <= set(json.loads(found))
    assert set(json.loads(found)) <= {"prune", "python"} | named
    ask = runner.metadata.version
    monkeypatch.setattr(runner.metadata, "version", lambda name: ask("no-such-package" if name == "timm" else name))
    assert runner.versions() == {k: v for k, v in json.loads(found).items() if k != "timm"}


def test_a_row_is_enough_to_run_its_cell_again(whole, tmp_path):
    row = next(row for row in read_rows(whole) if row["method"]["name"] == "dart" and row["status"] == "ok")
    from prune.evals.tasks import load_task

    again = sweep(
        tmp_path / "again.jsonl",
        models=[row["model"]["name"]],
        tasks=[load_task(row["task"]["name"], **row["task"]["options"])],
        methods=[Spec(row["method"]["name"], row["method"]["options"])],
        by=row["budget"]["by"],
        shares=[parse_share(str(row["budget"]["share"]))],
        batch_size=row["run"]["batch_size"],
    )
    again.run()
    assert rows(tmp_path / "again.jsonl")[row["cell"]] == rows(whole)[row["cell"]]


# ------------------------------------------------------------------------------------------------------------ resumed
def test_a_killed_run_ends_with_the_same_rows(whole, tmp_path):
    """SIGKILL five times, in the middle of a cell and between cells; every start must get further."""
    path, made = tmp_path / "results.jsonl", sweeps.context()

    def lines():
        """(finished cells, finished batches of unfinished ones)"""
        journals = [file for file in path.parent.glob("*.partial")]
        with contextlib.suppress(FileNotFoundError):
            return tuple(sum(file.read_text().count("\n") for file in files) for files in ([path], journals))
        return (0, 0)

    for wanted in ((0, 2), (1, 1), (2, 3), (3, 0), (3, 2)):  # (finished cells, finished batches of the next) at least
        process = made.Process(target=sweeps.run, args=(str(path), {}))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and lines() < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
    assert lines()[0] < len(rows(whole))
    with path.open("a") as file:
        file.write('{"schema": 1, "cell": "torn')  # a kill in the middle of a write
    sweep(path).run()
    assert rows(path) == rows(whole)
    assert sorted(path.parent.iterdir()) == [path]  # neither journals nor locks


def test_an_interrupt_costs_one_batch(whole, tmp_path, monkeypatch):
    answered, answer = [], subject.Subject.answer

    def interrupted(self, items, length):
        if len(answered) == BATCHES + 2:  # in the second cell's third batch
            raise KeyboardInterrupt
        answered.append(len(items))
        return answer(self, items, length)

    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(runner.Sweep, "warm", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(subject.Subject, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(path).run()
    before = len(answered)
    answered.extend([0] * 100)  # never again
    sweep(path).run()
    ran = answered[before + 100 :]
    assert len(ran) == 6 * BATCHES + 1 - before  # dart at 1/9 is refused in its first batch
    assert rows(path) == rows(whole)


def test_finished_cells_are_not_run_again(whole, monkeypatch):
    monkeypatch.setattr(subject.Subject, "answer", lambda *_: pytest.fail("ran again"))
    before = whole.read_bytes()
    assert len(sweep(whole).run()) == 7
    assert whole.read_bytes() == before


def test_rows_of_an_earlier_version_are_finished_too(whole, tmp_path, monkeypatch):
    """Versions, and what came into rows later, are no part of what a cell is; the report takes both sorts together."""
    old, path = read_rows(whole), tmp_path / "results.jsonl"
    for row in old:
        row["versions"] = {"prune": "0.0.1", "torch": "2.0.0", "transformers": "5.0.0", "python": "3.10.0"}
        (row["result"] or {}).pop("majority", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    monkeypatch.setattr(subject.Subject, "answer", lambda *_: pytest.fail("ran again"))
    assert sweep(path).run() == old
    assert run("report", path, "-o", tmp_path / "report").exit_code == 0
    path.write_text("".join(json.dumps(row) + "\n" for row in [*old[:3], *read_rows(whole)[3:]]))
    assert run("report", path, "-o", tmp_path / "report").exit_code == 0


def test_a_whole_last_line_without_its_end_counts(whole, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    path.write_bytes(whole.read_bytes().rstrip())
    monkeypatch.setattr(subject.Subject, "answer", lambda *_: pytest.fail("ran again"))
    sweep(path).run()
    assert path.read_bytes() == whole.read_bytes()


def test_fresh_puts_the_rows_aside_and_nothing_else(whole, tmp_path):
    path, old = tmp_path / "results.jsonl", tmp_path / "results.jsonl.old"
    path.write_bytes(whole.read_bytes())
    only = dict(methods=[Spec("random")], shares=[parse_share("1/3")])
    sweep(path, fresh=True, **only).run()
    assert old.read_bytes() == whole.read_bytes() and len(rows(path)) == 2
    path.write_text("# Notes\n")
    with pytest.raises(results.ResultsError, match="line 1: not JSON"):
        sweep(path, fresh=True, **only).run()
    assert path.read_text() == "# Notes\n" and old.read_bytes() == whole.read_bytes()


def test_other_pictures_or_weights_are_other_cells(tmp_path):
    """What a name stands for may change between runs; rows of the old state must not answer for the new one."""
    from prune.evals.tasks import load_task

    items = list(Scenes(size=2))
    (tmp_path / "task.jsonl").write_text(json.dumps({"image": "a.png", "question": "what?", "answer": "3"}))
    items[0].images[0].save(tmp_path / "a.png")
    before = load_task(f"folder:{tmp_path}").digest
    items[1].images[0].save(tmp_path / "a.png")
    assert load_task(f"folder:{tmp_path}").digest != before

    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = subject.revision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert subject.revision(tmp_path) != before and subject.revision(tmp_path / "none") is None


def test_two_runs_do_not_write_to_one_file(whole):
    from filelock import FileLock

    with FileLock(whole.with_name(whole.name + ".lock")):
        with pytest.raises(results.ResultsError, match="another run is writing"):
            sweep(whole).run()


def test_a_model_that_one_process_cannot_load_is_skipped_by_all(tmp_path, monkeypatch):
    """Else the others' batches would go into rows of another model."""
    told = []

    class Pair(runner.Team):
        def gather(self, found):
            return [*found, "no such file" if found == [None] and not told else None]

    made = sweep(tmp_path / "r.jsonl", models=["scenes-llava", "demo:llava"], methods=[], tell=told.append)
    made.team = Pair("cpu")
    monkeypatch.setattr(runner.Sweep, "_cell", lambda self, cell, subject, *_: {"cell": subject.name, "status": "ok"})
    assert [row["status"] for row in made.run()] == ["failed", "ok"] and told == ["scenes-llava: no such file"]


def test_two_processes_give_the_rows_of_one(whole, tmp_path):
    path, made = tmp_path / "results.jsonl", sweeps.context()
    team = [made.Process(target=sweeps.run, args=(str(path), rank)) for rank in sweeps.ranks(2)]
    for process in team:
        process.start()
    for process in team:
        process.join(180)
    assert [process.exitcode for process in team] == [0, 0]
    assert rows(path) == rows(whole)


# -------------------------------------------------------------------------------------------------------- what breaks
class Broken:
    """Items of which one cannot be made."""

    def __init__(self, items, index):
        self.items, self.index = items, index

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if index == self.index:
            raise OSError("the disk fell out")
        return self.items[index]


def test_a_broken_cell_is_recorded_and_the_sweep_goes_on(tmp_path, monkeypatch):
    from prune.reducers import divprune

    reduce, path = divprune.DivPrune.reduce, tmp_path / "results.jsonl"
    monkeypatch.setattr(divprune.DivPrune, "reduce", lambda *_: 1 // 0)
    broken = {row["method"]["name"]: row for row in sweep(path, shares=[parse_share("1/3")]).run()}
    assert {name: row["status"] for name, row in broken.items()} == {
        "none": "ok",
        "random": "ok",
        "divprune": "failed",
        "dart": "ok",
    }
    assert "ZeroDivisionError" in broken["divprune"]["error"] and broken["divprune"]["result"] is None
    monkeypatch.setattr(divprune.DivPrune, "reduce", reduce)
    mended = sweep(path, shares=[parse_share("1/3")]).run()  # failed cells are tried again, and the last row counts
    assert [row["status"] for row in mended] == ["ok"] * 4
    assert len(path.read_text().splitlines()) == 5 and [row["status"] for row in read_rows(path)] == ["ok"] * 4


def test_exit_code_tells_of_a_failed_cell(tmp_path, monkeypatch):
    from prune.reducers import divprune

    monkeypatch.setattr(divprune.DivPrune, "reduce", lambda *_: 1 // 0)
    common = ("eval", "--limit", 6, "-b", "1/9", "--device", "cpu", "-o", tmp_path / "r.jsonl", "-m", "random")
    assert run(*common).exit_code == 0
    result = run(*common, "-m", "divprune")
    assert result.exit_code == 1 and "1 of 3 cells failed" in result.stderr and "ZeroDivisionError" in result.output


def test_a_full_disk_keeps_the_rows_before(whole, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    path.write_bytes(whole.read_bytes())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(results.ResultsError, match="No space left on device; the lines before are kept"):
        sweep(path, batch_size=5).run()
    assert path.read_bytes() == whole.read_bytes()


def test_all_methods_that_apply_is_the_default(tmp_path):
    told = []
    made = sweep(tmp_path / "r.jsonl", methods=None, shares=[parse_share("1/2")], tell=told.append)
    names = {spec.name for spec in made._methods(subject.Subject("scenes-llava", "cpu"))}
    assert {"random", "uniform", "dart", "fastv", "divprune"} <= names
    assert all(line.startswith("scenes-llava: without ") for line in told)


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "drat"], 1, "Did you mean 'dart'"),
        (["-m", "dart:lair=1"], 2, "Did you mean 'layer'"),
        (["-m", "dart:layer"], 2, "KEY=VALUE"),
        (["--model", "scene-llava"], 1, "Did you mean 'scenes-llava'"),
        (["-t", "scense"], 1, "scenes"),
        (["-b", "1.5"], 2, "share of the tokens in (0, 1]"),
        (["-b", "64"], 2, "share of the tokens in (0, 1]"),
        (["-b", "1/0"], 2, "share of the tokens in (0, 1]"),
        (["--column", "image"], 2, "KEY=NAME"),
        (["--limit", "-3"], 1, "limit"),
        (["--device", "gpu"], 1, "device 'gpu' cannot be used"),
        (["--attention", "fast"], 1, "cannot use fast attention"),
        (["--dtype", "flaot16"], 2, "'flaot16' is not one of"),
        (["--model", "./none"], 1, "there is no folder ./none"),
        (["--model", "demo:lava"], 1, "Did you mean 'demo:llava'"),
        (["-m", "random:seed={[]:1}"], 2, "seed='{[]:1}' must be a whole number"),
    ],
)
def test_words_the_command_does_not_know(tmp_path, arguments, code, message):
    path = tmp_path / "r.jsonl"
    result = run("eval", "-o", path, *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.stderr
    assert not path.exists() or path.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + '\n{"schema": 1, "ce\n', "r.jsonl, line 2: not JSON"),
        ('{"schema": 99, "cell": "a", "status": "ok"}\n', "line 1: schema version 99, this prune reads 1"),
        ('{"question": "what?"}\n', "line 1: not a row"),
        ("[1]\n", "line 1: not a row"),
        ('{"lr": 0.1}', "line 1: not a row"),
        ("# Notes\nof mine", "line 1: not JSON"),
        (ROW + "\nmy last words", "line 2: not JSON"),
        ('{"schema": 1, "cell": "a", "status": "ok"}\n', "line 1: the row lacks its model"),
    ],
)
@pytest.mark.parametrize("command", [("eval", "--limit", "6", "-o"), ("report",)])
def test_a_file_that_is_no_results_file_is_left_alone(tmp_path, content, message, command):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    result = run(*command, path)
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert path.read_text() == content


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("eval", "--limit", 6, "-o", tmp_path / "file" / "r.jsonl")
    assert result.exit_code == 1 and "cannot write to" in result.stderr and "give another -o" in result.stderr
    assert "there is no results file" in failure("report", tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------------------------------------- pieces
def test_the_papers_layer_keeps_its_depth():
    assert fitted("dart", 32) == {} == fitted("dart", 40) and fitted("random", 5) == {}
    assert fitted("dart", 28) == {"layer": 2} and fitted("fastv", 5) == {"layer": 1}
    assert Spec("fastv", {"layer": 3}).method(5).layer == 3  # what the user says stays
    assert Spec.parse("dart:image_pivots=3").method(5).layer == 1  # and says nothing of the layer


def test_options_may_hold_commas():
    assert Spec.parse("pyramiddrop:layers=(1, 2, 3)").options == {"layers": (1, 2, 3)}
    assert Spec.parse("dart:layer=1,image_pivots=8").options == {"layer": 1, "image_pivots": 8}


def test_shares():
    assert [float(parse_share(text)) for text in ("1/9", "0.25", "25%", "1")] == [1 / 9, 0.25, 0.25, 1]
    assert budget("keep", parse_share("1/9")).solve(get_geometry(576), lambda k: [k]) == 64
    assert budget("average", parse_share("1/9")).average == 1 / 9
    assert budget("flops", parse_share("1/9")).flops == 1 / 9


def get_geometry(n):
    from prune import Geometry

    return Geometry(n)


def test_intervals_cover_and_pair():
    scores = [1.0] * 60 + [0.0] * 40
    mean, low, high = stats.mean_interval(scores)
    assert mean == 0.6 and low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.02) and high == pytest.approx(0.696, abs=0.02)
    assert stats.mean_interval(scores) == (mean, low, high)  # the same draw every time
    better = stats.paired_difference([1.0] * 70 + [0.0] * 30, scores)  # ten items better, none worse
    assert better.mean == pytest.approx(0.1) and better.excludes_zero
    assert better.high - better.low < 0.13 < high - low  # pairs: far narrower than two separate intervals
    assert not stats.paired_difference(scores, scores[::-1]).excludes_zero
    with pytest.raises(ValueError, match="same items"):
        stats.paired_difference([1.0], [1.0, 0.0])


def test_summary_counts_every_item_once():
    made = [
        {
            "scores": [1.0, 0.0],
            "kinds": ["a", "b"],
            "cost": {"n": 4, "l": [2, 2], "f": {"x": 6}},
            "prefill_ms": 1,
            "decode_ms": 1,
        },
        {
            "scores": [1.0],
            "kinds": ["a"],
            "cost": {"n": 5, "l": [1, 4], "f": {"x": 3}},
            "prefill_ms": 9,
            "decode_ms": 2,
        },
    ]
    got = runner.summary(made, 3)
    assert got["cost"] == {"n": 3, "l": [1, 2], "f": {"x": 3}}
    assert got["result"]["kinds"] == {"a": {"items": 2, "accuracy": 1}, "b": {"items": 1, "accuracy": 0}}
    assert got["result"]["accuracy"] == pytest.approx(2 / 3) and json.dumps(got)
