"""A training at the paper's shapes from media to accuracies: float32 against bfloat16, and the same bits twice.

    python tests/benchmarks/full_training.py --device cuda --clips 240 --epochs 20 --workers 14

Clips of two domains with picture and sound that their class shows in (456 x 256, 120 frames; a tone), the encoders and
values of the preset epic-kitchens without flow, random weights, four classes. Every command is a process of its own.
Two trainings in float32 (`runtime.deterministic`, the default) are compared bit by bit; a third is in bfloat16, a
fourth too, with the cache read from disk (`runtime.cache_device = host`), which the system has been told to forget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import soundfile
import tomli_w
import torch

PRESET = Path(__file__).resolve().parents[2] / "presets" / "epic-kitchens.toml"
CLASSES, DOMAINS, FRAMES, RATE = 4, ("a", "b"), 120, 24000


def write_clip(root: Path, number: int) -> str:
    """Picture and sound of a clip; its line of the manifest."""
    rng = np.random.default_rng(number)
    label, domain, split = number % CLASSES, number // CLASSES % 2, "test" if number // CLASSES % 6 > 3 else "train"
    picture = cv2.GaussianBlur(rng.integers(0, 256, (560, 760, 3), np.uint8), (0, 0), 3 + 2 * domain)
    picture = cv2.convertScaleAbs(picture.astype(np.float32), alpha=3, beta=-250 + 40 * domain)
    writer = cv2.VideoWriter(str(root / f"{number}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 60, (456, 256))
    for t in range(FRAMES):
        dx, dy = ((2 * t, 0), (0, 2 * t), (2 * (FRAMES - t), 0), (0, 2 * (FRAMES - t)))[label]
        writer.write(np.ascontiguousarray(picture[dy : dy + 256, dx : dx + 456]))
    writer.release()
    time_axis = np.arange(2 * RATE) / RATE
    tone = np.sin(2 * np.pi * 300 * (label + 1) * time_axis) * 0.1 + rng.normal(0, 0.1 + 0.1 * domain, len(time_axis))
    soundfile.write(root / f"{number}.wav", tone.clip(-1, 1), RATE)
    return f"c{number},{DOMAINS[domain]},{split},{label},{number}.mp4,{number}.wav\n"


def mbcd(*words: object) -> float:
    """Seconds of a command, whose words are shown where it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mbcd_cli", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    return round(time.perf_counter() - started, 1)


def forget(folder: Path) -> None:
    """Have the files below it leave the page cache."""
    for path in folder.rglob("*.h5"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="of the four: float32, bfloat16, from disk, again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "media").mkdir()
        with ProcessPoolExecutor(options.workers) as pool:
            rows = list(pool.map(write_clip, [root / "media"] * options.clips, range(options.clips)))
        (root / "media" / "manifest.csv").write_text("id,domain,split,label,video,audio\n" + "".join(rows))
        tree = tomllib.loads(PRESET.read_text(encoding="utf-8"))
        del tree["modalities"]["flow"]
        for modality in tree["modalities"].values():
            modality.pop("weights", None)
            modality.pop("weights_sha256", None)
        tree["dataset"] = {"name": "media"}
        tree["cache"] |= {"dir": str(root / "cache"), "random_weights": True, "views": 1, "workers": options.workers}
        tree["model"]["modalities"] = ["video", "audio"]
        tree["average"]["beta"] = 0.98  # a few hundred steps
        tree["runtime"] = {"device": options.device}
        config = root / "config.toml"
        config.write_text(tomli_w.dumps(tree), encoding="utf-8")
        told: dict[str, object] = {"clips": options.clips, "torch": torch.__version__}
        told["prepare_s"] = mbcd("prepare", "manifest", "--root", root / "media", "--config", config)
        runs = {"float32": "float32", "bfloat16": "bfloat16", "from disk": "bfloat16", "again": "float32"}

        def train(name: str) -> float:
            run = root / "runs" / name.replace(" ", "-")
            words = ["--config", config, "--target-domain", "b", "--run-dir", run, "--epochs", options.epochs]
            words += ["--set", f"training.batch_size={options.batch}", "--set", f"runtime.precision={runs[name]}"]
            if name == "from disk":
                forget(root / "cache")
                words += ["--set", "runtime.cache_device=host"]
            return mbcd("train", *words, "--set", "cache.views=1")

        for name in filter(options.only.split(",").__contains__, runs) if options.only else runs:
            run = root / "runs" / name.replace(" ", "-")
            seconds = train(name)
            done, timing = json.loads((run / "done").read_text()), lines(run / "timing.jsonl")
            metrics = lines(run / "metrics.jsonl")
            told[name] = {
                "seconds": seconds,
                "steps": done["steps"],
                "steps_per_s": [round(timing[k]["steps_per_second"], 2) for k in (0, len(timing) // 2, -1)],
                "wait": [timing[k]["data_wait_share"] for k in (0, len(timing) // 2, -1)],
                "validation_s": round(sum(one["validation_seconds"] for one in timing), 1),
                "peak_memory_mb": done["peak_memory_mb"],
                "loss": [round(metrics[k]["train"]["total"], 4) for k in (0, len(metrics) // 2, -1)],
                "validation": [round(done[k]["validation"], 3) for k in ("best", "last")],
                "target": [round(done[k]["target"], 3) for k in ("best", "last")],
            }
            print(name, json.dumps(told[name]), flush=True)
        if options.only:
            return
        first, second = (
            torch.load(root / "runs" / name / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
            for name in ("float32", "again")
        )
        pairs = [(first["student"][key], second["student"][key]) for key in first["student"]]
        told["same_bits"] = all(torch.equal(one, other) for one, other in pairs)
    print(json.dumps({key: told[key] for key in ("clips", "torch", "prepare_s", "same_bits")}))


if __name__ == "__main__":
    main()
