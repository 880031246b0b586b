"""How an audit grows: seconds and memory for N clips that differ, with one near copy in a hundred.

python tests/benchmarks/audit_scale.py video 1000 10000 100000     # prints in memory: the search alone (or: audio)
python tests/benchmarks/audit_scale.py array 1000 10000 100000     # files: the whole of `mbcd audit`
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


DOMAINS, CLASSES, VALUES = 3, 20, 64


def audit_arrays(count: int, root: Path) -> None:
    """Audit rows of an array file: class and domain move their means, copies are nearly the same row once more."""
    rng = np.random.default_rng(0)
    domain, label = rng.integers(DOMAINS, size=count), rng.integers(CLASSES, size=count)
    means = rng.normal(size=(DOMAINS, 1, VALUES)) + rng.normal(size=(1, CLASSES, VALUES))
    values = means[domain, label] + rng.normal(size=(count, VALUES))
    first = np.arange(0, count, 100)
    values = np.concatenate([values, values[first] + 0.03 * rng.normal(size=(len(first), VALUES))]).astype(np.float32)
    domain, label = np.append(domain, domain[first]), np.append(label, label[first])
    np.save(root / "values.npy", values)
    split = np.where(rng.random(len(values)) < 0.3, "test", "train")
    lines = [f"c{i},d{domain[i]},{split[i]},{label[i]},values.npy#{i},r{i // 5}\n" for i in range(len(values))]
    (root / "manifest.csv").write_text("id,domain,split,label,vector,group\n" + "".join(lines))
    command = [sys.executable, "-m", "mbcd_cli", "audit", "manifest", "--root", str(root), "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {tuple(one["clips"]) for one in json.loads(done.stdout)["copies"]}
    copies = {(f"c{index}", f"c{count + at}") for at, index in enumerate(first)}
    _told("array", count, seconds, found, copies)
    print(f"    processor {used.ru_utime + used.ru_stime:.1f} s, peak {used.ru_maxrss / 1e6:.2f} GB", flush=True)


def _told(kind: str, count: int, seconds: float, found: set, copies: set) -> None:
    print(
        f"{kind} {count} clips: {seconds:.1f} s, {len(found & copies)} of {len(copies)} copies found, "
        f"{len(found - copies)} others",
        flush=True,
    )


def main() -> None:
    kind = sys.argv[1]
    if kind == "array":
        for count in map(int, sys.argv[2:]):
            with tempfile.TemporaryDirectory() as root:
                audit_arrays(count, Path(root))
        return
    list(near_pairs(video_prints(50, np.random.default_rng(0)), default_modality("video")))  # pays for imports
    for count in map(int, sys.argv[2:]):
        rng = np.random.default_rng(0)
        prints = {"video": video_prints, "audio": sound_prints}[kind](count, rng)
        copies = {(index, count + at) for at, index in enumerate(range(0, count, 100))}
        prints += [noisy(prints[index], rng) for index, _ in sorted(copies)]
        started, used = time.perf_counter(), time.process_time()
        found = {(a, b) for a, b, _, _ in near_pairs(prints, default_modality(kind))}
        _told(kind, count, time.perf_counter() - started, found, copies)
        print(f"    processor {time.process_time() - used:.1f} s, peak {peak_memory_mb(CPU) / 1e3:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
