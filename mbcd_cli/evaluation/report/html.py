"""One self-contained HTML file per evaluation or comparison: no network, no scripts, images inside.

Readable on a phone and in print, light and dark.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from mbcd_cli.evaluation.report import sections
from mbcd_cli.evaluation.report.evaluated import Run
from mbcd_cli.evaluation.report.results import Results
from mbcd_cli.evaluation.report.tables import Score, Table, plain
from mbcd_cli.files import write_text
from mbcd_cli.plotting import DPI
from mbcd_cli.say import are_figures

_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
LONG = 48
"""Characters from which a cell is broken into lines."""


def table_html(table: Table) -> str:
    """A table with its title and note."""

    left = {
        column for column in range(1, len(table.columns)) if not are_figures([plain(row[column]) for row in table.rows])
    }

    def style(column: int, text: str) -> str:
        rules = ["text-align: left"] if column in left else []
        rules += ["white-space: normal; min-width: 20rem"] if len(text) > LONG else []
        joined = "; ".join(rules)
        return f' style="{joined}"' if rules else ""

    def cell(value: str | Score, column: int) -> str:
        text = escape(plain(value))
        if isinstance(value, Score) and value.best:
            text = f"<strong>{text}</strong>"
        return f"<td{style(column, plain(value))}>{text}</td>"

    def line(index: int, row: Sequence[str | Score]) -> str:
        cells = "".join(cell(value, column) for column, value in enumerate(row))
        rule = ' style="border-top: 2px solid var(--rule)"' if table.starts(index) else ""
        return f"<tr{rule}>{cells}</tr>\n"

    head = "".join(f'<th scope="col"{style(i, column)}>{escape(column)}</th>' for i, column in enumerate(table.columns))
    rows = "".join(line(index, row) for index, row in enumerate(table.shown()))
    note = f'<p class="soft">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}\n'
    )


_PAGE_DPI = 96
"""CSS pixels an inch: plots are shown in the size they are drawn for, so that their letters are alike."""


def figure_html(path: Path, caption: str, *, wide: bool | None = None) -> str:
    """An image as a data URI, with its caption; `wide`: over the page's whole width, by default where it needs that."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = escape(caption)
    shape = " class=wide" if (_is_wide(path) if wide is None else wide) else ""
    # Not larger than drawn: a wide title would blow up a small plot.
    most = round(_pixels(path)[0] * _PAGE_DPI / DPI)
    size = f' style="max-width: {most}px; margin: 0 auto"' if path.suffix == ".png" else ""
    return (
        f"<figure{shape}>"
        f'<img{size} alt="{text}" src="data:{_TYPES[path.suffix]};base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def _pixels(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, which stand at its bytes 16 to 24."""
    head = path.read_bytes()[:24]
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def _is_wide(path: Path) -> bool:
    """Whether panels stand side by side in a picture, so that it needs the page's whole width."""
    width, height = _pixels(path)
    return path.suffix == ".png" and (width > 1.7 * height or width > 1150)


def gallery(files: Iterable[tuple[str, Path]]) -> str:
    """The images that exist, side by side where there is room, none beside an empty place; empty without any."""
    shown = [(caption, path) for caption, path in files if path.suffix in _TYPES and path.is_file()]
    narrow = [path for _, path in shown if not _is_wide(path)]
    alone = narrow[-1:] if len(narrow) % 2 else []
    images = [figure_html(path, caption, wide=path in alone or _is_wide(path)) for caption, path in shown]
    return f'<div class="plots">{"".join(images)}</div>\n' if images else ""


def page(title: str, parts: Mapping[str, str], *, lead: str = "") -> str:
    """The whole document: `parts` are headed sections (empty ones are left out) with links to them on top."""
    css = resources.files("mbcd_cli.evaluation.report").joinpath("report.css").read_text(encoding="utf-8")
    shown = {name: body for name, body in parts.items() if body}
    links = "".join(f'<a href="#part{i}">{escape(name)}</a>' for i, name in enumerate(shown))
    body = "".join(
        f'<section id="part{i}"><h2>{escape(name)}</h2>\n{text}</section>\n'
        for i, (name, text) in enumerate(shown.items())
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be fetched, whatever a clip or class is called.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{css}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}<nav>{links}</nav>\n{body}</body></html>\n"
    )


def _warned(warnings: Iterable[str]) -> str:
    return "".join(f'<div class="warning">{escape(warning)}</div>' for warning in warnings)


def _lead(results: Results) -> str:
    headline = results.headline
    boxes = "".join(
        f"<div>{escape(head)}<b>{sections.percent(value)} %</b></div>" for head, value in headline.top1.items()
    )
    where, epoch = escape(results.clips_name(headline.clips)), results.epochs.get(headline.checkpoint)
    warnings = _warned(results.warnings)
    return (
        f"<p>Top-1 accuracy on {where} of the deployed model: the {escape(headline.model)} of checkpoint "
        f'{escape(headline.checkpoint)} (epoch {epoch}).</p>\n<div class="figures">{boxes}</div>\n{warnings}'
    )


def _pairs(values: Mapping[str, object]) -> str:
    rows = [[str(key), str(value)] for key, value in values.items()]
    return table_html(Table("pairs", "Where these figures come from", ["what", "value"], rows))


def write_report(
    path: Path,
    results: Results,
    *,
    files: Mapping[str, Path],
    settings: str,
    run: Path | None = None,
    landscape: Path | None = None,
    skip: Iterable[Path] = (),
) -> Path:
    """Write the report of one evaluation.

    Args:
        results: of the evaluation.
        files: caption -> plot, as `evaluate` made them.
        settings: the resolved settings as TOML.
        run: the run folder; its training plots are shown too, but for those to `skip`.
        landscape: folder of landscape plots to show; by default the run's.

    Raises:
        FileError: it cannot be written.
    """

    def plots(*words: str) -> str:
        return gallery((name, file) for name, file in files.items() if name.startswith(words))

    def tables(*measured: Table | None) -> str:
        return "".join(table_html(table) for table in measured if table is not None)

    def folder(path: Path | None, skip: Iterable[Path] = ()) -> str:
        if path is None:
            return ""
        paths = [p for p in sorted(path.glob("*.png")) if p.resolve() not in {s.resolve() for s in skip}]
        return gallery((p.stem.replace("-", " "), p) for p in paths)

    hardest = sections.hardest_table(results)
    parts = {
        "Accuracy": tables(sections.accuracy_table(results), sections.domain_table(results))
        + plots("confusion", "classes", "accuracy per epoch")
        + tables(sections.class_table(results)),
        "Missing modalities": tables(*sections.missing_tables(results)) + plots("missing"),
        "Shift and corruptions": tables(sections.shift_table(results), sections.corruption_table(results))
        + plots("shift", "corruptions"),
        "Trust": tables(sections.trust_table(results), sections.ood_table(results)) + plots("reliability", "risk"),
        "Embeddings": plots("t-SNE"),
        "Hardest clips": tables(hardest),
        "Loss landscape": folder(landscape or (run and run / "landscape")),
        "Training": folder(run and run / "plots", skip=[*files.values(), *skip]),
        "Settings": f"<details><summary>settings.toml</summary><pre>{escape(settings)}</pre></details>",
        "Provenance": _pairs(results.provenance),
    }
    return write_text(path, page(results.title, parts, lead=_lead(results)))


def runs_html(runs: Sequence[Run]) -> str:
    """Where the figures of several runs come from: a row per run, and the versions they share or not."""

    def short(run: Run, ending: str) -> str:
        values = [value for key, value in run.provenance.items() if key.endswith(ending)]
        return ", ".join(value[:12] for value in values) or "-"

    rows = [
        [
            str(run.path),
            run.method,
            run.column,
            str(run.seed),
            "sealed" if run.sealed else f"{run.heads['fused']:.2f}",
            short(run, f"{run.provenance.get('checkpoint')} weights, sha256"),
            short(run, " cache"),
            f"{run.provenance.get('mbcd', '-')} / {run.provenance.get('torch', '-')}",
        ]
        for run in sorted(runs, key=lambda run: (run.dataset, run.modalities, run.method, run.column, run.seed))
    ]
    columns = ["run", "method", "target", "seed", "fused (%)", "weights, sha256", "caches", "mbcd / torch"]
    return table_html(Table("runs", "Where these figures come from", columns, rows))


def write_comparison(
    path: Path,
    tables: Sequence[Table],
    *,
    title: str,
    files: Mapping[str, Path] | None = None,
    warnings: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
) -> Path:
    """Write the tables of several runs, plots of them (caption -> file) and `sections` (heading -> HTML) as one page.

    Raises:
        FileError: it cannot be written.
    """
    lead = (
        "<p>Top-1 accuracy of every run's deployed model on its target, in percent. "
        "± is the standard deviation over seeds, bold the best of ours in a column.</p>\n"
    )
    lead += _warned(warnings)
    parts = {"Tables": "".join(map(table_html, tables)), "Plots": gallery((files or {}).items()), **(sections or {})}
    return write_text(path, page(title, parts, lead=lead))
