"""All kinds of sound against ffmpeg's sequential decoding (pytest -m stress tests/stress/test_every_sample.py -sn0).

What is accepted is what ffmpeg decodes, sample for sample: whole, and in spans asked for out of order; of what ffmpeg
can decode 99 % is accepted. The counts are printed per container.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from tally import Tally

from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

FFMPEG = shutil.which("ffmpeg")
pytestmark = [pytest.mark.stress, pytest.mark.skipif(not FFMPEG, reason="the ffmpeg command is not installed")]

STRICT = DatasetSettings(missing_frames="reject")
SUFFIXES = {
    "pcm_s16le": (".wav", ".w64", ".mov", ".mkv", ".avi", ".nut", ".caf"),
    "pcm_s16be": (".aiff", ".au", ".caf", ".mov"),
    "pcm_s24le": (".wav", ".w64", ".mkv", ".mov"),
    "pcm_s32le": (".wav", ".mkv"),
    "pcm_f32le": (".wav", ".w64", ".mkv", ".mov"),
    "pcm_f64le": (".wav", ".mkv"),
    "pcm_u8": (".wav", ".avi", ".mkv"),
    "pcm_mulaw": (".wav", ".au", ".mov", ".mkv"),
    "pcm_alaw": (".wav", ".mov", ".mkv"),
    "adpcm_ms": (".wav", ".avi", ".mkv"),
    "adpcm_ima_wav": (".wav", ".avi", ".mkv"),
    "flac": (".flac", ".mkv", ".mp4", ".oga"),
    "alac": (".m4a", ".mov", ".mkv", ".caf"),
    "tta": (".tta", ".mkv"),
    "wavpack": (".wv", ".mkv"),
    "aac": (".m4a", ".mp4", ".mov", ".mkv", ".aac", ".ts", ".flv", ".3gp", ".nut"),
    "libmp3lame": (".mp3", ".mp4", ".mkv", ".avi", ".flv", ".ts", ".nut"),
    "mp2": (".mp2", ".mpg", ".ts", ".mkv", ".avi"),
    "ac3": (".ac3", ".mp4", ".mkv", ".ts", ".vob", ".avi"),
    "eac3": (".eac3", ".mp4", ".mkv", ".ts"),
    "libvorbis": (".ogg", ".mkv", ".webm"),
    "libopus": (".opus", ".ogg", ".mkv", ".webm", ".mp4", ".ts"),
    "wmav2": (".wma", ".asf", ".wmv"),
}
LOSSLESS = ("pcm_", "flac", "alac", "tta", "wavpack", "adpcm_")
RATES = (8000, 16000, 44100, 48000)
KINDS = ("sound alone", "with a picture", "with a picture that begins later", "two channels")
WITH_PICTURE = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".flv", ".mpg", ".wmv", ".nut", ".3gp")


def ffmpeg(*arguments: object, data: bytes | None = None) -> bytes | None:
    """What it writes; None where it fails or complains."""
    command = [FFMPEG, "-hide_banner", "-v", "error", "-y", *map(str, arguments)]
    result = subprocess.run(command, input=data, capture_output=True, check=False)
    return result.stdout if result.returncode == 0 and not result.stderr else None


def decoded(path: Path) -> np.ndarray | None:
    """[S] float32: what ffmpeg decodes from the file's beginning, mixed down; None where it cannot."""
    raw = ffmpeg("-i", path, "-map", "0:a:0", "-f", "f32le", "-")
    probe = ffmpeg("-i", path, "-map", "0:a:0", "-t", 0.01, "-f", "wav", "-")
    if not raw or not probe:
        return None
    channels = int.from_bytes(probe[22:24], "little")
    return np.frombuffer(raw, np.float32).reshape(-1, channels).mean(axis=1)


def decoded_by_pyav(path: Path) -> np.ndarray:
    """The same by the FFmpeg that PyAV brings, which may round otherwise than an older command."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(container.streams.audio[0])]
        channels = container.streams.audio[0].codec_context.channels
    samples = np.concatenate([f if len(f) == channels else f.reshape(-1, channels).T for f in frames], axis=1)
    scale = {np.dtype(np.int16): 2.0**15, np.dtype(np.int32): 2.0**31}.get(samples.dtype, 1.0)
    return (samples / scale).mean(axis=0)


def make(path: Path, codec: str, rate: int, kind: str, seed: int) -> bool:
    """Three seconds of noise and a tone; whether ffmpeg can write such a file."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.05, (3 * rate, 2)) + 0.3 * np.sin(np.arange(3 * rate) / rate * 2764)[:, None]
    raw = np.clip(samples, -1, 1).astype(np.float32).tobytes()
    sound = ("-f", "f32le", "-ar", rate, "-ac", 2, "-i", "-")
    if codec in ("libmp3lame", "mp2") and rate < 16000:
        return False
    picture: tuple[object, ...] = ()
    if kind.startswith("with"):
        if path.suffix not in WITH_PICTURE:
            return False
        late = ("-itsoffset", 0.48) if kind.endswith("later") else ()
        video = {".webm": ("libvpx", "-b:v", "200k"), ".wmv": ("wmv2",), ".mpg": ("mpeg2video",)}.get(
            path.suffix, ("mpeg4",)
        )
        picture = (*late, "-f", "lavfi", "-i", "testsrc=s=64x64:r=25:d=3", "-map", "1:v", "-c:v", *video)
    channels = 2 if kind == "two channels" else 1
    written = ffmpeg(*sound, *picture, "-map", "0:a", "-c:a", codec, "-ac", channels, "-strict", -2, path, data=raw)
    return written is not None and path.is_file()


@pytest.fixture(scope="module")
def tally():
    tally = Tally()
    yield tally
    tally.close()
    counts = tally.files["all"]
    assert counts["rejected"] <= 0.01 * sum(counts.values())


def read(path: Path, **span: float) -> tuple[np.ndarray, int]:
    return read_audio(Media(path, **span), dataset=STRICT)


def silence_before(heard: np.ndarray, truth: np.ndarray, rate: int, tolerance: float) -> int | None:
    """Samples of silence before a sound that begins after its file does, which a plain decode leaves out.

    None where what is heard after them is not the truth.
    """
    before = len(heard) - len(truth)
    if not 0 <= before <= 0.7 * rate or np.abs(heard[:before]).max(initial=0.0) > tolerance:
        return None
    return before if np.abs(heard[before:] - truth).max() <= tolerance else None


@pytest.mark.parametrize("codec", SUFFIXES)
def test_every_sound_is_what_ffmpeg_decodes(tmp_path, codec, tally):
    wrong = []
    tolerance = 2e-7 if codec.startswith(LOSSLESS) else 1e-4
    for seed, (suffix, rate, kind) in enumerate(itertools.product(SUFFIXES[codec], RATES, KINDS)):
        path = tmp_path / f"{codec}-{rate}-{seed}{suffix}"
        truth = decoded(path) if make(path, codec, rate, kind, seed) else None
        if truth is None:
            continue
        try:
            whole, its_rate = read(path)
        except MediaError as error:
            tally.add(codec, path, "rejected", error.cause)
            continue
        before = silence_before(whole, truth, its_rate, tolerance)
        outcome = "equal"
        if before is None:
            before = silence_before(whole, decoded_by_pyav(path), its_rate, tolerance)
            outcome = "equal to PyAV's FFmpeg, not to the command's"
        if before is None:
            outcome, before = "wrong", 0
            wrong.append(f"{path.name} ({kind}): {len(whole)} samples, ffmpeg has {len(truth)}")
        rng = np.random.default_rng(seed)
        for start in rng.uniform(before / its_rate, len(whole) / its_rate - 0.5, 4):
            first, last = round(start * its_rate), round((start + 0.4) * its_rate)
            part, _ = read(path, start=start, stop=start + 0.4)
            if not np.array_equal(part, whole[first:last]):
                outcome = "wrong"
                wrong.append(f"{path.name} ({kind}): the span from {start:.3f} s")
        tally.add(codec, path, outcome)
        path.unlink()
    assert not wrong, "\n".join(wrong)
