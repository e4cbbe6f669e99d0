"""One thread, a transformers that speaks in errors only, a count of the contract's cells, and a check for bare models.

A model that a test shares must be left as it was.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import tiny, reference, matrix

torch.set_num_threads(1)  # two busy ones are ten times slower on models this small


class _Deprecations(logging.Handler):
    """What transformers announces by its logger instead of a warning is an error as well (see filterwarnings)."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        # Its own assisted decoding hands `generate` both.
        if "deprecated" in said and "together with generation-related arguments" not in said:
            raise DeprecationWarning(said)


transformers.logging.disable_default_handler()
transformers.logging.add_handler(_Deprecations())

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
