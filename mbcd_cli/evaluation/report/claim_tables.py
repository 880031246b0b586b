"""What can be claimed of two methods, and how methods rank: tables over evaluated runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mbcd_cli.errors import RunError
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
from mbcd_cli.evaluation.report.evaluated import Run, by_method, grouped
from mbcd_cli.evaluation.report.export import Outcomes, read_outcomes
from mbcd_cli.evaluation.report.score_tables import TableRows, per_setting
from mbcd_cli.evaluation.report.tables import Table


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
        trained = {method: {(run.column, run.seed) for run in of_method} for method, of_method in by_method(group)}
        possible = [*combinations(outcomes, 2)]
        pairs = {
            (first, second): _paired(outcomes[first][0], outcomes[second][0])
            for first, second in possible
            if trained[first] & trained[second]
        }
        told = {pair: method_difference([*targets.values()]) for pair, (targets, why) in pairs.items() if not why}
        corrected = dict(zip(told, holm([claim.p_among(len(told)) for claim in told.values()]), strict=True))
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
                least = f"{100 * claim.smallest(ALPHA / len(told)):.1f}" if claim.variance else "-"
                row += [_p_text(claim.p), _p_text(p), least, new, better]
            rows.append(row)
        if not rows:
            return [], (), ""
        columns = ["methods", "points", "95 %", "P", "p", "Holm", "least seen", "new domains", "verdict"]
        lacking = {why: None for _, why in outcomes.values() if why}
        if apart := len(possible) - len(pairs):
            lacking[f"{apart} other pair{'s' * (apart > 1)} of rows have no target and seed in common."] = None
        return rows, columns, _claims_note(pairs.values(), lacking)

    return per_setting(runs, "-claims", "differences of top-1, and what can be claimed", fill)


def _interval(claim: Difference) -> str:
    if not claim.variance:  # both get the same clips right: that is no proof that they always do
        return "-"
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
    for (dataset, modalities, setting), group in grouped(runs, lambda r: (r.dataset, r.modalities, r.setting)):
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
