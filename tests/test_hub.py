"""Saved pruners on the hub: what goes up comes down the same, from the cache too, and nothing hostile gets further.

The hub is `fake_hub.FakeHub` on the loopback interface; the client's process has `HF_ENDPOINT` set to it.
"""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
import yaml
from fake_hub import TOKEN, Client, FakeHub, load, outcome, push, push_handle, refusal, save_and_push, weights
from PIL import Image
from safetensors.torch import load as read_safetensors
from tiny import shared

from prune import ConfigError, PrunerConfig, UnknownMethodError, apply_pruner, get_method
from prune.config import FILE, LIMIT
from prune.hub import OURS, model_card
from prune.learned_scorer import LearnedScorer

GOOD = {"schema": 1, "method": "dart", "options": {"layer": 1}, "budget": {"keep": 4.0}}
BYTES = json.dumps(GOOD).encode()


@pytest.fixture(scope="module")
def hub():
    hub = FakeHub()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    client = Client(HF_ENDPOINT=hub.url, HF_HOME=str(home))
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(hub, home):
    """Shares the cache of `client`."""
    client = Client(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    yield client
    client.close()


def plain(config: dict) -> dict:
    return {**config, "budget": {"keep": 4.0}}


# ------------------------------------------------------------------------------------------------------ round trips
def test_what_is_pushed_attaches_again(hub, client):
    given = {"keep": 4, "layer": 1}
    url = client(push_handle, "ada/dart-4", "dart", given, token=TOKEN, metrics={"accuracy": 0.5})
    assert url == f"{hub.url}/ada/dart-4/commit/{hub.repos['ada/dart-4'].refs['main']}"
    files = hub.files("ada/dart-4")
    assert sorted(files) == [".gitattributes", "README.md", FILE]
    written = json.loads(files[FILE])
    assert written["metrics"] == {"accuracy": 0.5} and written["families"] == ["LLaVA-1.5"]
    assert len([path for method, path in hub.log if "/commit/" in path]) == 1  # one commit for all
    logits, kept, budget = client(outcome, "ada/dart-4", {})
    assert (logits, kept, budget) == client(outcome, "dart", given) and len(kept[0]) == 4
    assert len(client(outcome, "ada/dart-4", {"keep": 6})[1][0]) == 6
    assert any(agent.startswith("prune/") for agent in hub.agents)


def test_weights_travel_as_safetensors(hub, client, offline, tmp_path):
    torch.manual_seed(0)
    LearnedScorer(size=8, channels=3, hidden=5).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "notes.pkl").write_bytes(b"not asked for")
    config = {"schema": 1, "method": "index_preserving", "options": {"scorer": str(tmp_path / "mine")}}
    client(push, config, "ada/scorer", token=TOKEN)
    files = hub.files("ada/scorer")
    assert json.loads(files[FILE])["options"] == {"scorer": "weights/scorer"}
    assert {path for path in files if path.startswith("weights/")} == {
        "weights/scorer/config.json",
        "weights/scorer/model.safetensors",
    }
    assert b"small classifier" in files["README.md"] and str(tmp_path).encode() not in b"".join(files.values())
    found = client(weights, "ada/scorer")
    assert {key: torch.tensor(value).half().tolist() for key, value in found.items()} == {
        key: value.tolist() for key, value in read_safetensors(files["weights/scorer/model.safetensors"]).items()
    }
    assert offline(weights, "ada/scorer") == found
    # weights come from the commit of the config: main has none here
    client(push, config, "ada/branched", token=TOKEN, revision="side")
    assert client(weights, "ada/branched", revision="side") == found
    # members of a compose have places of their own
    member = {"method": "index_preserving", "options": config["options"]}
    client(push, {"schema": 1, "method": "compose", "members": [member, {"method": "fastv"}]}, "ada/two", token=TOKEN)
    assert "weights/0/scorer/model.safetensors" in hub.files("ada/two")
    assert client(load, "ada/two")["members"][0]["options"]["scorer"].endswith("weights/0/scorer")


def test_revisions(hub, client):
    first = hub.put("ada/turns", {FILE: BYTES})
    client(push, GOOD | {"budget": {"keep": 5}}, "ada/turns", token=TOKEN, revision="wide")
    client(push, GOOD | {"budget": {"keep": 6}}, "ada/turns", token=TOKEN)
    request = client(push, GOOD | {"budget": {"keep": 7}}, "ada/turns", token=TOKEN, create_pr=True)
    assert request == f"{hub.url}/ada/turns/discussions/1"
    keeps = {"main": 6, "wide": 5, "refs/pr/1": 7, first: 4, None: 6}
    for revision, keep in keeps.items():
        assert client(load, "ada/turns", revision=revision)["budget"] == {"keep": keep}, revision
    kind, text, untouched = client(refusal, "ada/turns", revision="v9")
    assert kind == "ConfigError" and re.search(r"'ada/turns' has no revision 'v9'; .*/commits", text) and untouched
    for revision in ("../../main", "/etc", "", "a b", 3):
        kind, text, untouched = client(refusal, "ada/turns", revision=revision)
        assert kind == "ConfigError" and "must be a branch, a tag or a commit" in text and untouched


def test_the_cache_is_asked_first(hub, client, offline, home, tmp_path):
    hub.put("ada/cached", {FILE: BYTES})
    gets = [("GET", f"/ada/cached/resolve/{commit}/{FILE}") for commit in ["main", *hub.repos["ada/cached"].commits]]

    def downloads() -> int:
        return sum(entry in gets for entry in hub.log)

    first = client(load, "ada/cached")
    assert downloads() == 1
    assert client(load, "ada/cached") == first and downloads() == 1  # the ETag is the same: nothing is sent
    assert offline(load, "ada/cached") == first
    assert client(load, "ada/cached", local_files_only=True) == first
    hub.put("ada/cached", {FILE: json.dumps(GOOD | {"budget": {"keep": 9}}).encode()})
    assert client(load, "ada/cached", local_files_only=True) == first
    assert client(load, "ada/cached")["budget"] == {"keep": 9} and downloads() == 2
    asked = len(hub.log)
    assert offline(load, "ada/cached")["budget"] == {"keep": 9}
    assert len(hub.log) == asked  # offline asks nothing
    # a cache elsewhere is empty, then it is not
    elsewhere = {"cache_dir": str(tmp_path / "cache")}
    kind, text, untouched = client(refusal, "ada/cached", local_files_only=True, **elsewhere)
    assert (kind, untouched) == ("ConfigError", True) and "not in the cache, and local_files_only=True forbids" in text
    client(load, "ada/cached", **elsewhere)
    assert (tmp_path / "cache" / "models--ada--cached").is_dir()
    assert client(load, "ada/cached", local_files_only=True, **elsewhere)["budget"] == {"keep": 9}
    with pytest.raises(ConfigError, match="not in the cache, and HF_HUB_OFFLINE forbids"):
        offline(load, "ada/never-seen")


def test_without_the_hub_the_cache_serves(hub, client):
    hub.put("ada/seen", {FILE: BYTES})
    first = client(load, "ada/seen")
    hub.stop()
    try:
        assert client(load, "ada/seen") == first
        kind, text, untouched = client(refusal, "ada/unseen", without_sleep=True)
    finally:
        hub.start()
    assert (kind, untouched) == ("ConfigError", True)
    assert re.search(rf"cannot reach {hub.url} for 'ada/unseen' \(Conn.*\); check the network or HF_ENDPOINT", text)
    hub.failing = 403
    try:
        assert client(load, "ada/seen") == first
        assert "no permission for 'ada/unseen' (HTTP 403)" in client(refusal, "ada/unseen")[1]
        hub.failing = 410
        assert "answers HTTP 410" in client(refusal, "ada/unseen")[1]
    finally:
        hub.failing = None


# ----------------------------------------------------------------------------------------------------------- errors
def test_places_that_hold_nothing(hub, client):
    hub.put("ada/model", {"config.json": b"{}"})
    hub.put("ada/secret", {FILE: BYTES}, private=True)
    hub.put("ada/gated", {FILE: BYTES}, gated=True)
    for name, match in (
        ("ada/nothing", f"no folder 'ada/nothing' here and no such repository on {hub.url}.*check the name.*hf auth"),
        ("ada/model", f"'ada/model' has no file {FILE}"),
        ("ada/secret", "or it is private: check the name, or log in with `hf auth login`"),
        ("ada/gated", "is gated: ask for access"),
        ("ada/..", "no name of a repository"),
        ("ada/a--b", "no name of a repository"),
        ("ada/x.git", "no name of a repository"),
        (f"ada/{'x' * 200}", "no name of a repository"),
    ):
        kind, text, untouched = client(refusal, name, keep=4)
        assert kind == "ConfigError" and re.search(match, text) and untouched, (name, text)
    assert client(load, "ada/secret", token=TOKEN) == plain(GOOD)
    assert "no such repository" in client(refusal, "ada/nothing", token=TOKEN)[1]
    assert "hf auth login" in client(refusal, "ada/secret", token=True)[1]  # a token must be there, and none is


def test_only_names_with_an_owner_are_asked_for(hub, client, tmp_path):
    hub.put("ada/dart", {FILE: BYTES})
    asked = len(hub.log)
    assert client(outcome, "dart", {"ratio": 0.5, "layer": 1, "token": TOKEN})  # a method, whatever the hub has
    for name, kind in (
        ("drat", "UnknownMethodError"),
        ("../ada/dart", "ConfigError"),
        ("/ada/dart", "ConfigError"),
        ("./ada", "ConfigError"),
        ("a/b/c", "ConfigError"),
        ("https://huggingface.co/ada/dart", "ConfigError"),
        ("ada\\dart", "ConfigError"),
        ("ada/dart\n", "ConfigError"),
        ("ada/därt", "ConfigError"),
        ("ada/", "ConfigError"),
    ):
        found, text, untouched = client(refusal, name, keep=4)
        assert found == kind and untouched, (name, text)
    assert len(hub.log) == asked


def test_revision_belongs_to_repositories(tmp_path):
    model, folder = shared("llava"), PrunerConfig.from_dict(GOOD).save_pretrained(tmp_path).parent
    for method in ("dart", get_method("dart")):
        with pytest.raises(ConfigError, match="revision='v1' is of a repository on the hub"):
            apply_pruner(model, method, keep=4, revision="v1")
    with pytest.raises(ConfigError, match="is local and has no revisions"):
        apply_pruner(model, folder, revision="v1")
    with pytest.raises(UnknownMethodError):
        apply_pruner(model, "drat", keep=4, revision="v1")


class Bomb:
    """Un-pickling it leaves a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_hostile_repositories(hub, client, tmp_path):
    boom = tmp_path / "boom"
    LearnedScorer(size=4, hidden=2).save_pretrained(tmp_path / "mine")
    config, sound = ((tmp_path / "mine" / name).read_bytes() for name in ("config.json", "model.safetensors"))
    bomb = pickle.dumps(Bomb(boom))
    scorer = {"schema": 1, "method": "index_preserving", "budget": {"ratio": 0.5}}

    def with_scorer(value) -> bytes:
        return json.dumps(scorer | {"options": {"scorer": value}}).encode()

    here = "weights/scorer"
    for number, (files, match) in enumerate(
        [
            ({FILE: b" " * 10_000_000}, f"{FILE} has 10000000 bytes, more than {LIMIT}"),
            ({FILE: bomb}, "not JSON"),
            ({FILE: b'{"schema": 1, "method": "__import__(\'os\').system(\'id\')"}'}, "no name of a method"),
            ({FILE: b'{"schema": 1, "schema": 1, "method": "dart"}'}, "the key 'schema' comes twice"),
            ({FILE: with_scorer("/etc")}, "folder of weights beside the file"),
            ({FILE: with_scorer(str(tmp_path / "mine"))}, "folder of weights beside the file"),
            ({FILE: with_scorer("../../mine")}, "folder of weights beside the file"),
            ({FILE: with_scorer("weights/../../x")}, "folder of weights beside the file"),
            ({FILE: with_scorer("~/mine")}, "folder of weights beside the file"),
            ({FILE: with_scorer("C:\\mine")}, "folder of weights beside the file"),
            ({FILE: with_scorer(here)}, f"has no file {here}/config.json"),
            ({FILE: with_scorer(here), f"{here}/config.json": config}, f"has no file {here}/model.safetensors"),
            (
                {FILE: with_scorer(here), f"{here}/config.json": config, f"{here}/model.safetensors": bomb},
                "no safetensors",
            ),
            (
                {FILE: with_scorer(here), f"{here}/config.json": b"[" * 10**6, f"{here}/model.safetensors": sound},
                "config.json has 1000000 bytes",
            ),
        ]
    ):
        hub.put(f"eve/{number}", files)
        kind, text, untouched = client(refusal, f"eve/{number}")
        assert kind == "ConfigError" and re.search(match, text) and untouched, (number, text)
        assert len(text) < 1000 and f"eve/{number}" in text
    assert not boom.exists()
    assert not [entry for entry in hub.log if entry[0] == "GET" and entry[1].startswith("/eve/0/")]  # too large


# ----------------------------------------------------------------------------------------------------------- uploads
def test_uploads_that_fail(hub, client, offline):
    for repo, options, match in (
        ("ada/new", {}, r"no permission for 'ada/new'.*hf auth login"),
        ("ada/new", {"token": "hf_wrong"}, r"no permission for 'ada/new'.*hf auth login"),
        ("bob/new", {"token": TOKEN}, r"no permission for 'bob/new' \(HTTP 403\)"),
        ("ada/n/ew", {"token": TOKEN}, "no name of a repository"),
        ("../new", {"token": TOKEN}, "no name of a repository"),
        ("ada/new", {"token": TOKEN, "revision": "../x"}, "must be a branch"),
    ):
        with pytest.raises(ConfigError, match=match):
            client(push, GOOD, repo, **options)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids to use the network, so nothing was sent"):
        offline(push, GOOD, "ada/new", token=TOKEN)
    assert "ada/new" not in hub.repos and "bob/new" not in hub.repos
    with apply_pruner(shared("llava"), "dart", keep=4, layer=1) as handle:
        with pytest.raises(ConfigError, match="repo_id wants push_to_hub=True"):
            handle.save_pretrained("nowhere", repo_id="ada/new")
        with pytest.raises(ConfigError, match="private wants push_to_hub=True"):
            handle.save_pretrained("nowhere", private=True)
    assert not os.path.exists("nowhere")


def test_a_pull_request_to_somebody_else(hub, client):
    hub.put("bob/his", {"README.md": b"# His\n"})
    url = client(push, GOOD, "bob/his", token=TOKEN, create_pr=True)
    assert url == f"{hub.url}/bob/his/discussions/1"
    assert FILE not in hub.files("bob/his") and FILE in hub.files("bob/his", "refs/pr/1")


def test_save_and_push(hub, client, tmp_path):
    folder = tmp_path / "my-pruner"
    file = client(save_and_push, str(folder), "dart", {"keep": 4}, token=TOKEN, private=True)
    assert file == str(folder / FILE) and os.listdir(folder) == [FILE]  # the card is the hub's
    assert hub.repos["ada/my-pruner"].private
    assert hub.files("ada/my-pruner")[FILE] == (folder / FILE).read_bytes()
    commits = len(hub.repos["ada/my-pruner"].commits)
    client(save_and_push, str(folder), "dart", {"keep": 4}, repo_id="ada/my-pruner", token=TOKEN)
    assert len(hub.repos["ada/my-pruner"].commits) == commits  # nothing is new


def test_a_card_that_somebody_wrote_stays(hub, client):
    hub.put("ada/mine", {"README.md": b"# Mine\n", "model.bin": b"other"})
    client(push, GOOD, "ada/mine", token=TOKEN)
    assert hub.files("ada/mine")["README.md"] == b"# Mine\n" and hub.files("ada/mine")["model.bin"] == b"other"
    client(push, GOOD, "ada/ours", token=TOKEN)
    client(push, GOOD | {"budget": {"keep": 77}}, "ada/ours", token=TOKEN)
    assert b"`keep=77`" in hub.files("ada/ours")["README.md"]


# -------------------------------------------------------------------------------------------------------------- card
def card(**fields) -> str:
    config = PrunerConfig.from_dict(GOOD | fields)
    return model_card(config, config.to_dict(), "ada/dart-4")


def test_the_card_says_what_how_and_the_numbers():
    text = card(metrics={"accuracy": {"scenes": 0.8125, "held": True, "note": "x"}}, families=["Qwen2.5-VL"])
    head, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head) == {"library_name": "prune", "tags": ["visual-token-pruning", "prune-dart"]}
    assert body.startswith(OURS) and "# dart-4" in body and "`keep=4`, the visual tokens that are kept" in body
    assert "| accuracy / scenes | 0.8125 |" in body and "held" not in body and "arxiv.org/abs/2502.11494" in body
    code = re.search(r"```python\n(.*?)```", body, re.S)[1]
    compile(code, "card", "exec")
    assert 'from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")' in code and 'apply_pruner(model, "ada/dart-4")' in code
    settings = json.loads(re.search(r"```json\n(.*?)```", body, re.S)[1])
    assert settings == {**plain(GOOD), "families": ["Qwen2.5-VL"]}
    for name, value in {"ratio": 0.5, "average": 8.0, "flops": 0.5}.items():
        assert f"`{name}={value:g}`, the " in card(budget={name: value})
    assert "model = ..." in card(families=["timm ViT"]) and "Numbers" not in card()
    many = card(metrics={f"m{n}": n for n in range(100)})
    assert "| m39 | 39 |" in many and "| m40 |" not in many and "60 more are in" in many


def test_texts_cannot_break_out_of_the_card():
    evil = "</td><script>alert(1)</script> | `x` [a](http://evil)\n---\n# Big\n```\n{{ 7 * 7 }}\ud800"
    with pytest.warns(UserWarning, match="unknown keys"):
        text = card(families=[evil], metrics={evil: 1, "n": {evil: evil}}, note=evil)
    body = text.encode().decode().split("---\n", 2)[2]
    outside = re.sub(r"```json\n.*?\n```", "", body, count=1, flags=re.S)
    assert "<script" not in outside.replace("\\<", "") and "](http://evil" not in outside
    assert body.count("\n```") == 6 and "\n---\n" not in outside.replace("| ---", "")
    assert len(re.findall(r"(?<!\\)\|", next(line for line in outside.splitlines() if line.startswith("| \\<")))) == 3
    settings = json.loads(re.search(r"```json\n(.*?)\n```", body, re.S)[1])
    assert settings["note"] == evil and settings["families"] == [evil]


# --------------------------------------------------------------------------------------------------------- pipelines
@pytest.fixture(scope="module")
def scenes():
    from prune.loading import load_model

    return load_model("scenes-llava", "cpu")


def chat(image: Image.Image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def by_hand(model, processor, chats) -> list[str]:
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "padding": True}
    inputs = processor.apply_chat_template(chats, return_tensors="pt", **options)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_pruned_model_in_a_transformers_pipeline(scenes):
    from transformers import pipeline

    from prune.evals.tasks import load_task

    model, processor = scenes
    items = load_task("scenes").items[:6]
    chats = [chat(item.images[0], item.question) for item in items]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}

    def answers(**more) -> list[str]:
        found = pipe(text=chats, **options, **more)
        return [(one[0] if isinstance(one, list) else one)["generated_text"].strip() for one in found]

    with torch.no_grad():
        bare = answers()
        with apply_pruner(model, "norm_diversity", keep=3) as handle:
            pruned = by_hand(model, processor, chats)
            assert answers() == pruned
            assert [len(image.kept) for image in handle.last.images] == [3]
            assert answers(batch_size=2) == pruned
            assert [(image.sample, len(image.kept)) for image in handle.last.images] == [(0, 3), (1, 3)]
            with handle.disabled():
                assert answers(batch_size=2) == bare == by_hand(model, processor, chats)
        assert answers() == bare
    assert pruned != bare  # so few tokens do change answers: the pipeline did run the pruned model
