"""Every code block of the README, of docs/ and of the generated pages of the methods is run, or checked without being
run; `python tests/test_docs_blocks.py` counts them.

Python blocks of a page run in order, in one namespace and one empty folder with a photo.jpg in it. Two things differ
from what a reader has: hub names stand for small untrained models of the same family, and names that a page does not
define (`GIVEN`, and what `prune` exports) are given. A statement that throws its handle away stands for itself, so the
pruner is taken off behind it. A block with `<!-- executed apart: how -->` in the line above has a test of its own; here
its imports, names and keywords are checked against real signatures.

Shell blocks are all run by `tests/integration/run_docs.sh`, in an hour and several virtual environments. Here
`prune` commands that are short and need no network are run. Our other commands are parsed with the real parser, so that
an option that does not exist is found. Of other programs' commands we check what is ours: files, extras, entry points,
model ids, tasks, and what our plug-ins are told; of vLLM's and lmms-eval's options, that the integration tests give
them too. The same goes for commands in sentences.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

import fake_hub
import pytest

from prune import PruneError

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PHOTO = "photo.jpg"
DEPTH = 32  # layers of the stand-ins, as in the models they stand for
_FENCE = re.compile(r"^(?:<!-- (executed apart): .+? -->\n)?```(\w*)[^\n]*\n(.*?)^```$", re.S | re.M)
_PROGRAMS = ("prune", "python", "pip", "bash", "accelerate", "lmms-eval", "vllm", "pytest", "ruff", "hf", "mkdocs")
_AT_ONCE = ("list", "show", "env", "report")  # commands of `prune`; others are short if they are told so
SHELL = ("", "sh", "text")
_LIMITS = ("--limit", "--items", "--help")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line, language, text, and how it is marked ("": it is run with its page)."""

    page: str
    line: int
    language: str
    code: str
    mark: str = ""

    @property
    def lines(self) -> list[str]:
        """The command lines of a block that is no other language's; none if it shows output."""
        if self.language not in SHELL:
            return []
        return [line for line in self.joined if _is_command(line)]

    @property
    def joined(self) -> list[str]:
        """All lines; one that goes on in the next is one."""
        return self.code.replace("\\\n", " ").splitlines()

    @property
    def commands(self) -> list[list[str]]:
        return [_words(part) for line in self.lines for part in re.split(r"&&|\|", line)]


def _is_command(line: str) -> bool:
    words = line.removeprefix("$ ").split()
    return bool(words) and words[0] in _PROGRAMS


def _words(line: str) -> list[str]:
    return shlex.split(line.removeprefix("$ "), comments=True)


def blocks(page: str, text: str | None = None) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    return [Block(page, text[: m.start(3)].count("\n"), m[2], m[3], m[1] or "") for m in _FENCE.finditer(text)]


def is_run(words: list[str]) -> bool:
    """Whether a command is short and needs nothing from elsewhere."""
    named = [value for key, value in zip(words, words[1:]) if key in ("--model", "--task", "-t")]
    if words[0] != "prune" or len(words) < 2 or any("/" in name for name in named):
        return False
    return words[1] in _AT_ONCE or any(limit in words for limit in _LIMITS)


# ------------------------------------------------------------------------------------------------------- the tests
def test_every_fence_is_seen():
    for page in PAGES:
        fences = re.findall(r"^\s*```", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert len(fences) == 2 * len(blocks(page)), f"{page}: a fence is indented or not closed"
        for block in blocks(page):
            where = f"{page}, line {block.line + 1}"
            assert block.language in ("python", "json", "toml", *SHELL), f"{where}: nothing runs {block.language}"
            assert len(block.lines) in (0, len(block.joined)), f"{where}: commands and what is none in one block"
            assert block.lines or block.language != "sh", f"{where}: no command that we know"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks(page, stand_ins, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _photo().save(PHOTO)
    space = Namespace(stand_ins)
    for block in blocks(page):
        where = f"{page}, line {block.line + 1}"
        if block.language == "python" and not block.mark:
            run(block, space)
        elif block.language == "python":
            check(block, where)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "toml" and importlib.util.find_spec("tomllib"):  # Python 3.11 has it
            importlib.import_module("tomllib").loads(block.code)
        for words in block.commands:
            command(words, where, execute=is_run(words))


def test_blocks_of_the_method_pages(stand_ins):
    """Each on a LLaVA that then sees a picture; what is left is bare."""
    import torch

    from prune import get_handle

    model, processor = stand_ins("llava-hf/llava-1.5-7b-hf")
    inputs = processor(text="USER: <image>\nWhat is shown? ASSISTANT:", images=_photo(), return_tensors="pt")
    for name, text in _method_pages().items():
        code = [block for block in blocks(f"docs/methods/{name}.md", text) if block.language == "python"]
        space = Namespace(stand_ins)
        for block in code:
            run(block, space)
        with torch.no_grad():
            model(**inputs)
        (image,) = space["handle"].last.images
        assert code and space["handle"].method.name == name and 0 < len(image.kept) < image.tokens, name
        space["handle"].remove()
        assert get_handle(model) is None


def test_the_block_that_needs_a_hub(monkeypatch, tmp_path):
    """In a process of its own: `huggingface_hub` reads its settings when it is imported."""
    apart = [block.page for page in PAGES for block in blocks(page) if block.mark]
    assert apart == ["docs/hub.md", "docs/vllm.md"]  # vLLM's: run_docs.sh
    monkeypatch.setattr(fake_hub, "USER", "user")
    hub, name, file = fake_hub.FakeHub(), "user/my-pruner", "pruner_config.json"
    old = {"schema": 1, "method": "divprune", "options": {}, "budget": {"keep": 16}}
    tagged = hub.put(name, {file: json.dumps(old).encode()})
    hub.repos[name].refs["v1"] = tagged
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": fake_hub.TOKEN}
    client = fake_hub.Client(**settings)
    try:
        attached = client(eval, f"__import__('test_docs_blocks').on_hub({str(tmp_path)!r})")
    finally:
        client.close()
        hub.stop()
    assert attached == [("hiprune", 64), ("hiprune", 64), ("divprune", 16), ("hiprune", 32)]
    pushed = json.loads(hub.files(name)[file])
    assert (
        pushed["metrics"] == {"scenes": 0.93} and pushed["options"]["alpha"] == 0.2 and "README.md" in hub.files(name)
    )
    assert json.loads((tmp_path / "my-pruner" / file).read_text())["budget"] == {"keep": 64}


def on_hub(folder: str) -> list[tuple[str, float]]:
    """In the client's process: run the block on the hub; method and kept tokens of the pruners it attaches."""
    import prune
    from prune.evals import demo

    os.chdir(folder)
    demo._LAYERS = DEPTH
    attach, attached = prune.apply_pruner, []

    def watched(*args, **options):
        handle = attach(*args, **options)
        attached.append((handle.method.name, handle.budget.keep))
        return handle

    prune.apply_pruner = watched
    (block,) = [block for block in blocks("docs/hub.md") if block.mark]
    run(block, {"model": demo.load_demo("llava")[0]})
    return attached


def test_links_lead_somewhere():
    made = {ROOT / "docs" / "methods" / f"{name}.md" for name in ("index", *_method_pages())}
    for page in (*PAGES, "CONTRIBUTING.md"):
        text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            assert target in made or target.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in _anchors(target), f"{page}: {link}"


def test_the_plug_ins_are_where_their_programs_look():
    from prune.adapters import vllm
    from prune.evals import lmms

    for group, target in {"vllm.general_plugins": vllm.register, "lmms_eval.models": lmms.manifests}.items():
        place = re.search(rf'^\[project.entry-points."{group}"\]\nprune = "(.+)"$', _project(), re.M)[1]
        assert EntryPoint("prune", place, group).load() is target


def test_commands_and_options_named_in_sentences_exist():
    """`prune show ... --method x` in backticks: command and options."""
    for page in PAGES:
        text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for name, rest in re.findall(r"`prune ([a-z]+)([^`]*)`", text):
            options = {one for parameter in _click("prune", name).params for one in parameter.opts}
            for option in re.findall(r"(?<![\w-])--[a-z-]+", rest):
                assert option in options, f"{page}: prune {name} has no {option}"
        for span in re.findall(r"`([^`]+)`", text):
            if _is_command(span) and "..." not in span and not span.startswith("prune"):
                for part in span.split("&&"):
                    command(_words(part), page, execute=False)


def test_tables_are_what_the_code_says():
    hooks = _hooks()
    for page in hooks.TABLES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert hooks.filled(page, text) == text, "run `python docs/_hooks.py`"


def test_method_pages():
    """Every method has a page with all its options, where it works, and the README's numbers."""
    from prune import list_methods, method_info

    hooks = _hooks()
    rows = hooks.measured()
    assert set(rows) == {hooks.UNPRUNED, *list_methods()}
    for name in list_methods():
        text = hooks.method_page(name, rows)
        described = re.findall(r"^\| `(\w+)` \| `.*` \| \S", text, re.M)
        assert described[-len(method_info(name).options) :] == list(method_info(name).options), name
        assert text.count("\n## ") == 4 and "Args:" not in text and "Raises:\n" not in text
    assert "| `divprune` | 80 ±5 +2 | 70 ±6 +2 | 62 ±7 +14↑ | 62 ±6 +32↑ |" in hooks.method_page("divprune", rows)
    assert "\n- a picked token is excluded explicitly" in hooks.method_page("divprune", rows)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("from prune import prune_it", "prune_it"),
        ('from prune import apply_pruner\napply_pruner(model, "hiprune", keep=4, beta=1)', "no option 'beta'"),
        ("handle.save_pretrained(1, 2, 3, 4, 5)", "too many"),
        ("handle.delete()", "delete"),
        ('llm.generate({"prompt": "", "mm_processor_kwargs": {"ratio": 0.5}})', "does not read .*'ratio'"),
        ('llm.generate({"promt": "", "mm_processor_kwargs": {"prune_ratio": 0.5}})', "promt"),
        ('llm.generate({"mm_processor_kwargs": {"prune_keep": 0}})', "keep=0"),
        ('LLM("x", hf_overrides={"pruning": {"method": "dart", "ratio": 0.5}})', "pruning"),
        ('LLM("x", hf_overrides={"visual_pruning": {"method": "dart", "ratio": 0.5}})', "dart cannot run"),
    ],
)
def test_a_wrong_block_is_found_without_running_it(code, complaint):
    with pytest.raises(Exception, match=complaint):
        check(Block("page", 0, "python", code), "page")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("prune eval --rate 3", "No such option"),
        ("prune evaluate", "evaluate"),
        ("prune eval --by tokens", "tokens"),
        ("python -m prune.evals.bench engine --speed 3", "No such option"),
        ("python -m prune.evals.benches", "no module"),
        ("pip install prune-vlm[nothing]", "no extra"),
        ("bash tests/integration/nothing.sh", "no file"),
        ("pytest tests/test_nothing.py", "no file"),
        ("pytest tests/test_docs.py --parallel", "unrecognized arguments"),
        ("mkdocs deploy", "mkdocs deploy"),
        ("hf login", "No such command 'login'"),
        ("vllm serve llava-hf/llava-1.5-8b", "no model"),
        ("vllm serve llava-hf/llava-1.5-7b-hf --prune-it 1", "no integration test .*--prune-it"),
        (
            'vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides \'{"visual_pruning": {"method": "dart"}}\'',
            "exactly one",
        ),
        ("vllm serve Qwen/Qwen2.5-VL-7B-Instruct --hf-overrides '{\"visual_pruning\": {}}'", "--video-pruning-rate"),
        ("lmms-eval --model llava_pruned", "no model llava_pruned"),
        ("lmms-eval --model llava_hf_pruned --tasks prune_scenery", "no task"),
        ("lmms-eval --model llava_hf_pruned --model_args pretrained=llava", "no model llava"),
        ("lmms-eval --model llava_hf_pruned --model_args pruner=fastv,pruner_layr=2", "layr"),
        ("lmms-eval --model llava_hf_pruned --model_args rate=0.5", "rate"),
        ("lmms-eval --model llava_hf_pruned --batch 1", "no integration test .*--batch"),
        ("lmms-eval --model llava_hf_pruned --include_path '$(python -m prune.evals.lmm)'", "no module"),
    ],
)
def test_a_wrong_command_is_found_without_running_it(line, complaint):
    with pytest.raises((AssertionError, KeyError, PruneError), match=complaint):
        command(_words(line), "page", execute=False)


# ---------------------------------------------------------------------------------------------------------- Python
def run(block: Block, space: dict) -> None:
    """Statement by statement; the pruner of a handle that nobody keeps comes off again."""
    tree = ast.increment_lineno(ast.parse(block.code), block.line)
    for statement in tree.body:
        exec(compile(ast.Module([statement], []), str(ROOT / block.page), "exec", dont_inherit=True), space)
        if isinstance(statement, ast.Expr) and _called(statement.value) == "apply_pruner":
            importlib.import_module("prune").get_handle(space[statement.value.args[0].id]).remove()


def _called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


class Namespace(dict):
    """Names a page uses without defining them: what `prune` exports, and `GIVEN`, made when it is asked for."""

    def __init__(self, stand_ins):
        super().__init__(__builtins__=__builtins__, __name__="__docs__")
        self.stand_ins = stand_ins

    def __missing__(self, name: str):
        prune = importlib.import_module("prune")
        if name not in prune.__all__ and name not in GIVEN:
            raise KeyError(name)
        self[name] = GIVEN[name](self.stand_ins) if name in GIVEN else getattr(prune, name)
        return self[name]


GIVEN = {
    "model": lambda stand_ins: stand_ins("llava-hf/llava-1.5-7b-hf")[0],
    "llava": lambda stand_ins: stand_ins("llava-hf/llava-1.5-7b-hf")[0],
    "other_vit": lambda stand_ins: importlib.import_module("timm").create_model("vit_tiny_patch16_224").eval(),
}


@pytest.fixture(autouse=True)
def scratch(monkeypatch):
    """The registry, so that methods of examples leave with them."""
    from prune import list_methods, registry

    list_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def stand_ins(monkeypatch):
    """Hub name -> a small untrained model of its family and its processor; what loads by a hub name gets these."""
    import transformers

    from prune.evals import demo

    monkeypatch.setattr(demo, "_LAYERS", DEPTH)
    made = {}

    def of(name: str):
        kinds = {"llava-1.5": "llava", "llava-v1.6": "llava-next", "Qwen2.5-VL": "qwen2.5-vl"}
        (kind,) = [kind for part, kind in kinds.items() if part in name] or [None]
        assert kind, (
            f"nothing stands for {name}: give it a test of its own, and put `<!-- executed apart: how -->` above it"
        )
        if name not in made:
            made[name] = demo.load_demo(kind)
        return made[name]

    for auto, place in ((transformers.AutoModelForImageTextToText, 0), (transformers.AutoProcessor, 1)):
        load = auto.from_pretrained

        def instead(name, *args, load=load, place=place, **kwargs):
            local = Path(name).exists()
            return load(name, *args, **kwargs) if local else of(str(name))[place]

        monkeypatch.setattr(auto, "from_pretrained", instead)
    if importlib.util.find_spec("timm"):
        import timm

        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))
    return of


def check(block: Block, where: str) -> None:
    """Imports work, and calls of what is ours fit its signature."""
    import prune

    tree = ast.parse(block.code)
    space = {**vars(prune), "handle": prune.Handle}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if module.split(".")[0] == "prune" or importlib.util.find_spec(module.split(".")[0]):
                exec(compile(ast.Module([node], []), where, "exec"), space)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        target, arguments = _target(call.func, space), [None] * len(call.args)
        if target is None:
            continue
        if "." in target.__qualname__ and inspect.isfunction(target):  # a method, looked up in its class
            arguments.insert(0, None)
        options = {key.arg: key.value for key in call.keywords if key.arg}
        signature = inspect.signature(target)
        signature.bind(*arguments, **options)
        if target is prune.apply_pruner and isinstance(name := call.args[1], ast.Constant):
            if name.value in prune.list_methods():
                own = {key: ast.literal_eval(options[key]) for key in options if key not in signature.parameters}
                prune.get_method(name.value, **own)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hf_overrides":
            _served(ast.literal_eval(node.value), "llava-hf/llava-1.5-7b-hf")
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values)
            _requested({key.value: value for key, value in pairs if isinstance(key, ast.Constant)}, where)


def _target(function: ast.expr, space: dict):
    """What `name(...)` or `name.attribute(...)` calls, if it is ours; else None."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = space.get(function.value.id)
        return None if owner is None else getattr(owner, function.attr)
    found = space.get(getattr(function, "id", None))
    return found if getattr(found, "__module__", "").startswith("prune") else None


# ----------------------------------------------------------------------------------------------------------- shell
def command(words: list[str], where: str, execute: bool) -> None:
    """Run a command line, or see that its program, options and files exist."""
    program, *arguments = words
    if program == "accelerate":
        at = arguments.index("-m")
        program, arguments = "python", arguments[at:]
        if arguments[1] == "prune.evals":
            program, arguments = "prune", ["eval", *arguments[2:]]
    if program == "prune" and execute:
        from typer.testing import CliRunner

        from prune.cli import app

        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{where}: {shlex.join(words)}\n{result.output}"
    elif program == "prune":
        _parse("prune", arguments, where)
    elif program == "python" and "-m" in arguments:
        module, *rest = arguments[arguments.index("-m") + 1 :]
        assert importlib.util.find_spec(module), f"{where}: no module {module}"
        if module == "prune.evals.bench" and rest:
            _parse(module, rest, where)
    elif program in ("bash", "python"):
        file = next(word for word in arguments if not word.startswith("-"))
        assert (ROOT / file).exists(), f"{where}: no file {file}"
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(word for word in arguments if re.match(r"prune-vlm|\.", word)))
        known = re.findall(r"^(\w+) = \[", _project().split("[project.optional-dependencies]")[1], re.M)
        assert all(one in known for extra in extras for one in extra.split(",")), f"{where}: no extra {extras}"
    elif program == "pytest" and arguments:
        for word in arguments:
            assert not word.endswith(".py") or (ROOT / word).exists(), f"{where}: no file {word}"
        # No test is imported, which takes seconds.
        code, said = _says([sys.executable, "-m", "pytest", "--noconftest", "--markers", *arguments])
        assert code == 0, f"{where}: {said}"
    elif program == "mkdocs":
        assert arguments in (["serve"], ["build"]) and (ROOT / "mkdocs.yml").exists(), f"{where}: {shlex.join(words)}"
    elif program == "hf":
        code, said = _says([sys.executable, "-m", "huggingface_hub.cli.hf", *arguments, "--help"])
        assert code == 0, f"{where}: {said}"
    elif program == "vllm":
        _vllm(arguments, where)
    elif program == "lmms-eval" and arguments != ["models"]:
        _lmms(arguments, where)


# ---------------------------------------------------------------------------------------------- vLLM and lmms-eval
def _vllm(arguments: list[str], where: str) -> None:
    """`vllm serve MODEL --option value ...`: a model of ours, options as the tests with the real vLLM give them."""
    verb, model, *rest = arguments
    assert verb == "serve" and model in _examples(), f"{where}: no model {model}"
    options = _pairs(rest, "vllm", where)
    if _examples()[model] == "Qwen2.5-VL":
        assert float(options.get("--video-pruning-rate", 0)) > 0, f"{where}: {model} needs --video-pruning-rate"
    _served(json.loads(options["--hf-overrides"]), model)


def _served(overrides: dict, model: str) -> None:
    """The plug-in takes them."""
    from test_vllm_parts import CLIP, QWEN

    from prune.adapters.vllm.options import OPTION, Pruning

    assert list(overrides) == [OPTION], overrides
    (served,) = [one for one in (CLIP, QWEN) if one.model == _examples()[model]]
    Pruning.parse(overrides[OPTION], served)


def _requested(request: dict[str, ast.expr], where: str) -> None:
    """A request to vLLM with a budget: the plug-in reads all of it, and the rest is what the integration tests send."""
    from test_vllm_parts import pruning

    from prune.adapters.vllm.options import strip

    if "mm_processor_kwargs" in request:
        asked = ast.literal_eval(request["mm_processor_kwargs"])
        assert not strip(asked), f"{where}: the plug-in does not read {strip(asked)}"
        pruning().asked(asked)
        assert all(f'"{key}"' in _integration("vllm") for key in request), f"{where}: {list(request)}"


def _lmms(arguments: list[str], where: str) -> None:
    """`lmms-eval --option value ...`: ids, tasks and `model_args` of ours."""
    from prune import Budget, get_method
    from prune.evals.lmms import TASKS, models

    options = _pairs(arguments, "lmms", where)
    assert options["--model"] in models.BASES, f"{where}: no model {options['--model']}"
    tasks = {path.stem for path in TASKS.rglob("*.yaml")}
    for task in options.get("--tasks", "").split(","):
        assert task in tasks or not task.startswith("prune_"), f"{where}: no task {task}"
    if inner := re.fullmatch(r"\$\((.*)\)", options.get("--include_path", "")):
        command(_words(inner[1]), where, execute=False)
    given = dict(pair.split("=") for pair in options.get("--model_args", "").split(",") if pair)
    known, model = {*_examples(), "scenes-llava"}, given.pop("pretrained", "scenes-llava")
    assert model in known, f"{where}: no model {model}"
    own, name = models.take_options(given, None), given.pop("pruner", None)
    if name is not None:
        get_method(name, **own)
        Budget(**{key: float(value) for key, value in given.items()})
    else:
        assert not given and not own, f"{where}: {given | own} without a pruner"


def _pairs(arguments: list[str], program: str, where: str) -> dict[str, str]:
    """--option value; the integration tests give the real program each of these options."""
    options = dict(zip(arguments[::2], arguments[1::2]))
    for option in options:
        spelt = rf'"{option}"|\b{option.lstrip("-").replace("-", "_")}("?:|=)'  # as a keyword of that name, too
        assert option.startswith("--"), f"{where}: {option}"
        assert re.search(spelt, _integration(program)), f"{where}: no integration test gives {option}"
    return options


@cache
def _integration(program: str) -> str:
    """The tests with the real program."""
    files = (ROOT / "tests" / "integration").glob(f"{program}_*.py")
    return "".join(path.read_text(encoding="utf-8") for path in files)


@cache
def _examples() -> dict[str, str]:
    """Hub name of a model the README names -> family."""
    from prune.adapters.families import FAMILIES

    return {family.example: family.name for family in FAMILIES}


# ---------------------------------------------------------------------------------------------------- our programs
def _says(words: list[str]) -> tuple[int, str]:
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # or this folder's kernels hide PyPI's
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def _parse(program: str, arguments: list[str], where: str) -> None:
    import typer

    name, *rest = arguments
    try:
        _click(program, name).make_context(name, list(rest))
    except typer.Exit:  # --help
        pass
    except Exception as error:  # typer has a click of its own, with its own classes of errors
        said = error.format_message() if hasattr(error, "format_message") else repr(error)
        raise AssertionError(f"{where}: {program} {shlex.join(arguments)}: {said}") from None


def _click(program: str, name: str):
    import typer

    module = importlib.import_module("prune.cli" if program == "prune" else program)
    return typer.main.get_command(module.app).commands[name]


def _project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "_hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _method_pages() -> dict[str, str]:
    """Name -> Markdown."""
    from prune import list_methods

    hooks = _hooks()
    rows = hooks.measured()
    return {name: hooks.method_page(name, rows) for name in list_methods()}


@cache
def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs name them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _photo():
    from prune.loading import open_image

    return open_image("china.jpg")


if __name__ == "__main__":
    total: Counter[str] = Counter()
    pages = {page: blocks(page) for page in PAGES}
    pages["the pages of the methods"] = [
        block for name, text in _method_pages().items() for block in blocks(name, text)
    ]
    for page, found in pages.items():
        count: Counter[str] = Counter()
        for block in found:
            if block.language == "python":
                count["Python, run apart" if block.mark else "Python, run"] += 1
            count.update({f"{block.language}, parsed": block.language in ("json", "toml")})
            for words in block.commands:
                count["command, run" if is_run(words) else "command, checked; run by run_docs.sh"] += 1
        total += count
        print(f"{page}: {', '.join(f'{n} {kind}' for kind, n in count.items() if n)}")
    print(f"all: {', '.join(f'{n} {kind}' for kind, n in total.items() if n)}")
