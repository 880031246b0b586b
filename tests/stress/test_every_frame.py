"""All kinds of files against ffmpeg's sequential decoding (pytest -m stress tests/stress/test_every_frame.py -sn0).

What is accepted shows the numbers that ffmpeg shows, always; of what ffmpeg can decode 99 % is accepted. The counts are
printed per codec and per container.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import conformance
import numpy as np
import pytest
from conformance import FFMPEG, ILLEGIBLE, differences, encode, every, numbers_of, rewrap, shown
from kinds import CODINGS, SUFFIXES, cuts, wrappings
from tally import Tally

from mbcd_cli.data.media import timeline
from mbcd_cli.data.media.video import read_frames
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings

pytestmark = [pytest.mark.stress, pytest.mark.skipif(not FFMPEG, reason="the ffmpeg command is not installed")]

_NOT_VALID = {"h264": (".wmv", ".asf"), "h263p": (".mpg", ".vob")}
"""Codecs that FFmpeg writes into containers that have no rule for them, and cannot read whole itself."""
_WRAPPED = ("h264 closed", "h264 open", "h264 field", "hevc open", "vp8 hidden", "vp9 hidden", "mpeg4 b", "mpeg2 b")


_OTHER_FFMPEG = "equal to PyAV's FFmpeg, not to the command's"


def _compared(path: Path, truth: conformance.Shown) -> tuple[list[str], str]:
    """What differs; or why the file is not accepted."""
    try:
        return differences(path, truth, seed=len(truth.numbers)), ""
    except MediaError as error:
        return [], error.cause


def looked(tally: Tally, codec: str, path: Path, *, stream: int = 0) -> list[str]:
    """Compares one file; what differs. Files that ffmpeg itself shows nothing of do not count.

    `illegible` in the tally: equal, and not every number can be read.
    """
    truth = shown(path, stream=stream)
    if truth is None:
        return []
    wrong, cause = _compared(path, truth)
    outcome = "illegible" if ILLEGIBLE in truth.numbers else "equal"
    if wrong or cause:
        # Of a cut within a group of pictures another FFmpeg shows a frame more or less at its ends.
        plain = conformance.shown_by_pyav(path, stream)
        outcome = "rejected" if cause else "wrong"
        if plain is not None and _compared(path, plain) == ([], ""):
            wrong, outcome, cause = [], _OTHER_FFMPEG, _OTHER_FFMPEG
    tally.add(codec, path, outcome, cause)
    return wrong


@pytest.fixture(scope="module")
def tally():
    tally = Tally()
    yield tally
    tally.close()


@pytest.fixture(autouse=True)
def no_open_recordings():
    yield
    conformance.close_recordings()


@pytest.mark.parametrize("name", CODINGS)
def test_every_codec_in_every_container(tmp_path, monkeypatch, tally, name):
    codec, source, wrong = name.split()[0], None, []
    for number, suffix in enumerate(SUFFIXES):
        if suffix in _NOT_VALID.get(codec, ()):
            continue
        path = tmp_path / f"{name.replace(' ', '-').replace(':', '')}{suffix}"
        path = encode(path, CODINGS[name]) if source is None else rewrap(path, "-i", source, "-c", "copy")
        source = source or path
        if path is not None:
            monkeypatch.setattr(timeline, "_HELD_BYTES", (64 * 2**20, 0)[number % 2])  # a long recording is sought in
            wrong += looked(tally, codec, path)
    assert wrong == []


@pytest.mark.parametrize("held", [64 * 2**20, 0])
@pytest.mark.parametrize("name", _WRAPPED)
def test_every_wrapping(tmp_path, monkeypatch, tally, name, held):
    monkeypatch.setattr(timeline, "_HELD_BYTES", held)
    codec = name.split()[0]
    source = encode(tmp_path / f"source{ {'vp8': '.webm', 'mpeg2': '.mpg'}.get(codec, '.mp4') }", CODINGS[name])
    if source is None:
        pytest.skip("its encoder is not there")
    seconds = CODINGS[name].frames / 25
    paths = wrappings(tmp_path / "wrapped", source, seconds)
    if held:
        cut = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".nut")
        paths |= cuts(tmp_path / "cuts", source, seconds, cut)
    valid = [path for path in paths.values() if path.suffix not in _NOT_VALID.get(codec, ())]
    assert [line for path in valid for line in looked(tally, codec, path)] == []


def test_enough_is_accepted(tally):
    """Runs last."""
    counts = tally.files["all"]
    if counts.total() < 1000:
        pytest.skip("only a part of this module ran")
    assert counts["rejected"] <= 0.01 * counts.total()
    assert counts["wrong"] == 0
    assert counts["illegible"] <= 0.05 * counts.total()
    assert counts[_OTHER_FFMPEG] <= 0.05 * counts.total()


# --- damage ----------------------------------------------------------------------------------------------------------

_SPOILT = [
    *[("h264 closed", suffix) for suffix in (".mp4", ".mkv", ".avi", ".flv", ".ts", ".nut")],
    *[("hevc open", ".mp4"), ("hevc", ".mkv"), ("vp8", ".webm"), ("vp9 hidden", ".webm"), ("mpeg4 b", ".avi")],
    *[("mpeg2 b", ".mpg"), ("wmv2", ".wmv"), ("theora", ".ogv"), ("mjpeg", ".mov"), ("h264", ".h264"), ("gif", ".gif")],
]


def spoilt(data: bytes, rng: np.random.Generator):
    """(what was done, the bytes): cut, zeroed and flipped at many places."""
    for share in np.linspace(0.03, 0.995, 16):
        yield f"cut at {share:.2f}", data[: int(share * len(data))]
    for size in (16, 300, 2000):
        for place in rng.integers(0, max(len(data) - size, 1), 4).tolist():
            yield f"{size} zeros at {place}", data[:place] + bytes(size) + data[place + size :]
    for count in (1, 4, 30):
        for _ in range(4):
            torn = bytearray(data)
            for place in rng.integers(0, len(data), count).tolist():
                torn[place] ^= 1 << int(rng.integers(8))
            yield f"{count} bits", bytes(torn)


@pytest.mark.parametrize(("name", "suffix"), _SPOILT)
def test_damage_is_told_or_does_no_harm(tmp_path, name, suffix):
    """What is accepted without a note shows what the whole file did, or is legible where ffmpeg's is and the same."""
    source = encode(tmp_path / f"a{suffix}", CODINGS[name])
    if source is None:
        pytest.skip("its encoder is not there")
    whole = shown(source).numbers
    outcomes: Counter[str] = Counter()
    wrong = []
    for number, (what, data) in enumerate(spoilt(source.read_bytes(), np.random.default_rng(len(name)))):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(data)
        notes: list[str] = []
        try:
            got = numbers_of(read_frames(Media(path), every, dataset=DatasetSettings(), notes=notes))
        except MediaError:
            outcomes["rejected"] += 1
            continue
        if notes:
            outcomes["noted"] += 1
            continue
        if got == whole:  # whatever a plain reader makes of it
            outcomes["whole"] += 1
            continue
        truth = conformance.shown_by_pyav(path)
        expected = truth.numbers if truth else []
        pairs = zip(got, expected, strict=False)
        if len(got) != len(expected) or any(a != b and ILLEGIBLE not in (a, b) for a, b in pairs):
            wrong.append(f"{what}: {got}, and ffmpeg shows {expected}")
        else:
            at = next((i for i, (a, b) in enumerate(zip(got, whole, strict=False)) if a != b), len(got))
            torn = ILLEGIBLE in got
            outcomes["torn picture" if torn else "shorter" if at == len(got) else "others"] += 1
            if not torn and at < len(got):
                print(name, suffix, what, got, file=sys.stderr)
    print(f"\n{name} {suffix} {dict(outcomes)}", file=sys.stderr)
    assert wrong == []
