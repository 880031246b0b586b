"""Damage that containers tell of by themselves, and that FFmpeg's readers pass over."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from conformance import every, numbers_of
from test_whole import DATASET, STRICT, cause, opus, sound, twice, video

from mbcd_cli.data.media.damage import ogg_checksum
from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError


def struck(path: Path, at: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def webm(path: Path, *, live: bool = False) -> Path:
    """A VP8 video of the frames' numbers, of several clusters, without checksums; a live one does not tell sizes."""
    with (
        av.open(str(video(path.with_suffix(".ogv")))) as source,
        av.open(str(path), "w", options={"live": str(int(live)), "cluster_time_limit": "400"}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return path


def seen(path: Path) -> list[int]:
    return numbers_of(read_frames(Media(path), every, dataset=STRICT))


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", ""), (".ogv", ""), (".opus", "opus"), (".mka", "aac")])
def test_every_struck_byte_is_told_or_changes_nothing(tmp_path, suffix, codec):
    path = tmp_path / f"a{suffix}"
    if codec:
        opus(path) if codec == "opus" else sound(path, codec)

        def read() -> np.ndarray:
            return read_audio(Media(path), dataset=STRICT)[0]
    else:
        video(path)

        def read() -> np.ndarray:
            return read_frames(Media(path), every, dataset=STRICT)

    whole, expected, told = path.read_bytes(), read(), 0
    for at in np.random.default_rng(0).integers(0, len(whole), 40).tolist():
        struck(path, at, at % 8)
        try:
            assert np.array_equal(read(), expected), at
        except MediaError as error:
            told += "is not as it was written" in error.cause
        path.write_bytes(whole)
    assert told > 30


@pytest.mark.parametrize("what", [b"\x1f\x43\xb6\x75", b"\xa3"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_struck_part_of_a_webm_is_told(tmp_path, what, place):
    """The name or the length of a cluster, or of a frame."""
    path = webm(tmp_path / "a.webm")
    assert seen(path) == list(range(50))
    data = path.read_bytes()
    clusters = [at for at in range(len(data)) if data.startswith(b"\x1f\x43\xb6\x75", at)]
    assert len(clusters) > 3
    at = clusters[2] if what[0] == 0x1F else data.index(what, clusters[2] + 8)
    struck(path, at + (len(what) if place else 0), 5)
    assert cause(path).endswith("is not as it was written")


def test_live_recordings_are_read_to_where_they_break_off(tmp_path):
    path = webm(tmp_path / "a.webm", live=True)
    assert seen(path) == list(range(50))
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    assert numbers_of(read_frames(Media(path), every, dataset=DATASET))[:45] == list(range(45))
    path.write_bytes(data)
    struck(path, data.rindex(b"\x1f\x43\xb6\x75"))
    assert cause(path).endswith("is not as it was written")
    path.write_bytes(data)
    assert seen(twice(path))[:50] == list(range(50))


def test_tags_behind_an_ogg_are_none_of_it(tmp_path):
    path = opus(tmp_path / "a.opus")
    expected = read_audio(Media(path), dataset=STRICT)[0]
    for behind in (b"TAG" + b" " * 125, bytes(100)):
        path.write_bytes(path.read_bytes() + behind)
        assert np.array_equal(read_audio(Media(path), dataset=STRICT)[0], expected)
        path.write_bytes(path.read_bytes()[: -len(behind)])


def test_the_checksum_of_ogg():
    """RFC 3533, 6: x^32 ... over 0x04c11db7, the highest bit first, from 0."""
    for length in (1, 28, 300):
        data, remainder = np.random.default_rng(length).bytes(length), 0
        for byte in data:
            remainder ^= byte << 24
            for _ in range(8):
                remainder = (remainder << 1 ^ (0x04C11DB7 if remainder >> 31 else 0)) & 0xFFFFFFFF
        assert ogg_checksum(data) == remainder
