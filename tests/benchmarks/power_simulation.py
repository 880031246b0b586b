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
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from mbcd_cli.evaluation.claims import Difference, TargetOutcomes, method_difference


@dataclass(frozen=True)
class Design:
    """Clips of each recording of every target, and seeds."""

    name: str
    sizes: tuple[tuple[int, ...], ...]
    seeds: int


@dataclass(frozen=True)
class Effects:
    """Standard deviations on the scale of the sum, where 1 is the clips' own; `domain`: how methods suit targets."""

    name: str
    seed: float
    recording: float
    domain: float = 0.2


OWN, SHARED, NOISE = 0.8, 1.0, 0.6
DESIGNS = (
    Design("6 x 70 clips, 1 target, 3 seeds", ((70,) * 6,), 3),
    Design("6 x 70 clips, 3 targets, 3 seeds", ((70,) * 6,) * 3, 3),
    Design("6 x 70 clips, 3 targets, 10 seeds", ((70,) * 6,) * 3, 10),
    Design("6 of 15 to 180, 3 targets, 3 seeds", ((180, 100, 70, 45, 25, 15),) * 3, 3),
    Design("30 x 15 clips, 3 targets, 3 seeds", ((15,) * 30,) * 3, 3),
    Design("500 clips, 1 target, 3 seeds", ((1,) * 500,), 3),
    Design("500 clips, 3 targets, 3 seeds", ((1,) * 500,) * 3, 3),
    Design("500 clips, 4 targets, 5 seeds", ((1,) * 500,) * 4, 5),
    Design("500 clips, 3 targets, 10 seeds", ((1,) * 500,) * 3, 10),
)
EFFECTS = (
    Effects("none", 0.0, 0.0),
    Effects("seeds", 0.15, 0.0),
    Effects("recordings", 0.0, 0.3),
    Effects("both, small", 0.06, 0.15),
    Effects("both", 0.15, 0.3),
)


def study(
    design: Design, effects: Effects, rng: np.random.Generator, *, better: float = 0.0
) -> tuple[list[TargetOutcomes], float]:
    """Outcomes of one study, and the true difference (0 to 1) over its targets; `better`: the first method's gain."""
    spread = np.sqrt(effects.seed**2 + effects.recording**2 + SHARED**2 + OWN**2 + NOISE**2)
    targets, truth = [], []
    for sizes in design.sizes:
        recording = np.repeat(np.arange(len(sizes)), sizes)
        clips, seeds = len(recording), design.seeds
        shared = rng.normal(0, SHARED, clips)
        middle = 0.3 + 0.3 * rng.normal() + effects.domain * rng.normal(size=2) + np.array([better, 0.0])
        right = []
        for mean in middle:
            seed = rng.normal(0, effects.seed, (seeds, 1))
            of_recording = rng.normal(0, effects.recording / np.sqrt(2), (2, seeds, len(sizes)))
            of_recording[0] = of_recording[0, 0]  # the other half is drawn per seed
            own = shared + rng.normal(0, OWN, clips) + rng.normal(0, NOISE, (seeds, clips))
            right.append(mean + seed + of_recording.sum(axis=0)[:, recording] + own > 0)
        targets.append(TargetOutcomes(right[0].astype(np.int8) - right[1], recording))
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
        times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), draws)
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
    """Print coverage, false positives, the intervals' half width and the bootstrap's coverage, in percent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--only", default="", help="designs whose name holds this")
    asked = parser.parse_args()
    print("| design | effects | covers | false positives | half width | bootstrap covers |\n" + "| --- " * 6 + "|")
    rng = np.random.default_rng(1)
    for design in (one for one in DESIGNS if asked.only in one.name):
        for effects in EFFECTS:
            covered, widths, plain = [], [], []
            for estimate, truth, targets in simulate(design, effects, asked.studies):
                low, high = estimate.interval()
                covered.append(low <= truth <= high)
                widths.append((high - low) / 2)
                if len(plain) < asked.studies // 4:
                    first, last = np.quantile(bootstrap(targets, rng), (0.025, 0.975))
                    plain.append(first <= truth <= last)
            same = Effects(effects.name, effects.seed, effects.recording, domain=0.0)
            false = [estimate.p < 0.05 for estimate, _, _ in simulate(design, same, asked.studies, seed=1)]
            figures = (100 * np.mean(covered), 100 * np.mean(false), 100 * np.mean(widths), 100 * np.mean(plain))
            print(
                f"| {design.name} | {effects.name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
