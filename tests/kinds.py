"""Kinds of videos: how they are encoded, into which containers, and how people wrap, cut and join them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from conformance import Coding, pipe, rewrap

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
