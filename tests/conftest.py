"""One thread, a silent transformers, a count of the contract's cells, and a check that tests leave models bare."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import tiny, reference, matrix

torch.set_num_threads(1)  # two busy ones are ten times slower on models this small
transformers.logging.set_verbosity_error()

CELLS = ("test_contract", "test_bad_input", "test_vit_contract")


@pytest.fixture(autouse=True)
def bare_models():
    """Every test must leave the shared models exactly as they were."""
    yield
    tiny = sys.modules.get("tiny")
    spoilt = tiny.check_bare() if tiny else []
    assert not spoilt, "; ".join(spoilt)


def pytest_terminal_summary(terminalreporter):
    passed = [r for r in terminalreporter.getreports("passed") if r.when == "call"]
    cells = sum(Path(r.location[0]).name.startswith(CELLS) for r in passed)
    terminalreporter.write_line(f"contract cells: {cells} passed")
