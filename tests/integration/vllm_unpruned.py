"""At ratio 0, and without the option, vLLM computes bit for bit what it computes without the plug-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_plain import cases
from vllm_support import Answer, checkpoint, engine


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_nothing_changes(family):
    checkpoint(family)  # made here, for both
    plain = subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_plain.py"), family],
        env={**os.environ, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in plain.stdout.splitlines() if line.startswith("ANSWERS")]
    assert found, plain.stderr[-3000:]
    expected = [Answer(**one) for one in json.loads(found[0].removeprefix("ANSWERS"))]
    for pruning, ratio in (({"method": "divprune", "ratio": 0.9}, 0.0), (None, None)):
        with engine(family, pruning) as ask:
            answers = [ask(one)[0] for one in cases(family, ratio)]
        for answer, right in zip(answers, expected, strict=True):
            assert answer.length == right.length
            assert answer.check(right, tolerance=0.0) == 0.0
