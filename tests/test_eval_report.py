"""The report of a sweep, on rows made here after the schema of `prune.evals.results`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
from base64 import b64decode
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from prune.errors import PruneError
from prune.evals.report import file_names, summarise, terminal_table, write_report
from prune.evals.results import SCHEMA
from prune.evals.stats import mean_interval, paired_difference
from prune.evals.summary import comparisons, share_text

KINDS = ("colour-of", "digit-of", "count", "presence", "leftmost", "topmost")
ACCURACY = {"none": 0.97, "random": 0.48, "uniform": 0.57, "divprune": 0.62, "dart": 0.84}
SHARES = (1 / 3, 2 / 9, 1 / 9, 1 / 18)
LAYERS, VISUAL, TEXT = 5, 144, 14.1


def make_row(
    method="dart", share=1 / 9, by="average", *, items=400, model="scenes-llava", task="scenes", accuracy=None,
    options=None, positions="original", seed=0, batch_size=50, device="cpu", torch="2.15.0", status="ok", error=None,
    kinds=KINDS, prefill_ms=None,
) -> dict:  # fmt: skip
    """One row with made-up numbers, a function of its arguments alone."""
    budget = None if method == "none" else {"by": by, "share": share}
    share = 1.0 if budget is None else share
    work = {
        "model": {"name": model, "dtype": "float32", "attention": "sdpa"},
        "task": {"name": task, "options": {"split": "test", "seed": seed}, "items": items},
        "method": {"name": method, "options": options or {}, "positions": positions},
        "budget": budget,
        "run": {"batch_size": batch_size, "max_new_tokens": 3},
    }
    key = hashlib.sha256(json.dumps(work).encode()).hexdigest()[:12]
    row = {"schema": SCHEMA, "cell": hashlib.sha256((key + device + torch).encode()).hexdigest()[:12], **work}
    row |= {"status": status, "error": error, "result": None, "cost": None, "measured": None}
    row |= {
        "versions": {"prune": "0.1.0", "torch": torch, "transformers": "5.23.0", "python": "3.11.2"},
        "device": device,
    }
    if status != "ok":
        return row
    rng = np.random.default_rng(int(key, 16))
    accuracy = ACCURACY.get(method, 0.5) if accuracy is None else accuracy
    wanted = accuracy if method == "none" else accuracy + (0.97 - accuracy) * (share - 1 / 9)
    hardness = 0.6 * np.random.default_rng(0).random(items) + 0.4 * rng.random(items)  # mostly the items', not ours
    scores = (hardness < np.quantile(hardness, wanted)) * 1.0 if items else np.zeros(0)
    estimate = mean_interval(scores)
    groups = {kind: scores[at :: len(kinds)] for at, kind in enumerate(kinds)}
    average = VISUAL * share
    alive = [average] * LAYERS if method != "dart" else [VISUAL, VISUAL, *[max(1.0, average * 5 / 3 - 96)] * 3]
    tokens = sum(alive) / LAYERS if budget and by == "keep" else average
    flops = {
        "tower": 9.1e7, "projector": 4.2e6, "attention": 2.1e5 * (tokens + TEXT) + 900 * (tokens + TEXT) ** 2,
        "mlp": 9.8e5 * (tokens + TEXT), "selection": 0.0 if method == "none" else 3.1e5, "head": 1.0e4,
    }  # fmt: skip
    full = 9.1e7 + 4.2e6 + 2.1e5 * (VISUAL + TEXT) + 900 * (VISUAL + TEXT) ** 2 + 9.8e5 * (VISUAL + TEXT) + 1.0e4
    row["result"] = {
        "items": items,
        "accuracy": estimate.mean,
        "interval": [estimate.low, estimate.high],
        "scores": scores.tolist(),
        "kinds": {
            kind: {"items": len(found), "accuracy": float(found.mean()) if len(found) else math.nan}
            for kind, found in groups.items()
        },
    }
    row["cost"] = {
        "visual_tokens": float(VISUAL), "kept_tokens": alive[-1], "average_tokens": tokens, "tokens_per_layer": alive,
        "text_tokens": TEXT, "new_tokens": 2.0, "flops": flops, "prefill_flops": sum(flops.values()),
        "prefill_flops_full": full, "decode_flops": 3.3e6, "kv_bytes": 5120 * (tokens + TEXT),
        "kv_bytes_full": 5120 * (VISUAL + TEXT),
    }  # fmt: skip
    row["measured"] = {
        "prefill_ms": prefill_ms or (0.9 + 1.4 * (tokens / VISUAL)) * (1 + 0.1 * rng.random()),
        "decode_ms": 0.3 + 0.1 * rng.random(), "seconds": 8.1, "finished": "2026-11-23T08:00:00+00:00",
    }  # fmt: skip
    return row


def make_rows(methods=("random", "uniform", "divprune", "dart"), shares=SHARES, **common) -> list[dict]:
    return [make_row("none", **common), *(make_row(name, share, **common) for name in methods for share in shares)]


def screen(rows, width=200, colours=False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colours, color_system="standard" if colours else None
    )
    console.print(terminal_table(rows, width))
    return console.file.getvalue()


def table_line(text: str, label: str) -> str:
    """The first line of a printed report that starts with a label: the one of accuracies."""
    return next(line for line in text.splitlines() if line.startswith(f"{label} "))


def read_csv(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a browser makes of a page: its tags with attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The rows, the folder of their report, and the paths it says it wrote."""
    rows = make_rows()
    folder = tmp_path_factory.mktemp("reports") / "new" / "folder"
    return rows, folder, write_report(rows, folder)


# ------------------------------------------------------------------------------------------------------- numbers


def test_differences_are_the_paired_ones_to_random_at_the_same_budget():
    rows = make_rows()
    for line in summarise(rows):
        if line.name in ("none", "random"):
            assert line.difference is None and line.reference is None
            continue
        (random,) = (r for r in rows if r["method"]["name"] == "random" and r["budget"] == line.row["budget"])
        assert line.reference == random["cell"]
        assert line.difference == paired_difference(line.row["result"]["scores"], random["result"]["scores"])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"items": 100},
        {"model": "another"},
        {"task": "another"},
        {"share": 1 / 18},
        {"by": "keep"},
        {"status": "failed"},
    ],
)
def test_no_difference_to_random_on_other_terms(other):
    dart = make_row()
    assert summarise([make_row("random"), dart])[1].difference
    assert summarise([make_row("random", **other), dart])[1].difference is None


def test_no_difference_where_the_data_of_the_task_changed():
    random, dart = make_row("random"), make_row("dart")
    random["task"]["digest"], dart["task"]["digest"] = "old", "new"
    line = summarise([random, dart])[1]
    assert line.difference is None
    assert "states of the task's data" in screen([random, dart])


def test_no_difference_where_scores_are_missing():
    random, dart = make_row("random"), make_row("dart")
    del dart["result"]["scores"][-1]
    assert summarise([random, dart])[1].difference is None


def test_ratios_are_to_the_un_pruned_cell_of_the_same_device_and_batch_size():
    rows = [
        make_row("none", prefill_ms=4.0),
        make_row("none", device="H200", prefill_ms=1.0),
        make_row("dart", prefill_ms=3.0),
        make_row("dart", 1 / 3, device="H200", prefill_ms=0.5),
        make_row("dart", 2 / 9, device="T4", prefill_ms=3.0),
        make_row("dart", 1 / 18, batch_size=1, prefill_ms=3.0),
    ]
    assert [line.prefill_ratio for line in summarise(rows)] == [1, 1, 0.75, 0.5, None, None]
    text = screen(rows)
    assert "cpu: 3, H200: 2, T4: 1" in text and "batch sizes (50: 5, 1: 1)" in text


def test_shares_of_flops_and_bytes():
    row = make_row()
    (line,) = summarise([row])
    assert line.prefill_share == row["cost"]["prefill_flops"] / row["cost"]["prefill_flops_full"]
    assert line.kv_share == row["cost"]["kv_bytes"] / row["cost"]["kv_bytes_full"]
    row["cost"]["kv_bytes_full"] = 0
    assert summarise([row])[0].kv_share is None


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1 / 3, "1/3"),
        (2 / 9, "2/9"),
        (1 / 18, "1/18"),
        (0.5, "1/2"),
        (1.0, "1"),
        (0.123, "0.123"),
        (1 / 300, "0.00333333"),
    ],
)
def test_shares_are_written_as_fractions_if_these_are_simple(share, text):
    assert share_text(share) == text


def test_lines_are_grouped_by_model_task_and_sort_of_budget():
    rows = [
        *make_rows(),
        *make_rows(by="keep")[1:],
        *make_rows(task="scenes-hard", by="flops"),
        make_row("none", model="b"),
    ]
    half = {**make_row("none"), "cell": "half", "model": {**rows[0]["model"], "dtype": "float16"}}
    groups = comparisons(summarise([*rows, half]))
    assert [(group.model, group.task, group.by) for group in groups] == [
        ("scenes-llava(dtype=float32)", "scenes", "average"),
        ("scenes-llava(dtype=float32)", "scenes", "keep"),
        ("scenes-llava(dtype=float32)", "scenes-hard", "flops"),
        ("b", "scenes", None),
        ("scenes-llava(dtype=float16)", "scenes", None),
    ]
    for group in groups[:3]:
        assert [line.name for line in group.baseline] == ["none"]
        assert list(group.methods) == ["random", "dart", "divprune", "uniform"] and group.shares == SHARES
    assert sorted(line.row["cell"] for group in groups for line in group.lines if line.name != "none") == sorted(
        row["cell"] for row in rows if row["method"]["name"] != "none"
    )


def test_variants_of_a_method_are_lines_named_by_what_differs():
    same = {"pivots": 8, "schedule": [0.5] * 100}
    rows = [make_row("random"), make_row("fastv", options={"layer": 2})]
    rows += [make_row("dart", share, options={"layer": layer, **same}) for layer in (1, 2) for share in SHARES]
    (group,) = comparisons(summarise(rows))
    assert list(group.methods) == ["random", "dart(layer=1)", "dart(layer=2)", "fastv"]
    assert [len(cells) for cells in group.methods.values()] == [1, 4, 4, 1]
    rows = [
        make_row("dart", positions=positions, batch_size=size)
        for positions in ("original", "compact")
        for size in (1, 2)
    ]
    assert {line.method for line in summarise(rows)} == {
        f"dart(positions={positions}, batch_size={size})" for positions in ("original", "compact") for size in (1, 2)
    }


def test_long_options_stay_apart():
    """Equal beginnings and ends, differences in the middle: two lines all the same."""
    lines = summarise([make_row(options={"prompt": f"{'a' * 300}{middle}{'z' * 300}"}) for middle in "bc"])
    labels = [line.method for line in lines]
    assert len(set(labels)) == 2 and max(map(len, labels)) < 60


def test_the_best_of_a_budget():
    rows = [make_row("dart", accuracy=0.9), make_row("divprune", accuracy=0.5), make_row("none", accuracy=1.0)]
    (group,) = comparisons(summarise(rows))
    assert group.best == {rows[0]["cell"]}
    (group,) = comparisons(summarise(rows[::2]))
    assert group.best == set()


# ------------------------------------------------------------------------------------------------------ terminal


@cache
def _many() -> list[dict]:
    return make_rows(["random", *(f"method_number_{at}" for at in range(22))])


@pytest.mark.parametrize("width", [40, 60, 80, 120, 240])
def test_the_terminal_table_fits_and_loses_nothing(width):
    methods = [f"method_number_{at}" for at in range(22)]
    text = screen(_many(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "\x1b" not in text
    decode = r" +\d\.\d{3}" if width >= 80 else ""
    assert re.search(rf"^un-pruned +144\.0 .* 1\.00{decode} *$", text, re.M)  # columns of costs are whole or left out
    squeezed = re.sub(r"\s", "", text)
    if width >= 60:  # labels are not folded: accuracies, and a cost per budget
        assert all(squeezed.count(name) >= 5 for name in methods)
    headings = re.findall(r"1/3|2/9|1/9|1/18", "\n".join(text.split("cost of")[0].splitlines()))
    assert headings == ["1/3", "2/9", "1/9", "1/18"]


def test_numbers_in_the_terminal():
    rows = make_rows()
    line = next(line for line in summarise(rows) if line.name == "dart" and line.share == 1 / 3)
    accuracy, difference = ([f"{100 * value:.1f}" for value in found] for found in (line.accuracy, line.difference))
    wide = " ".join(table_line(screen(rows, 200), "dart").split())
    assert wide.startswith(
        f"dart * {accuracy[0]} [{accuracy[1]}, {accuracy[2]}] +{difference[0]}↑ [+{difference[1]}, +{difference[2]}] "
    )
    narrow = " ".join(table_line(screen(rows, 80), "dart").split())
    half = 50 * (line.accuracy.high - line.accuracy.low)
    assert narrow.startswith(f"dart * {100 * line.accuracy.mean:.0f} ±{half:.0f} +{100 * line.difference.mean:.0f}↑ ")


def test_colours_say_better_worse_and_neither():
    rows = [
        make_row("random", accuracy=0.6),
        make_row("a", accuracy=0.9),
        make_row("b", accuracy=0.3),
        make_row("c", accuracy=0.61),
    ]
    text = screen(rows, colours=True)
    assert re.search(r"\x1b\[32m *\+\d+\.\d↑", text) and re.search(r"\x1b\[31m *-\d+\.\d↓", text)
    plain = screen(rows)
    assert "↑" in table_line(plain, "a") and "↓" in table_line(plain, "b")
    assert not {"↑", "↓"} & set(table_line(plain, "c"))


def test_failed_cells_and_those_out_of_reach():
    rows = make_rows(shares=(1 / 3, 1 / 9))
    rows[-1] = make_row("dart", status="failed", error="OutOfMemoryError: no memory\nTraceback")
    rows[-3] = make_row("divprune", status="out of reach", error="one token kept of 144 still costs 58.2")
    text = screen(rows, 120)
    assert " failed" in table_line(text, "dart") and " out of reach" in table_line(text, "divprune")
    assert "dart at 1/9: failed: OutOfMemoryError: no memory Traceback" in text
    assert "divprune at 1/9: out of reach: one token kept of 144 still costs 58.2" in text


def test_what_is_out_of_reach_is_said_once_per_method():
    error = "average=0.33 is out of reach: one token kept of 144 still costs 58.2"
    rows = [make_row("none"), *(make_row(status="out of reach", error=error, share=share) for share in (1 / 3, 1 / 9))]
    text = screen(rows, 120)
    assert text.count("58.2") == 1 and "dart at 1/3, 1/9: average=0.33 is out of reach: one token" in text


def test_cells_that_miss_their_budget_are_named():
    rows = make_rows(shares=(1 / 3,))
    assert "equal cost" not in screen(rows)
    rows[-1]["cost"]["average_tokens"] *= 1.03
    text = " ".join(screen(rows).split())
    assert "note: Not at equal cost, counts being whole numbers: dart at 1/3: 49.44 for 48." in text


def test_notes_on_what_cannot_be_compared():
    rows = [*make_rows(shares=(1 / 9,)), make_row(options={"layer": 1}, torch="2.14.0", items=100)]
    text = " ".join(screen(rows).split())
    assert "versions of torch (2.15.0: 5, 2.14.0: 1)" in text and "numbers of items (400: 5, 100: 1)" in text
    assert "note:" not in screen(make_rows())
    assert "No cells of random" in screen([make_row("none"), make_row("dart")])
    two = [make_row("random", options={"layer": layer}) for layer in (0, 2)]
    assert "Differences are to random(layer=0)." in screen([*two, make_row("dart")])


def test_what_needs_no_picture_is_one_line_below_the_table(tmp_path):
    rows = make_rows(shares=(1 / 3, 1 / 9))
    assert "Always the" not in screen(rows)
    for row in rows[1:]:  # a row of an earlier version does not say
        row["result"]["majority"] = 0.2054
    said = "Always the most frequent answer of each kind: 20.5 %."
    text = screen(rows)
    assert text.count(said) == 1 and text.index("uniform") < text.index(said) < text.index("cost of")
    write_report(rows, tmp_path)
    assert (tmp_path / "report.md").read_text().count(f"\n\n{said}\n\n") == 1
    rows = [make_row("none", kinds=()), make_row("random", kinds=(), items=100)]
    for row, share in zip(rows, (0.5, 0.25)):
        row["result"]["majority"] = share
    assert "answer: 50.0 %.\nAlways the most frequent answer: 25.0 %." in re.sub(" +\n", "\n", screen(rows))


def test_text_of_rows_is_shown_as_it_is():
    text = screen(
        [
            make_row("none", model="[red]a[/red] \x1b[31m\nb"),
            make_row("dart", status="failed", error="[/] \x1b]0;t\x07"),
        ]
    )
    assert "[red]a[/red]  [31m b on scenes" in text and "\x1b" not in text and "\x07" not in text


# --------------------------------------------------------------------------------------------------------- files


def test_the_files_of_a_report(report):
    _, folder, paths = report
    assert sorted(paths) == sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    plots = [f"plots/scenes-llava-scenes-average-{name}.png" for name in ("tokens", "flops", "latency", "kinds")]
    assert names == ["report.md", "report.csv", *plots, "report.html"]


def test_every_number_of_the_rows_is_in_the_csv(report):
    rows, folder, _ = report
    records = read_csv(folder / "report.csv")
    assert [record["cell"] for record in records] == [row["cell"] for row in rows]
    assert all(re.fullmatch(r"[a-z0-9_]+", column) for column in records[0])
    for row, record, line in zip(rows, records, summarise(rows)):
        for column, value in {
            "accuracy": row["result"]["accuracy"],
            "accuracy_low": row["result"]["interval"][0],
            "accuracy_high": row["result"]["interval"][1],
            "budget_share": row["budget"] and row["budget"]["share"],
            "difference": line.difference and line.difference.mean,
            "difference_high": line.difference and line.difference.high,
            "average_tokens": row["cost"]["average_tokens"],
            "flops_attention": row["cost"]["flops"]["attention"],
            "prefill_ms": row["measured"]["prefill_ms"],
            "kind_colour_of": row["result"]["kinds"]["colour-of"]["accuracy"],
            "kv_share": row["cost"]["kv_bytes"] / row["cost"]["kv_bytes_full"],
        }.items():
            assert (record[column] == "") if value is None else (float(record[column]) == value), column
        assert record["version_torch"] == "2.15.0" and record["device"] == "cpu" and record["run_batch_size"] == "50"
        assert json.loads(record["tokens_per_layer"]) == row["cost"]["tokens_per_layer"]


def test_csv_of_failed_cells_and_awkward_text(tmp_path):
    error = 'a "quoted", text\nof two lines'
    rows = [make_row("none"), make_row(status="failed", error=error, options={"a": [1, "b;,"]})]
    write_report(rows, tmp_path)
    record = read_csv(tmp_path / "report.csv")[1]
    assert record["error"] == error and record["status"] == "failed" and record["accuracy"] == ""
    assert json.loads(record["method_options"]) == {"a": [1, "b;,"]}


def test_markdown_tables_are_whole(report):
    rows, folder, paths = report
    text = (folder / "report.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1 and block.splitlines()[1].startswith("| --- | ---:")
    line = next(line for line in summarise(rows) if line.name == "dart" and line.share == 1 / 3)
    accuracy, difference = ([f"{100 * value:.1f}" for value in found] for found in (line.accuracy, line.difference))
    cell = f"**{accuracy[0]}** [{accuracy[1]}, {accuracy[2]}]<br>+{difference[0]}↑ [+{difference[1]}, +{difference[2]}]"
    assert f"| dart | {cell} |" in text
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert [folder / name for name in linked] == [path for path in paths if path.suffix == ".png"]


def test_the_page_needs_nothing_else_and_holds_the_plots(report):
    rows, folder, paths = report
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    prefix = "data:image/png;base64,"
    assert all(picture.startswith(prefix) for picture in pictures)
    drawn = [b64decode(picture.removeprefix(prefix)) for picture in pictures]
    assert drawn == [path.read_bytes() for path in paths if path.suffix == ".png"]
    for fact in (
        "torch=2.15.0",
        "batch_size=50",
        "split=test",
        "2026-11-23T08:00:00+00:00",
        "prune report results.jsonl",
    ):
        assert fact in page.text
    for line in summarise(rows):
        assert f"{100 * line.accuracy.mean:.1f} [{100 * line.accuracy.low:.1f}, " in page.text


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> | [a](http://b) `c` $x_{$ \x1b[31m \n../../etc"


def test_text_of_rows_is_escaped_everywhere(tmp_path):
    rows = make_rows(("random", "dart"), (1 / 9,), model=EVIL, task=EVIL, kinds=(EVIL, "b"), device=EVIL)
    rows += [make_row(EVIL, options={EVIL: at}, model=EVIL, task=EVIL) for at in range(2)]
    rows += [make_row("fastv", model=EVIL, task=EVIL, status="failed", error=EVIL)]
    paths = write_report(rows, tmp_path / "report", command=EVIL)
    page = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "a"} & {tag for tag, _ in page.tags}
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 10
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"<(?!br>)", text) and not re.search(r"(?<!\\)\]\((?!plots/)", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    for path in paths:
        assert path.resolve().is_relative_to((tmp_path / "report").resolve())
        assert re.fullmatch(r"[A-Za-z0-9.-]{1,200}", path.name)


def test_file_names_differ_on_every_file_system():
    rows = [make_row("none", model=name) for name in ("a/b", "a-b", "A b", "é", "ü", "..", "x" * 300, "a-b-2")]
    names = file_names(comparisons(summarise(rows)))
    assert len({name.lower() for name in names}) == len(names) and max(map(len, names)) < 160
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name in names)


# --------------------------------------------------------------------------------------------------------- plots


def test_plots_are_pictures(report):
    for path in report[2]:
        if path.suffix == ".png":
            picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
            assert picture.shape[0] > 250 and picture.shape[1] > 500
            inked = (picture < 250).any(-1).mean()
            assert 0.01 < inked < 0.9, path.name
            frame = np.concatenate(
                [picture[:2].ravel(), picture[-2:].ravel(), picture[:, :2].ravel(), picture[:, -2:].ravel()]
            )
            assert frame.min() == 255, f"{path.name} is cut off"


def axes_of(function, rows):
    (group,) = comparisons(summarise(rows))
    return function(group).axes[0]


def test_points_lie_at_their_numbers():
    from prune.evals import plots

    rows = make_rows(("dart",))  # one curve is not moved aside
    lines = summarise(rows)[1:]
    costs = {
        plots._against_tokens: lambda line: line.cost("average_tokens"),
        plots._against_flops: lambda line: 100 * line.prefill_share,
    }
    for function, cost in costs.items():
        axes = axes_of(function, rows)
        (container,) = axes.containers
        curve, _, (bars,) = container
        expected = sorted((cost(line), *(100 * value for value in line.accuracy)) for line in lines)
        assert np.allclose(curve.get_xydata(), [point[:2] for point in expected])
        assert np.allclose([bar[:, 1] for bar in bars.get_segments()], [point[2:] for point in expected])
        assert axes.get_legend_handles_labels()[1] == ["un-pruned", "dart"]
    axes = axes_of(plots._latency, rows)
    points = {line.get_label(): line.get_xdata() for line in axes.lines[1:]}
    assert points == {share_text(line.share): (line.prefill_ratio,) for line in lines}
    image = axes_of(plots._kinds, rows).images[0].get_array()
    assert np.allclose(image[1], [100 * lines[0].kinds[kind] for kind in KINDS])


def test_curves_at_equal_cost_are_set_apart_but_not_into_the_next_budget():
    from prune.evals import plots

    axes = axes_of(plots._against_tokens, make_rows([f"method{at}" for at in range(22)], (1 / 9, 0.1)))
    x = np.array([container[0].get_xdata() for container in axes.containers])
    assert x.shape == (22, 2) and (np.diff(x, axis=0) > 0).all() and x[:, 0].max() < x[:, 1].min()


def test_thirty_methods_look_different_in_colour_and_in_grey():
    from prune.evals import plots

    (group,) = comparisons(summarise(make_rows(["random", *(f"method{at}" for at in range(30))], (1 / 9,))))
    styles = [plots._style(group, label) for label in group.methods]
    assert len({(style["color"], style["marker"]) for style in styles}) == 31
    assert len({(style["marker"], str(style["linestyle"])) for style in styles}) == 31


def test_only_plots_that_mean_something():
    from prune.evals import plots

    def drawn(rows):
        (group,) = comparisons(summarise(rows))
        return [plot.name for plot in plots.draw(group)]

    assert drawn([make_row("none")]) == ["kinds"]
    bare = make_row("none")
    bare["result"]["kinds"] = {}
    assert drawn([bare]) == []
    plain = [bare, make_row("dart")]
    plain[1]["result"]["kinds"], plain[1]["measured"] = {}, None
    assert drawn(plain) == ["tokens", "flops"]


# -------------------------------------------------------------------------------------------------- unusual input


@pytest.mark.parametrize(
    "rows",
    [
        [make_row("none")],
        [make_row("dart")],
        [make_row("dart", status="failed", error=None)],
        [make_row("none"), make_row("dart", status="out of reach", error="58.2")],
        [make_row("none"), *(make_row("dart", items=0, share=share) for share in SHARES)],
        [make_row("none"), make_row("dart", items=1)],
        [make_row("none"), make_row("dart", share=1.0), make_row("random", share=1.0)],
        [*make_rows(("dart",), (0.5,), model="a"), *make_rows(("dart",), (0.5,), by="keep", task="scenes-hard")],
    ],
    ids=["none alone", "a method alone", "failed alone", "out of reach", "no items", "one item", "share 1", "several"],
)
@pytest.mark.filterwarnings("error")
def test_unusual_rows_are_reported_all_the_same(rows, tmp_path):
    write_report(rows, tmp_path)
    assert len(read_csv(tmp_path / "report.csv")) == len(rows)
    html, text = (tmp_path / "report.html").read_text(encoding="utf-8"), screen(rows)
    for line in summarise(rows):
        assert line.method in html and line.method in text
        assert line.status == "ok" or line.status in html and line.status in text
    assert "nan" not in html.replace("name", "").lower().split("data:")[0]


def test_accuracies_that_are_no_numbers():
    row = make_row("dart", items=0)
    assert np.isnan(row["result"]["accuracy"])
    (line,) = summarise([row])
    assert line.accuracy is None and line.status == "no items" and line.difference is None and line.kinds == {}
    assert "no items" in table_line(screen([make_row("none"), row]), "dart")


@pytest.mark.parametrize(
    "function", [summarise, lambda rows: terminal_table(rows, 80), lambda rows: write_report(rows, "x")]
)
def test_no_rows(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PruneError, match="no rows"):
        function([])
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere; /proc takes no files even so
        locked = "/proc"
    for folder in (tmp_path / "file", locked):
        with pytest.raises(PruneError, match=f"cannot write the report to {re.escape(str(folder))}.*another folder"):
            write_report([make_row("none")], folder)


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PruneError, match="pip install matplotlib"):
        write_report([make_row("none")], tmp_path)
    assert not os.listdir(tmp_path)


def test_the_state_of_matplotlib_is_left_alone(tmp_path):
    code = (
        "import sys, json, prune.evals.report as report; assert 'matplotlib' not in sys.modules;"
        "import matplotlib; before = matplotlib.rcParams.copy();"
        f"report.write_report(json.load(open({str(tmp_path / 'rows.json')!r})), {str(tmp_path / 'out')!r});"
        "assert dict.__eq__(matplotlib.rcParams, before) and 'matplotlib.pyplot' not in sys.modules"
    )
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(("dart",), (1 / 9,))))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
