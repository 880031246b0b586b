"""What `read_frames` costs beside raw decord, in processor time and in one run (group `bench` brings decord).

    python tests/benchmarks/read_frames.py

(a) 32 of the 120 frames of a clip of 456 x 256, whose packets prove its frames, against decord's get_batch of the
    same frames and the last: H.264 as x264 writes it by default, and MPEG-4;
(b) the same clip in containers that prove nothing and are decoded from their beginning: avi, ts, mpg;
(c) two-second spans of a recording, out of order: held in memory, sought in, and read in sequence (ts).

Turns alternate; the median of `--rounds` counts. A ratio of 1.00 is decord's time on the mp4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from mbcd_cli.data.media import timeline, video
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media
from mbcd_cli.settings import DatasetSettings

WIDTH, HEIGHT, FRAMES, RATE = 456, 256, 120, 30
WANTED = np.arange(0, 64, 2) + 20
CODECS = {"h264": ["libx264"], "mpeg4": ["mpeg4", "-q:v", "4"]}


def write(path: Path, frames: int, *codec: str) -> Path:
    """Moving noise: something for the codec to do."""
    big = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (400, 700, 3), np.uint8), (0, 0), 2)
    raw = b"".join(big[t % 140 : t % 140 + HEIGHT, 2 * t % 240 : 2 * t % 240 + WIDTH].tobytes() for t in range(frames))
    words = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}"]
    words += ["-r", str(RATE), "-i", "-", "-pix_fmt", "yuv420p", "-c:v", *codec, str(path)]
    subprocess.run(words, input=raw, check=True)
    return path


def whole(path: Path) -> None:
    """32 frames of a clip by its own file."""
    read_frames(Media(path), lambda count: WANTED, dataset=DatasetSettings())


def with_decord(path: Path) -> None:
    """The same with decord, which trusts its index."""
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    reader.get_batch([*WANTED.tolist(), len(reader) - 1]).asnumpy()


def spans(path: Path, held: int) -> None:
    """Ten spans of one recording, opened anew."""
    timeline._HELD_BYTES = held
    while video._recordings._entries:
        video._recordings._entries.pop()[1].close()
    for start in (20, 4, 33, 12, 28, 0, 36, 8, 16, 24):
        read_frames(
            Media(path, start=start, stop=start + 2), lambda count: np.arange(0, 60, 2), dataset=DatasetSettings()
        )


def processor_seconds(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            begun = time.process_time()
            job()
            taken[name].append(time.process_time() - begun)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first round imports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as place:
        root, jobs = Path(place), {}
        for name, codec in CODECS.items():
            path = write(root / f"{name}.mp4", FRAMES, *codec)
            jobs[f"{name} mp4 decord"] = lambda path=path: with_decord(path)
            for suffix in ("mp4", "mkv", "avi", "ts"):
                path = write(root / f"{name}.{suffix}", FRAMES, *codec)
                jobs[f"{name} {suffix}"] = lambda path=path: whole(path)
        path = write(root / "mpeg2.mpg", FRAMES, "mpeg2video", "-q:v", "4", "-bf", "2")
        jobs["mpeg2 mpg"] = lambda: whole(path)
        seconds = processor_seconds(jobs, options.rounds)
        long = {suffix: write(root / f"long.{suffix}", 1200, "libx264", "-g", "60") for suffix in ("mp4", "ts")}
        ten = {
            "ten spans, held": lambda: spans(long["mp4"], 64 * 2**20),
            "ten spans, sought": lambda: spans(long["mp4"], 0),
            "ten spans, in sequence (ts)": lambda: spans(long["ts"], 64 * 2**20),
        }
        seconds |= processor_seconds(ten, max(options.rounds // 5, 1))
    figures = {
        name: {"ms": round(1e3 * value, 1), **_beside_decord(name, value, seconds)} for name, value in seconds.items()
    }
    json.dump(figures, sys.stdout, indent=2)


def _beside_decord(name: str, value: float, seconds: dict[str, float]) -> dict[str, float]:
    reference = seconds.get(f"{name.split()[0]} mp4 decord")
    return {"ratio": round(value / reference, 2)} if reference else {}


if __name__ == "__main__":
    main()
