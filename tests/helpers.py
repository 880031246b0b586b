"""Small real media files for tests, written by OpenCV and soundfile, and ways to spoil them."""

from __future__ import annotations

import csv
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile

from mbcd_cli.errors import MediaError

AV_DIGITS = Path(__file__).resolve().parents[2] / "shared" / "data" / "av-digits"
"""The real test dataset, beside the repository where it is present."""

needs_av_digits = pytest.mark.skipif(not AV_DIGITS.is_dir(), reason="the av-digits dataset is not beside the clone")


def cause(reading: Callable[[], object]) -> str:
    """Why `reading` finds its file unusable; the error names the file and a remedy."""
    with pytest.raises(MediaError) as caught:
        reading()
    assert caught.value.remedy
    assert caught.value.file in str(caught.value)
    return caught.value.cause


def run(code: str, *arguments: object, **environ: str) -> subprocess.Popen:
    """A process that runs `code`, its stdin and stdout piped."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environ}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


_WITHOUT_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int handle, int kind) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


def without_flock(folder: Path, number: int) -> dict[str, str]:
    """An environment in which `flock` answers what NFS or Lustre without locks answer; skips without a C compiler."""
    return {"LD_PRELOAD": str(shim(folder, _WITHOUT_FLOCK)), "FLOCK_ERRNO": str(number)}


def shim(folder: Path, source: str) -> Path:
    """A library to preload, compiled from C."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    (folder / "shim.c").write_text(source)
    library = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True)
    return library


def in_child(action) -> int:
    """Run `action` in a forked child; its exit status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def until(there: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Look again and again, for a minute at most, until something is there; `process` has to live until then."""
    for _ in range(30_000):
        if there():
            return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.002)
    assert there(), "it never came"


def numbered_frames(count: int = 16, height: int = 48, width: int = 64) -> np.ndarray:
    """[count <= 25, H, W, 3] uint8: frame t is plain grey of level 10 t, with a red corner at the top left."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = 10 * np.arange(count).reshape(-1, 1, 1, 1)
    frames[:, : height // 4, : width // 4] = (220, 30, 30)
    return frames


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `numbered_frames` these are, told by the grey at the lower right."""
    return [round(float(frame[-8:, -8:].mean()) / 10) for frame in frames]


def moving_texture(count: int, side: int = 64, *, dx: float = 2.0, dy: float = 0.0, seed: int = 0) -> np.ndarray:
    """[count, side, side, 3] uint8: a smooth random texture that moves by (dx, dy) pixels per frame."""
    noise = np.random.default_rng(seed).uniform(0, 255, (side * 2, side * 2)).astype(np.float32)
    big = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    frames = []
    for t in range(count):
        shift = np.float32([[1, 0, t * dx - side / 2], [0, 1, t * dy - side / 2]])
        frames.append(cv2.warpAffine(big, shift, (side, side)))
    return np.repeat(np.rint(np.stack(frames)).astype(np.uint8)[..., None], 3, axis=-1)


def write_video(path: Path, frames: np.ndarray, *, fps: float = 16, codec: str | None = None) -> Path:
    """Frames [T, H, W, 3] RGB or [T, H, W] grey -> a video file; the suffix says which container (avi is MJPG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=-1)
    fourcc = cv2.VideoWriter_fourcc(*(codec or ("MJPG" if path.suffix == ".avi" else "mp4v")))
    writer = cv2.VideoWriter(str(path), fourcc, fps, (frames.shape[2], frames.shape[1]))
    assert writer.isOpened(), f"OpenCV cannot write {path.suffix}"
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


write_mp4 = write_video


def write_frames(folder: Path, frames: np.ndarray, *, first: int = 1, suffix: str = "jpg") -> Path:
    """Frames -> folder/frame_0000000001.jpg and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, start=first):
        image = frame if frame.ndim == 2 else np.ascontiguousarray(frame[..., ::-1])
        cv2.imwrite(str(folder / f"frame_{number:010d}.{suffix}"), image, [cv2.IMWRITE_JPEG_QUALITY, 98])
    return folder


def tone(seconds: float = 0.5, *, rate: int = 8000, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    """A sine wave, [seconds * rate] float64."""
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_wav(path: Path, samples: np.ndarray, *, rate: int = 8000, subtype: str = "PCM_16") -> Path:
    """Samples [S] or [S, channels] -> a wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def write_array(path: Path, values: np.ndarray) -> Path:
    """A tensor -> a .npy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)
    return path


def write_manifest(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] | None = None) -> Path:
    """Rows -> a CSV file; the columns are the first row's unless given."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


SMALL = [
    "modalities.video.frames=4",
    "modalities.video.short_side=24",
    "modalities.video.crop=20",
    "modalities.video.width=2",
    "modalities.audio.samples=4000",
    "modalities.audio.nperseg=128",
    "modalities.audio.noverlap=64",
    "modalities.audio.width=2",
    "cache.views=2",
    "cache.shard_clips=3",
    "cache.workers=0",
    "model.hidden=8",
]
"""Settings (`--set`) that make the tiny dataset of `write_dataset` quick to prepare and train on."""


def write_dataset(
    root: Path,
    *,
    domains: Sequence[str] = ("alpha", "beta"),
    classes: int = 2,
    train: int = 2,
    test: int = 1,
    seed: int = 0,
) -> Path:
    """A tiny dataset of real media (16-frame mp4s, half-second wavs, .npy vectors) with its manifest.csv.

    Class shows as brightness of the picture, pitch of the sound and mean of the vector.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for domain in domains:
        for label in range(classes):
            for number in range(train + test):
                identity = f"{domain}_{label}_{number}"
                frames = moving_texture(16, seed=int(rng.integers(1 << 30))).astype(np.float64)
                frames = np.clip(frames * 0.3 + 150 * (label + 0.5) / classes, 0, 255).astype(np.uint8)
                sound = tone(hertz=400 * (label + 1)) + rng.normal(0, 0.01, 4000)
                write_video(root / "video" / f"{identity}.mp4", frames)
                write_wav(root / "audio" / f"{identity}.wav", sound)
                write_array(root / "pose" / f"{identity}.npy", rng.normal(label, 0.5, 6).astype(np.float32))
                rows.append(
                    {
                        "id": identity,
                        "domain": domain,
                        "split": "train" if number < train else "test",
                        "label": label,
                        "label_name": f"class{label}",
                        "video": f"video/{identity}.mp4",
                        "audio": f"audio/{identity}.wav",
                        "pose": f"pose/{identity}.npy",
                    }
                )
    write_manifest(root / "manifest.csv", rows)
    return root


# --- spoiling and changing mp4 files, byte by byte -----------------------------------------------------------------


def _box(data: bytes, kind: bytes) -> int:
    at = data.index(kind)
    assert data.count(kind) >= 1
    return at + 4  # the first byte of the box's content


def rotate_mp4(source: Path, target: Path, degrees: int) -> Path:
    """The same video with display rotation in its track header, as phones write it."""
    data = bytearray(source.read_bytes())
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    at = _box(data, b"tkhd") + 40
    one = 0x10000
    data[at : at + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 0x40000000)
    target.write_bytes(data)
    return target


def trim_mp4(source: Path, target: Path, *, skip: float, seconds: float) -> Path:
    """The same file with an edit list that shows only `seconds` from `skip` on, as cutting without re-encoding does."""
    data = bytearray(source.read_bytes())
    (scale,) = struct.unpack_from(">I", data, _box(data, b"mdhd") + 12)
    (movie_scale,) = struct.unpack_from(">I", data, _box(data, b"mvhd") + 12)
    at = _box(data, b"elst") + 8
    (begin,) = struct.unpack_from(">i", data, at + 4)
    struct.pack_into(">Ii", data, at, round(seconds * movie_scale), begin + round(skip * scale))
    target.write_bytes(data)
    return target


def retime_mp4(source: Path, target: Path, durations: Sequence[int]) -> Path:
    """The same frames shown for uneven times: `durations` in units of the first frame's, one per frame."""
    data = bytearray(source.read_bytes())
    at = _box(data, b"stts")
    count, unit = struct.unpack_from(">II", data, at + 8)
    assert len(durations) == count
    entries = b"".join(struct.pack(">II", 1, unit * d) for d in durations)
    table = bytes(data[at : at + 4]) + struct.pack(">I", count) + entries
    (old,) = struct.unpack_from(">I", data, at - 8)
    grown = len(table) + 8 - old
    # The index lies at the file's end, so that only the sizes of the boxes around the table change.
    assert data.index(b"mdat") < data.index(b"moov")
    data[at : at - 8 + old] = table
    struct.pack_into(">I", data, at - 8, old + grown)
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        place = _box(data, kind) - 8
        (size,) = struct.unpack_from(">I", data, place)
        struct.pack_into(">I", data, place, size + grown)
    (scale,) = struct.unpack_from(">I", data, _box(data, b"mdhd") + 12)
    struct.pack_into(">I", data, _box(data, b"mdhd") + 16, unit * sum(durations))
    (movie_scale,) = struct.unpack_from(">I", data, _box(data, b"mvhd") + 12)
    whole = round(unit * sum(durations) / scale * movie_scale)
    struct.pack_into(">I", data, _box(data, b"mvhd") + 16, whole)
    struct.pack_into(">I", data, _box(data, b"tkhd") + 20, whole)
    struct.pack_into(">I", data, _box(data, b"elst") + 8, whole)
    target.write_bytes(data)
    return target
