"""The table of what works where is what happens today, and whatever refuses does so for a declared reason."""

import json

import capabilities
import pytest

from prune import get_method, list_methods, tables
from prune.adapters.families import FAMILIES, SIGNAL_TOWERS
from prune.adapters.tower import CLS_KINDS

WITHOUT_CLS = {"LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"}


@pytest.fixture(scope="module")
def found():
    return capabilities.probe()


def test_the_committed_table_is_what_a_probe_finds(found):
    assert capabilities.FILE.read_text() == capabilities.text(found), "run `python tests/capabilities.py`"


def test_methods_refuse_for_want_of_a_cls_token_and_nothing_else(found):
    assert sum(shape.cls for shape in SIGNAL_TOWERS.values()) == 2  # CLIP and InternVL: see WITHOUT_CLS
    for method, cells in found.items():
        reads_cls = any(spec.kind in CLS_KINDS for spec in get_method(method).tower.values())
        refused = {family for family, outcome in cells.items() if outcome != "works"}
        assert refused == (WITHOUT_CLS if reads_cls else set()), method
        assert all(cells[family].startswith("no CLS token") for family in refused)


def test_an_option_that_helps_is_named(found):
    options = {method: cells["Qwen2-VL"].partition("; ")[2] for method, cells in found.items()}
    helped = {method: option for method, option in options.items() if option}
    assert helped.pop("todre") == "works with pivot='random'"
    assert helped == dict.fromkeys(("fastervlm", "flowcut", "visionzip", "vispruner"), "works with score='received'")


def test_the_file_names_every_method_and_family():
    rows = json.loads(capabilities.FILE.read_text())
    assert list(rows) == list_methods()
    assert all(list(cells) == [family.name for family in FAMILIES] for cells in rows.values())


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"A": "works", "B": "works"}, "all"),
        ({"A": "works", "B": "no nose", "C": "no nose"}, "all but B, C (no nose)"),
        ({"A": "no ear", "B": "no nose", "C": "works"}, "all but A (no ear), B (no nose)"),
        (None, "not probed"),
    ],
)
def test_in_words(cells, words, monkeypatch):
    monkeypatch.setattr(tables, "_probed", lambda: {} if cells is None else {"method": cells})
    assert tables.families_words("method") == words
