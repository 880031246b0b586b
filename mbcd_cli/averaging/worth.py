"""What averages are worth, over targets and seeds: rows of a table and of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbcd_cli.evaluation.claims import Difference
from mbcd_cli.evaluation.report.tables import Score, Table
from mbcd_cli.paper.rows import order_methods

TRAINED = "as trained"
"""What a run deploys without any of this: the teacher of the best epoch, or the student where there is none."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What one average is worth; accuracies in percent, loss increases in nats.

    Attributes:
        seed: None of a soup.
        target: top-1 on the target. source: on the sources' held-out clips.
        increase: mean loss increase at the largest of `landscape.radii`. worst: the largest that ascent finds at the
            smallest but 0.
        distance: L1 distance of a profile.
    """

    average: str
    method: str
    domain: str
    seed: int | None
    target: float
    source: float
    increase: float
    worst: float
    distance: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """An average of one method, over targets and seeds.

    Attributes:
        gain: points over `TRAINED` on the target; None of that itself.
        distance: mean L1 distance of profiles, None of others.
    """

    method: str
    average: str
    target: Score
    gain: Difference | None
    source: Score
    increase: Score
    worst: Score
    distance: float | None


def summarised(found: Sequence[Worth]) -> list[Summary]:
    """Every average of every method, in the order of tables."""
    rows = []
    for method in order_methods(one.method for one in found):
        of_method = [one for one in found if one.method == method]
        for average in dict.fromkeys(one.average for one in of_method):
            of_average = [one for one in of_method if one.average == average]
            met = [one.distance for one in of_average if one.distance is not None]
            rows.append(
                Summary(
                    method,
                    average,
                    Score.over([one.target for one in of_average]),
                    gain(of_method, average),
                    Score.over([one.source for one in of_average]),
                    Score.over([one.increase for one in of_average]),
                    Score.over([one.worst for one in of_average]),
                    float(np.mean(met)) if met else None,
                )
            )
    return rows


def gain(of_method: Sequence[Worth], average: str) -> Difference | None:
    """Points of an average over `TRAINED` on the target: of every seed the mean over targets, then over seeds.

    None of `TRAINED` itself. A soup is compared with the mean of its runs; of one value a target, as of one seed,
    or of seeds that gain the same, there is no interval (freedom 0).
    """
    trained = [one for one in of_method if one.average == TRAINED]
    by_seed: dict[int | None, list[float]] = {}
    for one in of_method:
        if one.average == average:
            alike = [other.target for other in trained if other.domain == one.domain and one.seed in (None, other.seed)]
            by_seed.setdefault(one.seed, []).append(one.target - float(np.mean(alike)))
    means = [float(np.mean(values)) for values in by_seed.values()]
    if average == TRAINED or not means:
        return None
    if len(means) < 2 or np.ptp(means) < 1e-9:
        return Difference(means[0], 0.0, 0)
    return Difference(float(np.mean(means)), float(np.var(means, ddof=1)) / len(means), len(means) - 1)


def study_table(rows: Sequence[Summary]) -> Table:
    """All of them."""
    columns = ["method", "average", "target (%)", "against as trained", "source (%)", "increase", "worst", "L1"]
    note = (
        "Mean and standard deviation over targets and seeds; source: held-out clips of the sources. Against as "
        "trained: points on the target, with the 95 % interval over seeds (of each, the mean over targets). Increase: "
        "mean loss increase at the largest radius; worst: by ascent at the smallest. L1: distance of the profile."
    )
    cells: list[list[str | Score]] = []
    for row in rows:
        flat = [row.increase.text(digits=3), row.worst.text(digits=1)]
        met = "" if row.distance is None else f"{row.distance:.3f}"
        cells.append([row.method, row.average, row.target, _text(row.gain), row.source, *flat, met])
    return Table("study", "Averages after the fact", columns, cells, note, blocks=True)


def _text(told: Difference | None) -> str:
    if told is None:
        return ""
    if not told.freedom:
        return f"{told.value:+.2f}"
    low, high = told.interval()
    return f"{told.value:+.2f} ({low:+.2f} to {high:+.2f})"
