"""Several runs: grouped by dataset, modalities, sources and method; mean and spread over seeds.

All figures in tables are top-1 in percent, of each run's deployed model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mbcd_cli.evaluation.report.evaluated import Run, by_method, grouped
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.paper.published import published_domains
from mbcd_cli.paper.rows import place_of_set, published_rows

TableRows = list[list[str | Score]]


def averages(runs: Sequence[Run], columns: Sequence[str], value: str = "fused") -> Score:
    """Mean over targets, and its spread over the seeds that have every target; empty where a target is missing."""
    by_seed: dict[int, dict[str, float]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.column] = _value(run, value)
    of_seeds = by_seed.values()
    if {column for of_seed in of_seeds for column in of_seed} != set(columns):
        return Score(None)
    means = [np.mean([of_seed[column] for of_seed in of_seeds if column in of_seed]) for column in columns]
    complete = [of_seed for of_seed in of_seeds if len(of_seed) == len(columns)]
    spread = Score.over([float(np.mean([of_seed[column] for column in columns])) for of_seed in complete])
    return replace(spread, value=float(np.mean(means)))


def _value(run: Run, value: str) -> float:
    if value == "in-domain":
        return float("nan") if run.in_domain is None else run.in_domain
    return run.heads[value]


def marked(rows: Sequence[Sequence[str | Score]]) -> TableRows:
    """`rows` with the largest figure of every column marked best (all of them where several are equal)."""
    out = [list(row) for row in rows]
    for column in range(1, max((len(row) for row in out), default=0)):
        cells = [row[column] for row in out if isinstance(row[column], Score) and row[column].value is not None]
        if len(cells) < 2:
            continue
        top = max(round(cell.value, 2) for cell in cells)
        for row in out:
            cell = row[column]
            if isinstance(cell, Score) and cell.value is not None and round(cell.value, 2) == top:
                row[column] = replace(cell, best=True)
    return out


def _columns(runs: Sequence[Run], dataset: str) -> list[str]:
    """The targets (or source-target pairs) of a dataset's runs, in the paper's order where it has them."""
    columns = sorted({run.column for run in runs if run.dataset == dataset})
    papers = [domain for domain in published_domains(dataset) if domain in columns]
    return papers + [column for column in columns if column not in papers]


def _published(
    setting: str, dataset: str, modalities: Sequence[str], columns: Sequence[str], *, ablations: bool = False
) -> TableRows:
    rows = published_rows(setting, dataset, modalities, columns, ablations=ablations)
    return [[label, *map(Score, figures)] for label, figures in rows]


def joint_tables(runs: Sequence[Run]) -> list[Table]:
    """The paper's layout: per setting one table, datasets side by side, a block of methods per set of modalities.

    Only for settings with several datasets or sets of modalities; with one of each the main table says it all.
    """
    tables = []
    for setting, group in grouped(runs, lambda r: r.setting):
        datasets = sorted({run.dataset for run in group})
        if len(datasets) > 2:
            # Too wide to read: a table each, where a dataset has several sets of modalities.
            for dataset in datasets:
                of_dataset = joint_tables([run for run in group if run.dataset == dataset])
                tables += [replace(table, name=f"{dataset}-{table.name}") for table in of_dataset]
            continue
        sets = sorted({run.modalities for run in group}, key=lambda m: (place_of_set(m), len(m), m))
        if len(datasets) == len(sets) == 1:
            continue
        columns = {dataset: _columns(group, dataset) for dataset in datasets}
        rows: TableRows = []
        for modalities in sets:
            block: TableRows = []
            for method, of_method in by_method([run for run in group if run.modalities == modalities]):
                cells: list[Score] = []
                for dataset in datasets:
                    of_dataset = [run for run in of_method if run.dataset == dataset]
                    cells += [
                        Score.over([run.heads["fused"] for run in of_dataset if run.column == column])
                        for column in columns[dataset]
                    ]
                    cells.append(averages(of_dataset, columns[dataset]))
                block.append([method, *cells])
            block = marked(block)
            published: dict[str, dict[str, list[str | Score]]] = {}
            for dataset in datasets:
                for row in _published(setting, dataset, modalities, columns[dataset]):
                    published.setdefault(str(row[0]), {})[dataset] = row[1:]
            for name, by_dataset in published.items():
                parts = [by_dataset.get(d, [Score(None)] * (len(columns[d]) + 1)) for d in datasets]
                block.append([name, *(cell for part in parts for cell in part)])
            rows += [["+".join(modalities), *row] for row in block]
        header = [f"{d}: {c}" if len(datasets) > 1 else c for d in datasets for c in [*columns[d], "average"]]
        title = f"{' and '.join(datasets)}, {setting}: top-1 accuracy (%) by modalities"
        names = ["modalities", "method", *header]
        tables.append(Table(f"all-{setting}", title, names, rows, _seeds(group), blocks=True))
    return tables


def unrepeated(tables: Sequence[Table]) -> list[Table]:
    """`tables` without those whose rows a joint one (`all-SETTING`, or `DATASET-all-SETTING`) has already."""
    joint = [table for table in tables if table.columns[:2] == ["modalities", "method"] and "all-" in table.name]
    told = [
        (name[:-1] and f"{name[:-1]}, ", setting) for name, _, setting in (t.name.rpartition("all-") for t in joint)
    ]
    return [
        table
        for table in tables
        if table in joint or not any(table.title.startswith(a) and table.name.endswith(f"-{b}") for a, b in told)
    ]


def _seeds(runs: Sequence[Run]) -> str:
    counts = Counter((run.dataset, run.modalities, run.method, run.column) for run in runs).values()
    low, high = min(counts), max(counts)
    count = str(low) if low == high else f"{low} to {high}"
    return "One seed." if high == 1 else f"Mean and standard deviation over {count} seeds."


def per_setting(
    runs: Sequence[Run], suffix: str, title: str, fill: Callable[[list[Run]], tuple[TableRows, Sequence[str], str]]
) -> list[Table]:
    """A table per dataset, modalities and setting; `fill` gives rows (none: no table), columns, note."""
    tables = []
    for (dataset, modalities, setting), group in grouped(runs, lambda r: (r.dataset, r.modalities, r.setting)):
        rows, columns, note = fill(group)
        if rows:
            name = f"{dataset}-{'-'.join(modalities)}-{setting}{suffix}"
            tables.append(Table(name, f"{dataset}, {'+'.join(modalities)}, {setting}: {title}", columns, rows, note))
    return tables


def main_tables(runs: Sequence[Run]) -> list[Table]:
    """One table per dataset, modalities and setting: methods down, targets across, the average, the pretraining.

    Zero-shot rows stand below the methods of the same setting that read their modality, and are never the best; where
    there are no such methods they have a table of their own.
    """
    trained, zero_shot = [run for run in runs if not run.zero_shot], [run for run in runs if run.zero_shot]

    def beside(one: Run, run: Run) -> bool:
        return (one.dataset, one.setting) == (run.dataset, run.setting) and {*one.modalities} <= {*run.modalities}

    def fill(group: list[Run]) -> tuple[TableRows, Sequence[str], str]:
        first = group[0]
        columns = _columns(group, first.dataset)

        def rows_of(some: Sequence[Run]) -> TableRows:
            rows: TableRows = []
            for method, of_method in by_method(some):
                cells = [Score.over([r.heads["fused"] for r in of_method if r.column == column]) for column in columns]
                data = " / ".join(dict.fromkeys(run.pretraining for run in of_method))
                rows.append([method, *cells, averages(of_method, columns), data])
            return rows

        published = _published(first.setting, first.dataset, first.modalities, columns, ablations=True)
        unknown = [[*row, ""] for row in published]
        below = [one for one in zero_shot if beside(one, first) and one.column in columns]
        plain = [run for run in group if not run.zero_shot]
        notes = [_seeds(plain)] if plain else []
        notes += ["Zero-shot rows: nothing was trained on the sources."] if below else []
        header = ["method", *columns, "average", "pretraining"]
        return marked(rows_of(plain)) + rows_of(below) + unknown, header, " ".join(notes)

    alone = [one for one in zero_shot if not any(beside(one, run) for run in trained)]
    return per_setting([*trained, *alone], "", "top-1 accuracy (%)", fill)


def modality_tables(runs: Sequence[Run]) -> list[Table]:
    """One table per dataset, modalities and setting: fused, each modality's own head and in-domain, over targets."""

    def fill(group: list[Run]) -> tuple[TableRows, Sequence[str], str]:
        columns, heads = sorted({run.column for run in group}), ("fused", *group[0].modalities)
        rows: TableRows = []
        for method, of_method in by_method(group):
            tested = [run for run in of_method if run.in_domain is not None]
            cells = [averages(of_method, columns, head) for head in heads]
            rows.append([method, *cells, averages(tested, columns, "in-domain")])
        note = "In-domain is the fused accuracy on the source domains' test split."
        return marked(rows), ["method", *heads, "in-domain"], note

    return per_setting(runs, "-modalities", "by head, average over targets (%)", fill)


def sealed_tables(runs: Sequence[Run]) -> list[Table]:
    """Accuracy on the sources' held-out clips, of runs whose targets are sealed: all that may be known of them."""

    def fill(group: list[Run]) -> tuple[TableRows, Sequence[str], str]:
        columns = _columns(group, group[0].dataset)
        rows: TableRows = []
        for method, of_method in by_method(group):
            by_target = [[run.in_domain for run in of_method if run.column == column] for column in columns]
            rows.append([method, *map(Score.over, by_target), averages(of_method, columns, "in-domain")])
        note = "The targets are sealed: `mbcd reveal` opens them, and writes the look into the ledger beside the runs."
        return marked(rows), ["method", *(f"without {c}" for c in columns), "average"], f"{_seeds(group)} {note}"

    return per_setting(runs, "-sealed", "top-1 accuracy (%) on held-out clips of the sources", fill)


def adapted_tables(
    runs: Sequence[Run], found: Mapping[Path, Mapping[str, Mapping[str, float]]], *, rule: str, mark: str
) -> list[Table]:
    """Runs adapted at test time: per method the unadapted row and those of `rule`, over targets.

    Args:
        found: run folder -> row -> head -> top-1 (0 to 1); the unadapted row first.
        mark: a sentence on what they use, for the note.
    """

    def fill(group: list[Run]) -> tuple[TableRows, Sequence[str], str]:
        columns = _columns(group, group[0].dataset)
        rows: TableRows = []
        for method, of_method in by_method(group):
            plain, *others = found[of_method[0].path]
            for row in (plain, *others):
                heads = {r.path: {head: 100 * value for head, value in found[r.path][row].items()} for r in of_method}
                given = [replace(r, heads=heads[r.path]) for r in of_method]
                gained = [replace(r, heads={"fused": heads[r.path]["fused"] - r.heads["fused"]}) for r in of_method]
                cells = [Score.over([r.heads["fused"] for r in given if r.column == column]) for column in columns]
                last = "" if row == plain else averages(gained, columns)
                rows.append([method, row, *cells, averages(given, columns), last])
        return rows, ["method", "prediction", *columns, "average", "against unadapted"], f"{_seeds(group)} {mark}"

    title = f"adapted by {rule.upper()}, top-1 accuracy (%)"
    return [replace(table, blocks=True) for table in per_setting(runs, f"-{rule}", title, fill)]
