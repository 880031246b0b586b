"""Videos of every kind whose frames carry their own number, and what ffmpeg shows of them.

The `ffmpeg` command encodes, rewraps and decodes where it is installed; elsewhere PyAV's encoders and a plain
sequential read with PyAV do, and what only the command can make is left out (None).

Letters: N frames, H W pixels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mbcd_cli.data.media import video
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media
from mbcd_cli.settings import DatasetSettings

FFMPEG = shutil.which("ffmpeg")
_BITS, _CHECKED = 11, 5  # 16 blocks: the number, and its remainder, by which a torn picture is told from another's
_PRIME, _SALT = 31, 19
_DARK, _BRIGHT = 40, 215
ILLEGIBLE = -1


def close_recordings() -> None:
    """What this thread keeps open is opened anew."""
    while video._recordings._entries:
        video._recordings._entries.pop()[1].close()


def picture_of(number: int, width: int = 64, height: int = 64) -> np.ndarray:
    """[H, W] uint8: `number` (< 2048) as 4 x 4 dark and bright blocks."""
    code = number | (number * _SALT + 7) % _PRIME << _BITS
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    bits = code >> (4 * rows[:, None] + columns) & 1
    return np.where(bits, _BRIGHT, _DARK).astype(np.uint8)


def number_of(picture: np.ndarray) -> int:
    """The number that a picture [H, W] or [H, W, 3] shows, or `ILLEGIBLE`."""
    grey = picture if picture.ndim == 2 else picture[..., 1]
    height, width = grey.shape
    code = 0
    for block in range(16):
        y, x = divmod(block, 4)
        rows = slice((8 * y + 2) * height // 32, -((-8 * y - 6) * height // 32))
        columns = slice((8 * x + 2) * width // 32, -((-8 * x - 6) * width // 32))
        level = float(grey[rows, columns].mean())
        if 95 < level < 160:
            return ILLEGIBLE
        code |= (level > 127) << block
    number = code & (1 << _BITS) - 1
    return number if code >> _BITS == (number * _SALT + 7) % _PRIME else ILLEGIBLE


def numbers_of(pictures: Iterable[np.ndarray]) -> list[int]:
    """`number_of` each."""
    return [number_of(picture) for picture in pictures]


# --- encoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coding:
    """How the frames of a video are encoded.

    Attributes:
        encoder: FFmpeg's name of it.
        options: the encoder's, by FFmpeg's names.
        pixels: FFmpeg's name of the pixel format.
        passes: 2 where the encoder looks at all frames before it writes the first.
        rate: frames per second.
        frames: N before `dropped`.
        dropped: of every so many frames one is left out and the one before it stays: a variable rate.
        draw: (number, W, H) -> what a frame shows, [H, W] or [H, W, 3].
    """

    encoder: str
    options: dict[str, str | int] = field(default_factory=dict)
    pixels: str = "yuv420p"
    passes: int = 1
    rate: Fraction = Fraction(25)
    frames: int = 48
    size: tuple[int, int] = (64, 64)
    dropped: int | None = None
    draw: Callable[[int, int, int], np.ndarray] = picture_of

    def pictures(self) -> dict[int, np.ndarray]:
        """What each frame shows, by number."""
        kept = [n for n in range(self.frames) if not self.dropped or n % self.dropped != self.dropped - 2]
        return {n: self.draw(n, *self.size) for n in kept}


def command(*arguments: object, data: bytes | None = None) -> bytes:
    """What `ffmpeg` writes to its standard output.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    words = [str(FFMPEG), "-hide_banner", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(words, input=data, check=True, capture_output=True, timeout=120).stdout


def encode(path: Path, coding: Coding, *muxing: object) -> Path | None:
    """A video of one picture stream; None where it cannot be made here.

    Args:
        path: its suffix says which container.
        coding: the picture.
        muxing: further output options of the `ffmpeg` command.
    """
    try:
        if FFMPEG:
            _encode_with_command(path, coding, muxing)
        elif muxing or coding.passes > 1:
            return None
        else:
            _encode_with_pyav(path, coding)
    except (subprocess.CalledProcessError, av.FFmpegError, ValueError):
        path.unlink(missing_ok=True)
        return None
    return path


def _encode_with_command(path: Path, coding: Coding, muxing: tuple) -> None:
    pictures = coding.pictures()
    whole = [pictures.get(n, pictures[0]) for n in range(coding.frames)]
    layout = "gray" if whole[0].ndim == 2 else "rgb24"
    words = ["-f", "rawvideo", "-pix_fmt", layout, "-s", "{}x{}".format(*coding.size), "-r", coding.rate, "-i", "-"]
    if coding.dropped:
        words += ["-vf", f"select='not(eq(mod(n,{coding.dropped}),{coding.dropped - 2}))'", "-fps_mode", "vfr"]
    words += ["-c:v", coding.encoder, "-pix_fmt", coding.pixels, "-threads", 1]
    for name, value in coding.options.items():
        words += [f"-{name}:v", value]
    raw = b"".join(picture.tobytes() for picture in whole)
    with tempfile.TemporaryDirectory() as folder:
        log = ["-passlogfile", Path(folder) / "log"] if coding.passes > 1 else []
        for number in range(1, coding.passes):
            command(*words, *log, "-pass", number, "-f", "null", "-", data=raw)
        command(*words, *log, *(["-pass", 2] if log else []), *muxing, path, data=raw)


def _encode_with_pyav(path: Path, coding: Coding) -> None:
    with av.open(str(path), "w") as container:
        options = {name: str(value) for name, value in coding.options.items()}
        stream = container.add_stream(coding.encoder, rate=coding.rate, options=options)
        stream.width, stream.height = coding.size
        stream.pix_fmt = coding.pixels
        stream.codec_context.thread_count = 1
        for number, picture in coding.pictures().items():
            frame = av.VideoFrame.from_ndarray(picture, format="gray" if picture.ndim == 2 else "rgb24")
            frame.pts, frame.time_base = number, 1 / Fraction(coding.rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def rewrap(path: Path, *arguments: object) -> Path | None:
    """What `ffmpeg` makes of these arguments (inputs and output options), written to `path`; None where it cannot."""
    if not FFMPEG:
        return None
    try:
        command(*arguments, path)
    except subprocess.CalledProcessError:
        path.unlink(missing_ok=True)
        return None
    return path


def pipe(path: Path, *arguments: object) -> Path | None:
    """The same through a pipe: a live file, of which no header was completed at its end."""
    if not FFMPEG:
        return None
    try:
        path.write_bytes(command(*arguments, "-"))
    except subprocess.CalledProcessError:
        path.unlink(missing_ok=True)
        return None
    return path


# --- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """Frames in the order of a sequential read.

    Attributes:
        pictures: N of [H, W] uint8, grey, or [H, W, 3] RGB.
        times: [N] seconds at which each begins, from the file's own beginning; NaN where it has none.
    """

    pictures: Sequence[np.ndarray]
    times: np.ndarray

    @property
    def numbers(self) -> list[int]:
        """[N] the numbers that they carry."""
        return numbers_of(self.pictures)

    def within(self, start: float, stop: float) -> list[int]:
        """Places of those whose middle lies in [start, stop) seconds."""
        step = float(np.median(np.diff(self.times)))
        middles = self.times + np.minimum(np.diff(self.times, append=self.times[-1] + step), step) / 2
        return np.flatnonzero((middles >= start) & (middles < stop)).tolist()


def shown(path: Path, *, stream: int = 0, rgb: bool = False) -> Shown | None:
    """What ffmpeg's sequential decoding shows of a picture stream, turned upright; None where it shows nothing."""
    return shown_by_command(path, stream, rgb) if FFMPEG else shown_by_pyav(path, stream, rgb)


def shown_by_command(path: Path, stream: int = 0, rgb: bool = False) -> Shown | None:
    """As the `ffmpeg` command decodes it."""
    words = ["-hide_banner", "-threads", "1", "-copyts", "-i", path, "-map", f"0:v:{stream}", "-vf", "showinfo"]
    words += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24" if rgb else "gray", "-"]
    done = subprocess.run([str(FFMPEG), *map(str, words)], capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
    lines = re.findall(r"n: *\d+ pts: *\S+ pts_time:(\S+) .*? s:(\d+)x(\d+) ", done.stderr.decode("utf-8", "replace"))
    if not lines:
        return None
    width, height = map(int, lines[0][1:])
    pictures = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, *([3] if rgb else []))
    times = np.array([float("nan") if time == "NOPTS" else float(time) for time, *_ in lines])
    with av.open(str(path), metadata_errors="replace") as container:
        return Shown(pictures, times[: len(pictures)] - _beginning(container))


def _beginning(container: av.container.InputContainer) -> float:
    """Seconds at which the earliest of a file's picture and sound streams begins; run-in before 0 is not played."""
    media = [*container.streams.video, *container.streams.audio]
    starts = (float(stream.start_time * stream.time_base) for stream in media if stream.start_time is not None)
    return max(min(starts, default=0.0), 0.0)


def shown_by_pyav(path: Path, stream: int = 0, rgb: bool = False) -> Shown | None:
    """As a plain sequential read with PyAV has it: the same libraries that `mbcd` uses, another road."""
    pictures, times = [], []
    with av.open(str(path), metadata_errors="replace") as container:
        zero = _beginning(container)
        picture = container.streams.video[stream]
        picture.thread_count = 1
        for packet in container.demux(picture):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                image = frame.to_ndarray(format="rgb24" if rgb else "gray")
                pictures.append(np.rot90(image, frame.rotation // 90))
                times.append(float("nan") if frame.pts is None else float(frame.pts * frame.time_base) - zero)
    return Shown(pictures, np.array(times)) if pictures else None


# --- what mbcd shows of it -------------------------------------------------------------------------------------------

_UNTIMED = (".avi", ".wmv", ".asf", ".h264", ".hevc", ".m1v", ".m2v", ".mjpeg", ".h263", ".obu")
"""Containers that do not say when a frame is shown: AVI and ASF have the rhythm of decoding, bare streams nothing."""
STRICT = DatasetSettings(missing_frames="reject", min_frames=1)


def every(count: int) -> np.ndarray:
    """All frames of a clip."""
    return np.arange(count)


def differences(path: Path, truth: Shown, *, seed: int = 0, spans: int = 3) -> list[str]:
    """Where what `read_frames` gives is not what is shown: the whole file, and spans of it asked for out of order.

    Raises:
        MediaError: the file is not accepted.
    """
    expected, wrong = truth.numbers, []

    def compare(what: str, places: list[int], **span: object) -> None:
        got = numbers_of(read_frames(Media(path, **span), every, dataset=STRICT))
        if got != [expected[place] for place in places]:
            wrong.append(f"{path.name}, {what}: {got}, and it shows {[expected[place] for place in places]}")

    count, rng = len(expected), np.random.default_rng(seed)
    compare("whole", list(range(count)))
    for _ in range(spans):
        start, stop = sorted(rng.choice(count + 1, 2, replace=False).tolist()) if count else (0, 0)
        compare(f"frames {start}:{stop}", list(range(start, stop)), start=start, stop=stop, unit="frame")
    rising = count > 1 and not np.isnan(truth.times).any() and (np.diff(truth.times) > 0).all()
    for _ in range(spans if rising and path.suffix not in _UNTIMED else 0):
        first, last = sorted(rng.choice(count, 2, replace=False).tolist())
        start, stop = float(truth.times[first]), float(truth.times[last])
        compare(f"{start:.3f} to {stop:.3f} s", truth.within(start, stop), start=start, stop=stop)
    return wrong
