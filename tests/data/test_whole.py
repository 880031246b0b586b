"""Files that are cut, joined end to end, of a header that lies, or whose last frame is held."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from conformance import every, numbers_of, picture_of
from helpers import numbered_frames, retime_mp4, trim_mp4, write_video
from kinds import CODINGS

from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.media.video import read_frames, timeline_of
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings(min_frames=1)
STRICT = DatasetSettings(min_frames=1, missing_frames="reject")
RATE = 16000
VIDEOS = {
    ".mp4": "h264",
    ".mov": "h264",
    ".flv": "h264",
    ".ts": "h264",
    ".mkv": "h264",
    ".nut": "h264",
    ".wmv": "wmv2",
    ".ogv": "vp8",
    ".avi": "mpeg4",
    ".mpg": "mpeg2",
}


def video(path: Path, count: int = 50, *, last: float = 0.0) -> Path:
    """Numbered frames at 25 per second, the last of them held for `last` seconds more."""
    coding = CODINGS[VIDEOS[path.suffix]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(coding.encoder, rate=25, options=map_str(coding.options) | {"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        packets = []
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture_of(number), format="gray")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].duration += round(last / packets[-1].time_base)
        container.mux(packets)
    return path


def map_str(options: dict) -> dict[str, str]:
    return {name: str(value) for name, value in options.items()}


def noise(seconds: float = 2.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, round(seconds * RATE)) / 32768


def sound(path: Path, codec: str = "", seconds: float = 2.0) -> Path:
    """Noise by soundfile, or by PyAV's encoder `codec`."""
    if not codec:
        soundfile.write(path, noise(seconds), RATE, subtype="PCM_16")
        return path
    rate = 44100 if codec == "wmav2" else RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.codec_context.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray((noise(seconds) * 32767).astype(np.int16)[None], layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, stream.codec_context.frame_size or 0)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def twice(path: Path) -> Path:
    path.write_bytes(path.read_bytes() * 2)
    return path


def cause(path: Path, read=read_frames) -> str:
    arguments = (Media(path), every) if read is read_frames else (Media(path),)
    with pytest.raises(MediaError) as error:
        read(*arguments, dataset=DATASET)
    assert error.value.remedy
    return error.value.cause


@pytest.mark.parametrize("suffix", [".ts", ".ogv", ".avi", ".mkv", ".mpg"])
def test_joined_videos_are_read_to_the_end(tmp_path, suffix):
    path = twice(video(tmp_path / f"a{suffix}"))
    notes: list[str] = []
    numbers = numbers_of(read_frames(Media(path), every, dataset=STRICT, notes=notes))
    assert (numbers, notes) == ([*range(50)] * 2, [])


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".flv", ".wmv", ".nut"])
def test_joined_videos_of_which_only_the_first_would_be_seen_are_named(tmp_path, suffix):
    path = video(tmp_path / f"a{suffix}")
    size = path.stat().st_size
    assert cause(twice(path)).startswith(f"another file begins {size} bytes before its end: files are joined")


@pytest.mark.parametrize("suffix", [".wav", ".aiff", ".au", ".caf", ".w64", ".rf64"])
def test_joined_files_of_samples_are_named(tmp_path, suffix):
    path = sound(tmp_path / f"a{suffix}")
    size = path.stat().st_size
    assert f"{size} bytes after the end of the sound" in cause(twice(path), read_audio)


@pytest.mark.parametrize(("suffix", "codec"), [(".m4a", "aac"), (".tta", "tta"), (".wma", "wmav2"), (".flac", "flac")])
def test_joined_sounds_are_named(tmp_path, suffix, codec):
    assert "files are joined" in cause(twice(sound(tmp_path / f"a{suffix}", codec)), read_audio)


def test_wav_with_a_length_that_lies(tmp_path):
    whole = noise().astype(np.float32)
    data = sound(tmp_path / "a.wav").read_bytes()

    def stating(length: int, behind: bytes = b"") -> Path:
        path = tmp_path / f"{length}-{len(behind)}.wav"
        path.write_bytes(data[:40] + struct.pack("<I", length) + data[44:] + behind)
        return path

    for length in (0, 0x7FFFF000, 0xFFFFFFFF):  # never completed, as recorders leave it that write to a pipe
        got, _ = read_audio(Media(stating(length)), dataset=STRICT)
        np.testing.assert_array_equal(got, whole)
        part, _ = read_audio(Media(stating(length), start=0.5, stop=1.5), dataset=STRICT)
        np.testing.assert_array_equal(part, whole[8000:24000])
    assert "54000 bytes after the end" in cause(stating(10000), read_audio)
    words = b"LIST" + struct.pack("<I", 3000) + bytes(3000)
    for behind in (words, b"TAG" + b" " * 125, bytes(5000)):  # neither words nor padding are sound
        assert len(read_audio(Media(stating(64000, behind)), dataset=STRICT)[0]) == 32000
    empty = tmp_path / "empty.wav"
    empty.write_bytes(data[:40] + bytes(4) + b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert cause(empty, read_audio)


@pytest.mark.parametrize("share", [0.97, 0.8])
@pytest.mark.parametrize("suffix", [".ogv", ".wmv", ".flv", ".avi", ".mkv"])
def test_videos_that_are_cut_are_named(tmp_path, suffix, share):
    path = video(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert cause(path).startswith("cut short: it ")
    if suffix != ".ogv":
        assert f"it claims {len(data)} bytes, and {path.stat().st_size} are there" in cause(path)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp3", "libmp3lame"), (".wma", "wmav2"), (".opus", "libopus")])
def test_sounds_that_are_cut_are_named(tmp_path, suffix, codec):
    path = sound(tmp_path / f"a{suffix}", codec, 6.0) if codec != "libopus" else opus(tmp_path / "a.opus")
    assert len(read_audio(Media(path), dataset=STRICT)[0]) > 6 * RATE - 4000
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.97)])
    assert "cut short: it " in cause(path, read_audio)


def opus(path: Path) -> Path:
    soundfile.write(path, noise(6.0), RATE, format="OGG", subtype="OPUS")
    return path


def test_an_ogg_without_an_end_mark_is_read_as_a_live_recording_is(tmp_path):
    path = video(tmp_path / "a.ogv")
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"OggS")])
    shown = numbers_of(read_frames(Media(path), np.arange, dataset=STRICT))
    assert 0 < len(shown) < 50
    assert shown == list(range(len(shown)))
    path.write_bytes(data[: data.rfind(b"OggS") + 20])
    assert cause(path) == "cut short: it ends within a page"


def test_a_fragmented_mp4_that_is_cut_is_named(tmp_path):
    path = video(tmp_path / "a.mp4")
    live = tmp_path / "live.mp4"
    with (
        av.open(str(path)) as source,
        av.open(str(live), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    data = live.read_bytes()
    assert numbers_of(read_frames(Media(live), every, dataset=STRICT)) == list(range(50))
    for left in (data.rfind(b"mdat") + 40, data.rfind(b"moof") + 20):
        live.write_bytes(data[:left])
        assert cause(live).startswith(("cut short: it claims", "cut short: its last part (m"))
    path.write_bytes(path.read_bytes()[:400])
    assert "and the index (moov) behind it" in cause(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".flv", ".mov"])
def test_a_last_frame_that_is_held(tmp_path, suffix):
    """As long as its file says; what is beyond is after the end."""
    path = video(tmp_path / f"a{suffix}", last=5.0)
    assert timeline_of(path).end == pytest.approx(7.0, abs=0.05)
    for start, stop, numbers in ((0.0, 2.0, [*range(50)]), (1.8, 6.9, [*range(45, 50)]), (3.0, 4.0, [49])):
        got = read_frames(Media(path, start=start, stop=stop), every, dataset=STRICT)
        assert numbers_of(got) == numbers
    for start, stop in ((7.1, 8.0), (6.0, 8.0)):
        with pytest.raises(MediaError, match="after the"):
            read_frames(Media(path, start=start, stop=stop), every, dataset=STRICT)


def test_a_last_frame_is_held_no_longer_than_the_edit_list_shows_it(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(16))
    held = retime_mp4(path, tmp_path / "held.mp4", [1] * 15 + [33])
    assert timeline_of(held).end == pytest.approx(3.0, abs=0.01)
    assert timeline_of(trim_mp4(held, tmp_path / "cut.mp4", skip=0.0, seconds=2.0)).end == pytest.approx(2.0, abs=0.01)
