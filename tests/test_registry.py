"""Registration validates, lookup helps, plug-ins load."""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint
from inspect import signature

import pytest

from prune import (
    Budget,
    Compose,
    ConfigError,
    Scorer,
    UnknownMethodError,
    get_method,
    list_methods,
    method_info,
    register,
    registry,
)
from prune.method import Site, options_of
from prune.reducers.fastv import FastV
from prune.reducers.random import Random
from prune.registry import acts_at, method_class


@pytest.fixture
def scratch(monkeypatch):
    """A copy of the registry that the test may fill."""
    list_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield
    registry._load.cache_clear()


def scorer(name, **attributes):
    body = {"name": name, "score": lambda self, tokens: tokens.features[..., 0], **attributes}
    return dataclass(type("Mine", (Scorer,), body))


def test_register_and_get(scratch):
    cls = register(scorer("mine", __annotations__={"scale": float}, scale=1.0))
    assert isinstance(get_method("mine", scale=2.0), cls)
    assert "mine" in list_methods("mi*")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (scorer("Upper"), "lower-case"),
        (scorer(""), "lower-case"),
        (scorer("fastv"), "taken"),
        (scorer("mine", signals=("gravity",)), "gravity"),
        (type("Plain", (Scorer,), {"name": "plain", "score": None}), "dataclass"),
        (dataclass(type("Lazy", (Scorer,), {"name": "lazy"})), "does not implement score"),
        (scorer("mine", __annotations__={"needed": int}), "default"),
        (int, "subclass"),
    ],
)
def test_register_refuses(scratch, cls, reason):
    before = dict(registry._REGISTRY)
    with pytest.raises(ConfigError, match=reason):
        register(cls)
    assert before == registry._REGISTRY


def test_unknown_name_lists_the_closest_and_all():
    with pytest.raises(UnknownMethodError, match="Did you mean 'divprune'.*Known methods: .*fastv"):
        get_method("divprun")


def test_unknown_option_lists_the_options():
    with pytest.raises(ConfigError, match="no option 'laier'.*Did you mean 'layer'.*options are: layer"):
        get_method("fastv", laier=3)


@pytest.mark.parametrize("name", list_methods())
def test_options_of_a_wrong_type_are_refused(name):
    options = options_of(get_method(name))
    assert options_of(get_method(name, **options)) == options
    for key, value in options.items():
        for wrong in ("two", True, float("inf"), float("nan"), [["a"]], object()):
            if isinstance(value, bool) and wrong is True:
                continue
            for build in (partial(get_method, name), method_class(name)):
                with pytest.raises(ConfigError, match="two/config.json" if key == "scorer" and wrong == "two" else key):
                    build(**{key: wrong})


@pytest.mark.parametrize("given", [[1, 2], (1, 2), range(1, 3)])
def test_options_may_be_any_sequence(given):
    assert get_method("transprune", layers=given).layers == method_class("transprune")(given).layers == (1, 2)


def test_a_class_built_by_hand_counts_its_arguments():
    assert FastV(3) == FastV(layer=3) and "layer" in signature(FastV).parameters
    for wrong in (lambda: FastV(1, 2), lambda: FastV(1, layer=2), lambda: FastV(laier=1)):
        with pytest.raises(TypeError):
            wrong()


def test_filters():
    infos = {name: method_info(name) for name in list_methods()}
    asking = list_methods(where="decoder", needs_question=True)
    assert asking == [name for name, info in infos.items() if "decoder" in info.where and info.needs_question]
    assert "fastv" in asking and "divprune" not in asking
    plain = list_methods(signals=set())
    assert plain == [name for name, info in infos.items() if not info.signals] and "divprune" in plain
    assert "fastv" in list_methods(signals={"last_token_attention"}) and "fastv" not in plain
    assert list_methods("*prune*") == [name for name in infos if "prune" in name] and "divprune" in infos
    assert method_info("fastv").options == {"layer": 2}


def test_where_is_short():
    sites = [Site.parse(site) for site in ("projected", "decoder:8", "decoder:16")]
    assert acts_at(sites) == "projected + decoder:8,16"
    assert acts_at([Site.parse(f"decoder:{layer}") for layer in range(5, 32)]) == "decoder:5...31"
    assert acts_at([Site.parse("vision:3"), *sites]) == "vision:3 + projected + decoder:8,16"


def test_entry_points_load_and_broken_ones_only_warn(scratch, monkeypatch):
    good = scorer("from_plugin")
    plugin = type("E", (), {"name": "good", "value": "x:y", "load": lambda self: good})()
    broken = EntryPoint("broken", "no_such_module_at_all:X", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken, plugin])
    registry._load.cache_clear()
    with pytest.warns(UserWarning, match="broken"):
        names = list_methods()
    assert "from_plugin" in names


def test_compose_refuses_descending_sites_and_single_members():
    with pytest.raises(ConfigError, match="ascend"):
        Compose(FastV(), Random())
    with pytest.raises(ConfigError, match="at least two"):
        Compose(FastV())


def test_compose_positions_and_budgets():
    divprune, fastv = get_method("divprune"), FastV(layer=2)
    assert Compose(divprune, fastv).positions == "original"
    own = Compose(Random(), fastv, budgets=[Budget(keep=8), Budget(keep=4)])
    assert own.kept(16, None) == 4
    with pytest.raises(ConfigError, match="budgets of its own"):
        Compose(own, FastV(layer=3))
    with pytest.raises(ConfigError, match="per member"):
        Compose(Random(), fastv, budgets=[Budget(flops=0.5), Budget(keep=4)])
