"""The OpenAI-compatible server of the real vLLM, as a user starts it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from vllm_support import Answer, checkpoint, hugging_face, photo, prompt

RATIO = 0.5
PATIENCE = 300  # seconds until the server answers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(checkpoint("llava")), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", "4", "--block-size", "32", "--trust-request-mm-kwargs"),
        *("--hf-overrides", json.dumps({"visual_pruning": {"method": "divprune", "ratio": RATIO}})),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            url, start = f"http://127.0.0.1:{port}", time.monotonic()
            while not alive(url):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() - start < PATIENCE, log.read_text()[-3000:]
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def alive(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def chat(url: str, picture, **more) -> tuple[int, dict]:
    """Status and body of the answer to a chat request with an image and a question."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "text", "text": "USER: "},
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "\nWhat is shown?"},
    ]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 10,
        "ignore_eos": True,
        "add_special_tokens": False,
        "logprobs": True,
        "return_tokens_as_token_ids": True,  # the text of a random model is no text
        **more,
    }
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize("ratio", [None, 0.75, 0.0, 0.5])
def test_a_chat_request_with_an_image(server, ratio):
    more = {} if ratio is None else {"mm_processor_kwargs": {"prune_ratio": ratio}}
    status, answer = chat(server, photo(1), **more)
    assert status == 200, answer
    expected = hugging_face("llava", "divprune", prompt("llava"), photo(1), RATIO if ratio is None else ratio)
    assert answer["usage"]["prompt_tokens"] == expected.length
    found = answer["choices"][0]["logprobs"]["content"]
    tokens = [int(one["token"].removeprefix("token_id:")) for one in found]
    Answer(tokens, [one["logprob"] for one in found], expected.length).check(expected)


@pytest.mark.parametrize("ratio, message", [(1.5, "ratio=1.5 must be in [0, 1)"), ("much", "not a finite number")])
def test_a_bad_ratio_is_a_bad_request(server, ratio, message):
    status, answer = chat(server, photo(1), mm_processor_kwargs={"prune_ratio": ratio})
    assert status == 400
    assert message in answer["error"]["message"]
    assert chat(server, photo(1))[0] == 200
