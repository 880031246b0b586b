"""What is said about the methods: `mbcd list methods`, and docs/methods.md with its commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mbcd_cli import console
from mbcd_cli.cli import app
from mbcd_cli.methods import METHODS, same_class

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    mbcd (train .*)$", PAGE, re.MULTILINE)


def test_the_list_says_paper_year_and_chassis(monkeypatch):
    rows = {row["method"]: row for row in json.loads(CliRunner().invoke(app, ["list", "methods", "--json"]).output)}
    assert list(rows)[: len(METHODS)] == list(METHODS)
    assert (rows["cmrf"]["paper"], rows["cmrf"]["year"], rows["cmrf"]["published"]) == ("NeurIPS", 2024, True)
    assert (rows["erm"]["year"], rows["sam"]["published"]) == (None, False)
    assert all(len(row["what"]) <= 50 for row in rows.values()), "two lines of a narrow terminal, or three"
    monkeypatch.setattr(console.out, "width", 80)
    lines = CliRunner().invoke(app, ["list", "methods"]).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(word in line for line in lines for word in ("None", "True", "False"))


def test_every_method_stands_in_the_table():
    told = set(re.findall(r"`([\w+-]+)`", "".join(re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE))))
    missing = {name for name in METHODS if name not in told and not same_class(name, "mbcd")}
    assert not missing


def sections():
    """(method, its section) of every command on the page."""
    texts = re.findall(r"^## .+?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    for command in COMMANDS:
        method = shlex.split(command)[shlex.split(command).index("--method") + 1]
        yield method, next(text for text in texts if command in text)


def test_every_class_has_a_section_with_its_equations_cost_and_command():
    told = dict(sections())
    missing = [name for name in METHODS if not any(same_class(name, other) for other in told)]
    assert not missing
    assert not [name for name, text in told.items() if "Cost: " not in text and name != "probe"]
    equations = re.compile(r"^    (?!mbcd train)", re.MULTILINE)
    assert [name for name, text in told.items() if not equations.search(text)] == ["mbcd"], "its own are in method.md"


def test_every_section_says_what_its_chassis_sets():
    for method, section in sections():
        assert ("`--chassis published`:" in section) == (
            METHODS[method].published is not None or "refused; its" in section
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_settings_that_there_are(command):
    done = CliRunner().invoke(app, [*shlex.split(command), "--show-settings"])
    assert done.exit_code == 0, done.output
