"""A population of trainings against as many trainings in processes of their own, and its step against its products.

Vectors in the shapes of av-digits-vectors (1280 and 192 values, 1500 clips, three domains), that preset's widths, one
target. Together is a whole sweep (`--pack auto`), start-up, validation, checkpoints, the evaluation of each and the
tables included; alone are processes of `mbcd train`, as many at a time. Of those fewer are trained and counted by their
steps, since that only repeats itself. Both write bytecode, as an installed Python does. `of_floor` is the time of a
population's step (one process, one thread) over that of its matrix products alone: per pass forward one batched product
a layer for all members, backward two (one where the layer reads the input). ERM takes one pass each way, MBCD three:
forward of the student twice and of the teacher, backward of uni-modal losses, their distillation and the fused loss.

    python tests/benchmarks/population.py --members 64 --alone 8 --methods erm,mbcd
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.opening import open_for_training
from mbcd_cli.settings.sources import Layer
from mbcd_cli.training import together
from mbcd_cli.training.train import train

DIMENSIONS, DOMAINS, CLASSES, CLIPS, BATCH = {"frames": 1280, "speech": 192}, ("a", "b", "c"), 10, 1500, 16
HIDDEN = 128
MBCD = (sys.executable, "-m", "mbcd_cli")


def write_features(root: Path) -> None:
    """manifest.csv and one array per modality."""
    rng = np.random.default_rng(0)
    labels = np.arange(CLIPS) % CLASSES
    root.mkdir()
    for name, width in DIMENSIONS.items():
        centres = rng.normal(size=(CLASSES, width))
        np.save(root / f"{name}.npy", (centres[labels] + 3 * rng.normal(size=(CLIPS, width))).astype(np.float32))
    with (root / "manifest.csv").open("w", encoding="utf-8") as file:
        file.write(f"id,domain,split,label,{','.join(DIMENSIONS)}\n")
        for clip, label in enumerate(labels):
            split = "test" if clip // CLASSES % 5 == 0 else "train"
            arrays = ",".join(f"{name}.npy#{clip}" for name in DIMENSIONS)
            file.write(f"c{clip},{DOMAINS[clip * len(DOMAINS) // CLIPS]},{split},{label},{arrays}\n")


def run(command: Sequence[str], folder: Path) -> None:
    """A command, whose words are shown where it fails."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environ)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-3000:])


def settings_of(folder: Path) -> list[str]:
    """Of every training, as words of a command."""
    told = (
        f"cache.dir={folder / 'cache'}",
        "evaluation.batch_size=512",
        "training.epochs=12",
        f"training.batch_size={BATCH}",
        f"model.hidden={HIDDEN}",
        "runtime.threads=1",
    )
    return [word for one in told for word in ("--set", one)]


def sweep(folder: Path, method: str, seeds: int, *, pack: str, jobs: int) -> tuple[float, int]:
    """Seconds of the sweep, and the steps that its trainings took."""
    runs = folder / f"{method}-{pack}"
    command = [*MBCD, "sweep", "--dataset", "vectors", "--targets", "c", "--methods", method, "--seeds", str(seeds)]
    command += ["--jobs", str(jobs), "--pack", pack, "--runs-dir", str(runs), "--output", str(runs / "tables")]
    command += [*settings_of(folder), "--set", "evaluation.analyses=[]", "--set", "evaluation.report=false"]
    started = time.perf_counter()
    run(command, folder)
    return time.perf_counter() - started, _steps(runs, seeds)


def alone(folder: Path, method: str, seeds: int, *, jobs: int) -> tuple[float, int]:
    """Seconds of a process of `mbcd train` for each seed, and the steps that they took."""
    runs = folder / f"{method}-alone"
    command = [*MBCD, "train", "--dataset", "vectors", "--target-domain", "c", "--method", method, *settings_of(folder)]
    started = time.perf_counter()
    with ThreadPoolExecutor(jobs) as at_a_time:
        each = [[*command, "--seed", str(seed), "--runs-dir", str(runs)] for seed in range(seeds)]
        list(at_a_time.map(lambda one: run(one, folder), each))
    return time.perf_counter() - started, _steps(runs, seeds)


def _steps(runs: Path, seeds: int) -> int:
    done = [json.loads(path.read_text(encoding="utf-8")) for path in runs.glob("*/*/done")]
    assert len(done) == seeds, "not all trainings have ended"
    return sum(one["steps"] for one in done)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def floor(members: int, passes: int) -> float:
    """Seconds that the products of a step take, of `passes` passes forward and as many backward."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modalities = len(DIMENSIONS)
    widths = [(width, HIDDEN) for width in DIMENSIONS.values()] + [(HIDDEN, HIDDEN)] * modalities
    widths += [(HIDDEN, HIDDEN)] * modalities + [(HIDDEN, CLASSES)] * modalities
    widths += [(HIDDEN * modalities, HIDDEN), (HIDDEN, CLASSES)]
    layers = []
    for inside, out in widths:
        x, weight = torch.randn(members, BATCH, inside), torch.randn(members, out, inside)
        layers.append([part.to(device) for part in (x, weight, torch.randn(members, BATCH, out))])
    best = float("inf")
    for _ in range(9):
        started = time.perf_counter()
        for number, (x, weight, gradient) in enumerate(layers):
            torch.bmm(x, weight.mT)
            torch.bmm(gradient.mT, x)
            if number >= modalities:
                torch.bmm(gradient, weight)
        _wait()
        best = min(best, time.perf_counter() - started)
    return passes * best


def step_seconds(folder: Path, method: str, members: int) -> tuple[float, float]:
    """Seconds of a population's step: the median of an epoch's, but for the first, which is compared with one alone.

    And of a training's alone: those of its second epoch over its steps, batches and log included.
    """
    torch.set_num_threads(1)
    seconds: list[float] = []

    class Timed(together.StackedStep):
        def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
            started = time.perf_counter()
            vectors = super().__call__(batches)
            _wait()
            seconds.append(time.perf_counter() - started)
            return vectors

    opened = None
    wanted = []
    for seed in range(members):
        settings = resolve(
            sets=[
                f"training.batch_size={BATCH}",
                f"model.hidden={HIDDEN}",
                "runtime.threads=1",
                f"training.seed={seed}",
            ],
            flags={
                "dataset.name": "vectors",
                "cache.dir": folder / "cache",
                "method.name": method,
                "training.epochs": 1,
                "training.target_domain": "c",
            },
        )
        settings, opened = open_for_training(settings, opened)
        wanted.append(together.Wanted(settings, folder / "steps" / method / str(seed)))
    plain, together.StackedStep = together.StackedStep, Timed
    try:
        together.train_together(wanted, opened, width=members, ended=lambda one, outcome: None)
    finally:
        together.StackedStep = plain
    solo = resolve(base=Layer("wanted", wanted[0].settings.model_dump(mode="json")), flags={"training.epochs": 2})
    train(solo, opened, run=folder / "steps" / method / "alone", resume=False, overwrite=False)
    timing = (folder / "steps" / method / "alone" / "timing.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(seconds[1:])[len(seconds) // 2], 1 / json.loads(timing[-1])["steps_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="trainings in processes of their own; 0: steps only")
    parser.add_argument("--methods", default="erm,mbcd")
    parser.add_argument("--pack", default="auto", help="trainings at a time in a process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, with a thread each")
    told = parser.parse_args()
    result = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder / "vectors")
        prepare = (
            *MBCD,
            "prepare",
            "manifest",
            "--root",
            str(folder / "vectors"),
            "--cache-dir",
            str(folder / "cache"),
        )
        run((*prepare, "--views", "1"), folder)
        for method in told.methods.split(","):
            rates: dict[str, float] = {}
            if told.alone:
                seconds, steps = sweep(folder, method, told.members, pack=told.pack, jobs=told.jobs)
                rates["together"] = steps / seconds
                seconds, steps = alone(folder, method, told.alone, jobs=told.jobs)
                rates["alone"] = steps / seconds
            members = min(told.members, together.WIDTH if told.pack == "auto" else int(told.pack))
            step, one = step_seconds(folder, method, members)
            least = floor(members, 3 if method == "mbcd" else 1)
            result[method] = {
                "step_ms": round(1000 * step, 1),
                "alone_step_ms": round(1000 * one, 2),
                "steps_ratio": round(members * one / step, 2),
                "floor_ms": round(1000 * least, 1),
                "of_floor": round(step / least, 2),
            }
            if rates:
                result[method] |= {
                    "member_steps_per_s": round(rates["together"], 1),
                    "alone_steps_per_s": round(rates["alone"], 1),
                    "ratio": round(rates["together"] / rates["alone"], 2),
                }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
