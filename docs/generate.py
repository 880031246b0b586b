"""Writes docs/cli.md and docs/settings.md from the code: `uv run python docs/generate.py`.

A test compares the files with what this prints, so that help, settings and docs cannot drift apart.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel

from mbcd_cli.methods import DEFAULT
from mbcd_cli.settings.described import described

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py; change the code, then run it again. -->"


def cli_page() -> str:
    """Help of every command, as an 80-column terminal shows it."""
    os.environ.update(TERMINAL_WIDTH="80", COLUMNS="80", NO_COLOR="1", TERM="dumb")
    os.environ.pop("FORCE_COLOR", None)
    from typer.main import get_command
    from typer.testing import CliRunner

    from mbcd_cli.cli import app

    runner = CliRunner()
    pages = [NOTE, "# Command line", ""]
    for name in ("", *get_command(app).commands):
        shown = runner.invoke(app, [*([name] if name else []), "--help"], prog_name="mbcd", color=False)
        text = "\n".join(line.rstrip() for line in shown.output.strip("\n").splitlines())
        pages += [f"## mbcd {name}".rstrip(), "", "```text", text, "```", ""]
    return "\n".join(pages)


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for one in described(model, prefix):
        default = DEFAULT if one.path == "method.name" else one.default
        shown = f"`{default}`" if default else ""
        rows.append(
            f"| `{one.path}` | {one.type.replace('|', chr(92) + '|')} | {shown} | {' '.join(one.meaning.split())} |"
        )
    return rows


def settings_page() -> str:
    """Every field of the tree: path, type, default, meaning."""
    from mbcd_cli import settings
    from mbcd_cli.data.modalities import KINDS
    from mbcd_cli.data.readers import READERS, reader_settings
    from mbcd_cli.methods import METHODS, method_class

    pages = [NOTE, "# Settings", ""]
    pages += [
        "Precedence: flag > `--set part.field=value` > `MBCD_PART__FIELD` > `--config FILE` > `--preset` > default.",
        "`mbcd train --show-settings` prints the resolved tree. Searched: what `mbcd sweep --search` draws from.",
        "",
    ]
    header = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in settings.Settings.model_fields.items():
        if name == "modalities":
            for kind in KINDS.values():
                pages += [f"## modalities.NAME, kind {kind.model_fields['kind'].default}", "", kind.__doc__ or "", ""]
                pages += [*header, *_rows(kind, "modalities.NAME."), ""]
            continue
        if name == "method":
            kinds: dict[type[BaseModel], list[str]] = {}
            for method in METHODS:
                kinds.setdefault(method_class(method).Settings, []).append(method)
            for kind, methods in kinds.items():
                pages += [f"## method, of {', '.join(methods)}", "", kind.__doc__ or "", "", *header]
                pages += [*_rows(kind, "method."), ""]
            continue
        group = field.annotation
        pages += [f"## {name}", "", group.__doc__ or "", "", *header, *_rows(group, f"{name}."), ""]
        if name == "dataset":
            own: dict[type[BaseModel], list[str]] = {}
            for reader in READERS:
                own.setdefault(type(reader_settings(reader)), []).append(reader)
            for kind, readers in own.items():
                if kind is not settings.ReaderSettings:
                    pages += [f"## dataset.reader, of {', '.join(readers)}", "", kind.__doc__ or "", "", *header]
                    pages += [*_rows(kind, "dataset.reader."), ""]
    return "\n".join(pages)


PAGES = {"cli.md": cli_page, "settings.md": settings_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (HERE / file).write_text(page().rstrip("\n") + "\n", encoding="utf-8")
        print(f"wrote docs/{file}")
