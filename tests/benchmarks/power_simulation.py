"""How often the intervals of `mbcd evaluate --runs` hold the truth, over simulated studies with planted effects.

    python tests/benchmarks/power_simulation.py [--studies 2000] [--only TEXT]

A clip is got right where a sum of normal effects is above 0: the target's difficulty, how the method suits it, the
seed, the recording, seed x recording, the clip (shared by both methods, and each one's own) and seed x clip. The
truth, the difference over all seeds and clips that might have been drawn, then has a closed form. With no difference
planted the share of intervals that leave out 0 is that of false positives. Beside the interval stands that of a
percentile bootstrap which draws seeds and, in every target, recordings with their clips anew.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import norm

from mbcd_cli.evaluation.claims import ALPHA, DOMAINS, Difference, TargetOutcomes, in_new_domains, method_difference


@dataclass(frozen=True)
class Design:
    """Clips of each recording of every target, and seeds."""

    name: str
    sizes: tuple[tuple[int, ...], ...]
    seeds: int


@dataclass(frozen=True)
class Effects:
    """Standard deviations on the scale of the sum, where 1 is that which both methods find in a clip; `domain`: how
    methods suit targets; `own`: what each finds in a clip."""

    name: str
    seed: float
    recording: float
    domain: float = 0.2
    own: float = 0.8


SHARED, NOISE = 1.0, 0.6
FAR, MANY = 2e-4, 250
"""The level that Holm's correction asks of the first of so many tests."""
CLIPS = {
    "6 recordings of 70": (70,) * 6,
    "6 of 15 to 180": (180, 100, 70, 45, 25, 15),
    "30 recordings of 15": (15,) * 30,
    "500 by themselves": (1,) * 500,
}
DESIGNS = tuple(
    Design(f"{name}, {targets} target{'s' * (targets > 1)}, {seeds} seeds", (sizes,) * targets, seeds)
    for name, sizes in CLIPS.items()
    for targets in (1, 3)
    for seeds in (3, 5, 10)
)
EFFECTS = (
    Effects("none", 0.0, 0.0),
    Effects("seeds", 0.15, 0.0),
    Effects("recordings", 0.0, 0.3),
    Effects("both, small", 0.06, 0.15),
    Effects("both", 0.15, 0.3),
    Effects("both, methods alike", 0.1, 0.15, own=0.2),
)


def study(
    design: Design, effects: Effects, rng: np.random.Generator, *, better: float = 0.0
) -> tuple[list[TargetOutcomes], float]:
    """Outcomes of one study, and the true difference (0 to 1) over its targets; `better`: the first method's gain."""
    spread = np.sqrt(effects.seed**2 + effects.recording**2 + SHARED**2 + effects.own**2 + NOISE**2)
    seeds, half = design.seeds, np.sqrt(0.5)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return scale * rng.standard_normal(shape, np.float32)

    everywhere = normal(half * effects.seed, 2, seeds, 1)
    targets, truth = [], []
    for sizes in design.sizes:
        recording = np.repeat(np.arange(len(sizes)), sizes)
        clips = len(recording)
        middle = 0.3 + 0.3 * rng.normal() + effects.domain * rng.normal(size=2) + np.array([better, 0.0])
        # Of the variance of seeds half is of all targets, and of recordings half of all seeds.
        of_seed = middle[:, None, None] + everywhere + normal(half * effects.seed, 2, seeds, 1)
        of_recording = of_seed + normal(half * effects.recording, 2, 1, len(sizes))
        of_recording = of_recording + normal(half * effects.recording, 2, seeds, len(sizes))
        of_clip = normal(SHARED, clips) + normal(effects.own, 2, 1, clips)
        right = (of_recording[..., recording] + of_clip + normal(NOISE, 2, seeds, clips) > 0).view(np.int8)
        targets.append(TargetOutcomes(right[0] - right[1], recording))
        truth.append(float(np.subtract(*norm.cdf(middle / spread))))
    return targets, float(np.mean(truth))


def bootstrap(targets: list[TargetOutcomes], rng: np.random.Generator, draws: int = 1000) -> np.ndarray:
    """Percentile bootstrap over seeds and the recordings of every target: `draws` differences."""
    seeds = len(targets[0].differences)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    total = np.zeros(draws)
    for target in targets:
        _, recording, sizes = np.unique(target.recordings, return_inverse=True, return_counts=True)
        sums = np.stack([np.bincount(recording, row, len(sizes)) for row in target.differences])
        drawn = rng.integers(len(sizes), size=(draws, len(sizes))) + len(sizes) * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * len(sizes)).reshape(draws, -1)
        total += np.einsum("ds,sg,dg->d", weights, sums, times, optimize=True) / (times @ sizes)
    return total / len(targets)


def simulate(
    design: Design, effects: Effects, studies: int, *, seed: int = 0, better: float = 0.0
) -> Iterator[tuple[Difference, float, list[TargetOutcomes]]]:
    """Estimate, truth and outcomes of so many studies."""
    rng = np.random.default_rng(seed)
    for _ in range(studies):
        targets, truth = study(design, effects, rng, better=better)
        yield method_difference(targets), truth, targets


def main() -> None:
    """Print, in percent, how often intervals hold the truth (of these targets, and of all domains), false positives at
    5 % and at `FAR` (by p, and by what is corrected for many tests), how often the bootstrap's do, and the intervals'
    mean half width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--only", default="", help="designs whose name has this in it (a regular expression)")
    asked = parser.parse_args()
    columns = ["design", "effects", "covers", "false positives", "p < 0.0002", "p among many < 0.0002"]
    columns += ["covers all domains", "bootstrap covers", "half width"]
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    rng = np.random.default_rng(1)
    for design in (one for one in DESIGNS if re.search(asked.only, one.name)):
        for effects in EFFECTS:
            covered, everywhere, plain, widths = [], [], [], []
            for estimate, truth, targets in simulate(design, effects, asked.studies):
                low, high = estimate.interval()
                covered.append(low <= truth <= high)
                widths.append((high - low) / 2)
                if len(targets) >= DOMAINS:
                    low, high = in_new_domains(targets).interval()
                    everywhere.append(low <= 0 <= high)
                if len(plain) < asked.studies // 10:
                    first, last = np.quantile(bootstrap(targets, rng, 500), (0.025, 0.975))
                    plain.append(first <= truth <= last)
            same = replace(effects, domain=0.0)
            none = [estimate for estimate, _, _ in simulate(design, same, asked.studies, seed=1)]
            false = [estimate.p < ALPHA for estimate in none]
            far = [[p < FAR for p in (one.p, one.p_among(MANY))] for one in none]
            measured = (covered, false, *zip(*far, strict=True), everywhere, plain, widths)
            figures = [
                f"{100 * np.mean(one):.{2 if k in (2, 3) else 1}f}" if one else "-" for k, one in enumerate(measured)
            ]
            print(f"| {design.name} | {effects.name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
