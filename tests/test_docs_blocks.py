"""Every code block of the README and of docs/ is run, or checked without being run; `python tests/test_docs_blocks.py`
counts them.

Python blocks of a page run in order, in one namespace and one empty folder with a photo.jpg in it. Two things differ
from what a reader has: hub names stand for small untrained models of the same family, and names that a page does not
define (`GIVEN`, and what `prune` exports) are given. A statement that throws its handle away stands for itself, so the
pruner is taken off behind it. What cannot run anywhere (because it needs an account, or a GPU) has
`<!-- not executed: why -->` in the line above: then imports, names and keywords are checked against real signatures.

Of shell blocks, `prune` commands that are short and need no network are run. All others are parsed with the real
parser, so that an option that does not exist is found.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PHOTO = "photo.jpg"
DEPTH = 32  # layers of the stand-ins, as in the models they stand for
_FENCE = re.compile(r"^(?:<!-- not executed: (.+?) -->\n)?```(\w*)[^\n]*\n(.*?)^```$", re.S | re.M)
_PROGRAMS = ("prune", "python", "pip", "bash", "accelerate", "lmms-eval", "vllm", "pytest", "ruff", "hf", "mkdocs")
_AT_ONCE = ("list", "show", "env", "report")  # commands of `prune`; others are short if they are told so
_LIMITS = ("--limit", "--items", "--help")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line, language, text, and why it is not run (None: it is)."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The command lines in a block without a language of its own; none if it shows output."""
        if self.language not in ("", "sh", "bash", "text"):
            return []
        lines = self.code.replace("\\\n", " ").splitlines()
        parts = [part for line in lines if _is_command(line) for part in re.split(r"&&|\|", line)]
        return [_words(part) for part in parts]


def _is_command(line: str) -> bool:
    words = line.removeprefix("$ ").split()
    return bool(words) and words[0] in _PROGRAMS


def _words(line: str) -> list[str]:
    return shlex.split(line.removeprefix("$ "), comments=True)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, text[: m.start(3)].count("\n"), m[2], m[3], m[1]) for m in _FENCE.finditer(text)]


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


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks(page, stand_ins, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _photo().save(PHOTO)
    space = Namespace(stand_ins)
    for block in blocks(page):
        where = f"{page}, line {block.line + 1}"
        if block.language == "python" and block.reason is None:
            run(block, space)
        elif block.language == "python":
            check(block, where)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "toml" and importlib.util.find_spec("tomllib"):  # Python 3.11 has it
            importlib.import_module("tomllib").loads(block.code)
        for words in block.commands:
            command(words, where, execute=block.reason is None and is_run(words))


def test_commands_and_options_named_in_sentences_exist():
    """`prune show ... --method x` in backticks: command and options."""
    for page in PAGES:
        text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for name, rest in re.findall(r"`prune ([a-z]+)([^`]*)`", text):
            options = {one for parameter in _click("prune", name).params for one in parameter.opts}
            for option in re.findall(r"(?<![\w-])--[a-z-]+", rest):
                assert option in options, f"{page}: prune {name} has no {option}"


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
    ],
)
def test_a_wrong_block_is_found_without_running_it(code, complaint):
    with pytest.raises(Exception, match=complaint):
        check(Block("page", 0, "python", code, "why"), "page")


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
    ],
)
def test_a_wrong_command_is_found_without_running_it(line, complaint):
    with pytest.raises((AssertionError, KeyError), match=complaint):
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
        assert kind, f"nothing stands for {name}: put `<!-- not executed: why -->` above the block"
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
        if module == "prune.evals.bench":
            _parse(module, rest, where)
    elif program in ("bash", "python"):
        file = next(word for word in arguments if not word.startswith("-"))
        assert (ROOT / file).exists(), f"{where}: no file {file}"
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(word for word in arguments if re.match(r"prune-vlm|\.", word)))
        known = re.findall(r"^(\w+) = \[", _project().split("[project.optional-dependencies]")[1], re.M)
        assert all(one in known for extra in extras for one in extra.split(",")), f"{where}: no extra {extras}"


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


def _photo():
    from prune.loading import open_image

    return open_image("china.jpg")


if __name__ == "__main__":
    total: Counter[str] = Counter()
    for page in PAGES:
        count: Counter[str] = Counter()
        for block in blocks(page):
            if block.language == "python":
                count["Python, run" if block.reason is None else "Python, checked"] += 1
            count.update({f"{block.language}, parsed": block.language in ("json", "toml")})
            for words in block.commands:
                count["command, run" if block.reason is None and is_run(words) else "command, checked"] += 1
        total += count
        print(f"{page}: {', '.join(f'{n} {kind}' for kind, n in count.items() if n)}")
    print(f"all: {', '.join(f'{n} {kind}' for kind, n in total.items() if n)}")
