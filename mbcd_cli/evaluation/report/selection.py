"""Which of a training's epochs each rule of selection would have deployed, and what that costs against the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbcd_cli.evaluation.report.evaluated import Run, by_method
from mbcd_cli.evaluation.report.score_tables import per_setting
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.files import write_rows
from mbcd_cli.runs.folder import epoch_records
from mbcd_cli.scoring.deployed import deployed_of
from mbcd_cli.scoring.history import fused_accuracy

ORACLE = "oracle"
RULES = {
    "source validation": "the best on held-out clips of the sources: what is deployed",
    "leave one source out": "the epoch that is best, on average, on each source when it is the unseen one",
    "last": "the last epoch",
    "agreement": "heads agree on most of the target's clips (no labels)",
    "confidence": "most of the target's clips are above the confidence that matches source accuracy (no labels)",
    ORACLE: "the best on the target: never a result",
}
"""Rule of selection -> what it chooses."""


@dataclass(frozen=True, slots=True)
class Selected:
    """What a rule would have deployed of a run: the epoch, its target accuracy (%), points below the oracle's."""

    run: Run
    rule: str
    epoch: int
    accuracy: float
    regret: float


def selected(runs: Sequence[Run], left_out: Mapping[Path, Sequence[Run]] | None = None) -> list[Selected]:
    """Every rule on every run whose target is open and that has records of its epochs.

    Args:
        left_out: run folder -> trainings without each of its sources, each tested on that one.

    Raises:
        FileError: records that cannot be read.
    """
    found = []
    for run in runs:
        records = epoch_records(run.path)
        accuracy = _of_target(records)
        if not accuracy:
            continue
        epochs = {"source validation": int(records[-1]["best_epoch"]), "last": max(accuracy)}
        for rule in ("agreement", "confidence"):
            told = {r["epoch"]: r["unlabelled"][rule] for r in records if r.get("unlabelled")}
            if told.keys() == accuracy.keys():
                epochs[rule] = best_epoch(told)
        if others := [_of_target(epoch_records(other.path)) for other in (left_out or {}).get(run.path, ())]:
            common = accuracy.keys() & set.intersection(*map(set, others))
            if common:
                epochs["leave one source out"] = best_epoch(
                    {epoch: sum(other[epoch] for other in others) for epoch in sorted(common)}
                )
        epochs[ORACLE] = best_epoch(accuracy)
        best = accuracy[epochs[ORACLE]]
        found += [
            Selected(run, rule, epochs[rule], 100 * accuracy[epochs[rule]], 100 * (best - accuracy[epochs[rule]]))
            for rule in RULES
            if rule in epochs
        ]
    return found


def best_epoch(values: Mapping[int, float]) -> int:
    """The first epoch of those with the largest value."""
    return max(values, key=lambda epoch: (values[epoch], -epoch))


def _of_target(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Epoch -> accuracy (0 to 1) of the deployed model on the target, where all epochs have one."""
    told = {r["epoch"]: fused_accuracy(r, "target", deployed_of(r.get("target") or ())) for r in records}
    return {} if None in told.values() else told


def selection_tables(found: Sequence[Selected]) -> list[Table]:
    """Per dataset, modalities and setting: the rules' accuracies and regrets, and every method's regrets by rule."""
    by_run: dict[Path, list[Selected]] = {}
    for one in found:
        by_run.setdefault(one.run.path, []).append(one)
    runs = [each[0].run for each in by_run.values()]

    def rules_of(group: Sequence[Run]) -> dict[str, list[Selected]]:
        told: dict[str, list[Selected]] = {rule: [] for rule in RULES}
        for run in group:
            for one in by_run[run.path]:
                told[one.rule].append(one)
        return {rule: each for rule, each in told.items() if each}

    def by_rule(group: list[Run]) -> tuple[list[list[str | Score]], Sequence[str], str]:
        columns = sorted({run.column for run in group})
        rows: list[list[str | Score]] = []
        for rule, each in rules_of(group).items():
            regrets = [Score.over([one.regret for one in each if one.run.column == column]) for column in columns]
            accuracy = Score(Score.over([one.accuracy for one in each]).value)
            rows.append([rule, accuracy, *regrets, Score.over([one.regret for one in each])])
        note = "Regret: points below the oracle. Mean and standard deviation over methods and seeds. " + "; ".join(
            f"{rule}: {what}" for rule, what in RULES.items() if any(row[0] == rule for row in rows)
        )
        return rows, ["rule", "top-1 (%)", *columns, "regret"], f"{note}."

    def by_method_and_rule(group: list[Run]) -> tuple[list[list[str | Score]], Sequence[str], str]:
        rules = [rule for rule in rules_of(group) if rule != ORACLE]
        rows: list[list[str | Score]] = []
        for method, of_method in by_method(group):
            told = rules_of(of_method)
            rows.append([method, *(Score.over([one.regret for one in told.get(rule, ())]) for rule in rules)])
        return rows, ["method", *rules], "Mean and standard deviation over targets and seeds."

    return [
        *per_setting(runs, "-selection", "what each rule of selection would have deployed; regret by target", by_rule),
        *per_setting(runs, "-regret", "regret of each rule of selection, by method", by_method_and_rule),
    ]


def write_selection(found: Sequence[Selected], path: Path) -> Path:
    """All of it as a CSV: a line per run and rule."""
    return write_rows(
        path,
        (
            {
                "run": str(one.run.path),
                "method": one.run.method,
                "target": one.run.column,
                "seed": one.run.seed,
                "rule": one.rule,
                "epoch": one.epoch,
                "top-1 (%)": round(one.accuracy, 4),
                "regret (points)": round(one.regret, 4),
            }
            for one in found
        ),
    )
