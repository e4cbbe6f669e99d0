"""README, registry and family table say the same."""

import re
from pathlib import Path

from prune import list_methods, method_info
from prune.adapters.families import FAMILIES
from prune.tables import families_markdown, methods_markdown, vits_markdown

README = (Path(__file__).parents[1] / "README.md").read_text()


def section(name):
    return re.search(rf"<!-- {name}:[^>]*-->\n(.*?)\n<!-- end of {name} -->", README, re.S)[1].strip()


def test_method_table_is_what_the_registry_says():
    table = section("methods")
    assert table == methods_markdown([method_info(name) for name in list_methods()]), (
        "run `prune list --markdown` and paste it into README.md"
    )
    assert all(f"`{name}`" in table for name in list_methods())


def test_family_table_is_what_the_adapters_say():
    table = section("families")
    assert table == families_markdown()
    assert section("vits") == vits_markdown()
    assert all(family.name in table for family in FAMILIES)


def test_every_command_named_in_the_readme_exists():
    from typer.testing import CliRunner

    from prune.cli import app

    for command in set(re.findall(r"`prune ([a-z]+)", README)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
