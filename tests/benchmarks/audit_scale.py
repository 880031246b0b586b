"""How the search for near copies grows: prints of N clips that differ, with one near copy in a hundred, in memory.

python tests/benchmarks/audit_scale.py video 1000 10000 100000
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from mbcd_cli.audit.copies import near_pairs
from mbcd_cli.audit.prints import Print, sound_marks, unit
from mbcd_cli.data.modalities import default_modality
from mbcd_cli.runtime import peak_memory_mb

FRAMES, WAVES, SECONDS, CPU = 16, 63, 1, torch.device("cpu")


def video_prints(count: int, rng: np.random.Generator) -> list[Print]:
    """Frames whose low frequencies fall as a photograph's do, moving a little from one to the next."""
    fall = 1 / np.hypot(*np.divmod(np.arange(1, WAVES + 1), 8))
    return [_print(unit((rng.normal(size=(1, WAVES)) + _walk(rng)) * fall)) for _ in range(count)]


def _walk(rng: np.random.Generator) -> np.ndarray:
    return 0.1 * rng.normal(size=(FRAMES, WAVES)).cumsum(axis=0)


def sound_prints(count: int, rng: np.random.Generator) -> list[Print]:
    """Noise through a filter that changes with time, a second each."""
    prints = []
    for _ in range(count):
        loud = np.interp(np.arange(8000 * SECONDS), np.linspace(0, 8000 * SECONDS, 12), rng.random(12))
        hertz = np.interp(np.arange(8000 * SECONDS), np.linspace(0, 8000 * SECONDS, 6), rng.uniform(100, 2000, 6))
        wave = loud * (np.sin(2 * np.pi * hertz.cumsum() / 8000) + 0.3 * rng.normal(size=len(loud)))
        wave = np.rint(127 * wave / np.abs(wave).max()).astype(np.int8)
        prints.append(_print(sound_marks(wave), wave))
    return prints


def _print(marks: np.ndarray, wave: np.ndarray | None = None) -> Print:
    return Print("", "", "", marks.astype(np.float32), np.empty(0, np.int8) if wave is None else wave)


def noisy(held: Print, rng: np.random.Generator) -> Print:
    """A near copy."""
    if len(held.wave):
        wave = np.clip(held.wave + rng.normal(0, 3, len(held.wave)), -127, 127).astype(np.int8)
        return _print(sound_marks(wave), wave)
    return _print(unit(held.marks + rng.normal(0, 0.005, held.marks.shape)))


def main() -> None:
    kind = sys.argv[1]
    list(near_pairs(video_prints(50, np.random.default_rng(0)), default_modality("video")))  # pays for imports
    for count in map(int, sys.argv[2:]):
        rng = np.random.default_rng(0)
        prints = {"video": video_prints, "audio": sound_prints}[kind](count, rng)
        copies = {(index, count + at) for at, index in enumerate(range(0, count, 100))}
        prints += [noisy(prints[index], rng) for index, _ in sorted(copies)]
        started = time.perf_counter()
        found = {(a, b) for a, b, _, _ in near_pairs(prints, default_modality(kind))}
        seconds = time.perf_counter() - started
        print(
            f"{kind} {count} clips: {seconds:.1f} s, {len(found & copies)} of {len(copies)} copies found, "
            f"{len(found - copies)} others, {peak_memory_mb(CPU) / 1e3:.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
