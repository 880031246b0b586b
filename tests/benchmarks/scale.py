"""How time and memory grow with the number of clips: prepare, prepare again, open, start of training, evaluate.

Two modalities of vectors, three domains, ten classes, one test clip in four. Every command is a process of its own; its
seconds are those of the whole command (of the training: until its first step is logged), by the clock and of the
processor; its memory is the most that it held. What a clip costs is told beyond the smallest count, whose commands are
mostly imports.

    python tests/benchmarks/scale.py --clips 2000,8000,32000,128000
    python tests/benchmarks/scale.py --clips 1000000
    python tests/benchmarks/scale.py --clips 2000,8000 --files      # a file per clip and modality instead

Letters: N clips, D values.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

MODALITIES, DOMAINS, CLASSES, DIMENSION = ("face", "voice"), ("field", "lab", "studio"), 10, 32
MBCD = (sys.executable, "-m", "mbcd_cli")
OPEN = """
import sys
from pathlib import Path
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.resolved import resolve
dataset = open_dataset(resolve(flags={"cache.dir": Path(sys.argv[1])}), name="scale")
print(len(dataset.select(domains=dataset.domains)))
"""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds by the clock and of the processor, and peak memory (bytes), of one command."""

    seconds: float
    processor: float
    memory: int

    def per_clip(self, clips: int, least: Spent, fewest: int) -> str:
        """What each clip beyond the `fewest` costs."""
        more = max(clips - fewest, 1)
        return (
            f"{1e6 * (self.processor - least.processor) / more:7.1f} us of the processor, "
            f"{(self.memory - least.memory) / more:7.0f} bytes per clip"
        )


def write_features(root: Path, count: int, *, files: bool) -> None:
    """manifest.csv and the vectors [N, D] of every modality: one array per domain, or one file per clip."""
    rng = np.random.default_rng(0)
    labels, domains = rng.integers(CLASSES, size=count), np.arange(count) * len(DOMAINS) // count
    cells: dict[str, list[str]] = {}
    for name in MODALITIES:
        (root / name).mkdir(parents=True)
        values = rng.normal(size=(count, DIMENSION)).astype(np.float32)
        values += rng.normal(size=(CLASSES, DIMENSION)).astype(np.float32)[labels]
        if files:
            for index in range(count):
                np.save(root / name / f"{index}.npy", values[index])
            cells[name] = [f"{name}/{index}.npy" for index in range(count)]
            continue
        cells[name] = []
        for number, domain in enumerate(DOMAINS):
            rows = values[domains == number]
            np.save(root / name / f"{domain}.npy", rows)
            cells[name] += [f"{name}/{domain}.npy#{row}" for row in range(len(rows))]
    with (root / "manifest.csv").open("w", encoding="utf-8") as file:
        file.write(f"id,domain,split,label,{','.join(MODALITIES)}\n")
        for index, paths in enumerate(zip(*cells.values(), strict=True)):
            split = "train" if index % 4 else "test"
            file.write(f"clip{index:07d},{DOMAINS[domains[index]]},{split},{labels[index]},{','.join(paths)}\n")


def run(*command: str, until: Path | None = None) -> tuple[Spent, Spent]:
    """What a command takes until the file `until` holds something (by default to its end), and to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    reached = None
    ended = 0
    while not ended and until is not None and reached is None:
        if until.exists() and until.stat().st_size:
            reached = Spent(time.perf_counter() - started, *_so_far(process.pid))
        time.sleep(0.005)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not ended:
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    whole = Spent(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    return reached or whole, whole


def _so_far(pid: int) -> tuple[float, int]:
    """Processor seconds and peak memory of a process that is running."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), memory


def measure(folder: Path, count: int, *, files: bool) -> dict[str, Spent]:
    """Every command on a dataset of `count` clips."""
    root, cache, output = folder / "scale", folder / "cache", folder / "run"
    write_features(root, count, files=files)
    where = ("--cache-dir", str(cache))
    prepare = (*MBCD, "prepare", "manifest", "--root", str(root), *where)
    train = (*MBCD, "train", "--dataset", "scale", *where, "--target-domain", "studio", "--run", str(output))
    train += ("--batch-size", "256", "--set", "training.max_steps=4", "--set", "training.log_steps=1")
    spent = {"prepare": run(*prepare)[0], "prepare again": run(*prepare)[0]}
    spent["open"] = run(sys.executable, "-c", OPEN, str(cache))[0]
    spent["train, first step"] = run(*train, until=output / "steps.jsonl")[0]
    spent["evaluate"] = run(*MBCD, "evaluate", "--run", str(output), *where)[0]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", default="2000,8000,32000,128000")
    parser.add_argument("--files", action="store_true", help="one file per clip and modality")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's folder of temporary files")
    options = parser.parse_args()
    counts = [int(part) for part in options.clips.split(",")]
    found: dict[int, dict[str, Spent]] = {}
    for count in counts:
        folder = Path(tempfile.mkdtemp(prefix="mbcd-scale-", dir=options.folder))
        try:
            found[count] = measure(folder, count, files=options.files)
        finally:
            shutil.rmtree(folder)
        for phase, one in found[count].items():
            told = f"{count:9d}  {phase:18s} {one.seconds:7.1f} s {one.processor:7.1f} s of the processor "
            told += f"{one.memory / 1e6:6.0f} MB"
            if count > counts[0]:
                told += f"  {one.per_clip(count, found[counts[0]][phase], counts[0])}"
            print(told, file=sys.stderr)
    clips = {count: {phase: asdict(one) for phase, one in spent.items()} for count, spent in found.items()}
    machine = {"machine": platform.machine(), "load": os.getloadavg()[0]}
    print(json.dumps({**machine, "files": options.files, "clips": clips}, indent=1))


if __name__ == "__main__":
    main()
