"""Evaluated runs compared: tables, bars and a page in every form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbcd_cli.checksums import of_file
from mbcd_cli.errors import FileError, RunError
from mbcd_cli.evaluation.claims import ALPHA
from mbcd_cli.evaluation.report import plots
from mbcd_cli.evaluation.report.claim_tables import claim_tables, rankings
from mbcd_cli.evaluation.report.evaluated import Run, distinct, find_runs, load_run, told_apart
from mbcd_cli.evaluation.report.html import runs_html, table_html, write_comparison
from mbcd_cli.evaluation.report.score_tables import joint_tables, main_tables, modality_tables, sealed_tables
from mbcd_cli.evaluation.report.selection import selected, selection_tables, write_selection
from mbcd_cli.evaluation.report.tables import Table, comma_separated, latex, markdown
from mbcd_cli.files import write_json, write_text
from mbcd_cli.json_values import json_values
from mbcd_cli.ledger import REVEALED, looks, told


def compare(runs: Sequence[Run]) -> list[Table]:
    """Every table that `runs` give."""
    runs, sealed = [run for run in runs if not run.sealed], [run for run in runs if run.sealed]
    trained = [run for run in runs if not run.zero_shot]
    tables = [*joint_tables(trained), *main_tables(runs), *modality_tables(trained), *claim_tables(trained)]
    return [*tables, *sealed_tables(sealed)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs compared: their folders, warnings, tables, and name -> path of everything written."""

    runs: list[Path]
    warnings: list[str]
    tables: list[Table]
    files: dict[str, Path]


def compare_runs(patterns: Sequence[str], *, output: Path) -> Comparison:
    """Compare evaluated runs: tables of mean and spread over seeds, beside the paper's figures.

    Args:
        patterns: run folders, or patterns such as `runs/**`.
        output: folder for comparison.{md,html,json} and one .csv and .tex per table, plots.

    Raises:
        RunError: no evaluated run.
    """
    done, waiting = find_runs(patterns)
    notes = [f"{folder} is not evaluated: left out. Run `mbcd evaluate --run {folder}`." for folder in waiting]
    if not done:
        raise RunError(notes[0], "Evaluate the runs first.")
    named, kinds = told_apart(_loaded(done, notes))
    runs, repeats = distinct(named)
    return write_comparison_files(
        runs, compare(runs), notes=[*notes, *kinds, *repeats], output=output, title="Runs compared"
    )


def _loaded(folders: Sequence[Path], notes: list[str]) -> list[Run]:
    """The runs that can be compared; the others go to `notes`.

    Raises:
        RunError: there is none.
    """
    runs, bad = [], []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except RunError as error:
            bad.append(error)
    if not runs:
        raise bad[0]
    notes += [f"{error.message.rstrip('.')}: left out. {error.remedy}" for error in bad]
    return runs


def _looks(runs: Sequence[Run]) -> tuple[dict[str, str], list[str]]:
    """How often sealed targets were looked at, as a section of the page; and ledgers that cannot be trusted."""
    rows, broken = [], []
    for place in sorted({run.path.parent for run in runs if run.sealed or (run.path / REVEALED).is_file()}):
        try:
            found = looks(place)
        except FileError as error:
            broken.append(f"{error.message} {error.remedy}")
            continue
        rows += [[str(place), told(found), "", "", ""]]
        rows += [["", f"look {look.look}", look.when, look.what, str(len(look.runs))] for look in found]
    table = Table("looks", "Looks at sealed targets", ["runs", "ledger", "when (UTC)", "what", "runs revealed"], rows)
    return ({"Looks at the targets": table_html(table)} if rows else {}), broken


def write_comparison_files(
    runs: Sequence[Run],
    tables: Sequence[Table],
    *,
    notes: Sequence[str],
    output: Path,
    title: str,
    pictures: Mapping[str, Path] | None = None,
    sections: Mapping[str, str] | None = None,
    left_out: Mapping[Path, Sequence[Run]] | None = None,
) -> Comparison:
    """Write `tables` of `runs` in every form, with bars of the main ones; what `compare_runs` returns.

    Args:
        notes: warnings to show.
        pictures: more plots, caption -> file.
        sections: more of the page, heading -> HTML.
        left_out: as `selection.selected` takes it.

    Raises:
        FileError: they cannot be written.
    """
    opened = [run for run in runs if not run.sealed]
    bars = {table.title: plots.plot_methods(table, output / f"{table.name}.png") for table in main_tables(opened)}
    trained = [run for run in opened if not run.zero_shot]
    for one in rankings(trained):
        chance = "" if one.p < ALPHA else ", not more than chance gives"
        caption = f"{one.title} (Friedman p {one.p:.2g}{chance})"
        bars[caption] = plots.plot_ranks(one.ranks, one.critical, output / f"{one.name}.png", title=one.title)
    bars |= pictures or {}
    files = {}
    if found := selected(trained, left_out):
        tables = [*tables, *selection_tables(found)]
        regrets: dict[str, list[float]] = {}
        for one in found:
            regrets.setdefault(one.rule, []).append(one.regret)
        bars["Regret of each rule of selection"] = plots.plot_regrets(regrets, output / "regret.png")
        files["selection.csv"] = write_selection(found, output / "selection.csv")
    report = output / "comparison.html"
    looked, broken = _looks(runs)
    notes = [*notes, *broken]
    more = {**(sections or {}), **looked, "Provenance": runs_html(runs)}
    page = write_comparison(report, tables, title=title, files=bars, warnings=notes, sections=more)
    files |= {"report": page} | {path.name: path for path in bars.values()}
    text = {"comparison.md": "\n".join(map(markdown, tables))}
    for table in tables:
        text |= {f"{table.name}.csv": comma_separated(table), f"{table.name}.tex": latex(table)}
    for name, content in text.items():
        files[name] = write_text(output / name, content)
    beside = {run.path: None for others in (left_out or {}).values() for run in others}
    done = Comparison([*(run.path for run in runs), *beside], list(notes), list(tables), files)
    sums = {path.relative_to(output).as_posix(): of_file(path) for path in files.values()}
    files["results"] = write_json(output / "comparison.json", {**json_values(done), "files": sums})
    return done
