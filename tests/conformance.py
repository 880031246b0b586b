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
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media
from mbcd_cli.settings import DatasetSettings

FFMPEG = shutil.which("ffmpeg")
_BITS, _CHECKED = 11, 5  # 16 blocks: the number, and its remainder, by which a torn picture is told from another's
_PRIME, _SALT = 31, 19
_DARK, _BRIGHT = 40, 215
ILLEGIBLE = -1


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


# --- kinds of files --------------------------------------------------------------------------------------------------

_X264 = {"preset": "veryfast", "g": 12, "bf": 3}
_X265 = {"preset": "ultrafast"}
_VPX = {"b": "200k", "deadline": "realtime", "cpu-used": 8}
_ALTREF = {"b": "200k", "auto-alt-ref": 1, "lag-in-frames": 16, "deadline": "good", "cpu-used": 5}
_SVT = {"preset": 12, "svtav1-params": "lp=1"}


def _x264(parameters: str, **options: str | int) -> Coding:
    return Coding("libx264", {**_X264, **options, "x264-params": parameters})


def _x265(parameters: str, **options: str | int) -> Coding:
    return Coding("libx265", {**_X265, **options, "x265-params": "log-level=none:pools=none:" + parameters})


CODINGS: dict[str, Coding] = {
    "h264": Coding("libx264"),
    "h264 intra": Coding("libx264", {"g": 1}),
    "h264 closed": Coding("libx264", _X264),
    "h264 open": _x264("open-gop=1:keyint=12:min-keyint=12:bframes=8:b-adapt=0:scenecut=0"),
    "h264 long": _x264("keyint=infinite:scenecut=0"),
    "h264 pyramid": _x264("b-pyramid=strict:b-adapt=0:bframes=7", g=24),
    "h264 refresh": _x264("intra-refresh=1:keyint=12:bframes=0"),
    "h264 no b": Coding("libx264", {"g": 12, "bf": 0}),
    "h264 field": _x264("tff=1"),
    "h264 field open": _x264("bff=1:open-gop=1:b-adapt=0"),
    "h264 baseline": Coding("libx264", {"profile": "baseline", "g": 10}),
    "h264 live": Coding("libx264", {"tune": "zerolatency", "g": 12}),
    "h264 slices": _x264("slices=4:aud=1"),
    "h264 bluray": _x264("bluray-compat=1:nal-hrd=vbr:vbv-maxrate=2000:vbv-bufsize=2000"),
    "h264 filler": _x264("nal-hrd=cbr:vbv-maxrate=500:vbv-bufsize=500:bitrate=500", b="500k"),
    "h264 two-pass": Coding("libx264", {"b": "100k", "bf": 8}, passes=2),
    "h264 4:2:2": Coding("libx264", _X264, pixels="yuv422p"),
    "h264 4:4:4": Coding("libx264", _X264, pixels="yuv444p", size=(63, 51)),
    "h264 10 bit": Coding("libx264", _X264, pixels="yuv420p10le"),
    "h264 gray": Coding("libx264", _X264, pixels="gray"),
    "h264 rgb": Coding("libx264rgb", {"g": 12, "crf": 20}, pixels="rgb24"),
    "h264 uneven": Coding("libx264", _X264, dropped=5),
    "h264 15": Coding("libx264", _X264, rate=Fraction(15)),
    "h264 film": Coding("libx264", _X264, rate=Fraction(24000, 1001), size=(98, 74)),
    "h264 ntsc": Coding("libx264", _X264, rate=Fraction(30000, 1001)),
    "h264 50": Coding("libx264", _X264, rate=Fraction(50), frames=100),
    "h264 60": Coding("libx264", _X264, rate=Fraction(60), frames=120),
    "h264 120": Coding("libx264", _X264, rate=Fraction(120), frames=120),
    "h264 slow": Coding("libx264", _X264, rate=Fraction(1, 2), frames=24),
    "hevc": _x265("keyint=60", preset="fast"),
    "hevc intra": _x265("keyint=1"),
    "hevc closed": _x265("open-gop=0:keyint=12:bframes=4"),
    "hevc open": _x265("open-gop=1:keyint=12:min-keyint=12:bframes=8:b-adapt=0:scenecut=0:rc-lookahead=20"),
    "hevc radl": _x265("open-gop=0:keyint=12:min-keyint=12:bframes=4:b-adapt=0:radl=2"),
    "hevc no b": _x265("bframes=0:keyint=12"),
    "hevc refresh": _x265("intra-refresh=1:keyint=12:bframes=0"),
    "hevc field": _x265("interlace=tff:keyint=12"),
    "hevc 10 bit": replace(_x265("keyint=12"), pixels="yuv420p10le"),
    "hevc 4:4:4": replace(_x265("keyint=12"), pixels="yuv444p", size=(66, 50)),
    "hevc uneven": replace(_x265("keyint=12:bframes=4"), dropped=4),
    "hevc film": replace(_x265("keyint=24:bframes=3"), rate=Fraction(24000, 1001)),
    "vp8": Coding("libvpx", _VPX),
    "vp8 closed": Coding("libvpx", {**_VPX, "g": 12}),
    "vp8 hidden": Coding("libvpx", {**_ALTREF, "g": 30}, passes=2, frames=96),
    "vp8 hidden uneven": Coding("libvpx", _ALTREF, passes=2, frames=96, dropped=7),
    "vp8 alpha": Coding("libvpx", {"b": "200k", "auto-alt-ref": 0}, pixels="yuva420p"),
    "vp9": Coding("libvpx-vp9", _VPX),
    "vp9 closed": Coding("libvpx-vp9", {**_VPX, "g": 12}),
    "vp9 hidden": Coding("libvpx-vp9", _ALTREF, passes=2, frames=96),
    "vp9 4:4:4": Coding("libvpx-vp9", _VPX, pixels="yuv444p", size=(63, 51)),
    "vp9 10 bit": Coding("libvpx-vp9", {**_VPX, "profile": 2}, pixels="yuv420p10le"),
    "vp9 lossless odd": Coding("libvpx-vp9", {**_VPX, "lossless": 1}, size=(61, 47)),
    "vp9 alpha": Coding("libvpx-vp9", {"b": "200k", "cpu-used": 8, "auto-alt-ref": 0}, pixels="yuva420p"),
    "vp9 ntsc": Coding("libvpx-vp9", _ALTREF, rate=Fraction(30000, 1001)),
    "av1": Coding("libsvtav1", _SVT),
    "av1 closed": Coding("libsvtav1", {**_SVT, "g": 12}),
    "av1 aom": Coding("libaom-av1", {"cpu-used": 8, "usage": "realtime", "g": 24}),
    "av1 aom hidden": Coding("libaom-av1", {"cpu-used": 8, "lag-in-frames": 19, "g": 24}),
    "mpeg4": Coding("mpeg4", {"q": 3}),
    "mpeg4 b": Coding("mpeg4", {"q": 3, "bf": 2}),
    "mpeg4 intra": Coding("mpeg4", {"q": 3, "g": 1}),
    "mpeg4 closed": Coding("mpeg4", {"q": 3, "bf": 2, "flags": "+cgop", "g": 12}),
    "mpeg4 long": Coding("mpeg4", {"q": 3, "bf": 1, "g": 300}),
    "mpeg4 field": Coding("mpeg4", {"q": 3, "bf": 2, "flags": "+ildct+ilme"}),
    "mpeg4 uneven": Coding("mpeg4", {"q": 3, "bf": 2}, dropped=6),
    "mpeg4 xvid": Coding("libxvid", {"q": 3, "bf": 2}),
    "mpeg4 qpel": Coding("mpeg4", {"q": 3, "bf": 2, "flags": "+qpel"}),
    "mpeg2": Coding("mpeg2video", {"q": 3}),
    "mpeg2 b": Coding("mpeg2video", {"q": 3, "bf": 2}),
    "mpeg2 intra": Coding("mpeg2video", {"q": 3, "g": 1}),
    "mpeg2 closed": Coding("mpeg2video", {"q": 3, "bf": 2, "flags": "+cgop", "sc_threshold": 1000000000}),
    "mpeg2 field": Coding("mpeg2video", {"q": 3, "bf": 2, "flags": "+ildct+ilme", "alternate_scan": 1}),
    "mpeg2 4:2:2": Coding("mpeg2video", {"q": 3, "bf": 2}, pixels="yuv422p"),
    "mpeg2 ntsc": Coding("mpeg2video", {"q": 3, "bf": 2}, rate=Fraction(30000, 1001)),
    "mpeg1": Coding("mpeg1video", {"q": 3}),
    "mpeg1 b": Coding("mpeg1video", {"q": 3, "bf": 2}),
    "h263": Coding("h263", {"q": 3}, size=(128, 96), rate=Fraction(30000, 1001)),
    "h263p": Coding("h263p", {"q": 3}, size=(64, 64)),
    "flv1": Coding("flv", {"q": 3}),
    "wmv1": Coding("wmv1", {"q": 3}),
    "wmv2": Coding("wmv2", {"q": 3}),
    "msmpeg4": Coding("msmpeg4", {"q": 3}),
    "msmpeg4v2": Coding("msmpeg4v2", {"q": 3}),
    "theora": Coding("libtheora", {"q": 7, "g": 12}),
    "theora uneven": Coding("libtheora", {"q": 7, "g": 64}, dropped=6),
    "mjpeg": Coding("mjpeg", {"q": 3}, pixels="yuvj420p"),
    "mjpeg 4:4:4": Coding("mjpeg", {"q": 3}, pixels="yuvj444p", size=(63, 51)),
    "ljpeg": Coding("ljpeg", pixels="yuvj420p"),
    "prores": Coding("prores_ks", pixels="yuv422p10le"),
    "prores alpha": Coding("prores_ks", pixels="yuva444p10le"),
    "dnxhd": Coding("dnxhd", {"profile": "dnxhr_lb"}, pixels="yuv422p", size=(256, 144), frames=24),
    "ffv1": Coding("ffv1"),
    "ffv1 long": Coding("ffv1", {"level": 3, "g": 12}, pixels="yuv422p10le"),
    "ffv1 gray": Coding("ffv1", pixels="gray", size=(61, 47)),
    "ffvhuff": Coding("ffvhuff"),
    "huffyuv": Coding("huffyuv", pixels="yuv422p"),
    "utvideo": Coding("utvideo"),
    "magicyuv": Coding("magicyuv", pixels="gbrp"),
    "rawvideo": Coding("rawvideo"),
    "png": Coding("png", pixels="rgba"),
    "jpeg2000": Coding("jpeg2000"),
    "qtrle": Coding("qtrle", pixels="rgb24"),
    "cinepak": Coding("cinepak", {"max_strips": 1}, pixels="rgb24", frames=16),
    "svq1": Coding("svq1"),
    "snow": Coding("snow", {"strict": "experimental"}),
    "zmbv": Coding("zmbv", pixels="pal8"),
    "flashsv": Coding("flashsv", pixels="bgr24"),
    "msvideo1": Coding("msvideo1", pixels="rgb555le"),
    "gif": Coding("gif", pixels="gray"),
    "apng": Coding("apng", pixels="gray"),
    "rv10": Coding("rv10", {"q": 3}),
    "rv20": Coding("rv20", {"q": 3}),
    "dv": Coding("dvvideo", pixels="yuv420p", size=(720, 576), frames=16),
    "cfhd": Coding("cfhd", pixels="yuv422p10le", size=(128, 64)),
    "vc2": Coding("vc2", pixels="yuv420p"),
    "asv1": Coding("asv1", {"q": 3}),
    "dirac": Coding("vc2", pixels="yuv444p"),
}
"""Streams by name, the codec first; every first one of a codec is as FFmpeg writes it by default."""

SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".flv", ".ts", ".m2ts", ".mpg", ".vob", ".wmv", ".asf", ".ogv"),
    *(".3gp", ".nut", ".mxf", ".gif", ".apng", ".rm", ".dv", ".h264", ".hevc", ".m1v", ".m2v", ".mjpeg", ".ivf"),
    *(".obu", ".h263", ".y4m", ".wtv", ".f4v", ".mj2", ".3g2"),
)
"""Containers, by the suffix that FFmpeg knows them by; a codec that one does not take is left out there."""


def wrappings(folder: Path, source: Path, seconds: float) -> dict[str, Path]:
    """One picture in every way in which containers may hold it: fragmented, live, early, late, with sound, ...

    Args:
        folder: where they are written.
        source: a file of one picture stream, which is copied.
        seconds: its length.
    """
    picture = ["-i", source]
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "words.srt"
    words.write_text(f"1\n00:00:00,100 --> 00:00:{int(seconds) + 30},000\nstill talking\n")
    cover = folder / "cover.png"
    rewrap(cover, "-f", "lavfi", "-i", "color=red:s=64x64:d=0.04", "-frames:v", 1)

    def tone(length: float) -> list:
        return ["-f", "lavfi", "-i", f"sine=440:d={length}"]

    both, copy = ["-map", "0:v", "-map", "1:a", "-c:v", "copy"], ["-c", "copy"]
    later = ["-itsoffset", 1.5]
    made: dict[str, Path | None] = {}

    def put(name: str, *arguments: object, make: Callable = rewrap) -> None:
        made[name] = make(folder / name.replace(" ", "-"), *arguments)

    fragments = {
        "by key": "frag_keyframe+empty_moov+default_base_moof",
        "by frame": "frag_every_frame+empty_moov",
        "late index": "frag_keyframe+delay_moov",
        "dash": "dash+frag_keyframe+empty_moov+global_sidx",
        "faststart": "faststart",
        "negative": "negative_cts_offsets",
    }
    for name, flags in fragments.items():
        put(f"{name}.mp4", *picture, *copy, "-movflags", flags)
    put("live.mp4", *picture, *copy, "-movflags", "frag_keyframe+empty_moov", "-f", "mp4", make=pipe)
    for suffix in (".mp4", ".mov"):
        put(f"no edit list{suffix}", *picture, *copy, "-use_editlist", 0)
        put(f"scale 600{suffix}", *picture, *copy, "-video_track_timescale", 600)
        put(f"timecode{suffix}", *picture, *copy, "-timecode", "01:00:00:00")
    for suffix in (*SUFFIXES[:4], ".avi", ".flv", ".ts", ".m2ts", ".mpg", ".vob", ".nut", ".wmv", ".ogv"):
        put(f"far{suffix}", *picture, *copy, "-output_ts_offset", 1000)
        put(f"sound{suffix}", *picture, *tone(seconds), *both)
        put(f"short sound{suffix}", *picture, *tone(seconds / 2), *both)
        put(f"long sound{suffix}", *picture, *tone(seconds * 3), *both)
        put(f"late sound{suffix}", *picture, *later, *tone(seconds), *both)
        put(f"late picture{suffix}", *later, *picture, *tone(seconds + 1.5), *both)
        put(f"late long sound{suffix}", *picture, *later, *tone(seconds * 3), *both)
    for suffix, form in ((".mkv", "matroska"), (".webm", "webm"), (".flv", "flv"), (".avi", "avi"), (".nut", "nut")):
        put(f"live{suffix}", *picture, *copy, "-f", form, make=pipe)
        put(f"live sound{suffix}", *picture, *tone(seconds * 2), *both, "-f", form, make=pipe)
    for suffix in (".mkv", ".webm"):
        put(f"told live{suffix}", *picture, *copy, "-live", 1)
        put(f"short clusters{suffix}", *picture, *copy, "-cluster_time_limit", 100)
        put(f"cues in front{suffix}", *picture, *copy, "-reserve_index_space", 5000)
        put(f"laced sound{suffix}", *picture, *tone(seconds), *both, "-c:a", "libopus", "-frame_duration", 10)
    put("words.mkv", *picture, "-i", words, "-map", "0:v", "-map", 1, *copy)
    put("words.mp4", *picture, "-i", words, "-map", "0:v", "-map", 1, "-c:v", "copy", "-c:s", "mov_text")
    put("words.webm", *picture, "-i", words, "-map", "0:v", "-map", 1, "-c:v", "copy", "-c:s", "webvtt")
    put("no length.flv", *picture, *copy, "-flvflags", "no_duration_filesize")
    put("wrapped.ts", *picture, *copy, "-output_ts_offset", 2**33 / 90000 - 1.4 - seconds / 2)
    put("wrapped.mpg", *picture, *copy, "-output_ts_offset", 2**33 / 90000 - 0.5 - seconds / 2)
    put("undelayed.ts", *picture, *copy, "-muxdelay", 0, "-muxpreload", 0)
    put("latm.ts", *picture, *tone(seconds), *both, "-mpegts_flags", "latm+resend_headers")
    for suffix in (".mp4", ".mkv", ".mov"):
        put(f"cover{suffix}", *picture, "-i", cover, "-map", 0, "-map", 1, *copy, "-disposition:v:1", "attached_pic")
        put(f"image behind{suffix}", *picture, "-i", cover, "-map", 0, "-map", 1, *copy)
    return {name: path for name, path in made.items() if path is not None}


def cuts(folder: Path, source: Path, seconds: float, suffixes: Iterable[str]) -> dict[str, Path]:
    """Lossless cuts, before and behind key frames, as people make them; and what is glued together from them."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Path | None] = {}
    for suffix in suffixes:
        for place, start in enumerate((0.02, 0.2, 0.24, 0.333, 0.48, 0.5, 0.61, 0.777, 0.96, 1.1)):
            if start > seconds - 0.5:
                continue
            name = f"cut {start}{suffix}"
            seek = ["-ss", start, "-i", source, "-t", 0.8] if place % 3 else ["-i", source, "-ss", start, "-t", 0.8]
            more = (["-avoid_negative_ts", "make_zero"], ["-copyts"], ["-copyinkf"], [])[place % 4]
            made[name] = rewrap(folder / name.replace(" ", "-"), *seek, *more, "-c", "copy", "-map", "0:v")
        parts = [path for path in made.values() if path is not None and path.suffix == suffix][:3]
        listed = folder / "list.txt"
        listed.write_text("".join(f"file '{path}'\n" for path in parts))
        made[f"joined{suffix}"] = rewrap(
            folder / f"joined{suffix}", "-f", "concat", "-safe", 0, "-i", listed, "-c", "copy"
        )
        if suffix in (".ts", ".mpg") and parts:
            made[f"end to end{suffix}"] = folder / f"end-to-end{suffix}"
            made[f"end to end{suffix}"].write_bytes(b"".join(path.read_bytes() for path in parts))
    return {name: path for name, path in made.items() if path is not None}


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
