"""Several runs: grouped by dataset, modalities, sources and method; mean and spread over seeds; what can be claimed.

All figures in tables are top-1 in percent, of each run's deployed model.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from mbcd_cli import checksums
from mbcd_cli.errors import FOREIGN, RunError
from mbcd_cli.evaluation.claims import (
    ALPHA,
    DOMAINS,
    RECORDINGS,
    SEEDS,
    Difference,
    TargetOutcomes,
    critical_difference,
    holm,
    in_new_domains,
    method_difference,
)
from mbcd_cli.evaluation.report.export import Outcomes, read_outcomes
from mbcd_cli.evaluation.report.results import RESULTS_FORMAT, read_results
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.paper.published import published_domains
from mbcd_cli.paper.rows import place_of_set, published_rows
from mbcd_cli.resolved import PUBLISHED
from mbcd_cli.runs.names import run_checkpoints
from mbcd_cli.scoring.clip_sets import TARGET
from mbcd_cli.scoring.deployed import deployed_checkpoint

_VARIED = ("training.seed", "training.target_domain", "training.source_domains", "dataset.target_split")
"""Settings in which the runs of one method and table may differ."""

Key = TypeVar("Key", bound=Hashable)
TableRows = list[list[str | Score]]


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluated run.

    Attributes:
        target: unseen domain, or None (trained and tested in-domain).
        sources: domains seen in training.
        domains: all domains of the run, sources and target.
        heads: head -> top-1 (%) on the target, or in-domain without one; empty while the target is sealed.
        in_domain: fused top-1 (%) on the sources' test split, None when not measured.
        provenance: versions, weights and caches behind the figures: what -> value.
        settings: what the weights depend on, dotted name -> value, and the cache of every modality.
    """

    path: Path
    dataset: str
    modalities: tuple[str, ...]
    method: str
    target: str | None
    sources: tuple[str, ...]
    seed: int
    heads: Mapping[str, float]
    in_domain: float | None
    provenance: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        """Whether its target was not looked at yet."""
        return not self.heads

    @property
    def setting(self) -> str:
        """multi-source, single-source or in-domain."""
        if self.target is None:
            return "in-domain"
        return "single-source" if len(self.sources) == 1 else "multi-source"

    @property
    def column(self) -> str:
        """Where it belongs in a table: the target, or `source -> target`."""
        if self.target is None:
            return "+".join(self.sources)
        return f"{self.sources[0]} to {self.target}" if self.setting == "single-source" else self.target


def find_runs(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Run folders under the patterns (`runs/**` and the like): those with results.json, and those without.

    Raises:
        RunError: no run at all.
    """
    patterns = list(patterns)
    folders = sorted({Path(name) for pattern in patterns for name in glob(pattern, recursive=True)})  # noqa: PTH207
    folders = [f.parent if f.name in ("results.json", "settings.toml") else f for f in folders]
    # What was made of another checkpoint lies inside a run, and is none.
    folders = sorted(f for f in set(folders) if not any((above / "settings.toml").is_file() for above in f.parents))
    done = [f for f in folders if (f / "results.json").is_file()]
    waiting = [f for f in folders if f not in done and (f / "settings.toml").is_file()]
    if not done and not waiting:
        raise RunError(
            f"There is no run at {', '.join(patterns)}.", "Name run folders, or quote a pattern: --runs 'runs/**'."
        )
    return done, waiting


def load_run(folder: Path) -> Run:
    """The run whose results.json lies in `folder`.

    Raises:
        RunError: it cannot be read, or comes from another version.
    """
    results = read_results(folder / "results.json")
    try:
        if results["format"] != RESULTS_FORMAT:
            raise RunError(
                f"{folder / 'results.json'} has format {results['format']}, this mbcd reads {RESULTS_FORMAT}.",
                "Evaluate that run again.",
            )
        headline = results["headline"]
        _check_current(folder, headline["checkpoint"], results.get("checkpoints", {}))
        sealed = results["target_domain"] is not None and headline["clips"] != TARGET
        in_domain = results["models"][headline["checkpoint"]][headline["model"]].get("source")
        return Run(
            path=folder,
            dataset=str(results["dataset"]),
            modalities=_texts(results["modalities"]),
            method=str(results["method"]),
            target=None if results["target_domain"] is None else str(results["target_domain"]),
            sources=_texts(results["source_domains"]),
            seed=int(results["seed"]),
            heads={} if sealed else {head: 100 * float(value) for head, value in headline["top1"].items()},
            in_domain=None if in_domain is None else 100 * float(in_domain["fused"]["top1"]),
            provenance=_named_texts(results.get("provenance", {})) | {"checkpoint": headline["checkpoint"]},
            settings=_named_texts(
                {**results["settings"], **{f"{m} cache": f for m, f in results["fingerprints"].items()}}
            ),
        )
    except FOREIGN as error:
        raise RunError(
            f"{folder / 'results.json'} is no evaluation of ours ({type(error).__name__}: {error}).",
            "Evaluate that run again.",
        ) from error


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of names is none")
    return tuple(values)


def _named_texts(values: Mapping[str, object]) -> dict[str, str]:
    _texts(list(values.values()))
    return dict(values)


def _check_current(folder: Path, told: str, sums: Mapping[str, str]) -> None:
    """Refuse results of other weights than those that the run deploys now.

    Args:
        told: the checkpoint that they call deployed. sums: checksum of every checkpoint then.

    Raises:
        RunError: they are such; or the run's checkpoint is damaged.
    """
    try:
        files = run_checkpoints(folder)
    except RunError:
        return  # results that were copied, or written elsewhere, without the run
    wanted = deployed_checkpoint(files)
    try:
        now = checksums.checksum(files[wanted])
    except (OSError, checksums.DamagedError) as error:
        raise RunError(f"{files[wanted]} cannot be read: {error}.", "`mbcd verify` says what is damaged.") from error
    if told != wanted or sums.get(wanted) != now:
        raise RunError(
            f"{folder / 'results.json'} is of other weights than the run's {wanted} ones now.",
            f"Run `mbcd evaluate --run {shlex.quote(str(folder))}` again.",
        )


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """`runs`; where those of one method have other settings or caches, what differs stands in the method's name."""
    out: list[Run] = []
    for _, group in _grouped(runs, lambda r: (r.dataset, r.modalities, r.setting, r.method)):
        keys = dict.fromkeys(key for run in group for key in run.settings if key not in _VARIED)
        differ = [key for key in keys if len({run.settings.get(key) for run in group}) > 1]
        for run in group:
            words = ", ".join(f"{key.rpartition('.')[2]} {run.settings.get(key, 'unset')}" for key in differ)
            out.append(replace(run, method=f"{run.method} ({words})") if words else run)
    return sorted(out, key=lambda run: run.path)


def distinct(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """`runs` without those that repeat another's dataset, modalities, method, domains and seed; and warnings."""
    seen: dict[tuple, Run] = {}
    warnings = []
    for run in runs:
        key = (run.dataset, run.modalities, run.method, run.target, tuple(sorted(run.sources)), run.seed)
        if key in seen:
            warnings.append(f"{run.path} repeats {seen[key].path} (same method, domains and seed): left out.")
        else:
            seen[key] = run
    return list(seen.values()), warnings


def order_methods(methods: Iterable[str]) -> list[str]:
    """ERM first, then the weight average, then the others by name, MBCD last, whatever their chassis."""
    first, last = {"erm": 0, "ema": 1}, {"mbcd": 1}

    def place(method: str) -> tuple[int, int, str]:
        plain = method.removesuffix(PUBLISHED)
        return last.get(plain, 0), first.get(plain, 2), method

    return sorted(set(methods), key=place)


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
    for setting, group in _grouped(runs, lambda r: r.setting):
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
    for (dataset, modalities, setting), group in _grouped(runs, lambda r: (r.dataset, r.modalities, r.setting)):
        rows, columns, note = fill(group)
        if rows:
            name = f"{dataset}-{'-'.join(modalities)}-{setting}{suffix}"
            tables.append(Table(name, f"{dataset}, {'+'.join(modalities)}, {setting}: {title}", columns, rows, note))
    return tables


def main_tables(runs: Sequence[Run]) -> list[Table]:
    """One table per dataset, modalities and setting: methods down, targets across, the average last."""

    def fill(group: list[Run]) -> tuple[TableRows, Sequence[str], str]:
        first = group[0]
        columns = _columns(group, first.dataset)
        rows: TableRows = []
        for method, of_method in by_method(group):
            cells = [Score.over([r.heads["fused"] for r in of_method if r.column == column]) for column in columns]
            rows.append([method, *cells, averages(of_method, columns)])
        published = _published(first.setting, first.dataset, first.modalities, columns, ablations=True)
        return marked(rows) + published, ["method", *columns, "average"], _seeds(group)

    return per_setting(runs, "", "top-1 accuracy (%)", fill)


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


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


Tested = Mapping[tuple[str, int], Outcomes]
"""Column of the table and seed -> outcomes, of one method's runs."""


def outcomes_of(runs: Sequence[Run]) -> tuple[Tested, str]:
    """Of one method's runs; and why some have none, if so."""
    found, why = {}, ""
    for run in runs:
        try:
            found[run.column, run.seed] = read_outcomes(run.path)
        except RunError as error:
            why = str(error)
    return found, why


def _paired(first: Tested, second: Tested) -> tuple[dict[str, TargetOutcomes], str]:
    """Column -> how the second differs from the first with every seed that both have everywhere; and why nothing can be
    said for sure, if so."""
    common = first.keys() & second.keys()
    columns = sorted({column for column, _ in common})
    seeds = [
        seed for seed in sorted({seed for _, seed in common}) if all((column, seed) in common for column in columns)
    ]
    if not seeds:
        return {}, "no seed of both"
    if any(len({held[column, seed].digest for held in (first, second) for seed in seeds}) > 1 for column in columns):
        return {}, "tested on different clips"
    targets = {}
    for column in columns:
        right = [np.stack([held[column, seed].correct for seed in seeds]).astype(np.int8) for held in (first, second)]
        targets[column] = TargetOutcomes(right[1] - right[0], first[column, seeds[0]].recordings)
    if len(seeds) < SEEDS:
        return targets, f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    few = {column: count for column, target in targets.items() if (count := target.groups) < RECORDINGS}
    return targets, "; ".join(f"{count} recordings of {column}" for column, count in few.items())


def claim_tables(runs: Sequence[Run]) -> list[Table]:
    """Every two methods on the targets and seeds that both have, as `evaluation.claims` has it."""

    def fill(group: list[Run]) -> tuple[TableRows, Sequence[str], str]:
        outcomes = {method: outcomes_of(of_method) for method, of_method in by_method(group)}
        pairs = {
            (first, second): _paired(outcomes[first][0], outcomes[second][0])
            for first, second in combinations(outcomes, 2)
        }
        told = {pair: method_difference([*targets.values()]) for pair, (targets, why) in pairs.items() if not why}
        corrected = dict(zip(told, holm([claim.p for claim in told.values()]), strict=True))
        rows: TableRows = []
        for pair, (targets, why) in pairs.items():
            row = [f"{pair[1]} - {pair[0]}"]
            if why:
                points = 100 * np.mean([target.differences.mean() for target in targets.values()]) if targets else None
                row += ["-" if points is None else f"{points:+.2f}", *["-"] * 6, f"cannot be told: {why}"]
            else:
                claim, p = told[pair], corrected[pair]
                new = _interval(in_new_domains([*targets.values()])) if len(targets) >= DOMAINS else "-"
                better = f"{pair[claim.value > 0]} is better" if p < ALPHA else "not told apart"
                row += [f"{100 * claim.value:+.2f}", _interval(claim), f"{100 * claim.probability:.1f} %"]
                row += [_p_text(claim.p), _p_text(p), f"{100 * claim.smallest(ALPHA / len(told)):.1f}", new, better]
            rows.append(row)
        if not rows:
            return [], (), ""
        columns = ["methods", "points", "95 %", "P", "p", "Holm", "least seen", "new domains", "verdict"]
        return rows, columns, _claims_note(pairs.values(), {why: None for _, why in outcomes.values() if why})

    return per_setting(runs, "-claims", "differences of top-1, and what can be claimed", fill)


def _interval(claim: Difference) -> str:
    return " to ".join(f"{100 * end:+.1f}" for end in claim.interval())


def _claims_note(pairs: Iterable[tuple[dict[str, TargetOutcomes], str]], lacking: Iterable[str]) -> str:
    """What the columns mean, and of what clips, recordings and seeds they are."""
    sets = {column: target for targets, _ in pairs for column, target in targets.items()}
    counts = [f"{column} {target.clips} clips of {target.groups} recordings" for column, target in sets.items()]
    alone = all(target.groups == target.clips for target in sets.values())
    return " ".join(
        [
            "The first minus the second, with the interval over seeds, recordings and their clips. P: that the first "
            "is better. Holm: p corrected for all pairs of the table, by which the verdict goes (5 %). Least seen: the "
            "smallest true difference in points that such a study finds with 80 % probability. New domains: the "
            "interval if these targets are a sample of many.",
            f"Tested on {'; '.join(counts)}{' (each clip is one by itself)' * alone}." if counts else "",
            *lacking,
        ]
    )


BLOCKS = 6
"""Fewer blocks than these give no ranking: its test takes their number to be large."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Mean ranks (1 is best) of methods over blocks, a block being a target and a seed with which all were trained.

    Attributes:
        p: that all are equal (Friedman). critical: Nemenyi's critical difference of two mean ranks.
    """

    name: str
    title: str
    ranks: dict[str, float]
    blocks: int
    p: float
    critical: float


def rankings(runs: Sequence[Run]) -> list[Ranking]:
    """One per dataset, modalities and setting with three methods and `BLOCKS` blocks at least.

    Blocks of one target share their clips, so they are less than independent: the ranking orders, the table of claims
    tells apart.
    """
    from scipy.stats import friedmanchisquare, rankdata

    found = []
    for (dataset, modalities, setting), group in _grouped(runs, lambda r: (r.dataset, r.modalities, r.setting)):
        values = {m: {(r.column, r.seed): r.heads["fused"] for r in of_method} for m, of_method in by_method(group)}
        blocks = sorted(set.intersection(*({*of_method} for of_method in values.values())))
        if len(values) < 3 or len(blocks) < BLOCKS:
            continue
        table = np.array([[of_method[block] for block in blocks] for of_method in values.values()])
        if (table == table[0]).all():
            continue
        ranks = rankdata(-table.round(9), axis=0).mean(axis=1)
        name = f"{dataset}-{'-'.join(modalities)}-{setting}-ranks"
        title = f"{dataset}, {'+'.join(modalities)}, {setting}: mean rank over {len(blocks)} targets x seeds"
        p, critical = friedmanchisquare(*table).pvalue, critical_difference(len(values), len(blocks))
        of_methods = dict(zip(values, ranks.tolist(), strict=True))
        found.append(Ranking(name, title, of_methods, len(blocks), float(p), critical))
    return found


def by_method(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs of each method, in the order of tables."""
    return [(method, [r for r in runs if r.method == method]) for method in order_methods(r.method for r in runs)]


def _grouped(runs: Sequence[Run], key: Callable[[Run], Key]) -> list[tuple[Key, list[Run]]]:
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return sorted(groups.items())


def compare(runs: Sequence[Run]) -> list[Table]:
    """Every table that `runs` give."""
    runs, sealed = [run for run in runs if not run.sealed], [run for run in runs if run.sealed]
    tables = [*joint_tables(runs), *main_tables(runs), *modality_tables(runs), *claim_tables(runs)]
    return [*tables, *sealed_tables(sealed)]


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
