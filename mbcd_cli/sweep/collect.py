"""A sweep's finished cells as tables and curves: rows are named by method and grid values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

import numpy as np

from mbcd_cli.data.records import modality_order
from mbcd_cli.errors import RunError
from mbcd_cli.evaluation.report import plots
from mbcd_cli.evaluation.report.comparison import compare
from mbcd_cli.evaluation.report.evaluated import Run, load_run
from mbcd_cli.evaluation.report.score_tables import averages, marked
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.files import read_records
from mbcd_cli.launch.unit import read_failure
from mbcd_cli.methods import method_class
from mbcd_cli.methods.base import Panel
from mbcd_cli.paper.rows import order_methods
from mbcd_cli.resolved import method_label
from mbcd_cli.runs.folder import epoch_records
from mbcd_cli.scoring.deployed import deployed_of
from mbcd_cli.scoring.history import accuracy_history
from mbcd_cli.sweep.plan import Cell
from mbcd_cli.sweep.state import state

Pair = tuple[Cell, Run]


def load(cells: Sequence[Cell]) -> tuple[list[Pair], list[str]]:
    """The finished cells with their results, rows named as the sweep names them; and what is missing, in words."""
    pairs, notes = [], []
    open_cells = 0
    for cell in cells:
        now = state(cell.folder)
        if now == "done":
            try:
                pairs.append((cell, _load(cell)))
            except RunError as error:
                notes.append(
                    f"{cell.name} is left out: {error.message} Delete {cell.folder / 'results.json'} and run the sweep "
                    "again: it evaluates that run once more."
                )
        elif now == "failed":
            error = (read_failure(cell.folder) or "unknown").splitlines()[0]
            notes.append(f"{cell.name} failed: {error}")
        else:
            open_cells += 1
    if open_cells:
        notes.append(f"{open_cells} of {len(cells)} runs are not finished: means are over those that are.")
    return pairs, [*notes, *_caches(pairs)]


def _load(cell: Cell) -> Run:
    run = load_run(cell.folder)
    training = cell.settings.training
    if (run.dataset, run.method, run.target, run.seed) != (
        cell.settings.dataset.name,
        method_label(cell.settings),
        training.target_domain,
        training.seed,
    ):
        raise RunError(
            f"{cell.folder / 'results.json'} tells of another run ({run.dataset}, {run.method}, target {run.target}, "
            f"seed {run.seed}).",
            "Evaluate that run again.",
        )
    return replace(run, method=cell.label())


def _caches(pairs: Sequence[Pair]) -> list[str]:
    """A warning per dataset and modality whose runs saw different caches: it was prepared from other data meanwhile."""
    seen: dict[tuple[str, str], set[str]] = {}
    for _, run in pairs:
        for name in run.modalities:
            if cache := run.provenance.get(f"{name} cache"):
                seen.setdefault((run.dataset, name), set()).add(cache)
    return [
        f"Runs of {dataset} saw {len(caches)} different caches of {name} ({', '.join(sorted(caches))}): do not compare "
        "them. Give the changed dataset a name of its own, or train again with another --runs-dir."
        for (dataset, name), caches in seen.items()
        if len(caches) > 1
    ]


def tables(pairs: Sequence[Pair]) -> list[Table]:
    """Every table: one per axis of the grid first, then those of any comparison, then what the methods show."""
    opened = [(cell, run) for cell, run in pairs if not run.sealed]
    return [*axis_tables(opened), *compare([run for _, run in pairs]), *panel_tables(pairs)]


def _axes(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """Axes of the grid with more than one finished value, in the plan's order."""
    values: dict[str, dict[str, None]] = {}
    for cell, _ in pairs:
        for key, value in cell.values:
            values.setdefault(key, {})[value] = None
    return {key: [*several] for key, several in values.items() if len(several) > 1}


def axis_tables(pairs: Sequence[Pair]) -> list[Table]:
    """Per axis of the grid: methods down, the axis' values across, fused accuracy averaged over targets."""
    written = []
    for axis, values in _axes(pairs).items():
        groups: dict[tuple, list[Pair]] = {}
        for cell, run in pairs:
            by_name = () if axis in ("dataset.name", "dataset.root") else (run.dataset,)
            by_modalities = () if axis == "model.modalities" else ("+".join(run.modalities),)
            groups.setdefault((*by_name, *by_modalities, run.setting), []).append((cell, run))
        short = axis.rsplit(".", 1)[-1]
        for names, group in sorted(groups.items()):
            rows: list[list[str | Score]] = []
            by_label: dict[str, dict[str | None, list[Run]]] = {}
            for cell, run in group:
                by_label.setdefault(cell.label([axis]), {}).setdefault(dict(cell.values).get(axis), []).append(run)
            # The average of a row that lacks a target which others have is none.
            columns = {
                value: sorted({r.column for held in by_label.values() for r in held.get(value, [])}) for value in values
            }
            for label in order_methods(by_label):
                of_value = {value: by_label[label].get(value, []) for value in values}
                figures = [averages(runs, columns[value]) if runs else Score(None) for value, runs in of_value.items()]
                rows.append([label, *figures])
            where = ", ".join(names)
            written.append(
                Table(
                    "-".join([*names, short]).replace("+", "-"),
                    f"{where}: top-1 accuracy (%) by {axis}, average over targets",
                    ["method", *(v.replace(",", "+") if axis == "model.modalities" else v for v in values)],
                    marked(rows),
                    "Mean and standard deviation over seeds of the average over targets.",
                )
            )
    return written


def panel_tables(pairs: Sequence[Pair]) -> list[Table]:
    """Per dataset and panel that a method shows: its figures in training, per row and modality, mean over all its runs.

    Several sets of modalities are blocks of one table, so that it tells how both behave as M grows.
    """
    groups: dict[tuple[str, str], dict[tuple[str, ...], dict[str, list[dict[str, dict[str, float]]]]]] = {}
    panels: dict[str, Panel] = {}
    for cell, run in pairs:
        method = cell.settings.method
        for panel in method_class(method.name).panels(method):
            means = training_means(run.path, [name for name, shown in panel.figures.items() if shown.row])
            if means:
                panels.setdefault(panel.name, panel)
                by_set = groups.setdefault((run.dataset, panel.name), {})
                by_set.setdefault(run.modalities, {}).setdefault(run.method, []).append(means)
    written = []
    for (dataset, key), by_set in sorted(groups.items()):
        panel, several = panels[key], len(by_set) > 1
        names = modality_order(dict.fromkeys(name for modalities in by_set for name in modalities))
        rows: list[list[str | Score]] = []
        for modalities, by_label in by_set.items():
            block = ["+".join(modalities)] if several else []
            for label in order_methods(by_label):
                for figure, shown in panel.figures.items():
                    if shown.row:
                        cells = [
                            Score.over([shown.scale * means[m][figure] for means in by_label[label] if m in means])
                            for m in names
                        ]
                        rows.append([*block, f"{label}: {shown.row}", *cells])
        where = dataset if several else f"{dataset}, {'+'.join(names)}"
        written.append(
            Table(
                f"{where.replace(', ', '-').replace('+', '-')}-{panel.name}",
                f"{where}: {panel.title}",
                [*(["modalities"] if several else []), "method", *names],
                rows,
                f"{panel.note} Mean over all steps; spread over targets and seeds.".strip(),
                blocks=several,
            )
        )
    return written


def training_means(folder: Path, figures: Sequence[str]) -> dict[str, dict[str, float]]:
    """modality -> means of `figures` over a run's training, from steps.jsonl weighted by steps; {} without them."""
    records = read_records(folder / "steps.jsonl")
    if not records or any(name not in row for row in records[0]["modalities"].values() for name in figures):
        return {}
    weights = np.array([record["steps"] for record in records], float)
    return {
        modality: {
            name: float(np.average([record["modalities"][modality][name] for record in records], weights=weights))
            for name in figures
        }
        for modality in records[0]["modalities"]
    }


def curves(pairs: Sequence[Pair], output: Path) -> dict[str, Path]:
    """Plots of accuracy per epoch, mean over targets and seeds: one per dataset, modalities, protocol and clips."""
    groups: dict[tuple, dict[str, list[Mapping[int, float]]]] = {}
    for _, run in pairs:
        history = accuracy_history(epoch_records(run.path))
        if history is None:
            continue
        for where in ("validation", "target"):
            line = history.lines.get((where, deployed_of([model for clips, model in history.lines if clips == where])))
            if line is not None:
                values = {e: v for e, v in zip(history.epochs, line, strict=True) if v is not None}
                key = (run.dataset, run.modalities, run.setting, where)
                groups.setdefault(key, {}).setdefault(run.method, []).append(values)
    files = {}
    for (dataset, modalities, setting, where), lines in sorted(groups.items()):
        epochs = sorted({epoch for runs in lines.values() for values in runs for epoch in values})
        means = {
            label: [_mean(values[epoch] for values in lines[label] if epoch in values) for epoch in epochs]
            for label in order_methods(lines)
        }
        title = f"{dataset}, {'+'.join(modalities)}, {setting}: {where} accuracy per epoch"
        path = output / f"{dataset}-{'-'.join(modalities)}-{setting}-{where}-epochs.png"
        files[title] = plots.plot_lines(
            epochs, means, path, title=title, xlabel="epoch", ylabel="accuracy, mean over runs"
        )
    return files


def _mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return sum(held) / len(held) if held else None


def links(cells: Sequence[Cell], output: Path) -> str:
    """HTML list of all runs: a link to the report where there is one, else to the folder; the state if not done."""
    states = {cell.key: state(cell.folder) for cell in cells}

    def line(cell: Cell) -> str:
        report = cell.folder / "report.html"
        there = report if report.is_file() else cell.folder
        text = escape(cell.name)
        if there.exists():
            slash = "" if there is report else "/"
            text = f'<a href="{escape(quote(relpath(there, output)))}{slash}">{text}</a>'
        now = states[cell.key]
        if now == "failed":
            now += f": {read_failure(cell.folder) or 'unknown'}"
        return f"<li>{text}{'' if now == 'done' else f' ({escape(now)})'}</li>"

    done = sum(now == "done" for now in states.values())
    return (
        f"<p>{done} of {len(cells)} done. A link leads to the run's report, or to its folder where none was written "
        f"(mbcd evaluate --run RUN writes it).</p>\n<ul>{''.join(map(line, cells))}</ul>\n"
    )
