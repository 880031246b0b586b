"""Is one method better than another: an interval, a p-value, and the smallest difference that could have been seen.

The model. Two methods are trained with the same seeds on each of T targets and tested on the same clips. Of target t,
D[s, i] is 1 where with seed s only the first method gets clip i right, -1 where only the second does, else 0. The claim
is about d, the mean over targets of the mean over all seeds and all clips that might have been drawn; the targets are
those of the study. Seeds and recordings are random and crossed; clips are random within their recording:

    D[s, i] = d_t + seed_ts + recording_tg + (seed x recording)_tsg + clip_ti + (seed x clip)_tsi

Clips of one recording, and one seed's runs on several targets, may be correlated in any way; recordings, and different
seeds, are independent. B estimates the variance that comes of drawing recordings (of the mean over seeds), W that of
drawing seeds (the variance over seeds of the mean over targets and clips, over S), I the part that is in both: seeds x
recordings and seeds x clips. The variance of the estimate of d is V = max(0, B - I) + W. Of few seeds and errors all
means may be the same number of clips: W, which would be 0 and find anything, is then I, its least. B is the
cluster-robust variance of a mean over recordings of unequal size, made unbiased under the correlation within recordings
that the data show, with the degrees of freedom of Bell and McCaffrey (2002) under that correlation (Imbens and Kolesar
2016); Satterthwaite's rule adds those of the targets up.

The interval is one of Student's t. Its degrees of freedom f are those of both parts, n of each, by their shares of V:
1 / f is the sum of share^k / n with k = 2 - 2 / n, 1 at the least. Satterthwaite has k = 2, which is right of large n;
with the two degrees of freedom of three seeds it covers 92 % where 95 % are meant, since W is then too small just where
f comes out large. This covers 94.2 to 96.3 % of normal effects, whatever share comes of three seeds, where recordings
or clips are many; of six recordings up to 97.6 %. A percentile bootstrap over seeds and recordings covers less than
either: `tests/benchmarks/power_simulation.py` measures it. Far below 5 %, where a correction for many pairs looks, that
is not enough: where the W of three seeds is near 0 by chance, f is that of recordings alone, and up to 0.6 % of studies
have p < 0.0002. There f is that of W no less than I, which it is in expectation.

Letters: T targets, S seeds, N clips and G recordings of a target, M methods, K comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

SEEDS, RECORDINGS, DOMAINS = 3, 2, 3
"""With fewer seeds, recordings of a target, or targets that stand for others, intervals were not seen to hold."""
ALPHA, POWER = 0.05, 0.8
MOST = 1e6
"""Degrees of freedom from which Student's t is the normal distribution."""
_EQUAL = 1e-12
"""Means of seeds that differ by no more are the same, but for rounding."""


@dataclass(frozen=True, slots=True)
class TargetOutcomes:
    """Of one target: `differences` [S, N] as in the model, and the recording of every clip, [N] whole numbers."""

    differences: np.ndarray
    recordings: np.ndarray

    @property
    def clips(self) -> int:
        """N."""
        return len(self.recordings)

    @property
    def groups(self) -> int:
        """G."""
        return len(np.unique(self.recordings))


@dataclass(frozen=True, slots=True)
class Difference:
    """An estimated difference of accuracies (both 0 to 1): Student's t with `freedom` around `value`.

    Attributes:
        cautious: degrees of freedom for one test of many, whose level is far below 5 %; None: the same.
    """

    value: float
    variance: float
    freedom: float
    cautious: float | None = None

    @property
    def p(self) -> float:
        """Of the two-sided test of no difference; 1 where nothing differs at all."""
        return 2 * min(self.probability, 1 - self.probability)

    def p_among(self, tests: int) -> float:
        """p for a correction over so many tests, which asks for the far tail: the `cautious` one."""
        return replace(self, freedom=self._freedom(ALPHA / tests)).p

    def _freedom(self, alpha: float) -> float:
        return self.freedom if self.cautious is None or alpha >= ALPHA else self.cautious

    @property
    def probability(self) -> float:
        """That the first method is the better one: the share of the distribution that lies above 0."""
        if self.variance == 0:
            return 0.5 + 0.5 * float(np.sign(self.value))
        return float(stdtr(self.freedom, self.value / np.sqrt(self.variance)))

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """That the true difference lies in with probability 1 - alpha."""
        half = float(stdtrit(self.freedom, 1 - alpha / 2) * np.sqrt(self.variance))
        return self.value - half, self.value + half

    def smallest(self, alpha: float = ALPHA) -> float:
        """The smallest true difference that a study like this one finds (p < alpha) with probability `POWER`."""
        return smallest_difference(self.variance, self._freedom(alpha), alpha)


def smallest_difference(variance: float, freedom: float, alpha: float = ALPHA) -> float:
    """The difference that a two-sided t-test at level alpha finds with probability `POWER` (noncentral t)."""
    # The share of the other side is far below what POWER is rounded to.
    return float(np.sqrt(variance) * nctdtrinc(freedom, 1 - POWER, stdtrit(freedom, 1 - alpha / 2)))


def holm(p: Sequence[float]) -> list[float]:
    """K p-values, adjusted so that the chance of any false claim among all of them is kept (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def critical_difference(methods: int, blocks: int, alpha: float = ALPHA) -> float:
    """Mean ranks of M methods over so many blocks differ by less than this if they are equal (Nemenyi; Demsar 2006)."""
    from scipy import stats  # a third of a second to import

    quantile = stats.studentized_range.isf(alpha, methods, np.inf) / np.sqrt(2)
    return float(quantile * np.sqrt(methods * (methods + 1) / (6 * blocks)))


@dataclass(frozen=True, slots=True)
class _Measured:
    """Of one target: the mean of every seed [S], B and I of the model, and the degrees of freedom of B."""

    means: np.ndarray
    between: float
    mixed: float
    freedom: float


def recordings_variance(sizes: np.ndarray, correlation: float) -> tuple[float, float, float]:
    """What the recordings of a target do to the variance of a mean over its clips, of unit variance each.

    Args:
        sizes: clips of every recording, [G]. correlation: of two clips of one recording.

    Returns:
        The variance of the mean; what the sum over recordings of (share of the clips x deviation of their mean)^2 has
        to be multiplied by to be that in expectation; and its degrees of freedom.
    """
    share = sizes / sizes.sum()
    own = correlation + (1 - correlation) / sizes  # variance of a recording's mean
    pull = share * own  # its covariance with the mean over all
    weight, whole = share**2, float((share * pull).sum())
    expected = float((weight * (own - 2 * pull + whole)).sum())
    if expected <= 0:
        return whole, np.nan, 0.0
    first, second, third = weight.sum(), (weight * pull).sum(), (weight * pull**2).sum()
    squares = whole**2 * first**2 + 2 * third * first + 2 * second**2 - 4 * whole * first * second
    squares += (weight**2 * (own**2 + 2 * own * (whole - 2 * pull))).sum()
    return whole, whole / expected, float(expected**2 / squares)


def _measured(target: TargetOutcomes) -> _Measured:
    differences = np.asarray(target.differences, float)
    seeds, clips = differences.shape
    _, recording, sizes = np.unique(target.recordings, return_inverse=True, return_counts=True)
    means = differences.mean(axis=1)
    sums = np.stack([np.bincount(recording, row, len(sizes)) for row in differences])
    deviation = sums / sizes - means[:, None]
    over_seeds = deviation.mean(axis=0)
    _, factor, freedom = recordings_variance(sizes, correlation_within(differences.mean(axis=0), recording, sizes))
    weight = (sizes / clips) ** 2
    between = factor * float((weight * over_seeds**2).sum())
    mixed = factor * float((weight * (deviation - over_seeds) ** 2).sum()) / (seeds * max(seeds - 1, 1))
    return _Measured(means, between, mixed, freedom)


def correlation_within(values: np.ndarray, recording: np.ndarray, sizes: np.ndarray) -> float:
    """The intraclass correlation (0 to 1) of clips' values [N] in recordings [N] (0 to G - 1) of so many clips [G]."""
    clips, count = len(values), len(sizes)
    if count in (1, clips):
        return 0.0
    means = np.bincount(recording, values, count) / sizes
    among = float((sizes * (means - values.mean()) ** 2).sum()) / (count - 1)
    inside = float(((values - means[recording]) ** 2).sum()) / (clips - count)
    typical = (clips - float((sizes**2).sum()) / clips) / (count - 1)
    total = among + (typical - 1) * inside
    return float(np.clip((among - inside) / total, 0, 1)) if total > 0 else 0.0


def method_difference(targets: Sequence[TargetOutcomes]) -> Difference:
    """The difference of two methods over T targets (of the same S seeds, two at least), as the model has it."""
    measured = [_measured(target) for target in targets]
    means, scale = np.mean([one.means for one in measured], axis=0), len(targets) ** -2
    between, mixed = [scale * one.between for one in measured], scale * sum(one.mixed for one in measured)
    of_seeds = float(means.var(ddof=1)) / len(means) if np.ptp(means) > _EQUAL else mixed
    freedoms = [one.freedom for one in measured]
    variance, freedom = variance_of(between, freedoms, mixed, of_seeds, len(means) - 1)
    _, cautious = variance_of(between, freedoms, mixed, max(of_seeds, mixed), len(means) - 1)
    return Difference(float(means.mean()), variance, freedom, cautious)


def variance_of(
    between: Sequence[float], freedoms: Sequence[float], mixed: float, of_seeds: float, seeds: float
) -> tuple[float, float]:
    """V of the model and its degrees of freedom.

    Args:
        between: every target's share of B, with its `freedoms`. mixed: I. of_seeds: W, of `seeds` degrees of freedom.
    """
    recordings = sum(between)
    total = max(0.0, recordings - mixed) + of_seeds
    if total <= 0:
        return 0.0, MOST
    squares = sum(part**2 / n for part, n in zip(between, freedoms, strict=True) if part > 0)
    parts = [(of_seeds, seeds), (recordings, min(recordings**2 / squares, MOST) if squares > 0 else MOST)]
    inverse = sum(min(part / total, 1) ** max(2 - 2 / n, 1) / n for part, n in parts)
    # Both shares are near 1 where all of the variance is in both.
    return total, max(1 / inverse, min(n for _, n in parts))


def in_new_domains(targets: Sequence[TargetOutcomes]) -> Difference:
    """`method_difference`, for a claim about domains of which the T targets (two at least) are a sample.

    The model then has targets in the place of recordings, each seed's mean on a target in that of clips.
    """
    means = np.stack([np.asarray(target.differences, float).mean(axis=1) for target in targets], axis=1)
    return method_difference([TargetOutcomes(means, np.arange(len(targets)))])
