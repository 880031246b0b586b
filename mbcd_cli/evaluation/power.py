"""`mbcd power`: before anything is trained, the smallest difference between two methods that test sets and seeds show.

Letters: T targets, S seeds, K comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np

from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.modalities import asked_modalities
from mbcd_cli.data.prepared import check_domains
from mbcd_cli.data.readers import NoMediaError, read_dataset
from mbcd_cli.data.records import SPLITS
from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.evaluation.claims import (
    ALPHA,
    MOST,
    RECORDINGS,
    SEEDS,
    correlation_within,
    recordings_variance,
    smallest_difference,
    variance_of,
)
from mbcd_cli.evaluation.report.claim_tables import Tested, outcomes_of
from mbcd_cli.evaluation.report.evaluated import by_method, find_runs, load_run, told_apart
from mbcd_cli.settings import Settings

COUNTS = (1, 3, 5, 10, 100)
"""Numbers of seeds that are told about."""
NEAR = 1.1
"""Times the smallest difference of endless seeds: what more seeds would add to that is not worth them."""
_NONE = 5e-4
"""A difference that is written as 0.0 points."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the power of a study depends on besides its clips, recordings, targets and seeds; shares from 0 to 1.

    Attributes:
        agreement: of the clips that runs of two methods both get right or both get wrong.
        seed_agreement: the same of two runs of one method with different seeds.
        seed_spread: standard deviation over seeds of one method's accuracy on a target.
        icc: intraclass correlation, within a recording, of how much better one method is on a clip.
    """

    agreement: float
    seed_agreement: float
    seed_spread: float
    icc: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if not 0 <= value <= 1:
                raise SettingsError(f"{flag} {value:g} is no share.", "Give a number from 0 to 1.")
        if self.seed_agreement < self.agreement:
            raise SettingsError(
                f"Two seeds of one method agree on {self.seed_agreement:.1%} of the clips, less than two methods "
                f"({self.agreement:.1%}).",
                "Give an --agreement that is at most --seed-agreement.",
            )


@dataclass(frozen=True, slots=True)
class TargetPower:
    """One target, or the average over all.

    Attributes:
        recordings: of its clips. effective: independent clips that would tell as much.
        smallest: seeds -> smallest detectable difference (0 to 1); None where no interval holds.
    """

    target: str
    clips: int
    recordings: int
    effective: float
    smallest: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Power:
    """What `power` returns.

    Attributes:
        basis: where the assumptions come from, in words. comparisons: K, of which each is tested at `ALPHA` / K.
        targets: and last, where there are several, their average.
        verdict: whether seeds help or the test sets are the limit.
    """

    dataset: str
    assumptions: Assumptions
    basis: str
    comparisons: int
    targets: list[TargetPower]
    verdict: str


def power(
    settings: Settings,
    *,
    targets: Sequence[str],
    seeds: int,
    methods: int,
    runs: Sequence[str],
    assumed: dict[str, float | None],
    accuracy: float,
) -> Power:
    """The smallest difference that a study finds with 80 % probability, by its number of seeds.

    Args:
        settings: name a dataset; with `dataset.root` its tables are read, else its cache's index.
        targets: empty means all domains.
        seeds: of the study, 1 at least; it is told of others too.
        methods: to be compared with each other.
        runs: patterns of evaluated runs that assumptions are measured on.
        assumed: fields of `Assumptions` that are given; what is None is measured, or else follows from `accuracy`.

    Raises:
        SettingsError: domains that there are not, or assumptions that cannot be. CacheError, ManifestError: the dataset
            cannot be read. RunError: `runs` are none that tell anything.
    """
    if methods < 2:
        raise SettingsError(f"--methods {methods}: there is nothing to compare.", "Give 2 or more.")
    chance = 2 * accuracy * (1 - accuracy)  # that two independent runs of that accuracy differ on a clip
    values: dict[str, float] = {
        "agreement": 1 - chance / 2,
        "seed_agreement": 1 - 0.4 * chance,
        "seed_spread": 0.015,
        "icc": 0.02,
    }
    basis = f"assumed for an accuracy of {100 * accuracy:.0f} %"
    if runs:
        measured = measured_assumptions(runs)
        values |= measured
        basis = f"measured on runs: {_listed(measured)}; the others assumed"
    given = {key: value for key, value in assumed.items() if value is not None}
    if given:
        basis += f"; given: {_listed(given)}"
    assumptions, comparisons = Assumptions(**{**values, **given}), methods * (methods - 1) // 2
    name, sizes = _recordings(settings, targets)
    counts = sorted({*COUNTS, seeds})
    rows = [_of_targets(target, [held], assumptions, counts, comparisons) for target, held in sizes.items()]
    if len(sizes) > 1:
        rows.append(_of_targets("average", [*sizes.values()], assumptions, counts, comparisons))
    return Power(name, assumptions, basis, comparisons, rows, _verdict(rows[-1], seeds))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names).replace("_", " ")


def _recordings(settings: Settings, targets: Sequence[str]) -> tuple[str, dict[str, np.ndarray]]:
    """The dataset's name, and of every target the clips of each recording that are tested."""
    splits = ("test",) if settings.dataset.target_split == "test" else SPLITS
    if settings.dataset.root is None:
        dataset = open_dataset(settings, name=str(settings.dataset.name), modalities=settings.model.modalities)
        name, domains = dataset.name, tuple(dataset.domains)
        recordings = dataset.clips.recordings

        def chosen(target: str) -> np.ndarray:
            return dataset.select(domains=[target], splits=splits)
    else:
        try:
            listing = read_dataset(settings.dataset, asked_modalities(settings))
        except NoMediaError as error:
            listing = error.listing
        clips, name, domains = listing.clips, listing.name, listing.domains
        recordings = clips.recordings

        def chosen(target: str) -> np.ndarray:
            in_splits = np.isin(clips.splits, [SPLITS.index(split) for split in splits])
            number = clips.domain_names.index(target) if target in clips.domain_names else -1
            return np.flatnonzero((clips.domains == number) & in_splits)

    check_domains(name, domains, targets)
    sizes = {
        target: np.unique(recordings[chosen(target)], return_counts=True)[1]
        for target in dict.fromkeys(targets or domains)
    }
    if empty := [target for target, held in sizes.items() if not len(held)]:
        raise SettingsError(
            f"The target {empty[0]!r} has no clips of the {' or '.join(splits)} split.",
            "Choose other --targets, or test all clips: --set dataset.target_split=all.",
        )
    return name, sizes


def _of_targets(
    name: str, sizes: Sequence[np.ndarray], assumed: Assumptions, seeds: Sequence[int], comparisons: int
) -> TargetPower:
    """The average over targets, by the clips of each recording of each."""
    whole, _, freedoms = zip(*(recordings_variance(held, assumed.icc) for held in sizes), strict=True)
    lasting, fleeting = assumed.seed_agreement - assumed.agreement, 1 - assumed.seed_agreement
    scale = len(sizes) ** -2

    def smallest(count: float) -> float | None:
        if count < SEEDS or min(map(len, sizes)) < RECORDINGS:
            return None
        between = [scale * (lasting + fleeting / count) * one for one in whole]
        mixed = scale * sum(whole) * fleeting / count
        of_seeds = max(2 * assumed.seed_spread**2 / len(sizes) / count, mixed)
        total, freedom = variance_of(between, freedoms, mixed, of_seeds, min(count - 1, MOST))
        return smallest_difference(total, freedom, ALPHA / comparisons)

    found = {f"{count:g}": smallest(count) for count in (*seeds, float("inf"))}
    clips, recordings = (sum(map(count, sizes)) for count in (np.sum, len))
    return TargetPower(name, int(clips), recordings, float(1 / (scale * sum(whole))), found)


def _verdict(last: TargetPower, seeds: int) -> str:
    limit = last.smallest["inf"]
    if limit is None:
        return f"Nothing can be told of fewer than {RECORDINGS} recordings of a target, however many seeds there are."
    told = {int(count): value for count, value in last.smallest.items() if value is not None and count != "inf"}
    enough = next((count for count, value in told.items() if value <= NEAR * limit), None)
    now = (
        f"{100 * told[seeds]:.1f} points with {seeds} seeds"
        if seeds in told
        else f"No claim with fewer than {SEEDS} seeds"
    )
    if enough is not None and enough <= seeds:
        return f"{now}: more would hardly help, the test set is the limit ({100 * limit:.1f} points)."
    until = f"until the test set is the limit ({100 * limit:.1f} points)"
    if limit < _NONE:
        until = "and the test set sets no limit: two methods agree on its clips as often as two seeds of one"
    more = {count: value for count, value in told.items() if seeds < count <= (enough or count)}
    helped = ", ".join(f"{100 * value:.1f} with {count}" for count, value in more.items())
    return f"{now}, {helped}: more seeds help, {until}."


def measured_assumptions(patterns: Sequence[str]) -> dict[str, float]:
    """`Assumptions`, as far as evaluated runs tell: means over all pairs of runs on one target.

    Raises:
        RunError: no two methods with two seeds each on one target.
    """
    runs = [run for run in told_apart([load_run(f) for f in find_runs(patterns)[0]])[0] if not run.sealed]
    found: dict[str, list[float]] = {field.name: [] for field in fields(Assumptions)}
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.modalities, run.setting, run.column), []).append(run)
    for group in groups.values():
        held = {method: outcomes_of(of_method)[0] for method, of_method in by_method(group)}
        for of_method in held.values():
            _of_one(of_method, found)
        for pair in combinations(held.values(), 2):
            _of_two(*pair, found)
    if not all(found[name] for name in ("agreement", "seed_agreement", "seed_spread")):
        raise RunError(
            f"The runs at {', '.join(patterns)} tell nothing: no two methods with two seeds each on one target.",
            "Evaluate such runs, or give --agreement, --seed-agreement, --seed-spread and --icc.",
        )
    means = {name: float(np.mean(values)) for name, values in found.items() if values}
    means["seed_spread"] = float(np.sqrt(np.mean(np.square(found["seed_spread"]))))
    return means | {"seed_agreement": max(means["seed_agreement"], means["agreement"])}


def _of_one(runs: Tested, found: dict[str, list[float]]) -> None:
    """How the seeds of one method differ."""
    right = [one.correct for one in runs.values()]
    if len(right) > 1 and len({one.digest for one in runs.values()}) == 1:
        found["seed_agreement"] += [float((a == b).mean()) for a, b in combinations(right, 2)]
        found["seed_spread"].append(float(np.std([one.mean() for one in right], ddof=1)))


def _of_two(first: Tested, second: Tested, found: dict[str, list[float]]) -> None:
    """How two methods differ: of different seeds, since those of one may have begun alike."""
    both = [*first.values(), *second.values()]
    if len({one.digest for one in both}) != 1:
        return
    pairs = [(a, b) for a in first for b in second if a != b]
    found["agreement"] += [float((first[a].correct == second[b].correct).mean()) for a, b in pairs]
    _, recording, sizes = np.unique(both[0].recordings, return_inverse=True, return_counts=True)
    if RECORDINGS <= len(sizes) < len(recording):
        better = np.mean([one.correct for one in second.values()], axis=0)
        worse = np.mean([one.correct for one in first.values()], axis=0)
        found["icc"].append(correlation_within(better - worse, recording, sizes))
