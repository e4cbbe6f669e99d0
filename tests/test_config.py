"""Saved pruners: what is written attaches the same pruner again, and nothing broken or hostile gets further."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from fingerprint import changed, fingerprint
from tiny import collate, one, shared

from prune import (
    Budget,
    BudgetError,
    Compose,
    ConfigError,
    PruneError,
    Scorer,
    UnknownMethodError,
    apply_pruner,
    get_method,
)
from prune.config import FILE, LIMIT, PrunerConfig
from prune.learned_scorer import LearnedScorer

GOOD = {"schema": 1, "method": "dart", "options": {"layer": 1}, "budget": {"keep": 4}}
PAIR = [{"method": "divprune"}, {"method": "fastv", "options": {"layer": 2}}]
NAN = float("nan")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def write(folder, content) -> str:
    """A folder with the content as its config file; bytes and text as they are."""
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(data)
    return str(folder)


def outcome(model, method, **given):
    """Logits, kept indices and settings under a pruner."""
    inputs = collate(one("llava"))
    with apply_pruner(model, method, **given) as handle:
        logits = model(**inputs).logits
        kept = [image.kept.tolist() for image in handle.last.images]
        return logits, kept, (handle.method, handle.budget, handle._engine.positions)


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


# ------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize(
    "given",
    [
        {"keep": 4},
        {"ratio": 0.7},
        {"average": 6.0},
        {"average": 0.5},
        {"flops": 0.8},
        {"keep": 4, "positions": "original"},
    ],
    ids=str,
)
def test_a_saved_pruner_attaches_again(given, tmp_path):
    model = shared("llava")
    method, options = ("divprune", {}) if "positions" in given else ("dart", {"layer": 1, "image_pivots": 2})
    with apply_pruner(model, method, **given, **options) as handle:
        file = handle.save_pretrained(tmp_path / "made" / "anew", metrics={"accuracy": 0.5})
    assert file == tmp_path / "made" / "anew" / FILE
    expected = outcome(model, method, **given, **options)
    assert len(expected[1][0]) < 16
    for source in (str(file.parent), file.parent, str(file)):
        assert same(outcome(model, source), expected)
    saved = PrunerConfig.from_pretrained(file)
    assert saved.metrics == {"accuracy": 0.5} and saved.families == ("LLaVA-1.5",)
    assert os.listdir(file.parent) == [FILE]


def test_keywords_override_the_file(tmp_path):
    model, folder = shared("llava"), write(tmp_path / "a", {**GOOD, "positions": "original"})
    assert same(outcome(model, folder, ratio=0.5, layer=2), outcome(model, "dart", ratio=0.5, layer=2))
    assert same(outcome(model, folder, layer=3), outcome(model, "dart", keep=4, layer=3))
    with pytest.raises(ConfigError, match='positions="compact" needs'):
        apply_pruner(model, folder, positions="compact")
    with pytest.raises(ConfigError, match="no option 'layers'.*layer"):
        apply_pruner(model, folder, layers=2)
    without = write(tmp_path / "b", {key: value for key, value in GOOD.items() if key != "budget"})
    with pytest.raises(BudgetError, match="exactly one"):
        apply_pruner(model, without)
    assert same(outcome(model, without, keep=4), outcome(model, folder))


@pytest.mark.parametrize("own", [False, True])
def test_compose_is_saved_as_its_members(own, tmp_path):
    model = shared("llava")
    budgets = [Budget(keep=8), Budget(ratio=0.5)] if own else None
    method = Compose(get_method("divprune"), get_method("fastv", layer=2), budgets=budgets)
    given = {} if own else {"keep": 4}
    with apply_pruner(model, method, **given) as handle:
        folder = handle.save_pretrained(tmp_path).parent
    expected = outcome(model, method, **given)
    assert same(outcome(model, folder), expected)
    written = json.loads((tmp_path / FILE).read_text())
    assert [member["method"] for member in written["members"]] == ["divprune", "fastv"]
    assert ("budget" in written) != own and "options" not in written
    # one budget for all replaces the members' own
    plain = Compose(*method.members)
    assert same(outcome(model, folder, ratio=0.5), outcome(model, plain, ratio=0.5))
    with pytest.raises(ConfigError, match="belong to the members"):
        apply_pruner(model, folder, layer=3)


def test_a_dictionary_and_a_config_say_the_same():
    config = PrunerConfig(
        "pyramiddrop",
        {"layers": (1, 2, 3), "shares": (0.5, 0.25, 0.125)},
        Budget(average=0.5),
        "original",
        ("A",),
        {"x": [1]},
    )
    assert PrunerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.build() == get_method("pyramiddrop", layers=(1, 2, 3))
    with pytest.raises(ConfigError, match="positions and the rest go outside"):
        PrunerConfig("compose", members=(PrunerConfig("divprune"), PrunerConfig("fastv", positions="original")))
    assert PrunerConfig.from_dict(PrunerConfig("fastv").to_dict()) == PrunerConfig("fastv")


def test_unknown_keys_warn_and_survive(tmp_path):
    future = {"trust": {"deep": [1, 2]}, "revision": "abc"}
    members = [PAIR[0] | {"weight": 2}, PAIR[1]]
    folder = write(tmp_path / "a", {"schema": 1, "method": "compose", "members": members} | future)
    with pytest.warns(UserWarning, match="'weight'"), pytest.warns(UserWarning, match="'trust', 'revision'"):
        config = PrunerConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / FILE).read_text())
    assert {key: written[key] for key in future} == future and written["members"][0]["weight"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrunerConfig.from_dict(GOOD)


def test_a_handle_writes_back_what_it_was_loaded_with(tmp_path):
    model = shared("llava")
    members = [PAIR[0] | {"note": "a"}, PAIR[1] | {"note": "b"}]
    found = {"schema": 1, "method": "compose", "members": members, "budget": {"keep": 4}, "future": [1]}
    found |= {"metrics": {"x": 1}, "families": ["Qwen2-VL"]}
    folder = write(tmp_path / "a", found)

    def saved_again(change=None, **given) -> dict:
        with pytest.warns(UserWarning, match="unknown keys"):
            handle = apply_pruner(model, folder, **given)
        with handle, pytest.warns(UserWarning, match="unknown keys"):
            handle.budget = change or handle.budget
            again = handle.save_pretrained(tmp_path / "b")
            return PrunerConfig.from_pretrained(again).to_dict()

    same = saved_again()
    assert [same[key] for key in ("metrics", "families", "future")] == [{"x": 1}, ["Qwen2-VL"], [1]]
    for other in (saved_again(keep=5), saved_again(Budget(keep=5))):  # not what was measured
        assert other["future"] == [1] and other["families"] == ["LLaVA-1.5"] and "metrics" not in other
        assert [member["note"] for member in other["members"]] == ["a", "b"]


def test_weights_are_copied_beside_the_file(tmp_path):
    torch.manual_seed(0)
    LearnedScorer(size=8, hidden=3).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("not asked for")
    method = get_method("index_preserving", scorer=str(tmp_path / "mine"))
    config = PrunerConfig.of(method, Budget(ratio=0.5))
    folder = config.save_pretrained(tmp_path / "saved").parent
    assert json.loads((folder / FILE).read_text())["options"]["scorer"] == "weights/scorer"
    assert sorted(os.listdir(folder / "weights" / "scorer")) == ["config.json", "model.safetensors"]
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    moved = folder.rename(tmp_path / "moved")
    found = PrunerConfig.from_pretrained(moved)
    for a, b in zip(found.build()._module.parameters(), method._module.parameters(), strict=True):
        assert torch.equal(a, b)
    found.save_pretrained(moved)  # onto itself
    assert PrunerConfig.from_pretrained(moved) == found
    # a word of the method is no folder
    plain = PrunerConfig.of(get_method("index_preserving", scorer="contrast")).save_pretrained(tmp_path / "plain")
    assert os.listdir(plain.parent) == [FILE] and PrunerConfig.from_pretrained(plain).options["scorer"] == "contrast"
    # a link leads out of the folder; nothing is read there
    (moved / "out").symlink_to(tmp_path / "elsewhere")
    write(moved, scorer("out"))
    with pytest.raises(ConfigError, match="out is a link to a place outside"):
        PrunerConfig.from_pretrained(moved)
    with pytest.raises(ConfigError, match="no file .*mine.config.json any more"):
        config.save_pretrained(tmp_path / "third")
    assert not os.path.exists(tmp_path / "third" / FILE)


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", GOOD)
    config = PrunerConfig.from_pretrained(folder)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left.*another folder"):
            replace(config, budget=Budget(keep=9)).save_pretrained(folder)
    assert PrunerConfig.from_pretrained(folder) == config and os.listdir(folder) == [FILE]
    with pytest.raises(ConfigError, match="cannot write"):
        config.save_pretrained(tmp_path / "a" / FILE)
    with pytest.raises(ConfigError, match="bytes, more than"):
        replace(config, metrics={"x": "y" * LIMIT}).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------- bad files
DEEP = "[" * 100_000
DEEPER = {"schema": 1, "method": "dart", "metrics": json.loads('{"x":' * 40 + "0" + "}" * 40)}
NEST = PAIR[0]
for _ in range(40):
    NEST = {"method": "compose", "members": [NEST, PAIR[1]]}
WEIGHTS = "option scorer=.* must be a folder of weights beside the file"


def scorer(value) -> dict:
    return {"schema": 1, "method": "index_preserving", "budget": {"ratio": 0.5}, "options": {"scorer": value}}


BAD = [
    (b"", "not JSON.*save_pretrained"),
    (b"\x80\x04\x95\x0b", "not JSON"),  # a pickle
    ("{'schema': 1}", "not JSON"),
    (json.dumps(GOOD)[:-5], "not JSON"),
    ('{"schema": 1, "method": "dart", "metrics": ' + DEEP, "too deeply|not JSON"),
    (b" " * (LIMIT + 1), "larger than 1048576"),
    (b" " * 10_000_000, "larger than 1048576"),
    ('{"schema": 1, "method": "dart", "options": {"layer": 1, "layer": 2}}', "the key 'layer' comes twice"),
    (json.dumps(GOOD)[:-1] + ', "method": "fastv"}', "the key 'method' comes twice"),
    ("{" + '"a": 1, ' + "".join(f'"{n}": 1, ' for n in range(80_000)) + '"79999": 1}', "the key '79999' comes twice"),
    (DEEPER, "nested more than 32 deep"),
    (NEST | {"schema": 1}, "nested more than 32 deep"),
    ({"schema": 1, "method": "compose", "members": [PAIR[0]] * 10_000}, "members must be at most 16, got 10000"),
    (scorer("/etc"), WEIGHTS),
    (scorer("../secret"), WEIGHTS),
    (scorer("a/../../secret"), WEIGHTS),
    (scorer("./a"), WEIGHTS),
    (scorer("~/a"), WEIGHTS),
    (scorer("~root"), WEIGHTS),
    (scorer("a//b"), WEIGHTS),
    (scorer("a\\b"), WEIGHTS),
    (scorer("C:a"), WEIGHTS),
    (scorer("a\nb"), WEIGHTS),
    (scorer("a\n"), WEIGHTS),
    (scorer("a\0b"), WEIGHTS),
    (scorer("https://example.org/a"), WEIGHTS),
    (scorer("a" * 300), WEIGHTS),
    (scorer("secret"), "cannot read .*saved.secret.config.json"),  # beside the file, not in the working directory
    (scorer(3), "scorer=3 must be"),
    (scorer(["a"]), "scorer=.* must be"),
    (scorer(None), "scorer=None must be"),
    (scorer(""), "scorer='' must be"),
    (GOOD | {"budget": {"keep": True}}, "budget: keep=True"),
    ("[1]", "JSON object.*got \\[1\\]"),
    ("null", "JSON object.*got None"),
    ({"method": "dart"}, "schema must be.*got None"),
    (GOOD | {"schema": "1"}, "schema must be.*got '1'"),
    (GOOD | {"schema": True}, "schema must be"),
    (GOOD | {"schema": 0}, "schema must be"),
    (GOOD | {"schema": 2}, "schema 2 is newer.*pip install -U prune-vlm"),
    ({"schema": 1, "options": {}}, "no 'method'"),
    (GOOD | {"method": 3}, "method must be a name.*got 3"),
    (GOOD | {"method": "drat"}, "unknown method 'drat'.*Did you mean 'dart'.*install"),
    (GOOD | {"method": "../../etc/passwd"}, "no name of a method"),
    (GOOD | {"method": "__import__('os').system('true')"}, "no name of a method"),
    (GOOD | {"method": "x" * 10_000}, "no name of a method"),
    (GOOD | {"options": [1]}, "options must be an object"),
    (GOOD | {"options": None}, "options must be an object"),
    (GOOD | {"options": {"leyer": 2}}, "no option 'leyer'.*Did you mean 'layer'"),
    (GOOD | {"options": {"__class__": 2}}, "no option '__class__'"),
    (GOOD | {"options": {"layer": "two"}}, "layer='two' must be a whole number"),
    (GOOD | {"options": {"layer": 2.0}}, "layer=2.0 must be a whole number"),
    (GOOD | {"options": {"layer": True}}, "layer=True must be a whole number"),
    (GOOD | {"options": {"layer": None}}, "layer=None must be a whole number"),
    (GOOD | {"options": {"layer": -1}}, "layer=-1 must be a whole number"),
    (GOOD | {"options": {"newlines": 1}}, "newlines=1 must be True or False"),
    (
        {"schema": 1, "method": "pyramiddrop", "options": {"shares": [0.5, "x", 0.1]}},
        "shares=.* must be a sequence, each a number",
    ),
    (
        {"schema": 1, "method": "pyramiddrop", "options": {"shares": 0.5}},
        "shares=0.5 must be a sequence, each a number",
    ),
    (json.dumps(GOOD).replace('"layer": 1', '"layer": NaN'), "NaN is not a finite number"),
    (json.dumps(GOOD | {"metrics": {"x": NAN}}), "NaN is not a finite number"),
    (json.dumps(GOOD).replace('"keep": 4', '"keep": 1e999'), "1e999 is not a finite number"),
    (json.dumps(GOOD).replace('"keep": 4', '"keep": -Infinity'), "-Infinity is not a finite number"),
    (json.dumps(GOOD).replace('"keep": 4', '"keep": 1' + "0" * 400), "too large"),
    (json.dumps(GOOD).replace('"keep": 4', '"keep": 1' + "0" * 9000), "not JSON|too large"),
    (GOOD | {"budget": 4}, "budget must be an object"),
    (GOOD | {"budget": {}}, "budget: give exactly one"),
    (GOOD | {"budget": {"keep": 4, "ratio": 0.5}}, "budget: give exactly one"),
    (GOOD | {"budget": {"kept": 4}}, "budget must be an object with one of ratio, keep, average, flops"),
    (GOOD | {"budget": {"ratio": 1.5}}, "budget: ratio=1.5"),
    (GOOD | {"budget": {"keep": "4"}}, "budget: keep='4' is not a finite number"),
    (GOOD | {"positions": "sparse"}, "positions must be 'original' or 'compact', got 'sparse'"),
    (GOOD | {"positions": ["original"]}, "positions must be"),
    (GOOD | {"families": "llava"}, "families must be a list"),
    (GOOD | {"families": [1]}, "families must be a list of names"),
    (GOOD | {"metrics": 0.9}, "metrics must be an object"),
    (GOOD | {"members": PAIR}, "dart has no members"),
    ({"schema": 1, "method": "compose"}, "at least two"),
    ({"schema": 1, "method": "compose", "members": PAIR[:1]}, "at least two"),
    ({"schema": 1, "method": "compose", "members": PAIR[::-1]}, "sites of composed methods must ascend"),
    ({"schema": 1, "method": "compose", "members": {"a": 1}}, "members must be a list"),
    ({"schema": 1, "method": "compose", "members": [1, 2]}, "a member must be an object"),
    ({"schema": 1, "method": "compose", "members": [{}, {}]}, "no 'method'"),
    ({"schema": 1, "method": "compose", "members": PAIR, "options": {"layer": 1}}, "belong to the members"),
    ({"schema": 1, "method": "compose", "members": [PAIR[0] | {"budget": {"keep": 9}}, PAIR[1]]}, "every member"),
    (
        {
            "schema": 1,
            "method": "compose",
            "members": [m | {"budget": {"keep": 9}} for m in PAIR],
            "budget": {"keep": 4},
        },
        "budgets of their own",
    ),
    ({"schema": 1, "method": "compose", "members": [m | {"budget": {"flops": 0.5}} for m in PAIR]}, "ratio"),
]


@pytest.mark.parametrize("content,match", BAD, ids=[match[:40] for _, match in BAD])
def test_bad_files(content, match, tmp_path, monkeypatch):
    LearnedScorer(size=4, hidden=2).save_pretrained(tmp_path / "secret")
    monkeypatch.chdir(tmp_path)
    model, folder = shared("llava"), write(tmp_path / "saved", content)
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=f"(?s){match}") as caught:
        apply_pruner(model, folder)
    assert str(tmp_path / "saved" / FILE) in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(folder)
    assert not changed(before, fingerprint(model))


def test_places_without_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = shared("llava")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / FILE).mkdir()
    for name, match in (
        (tmp_path / "empty", "no file .*empty.*save_pretrained"),
        (tmp_path / "pipe", "no file"),
        (tmp_path / "folder", "no file"),
        (tmp_path / "gone", "no folder or file .*gone"),
        ("user/repo", "not in the cache, and HF_HUB_OFFLINE forbids"),  # tests/test_hub.py has the rest
        ("~/no/such", "no folder or file.*no name of a repository, such as 'user/repo'"),
        ("gone.json", "no folder or file"),
        ("a\0b/c", "no folder or file"),
        ("x/" * 5000, "no folder or file"),
    ):
        with pytest.raises(ConfigError, match=match):
            apply_pruner(model, name, keep=4)
    for word in ("drat", "", "no such method"):
        with pytest.raises(UnknownMethodError):
            apply_pruner(model, word, keep=4)


def test_a_registered_name_wins_over_a_folder(tmp_path, monkeypatch):
    model = shared("llava")
    write(tmp_path / "dart", GOOD | {"method": "random", "options": {}})
    write(tmp_path / "mine", GOOD | {"method": "random", "options": {}})
    monkeypatch.chdir(tmp_path)
    for name, expected in (("dart", "dart"), ("./dart", "random"), ("mine", "random")):
        with apply_pruner(model, name, keep=5) as handle:
            assert handle.method.name == expected


@dataclass
class Unlisted(Scorer):
    """Not registered."""

    weight: object = 1.0
    name = "unlisted"

    def score(self, tokens):
        return tokens.features[..., 0].float()


def test_what_cannot_be_saved(tmp_path):
    with apply_pruner(shared("llava"), Unlisted(), keep=4) as handle:
        with pytest.raises(ConfigError, match="Unlisted is not registered.*@register"):
            handle.save_pretrained(tmp_path)
    with apply_pruner(shared("llava"), "dart", keep=4, layer=1) as handle:
        for metrics in ({"x": NAN}, {"x": torch.ones(1)}, {"x": object()}):
            with pytest.raises(ConfigError, match="not JSON"):
                handle.save_pretrained(tmp_path, metrics=metrics)
    with pytest.raises(ConfigError, match="schema"):
        PrunerConfig("dart", extra={"schema": 3})
    assert not os.listdir(tmp_path)
    assert issubclass(ConfigError, PruneError)
