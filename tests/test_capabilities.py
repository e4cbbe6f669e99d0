"""The table of what works where is what happens today, and whatever refuses does so for a declared reason."""

import json

import capabilities
import pytest

from prune import Geometry, get_method, list_methods, tables
from prune.adapters.families import SIGNAL_TOWERS
from prune.adapters.tower import CLS_KINDS
from prune.adapters.vit_signals import AT_BLOCKS
from prune.tables import MODELS, VITS

PACKED = {"Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"}
WITHOUT_CLS = {"LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"}


@pytest.fixture(scope="module")
def found():
    return capabilities.probe()


def test_the_committed_table_is_what_a_probe_finds(found):
    assert capabilities.FILE.read_text() == capabilities.text(found), "run `python tests/capabilities.py`"


def inside(method):
    return any(site.kind == "block" for site in get_method(method).sites())


def refused(cells, families):
    return {family: cells[family] for family in families if cells[family] != "works"}


def test_models_refuse_methods_inside_their_encoder_where_it_cannot_be_cut(found):
    for method in filter(inside, found):
        refusals = refused(found[method], MODELS)
        assert set(refusals) - PACKED == {"InternVL"}
        assert refusals.pop("InternVL").startswith("its encoder cannot be cut")
        reducers = [stage.reducer for stage in stages(method)]
        plain = all(one.place == "input" and not one.signals and not one.reconstructs for one in reducers)
        assert set(refusals) == (set() if plain else PACKED), method
        assert all(why.startswith("its encoder can be cut between blocks only") for why in refusals.values())


def stages(method):
    return get_method(method).plan(Geometry(100), 10)


def test_models_refuse_other_methods_for_want_of_a_cls_token_and_nothing_else(found):
    assert sum(shape.cls for shape in SIGNAL_TOWERS.values()) == 2  # CLIP and InternVL: see WITHOUT_CLS
    for method in found:
        if inside(method):
            continue
        reads_cls = any(spec.kind in CLS_KINDS for spec in get_method(method).tower.values())
        refusals = refused(found[method], MODELS)
        assert set(refusals) == (WITHOUT_CLS if reads_cls else set()), method
        assert all(why.startswith("no CLS token") for why in refusals.values())


def test_vision_transformers_refuse_for_what_they_have_not(found):
    for method in found:
        chosen, refusals = get_method(method), refused(found[method], VITS)
        reads = {signal for stage in stages(method) for signal in stage.reducer.signals}
        if not inside(method) and len(chosen.sites()) > 1:
            wanted, why = set(VITS), "acts in several decoder layers"
        elif reads - AT_BLOCKS:
            wanted, why = set(VITS), "no text"
        elif chosen.needs_projector:
            wanted, why = set(VITS), "no projector"
        elif chosen.adaptive:
            wanted, why = {"timm EVA", "SigLIP"}, "pools over all patches"
        else:
            no_cls = "attention" in reads or any(spec.kind in CLS_KINDS for spec in chosen.tower.values())
            wanted, why = ({"SigLIP"} if no_cls else set()), "no CLS token"
        assert set(refusals) == wanted, method
        assert all(found.startswith(why) for found in refusals.values()), method


def test_an_option_that_helps_is_named(found):
    options = {method: cells["Qwen2-VL"].partition("; ")[2] for method, cells in found.items() if not inside(method)}
    helped = {method: option for method, option in options.items() if option}
    assert helped.pop("todre") == "works with pivot='random'"
    assert helped == dict.fromkeys(("fastervlm", "flowcut", "visionzip", "vispruner"), "works with score='received'")


def test_the_file_names_every_method_and_family():
    rows = json.loads(capabilities.FILE.read_text())
    assert list(rows) == list_methods()
    assert all(list(cells) == [*MODELS, *VITS] for cells in rows.values())


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"A": "works", "B": "works"}, "all"),
        ({"A": "works", "B": "no nose", "C": "no nose"}, "all but B, C (no nose)"),
        ({"A": "no nose", "B": "no nose"}, "none (no nose)"),
        ({"A": "no ear", "B": "no nose"}, "all but A (no ear), B (no nose)"),
        ({"A": "no ear", "B": "no nose", "C": "works"}, "all but A (no ear), B (no nose)"),
        (None, "not probed"),
    ],
)
def test_in_words(cells, words, monkeypatch):
    monkeypatch.setattr(tables, "_probed", lambda: {} if cells is None else {"method": cells})
    assert tables.families_words("method", list(cells or {})) == words
