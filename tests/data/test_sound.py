"""Sound against samples that are known, and against ffmpeg's own sequential decoding where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import av
import helpers
import numpy as np
import pytest
import soundfile
from helpers import cause, numbered_frames, tone, write_video, write_wav
from scipy.signal import resample_poly

from mbcd_cli.data.media import sound as module
from mbcd_cli.data.media.kept import Kept
from mbcd_cli.data.media.sound import read_audio
from mbcd_cli.data.media.soundtrack import Soundtrack
from mbcd_cli.data.records import Media
from mbcd_cli.preparation.cache_plan import read_listing
from mbcd_cli.preparation.check import check
from mbcd_cli.resolved import resolve
from mbcd_cli.settings import DatasetSettings

DATASET = DatasetSettings()
REJECT = DatasetSettings(missing_frames="reject")
RATE = 16000


def heard(path: Path, dataset: DatasetSettings = REJECT, notes: list[str] | None = None, **span) -> np.ndarray:
    return read_audio(Media(path, **span), dataset=dataset, notes=notes)[0]


def noise(seconds: float = 2.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """[S] float64 of whole 16-bit levels: what lossless codecs keep."""
    return np.random.default_rng(seed).integers(-9000, 9000, round(seconds * rate)) / 32768


def encode(
    path: Path,
    samples: np.ndarray,
    codec: str,
    *,
    rate: int = RATE,
    begins: float = 0.0,
    pause: tuple[float, float] | None = None,
    picture: float | None = None,
    tracks: int = 1,
    **options: str,
) -> Path:
    """Samples [S] -> a file written by PyAV's own encoders, or libsndfile's (vorbis).

    Args:
        begins: seconds of the file at which the sound begins.
        pause: second of the sound after which its time stamps jump, and by how much.
        picture: second of the file at which a picture of a second begins; none without.
        tracks: how often the sound is in the file.
    """
    if codec == "vorbis":
        soundfile.write(path, samples, rate, format="OGG", subtype="VORBIS")
        return path
    with av.open(str(path), "w", options=options) as out:
        if picture is not None:
            video = out.add_stream("mpeg4", rate=25)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        sounds = [out.add_stream(codec, rate=rate, layout="mono") for _ in range(tracks)]
        for stream in sounds:
            stream.bit_rate = 64000
        if picture is not None:
            for number in range(25):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * number, np.uint8), "rgb24")
                frame.pts = number + round(25 * picture)
                out.mux(video.encode(frame))
            out.mux(video.encode(None))
        for stream in sounds:
            resampler = av.AudioResampler(stream.codec_context.format, "mono", rate)
            size = stream.codec_context.frame_size or 1000
            for at in range(0, len(samples), size):
                levels = np.rint(samples[at : at + size] * 32768).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(levels[None], "s16", "mono")
                frame.sample_rate = rate
                jump = pause[1] if pause and at >= pause[0] * rate else 0.0
                frame.pts = at + round((begins + jump) * rate)
                for piece in resampler.resample(frame):
                    piece.pts = frame.pts
                    out.mux(stream.encode(piece))
            out.mux(stream.encode(None))
    return path


# --- plain files ---------------------------------------------------------------------------------------------------


def test_sound_is_mixed_down(tmp_path):
    left, right = tone(hertz=300), tone(hertz=700)
    path = write_wav(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    got, rate = read_audio(Media(path), dataset=DATASET)
    assert rate == 8000
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (left + right) / 2, atol=1e-6)


def test_sound_spans(tmp_path):
    samples = np.arange(8000) / 8000 - 0.5
    path = write_wav(tmp_path / "a.wav", samples, subtype="FLOAT")
    got, _ = read_audio(Media(path, start=0.25, stop=0.5), dataset=DATASET)
    np.testing.assert_allclose(got, samples[2000:4000], atol=1e-6)
    tail, _ = read_audio(Media(path, start=0.75, stop=1.05), dataset=REJECT)  # a rounded time stamp
    assert len(tail) == 2000
    long = Media(path, start=0.75, stop=2.0)
    assert len(read_audio(long, dataset=DATASET)[0]) == 2000
    assert "1.00 of 1.25 s lie after the end" in cause(lambda: read_audio(long, dataset=REJECT))
    assert "after the end of the sound" in cause(lambda: read_audio(Media(path, start=1.5), dataset=DATASET))


def test_sound_span_in_frames_follows_the_video(tmp_path):
    samples = np.arange(16000) / 16000 - 0.5
    wav = write_wav(tmp_path / "a.wav", samples, subtype="FLOAT")
    video = write_video(tmp_path / "a.mp4", numbered_frames(24), fps=16)
    media = Media(wav, start=4, stop=12, unit="frame", clock=video)
    np.testing.assert_allclose(read_audio(media, dataset=DATASET)[0], samples[2000:6000], atol=1e-6)
    whole = Media(wav, start=20, stop=24, unit="frame", clock=video)
    np.testing.assert_allclose(read_audio(whole, dataset=DATASET)[0], samples[10000:12000], atol=1e-6)
    lost = Media(wav, start=4, stop=12, unit="frame")
    assert "in frames" in cause(lambda: read_audio(lost, dataset=DATASET))


@pytest.mark.parametrize(("stored", "wanted"), [(44100, 16000), (8000, 16000), (16000, 8000)])
def test_resampling(tmp_path, stored, wanted):
    samples = tone(0.5, rate=stored, hertz=500)
    path = write_wav(tmp_path / "a.wav", samples, rate=stored, subtype="DOUBLE")
    got, rate = read_audio(Media(path), sample_rate=wanted, dataset=DATASET)
    assert rate == wanted
    assert len(got) == wanted // 2
    inner = slice(400, -400)
    np.testing.assert_allclose(got[inner], tone(0.5, rate=wanted, hertz=500)[inner], atol=5e-3)
    common = np.gcd(stored, wanted)
    np.testing.assert_allclose(got, resample_poly(samples, wanted // common, stored // common), atol=1e-5)


def test_limited_reading_equals_reading_all(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 40000)
    path = write_wav(tmp_path / "a.wav", samples, rate=8000, subtype="FLOAT")
    for rate in (None, 16000, 5000):
        whole, _ = read_audio(Media(path), sample_rate=rate, dataset=DATASET)
        some, _ = read_audio(Media(path), sample_rate=rate, limit=3000, dataset=DATASET)
        np.testing.assert_allclose(some, whole[:3000], atol=1e-6)


def test_bad_sound(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(0.25))
    data = path.read_bytes()
    path.write_bytes(data[: 44 + 1001])
    assert cause(lambda: read_audio(Media(path), dataset=DATASET)) == (
        "cut short: its header claims 2000 samples, and 500 are there"
    )
    path.write_bytes(data[:44].replace(struct.pack("<I", 4000), struct.pack("<I", 0)))
    assert "no samples" in cause(lambda: read_audio(Media(path), dataset=DATASET))
    path.write_bytes(b"")
    assert "empty" in cause(lambda: read_audio(Media(path), dataset=DATASET))
    path.write_bytes(b"RIFF and then nothing of the kind")
    assert "not a video or sound file that can be opened" in cause(lambda: read_audio(Media(path), dataset=DATASET))
    for value in (np.nan, np.inf):
        samples = tone(0.25)
        samples[7] = value
        write_wav(path, samples, subtype="FLOAT")
        assert cause(lambda: read_audio(Media(path), dataset=DATASET)).startswith("1 of 2000 samples are not finite")


def test_streamed_wav_without_a_length_is_read(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(0.25))
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 4, 0xFFFFFFFF)
    struct.pack_into("<I", data, 40, 0xFFFFFFFF)
    path.write_bytes(data)
    assert len(read_audio(Media(path), dataset=DATASET)[0]) == 2000


def test_truncated_flac(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 40000), 8000)
    assert len(read_audio(Media(path), dataset=DATASET)[0]) == 40000
    path.write_bytes(path.read_bytes()[:20000])
    assert cause(lambda: read_audio(Media(path), dataset=DATASET))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_wav_is_its_samples_to_the_bit(tmp_path, subtype):
    levels = np.random.default_rng(0).integers(-32768, 32768, (3000, 2), dtype=np.int16)
    path = tmp_path / "a.wav"
    soundfile.write(path, levels / 32768, RATE, subtype=subtype)
    expected = (levels.astype(np.float32) / np.float32(32768)).mean(axis=1)
    np.testing.assert_array_equal(heard(path), expected)
    np.testing.assert_array_equal(heard(path, start=0.05, stop=0.1), expected[800:1600])


@pytest.mark.parametrize("kind", ["AIFF", "W64", "CAF", "AU", "RF64", "WAV"])
def test_files_of_samples_that_are_cut_are_named(tmp_path, kind):
    path = tmp_path / "a.bin"
    soundfile.write(path, noise(), RATE, format=kind, subtype="PCM_16")
    np.testing.assert_array_equal(heard(path), noise().astype(np.float32))
    path.write_bytes(path.read_bytes()[:-8001])
    assert cause(lambda: heard(path)).startswith("cut short: its header claims")


def test_wav_longer_than_its_header_can_say(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(0.25))
    head = bytearray(path.read_bytes()[:44])
    for stated in (160_000_000, 0xFFFFFFFF):
        struct.pack_into("<I", head, 40, stated)
        with path.open("wb") as file:
            file.write(head)
            file.truncate(44 + 160_000_000 + 2**32)  # sparse
        assert "a length over 4 GB does not fit" in cause(lambda: heard(path, start=0.0, stop=1.0))


def test_flac_damaged_or_joined(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(), RATE)
    data = path.read_bytes()
    spoiled = bytearray(data)
    for at in np.random.default_rng(0).integers(2000, len(data), 200):
        spoiled[at] ^= 0x55
    path.write_bytes(spoiled)
    assert "damaged" in cause(lambda: heard(path))
    path.write_bytes(data + data)
    assert "files are joined" in cause(lambda: heard(path))


# --- other containers and codecs -----------------------------------------------------------------------------------

LOSSLESS = [
    *(("pcm_s16le", suffix) for suffix in ("mkv", "mov", "avi", "nut")),
    *(("flac", suffix) for suffix in ("flac", "mkv", "mp4", "ogg")),
    *(("alac", suffix) for suffix in ("m4a", "mkv")),
]
LOSSY = [
    *(("aac", suffix) for suffix in ("m4a", "mp4", "mkv", "mov", "ts", "flv", "avi", "aac")),
    *(("libmp3lame", suffix) for suffix in ("mp3", "mkv", "avi", "mp4")),
    *(("libopus", suffix) for suffix in ("opus", "webm", "mp4")),
    ("vorbis", "ogg"),
    *(("mp2", suffix) for suffix in ("mpg", "ts")),
    *(("ac3", suffix) for suffix in ("ac3", "mkv")),
    *(("wmav2", suffix) for suffix in ("wma", "wmv")),
]
RATES = {"libopus": 48000, "flv": 44100, "mpg": 48000, "ac3": 48000, "wmav2": 44100}


@pytest.mark.parametrize(("codec", "suffix"), LOSSLESS)
def test_lossless_sound_is_its_samples_to_the_bit(tmp_path, codec, suffix):
    path = encode(tmp_path / f"a.{suffix}", noise(), codec)
    np.testing.assert_array_equal(heard(path), noise().astype(np.float32))
    np.testing.assert_array_equal(heard(path, start=0.7, stop=1.3), noise()[11200:20800].astype(np.float32))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize(("codec", "suffix"), LOSSLESS + LOSSY)
def test_sound_is_what_a_sequential_decode_gives(tmp_path, codec, suffix):
    rate = RATES.get(codec) or RATES.get(suffix) or RATE
    smooth = np.convolve(noise(3.0, rate), np.ones(8) / 8, "same")
    video = suffix in ("mp4", "mkv", "mov", "avi", "wmv", "ts")
    path = encode(tmp_path / f"a.{suffix}", smooth, codec, rate=rate, picture=0.0 if video else None)
    command = ["ffmpeg", "-v", "error", "-i", path, "-map", "0:a:0", "-f", "f32le", "-"]
    expected = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.float32)
    got = heard(path)
    if suffix == "mkv" and len(got) < len(expected):  # an older ffmpeg plays the run-in that mkv declares
        expected = expected[-len(got) :]
    lead = len(got) - len(expected)  # where the first time stamp is later than the file's beginning
    assert 0 <= lead < 0.25 * rate
    assert not got[:lead].any()
    np.testing.assert_allclose(got[lead:], expected, atol=1e-4 if (codec, suffix) in LOSSY else 0)
    rng = np.random.default_rng(0)
    for start, length in zip(rng.uniform(0.3, 2, 8), rng.uniform(0.05, 0.8, 8), strict=True):
        span = slice(round(start * rate), round((start + length) * rate))
        np.testing.assert_array_equal(heard(path, start=start, stop=start + length), got[span])


def test_time_is_the_files_own(tmp_path):
    """A sound that begins after the picture, and one before which the picture begins late."""
    for suffix in ("mov", "mkv"):
        late = encode(tmp_path / f"late.{suffix}", noise(), "pcm_s16le", begins=0.5, picture=0.0)
        np.testing.assert_array_equal(heard(late, start=1.0, stop=1.5), noise()[8000:16000].astype(np.float32))
        whole = heard(late)
        assert not whole[:8000].any()
        np.testing.assert_array_equal(whole[8000:], noise().astype(np.float32))
        early = encode(tmp_path / f"early.{suffix}", noise(), "pcm_s16le", picture=1.5)
        np.testing.assert_array_equal(heard(early, start=1.0, stop=1.5), noise()[16000:24000].astype(np.float32))
    assert cause(lambda: heard(late, start=0.1, stop=0.6)) == "0.40 of 0.50 s lie before the beginning of the sound"
    notes: list[str] = []
    part = heard(late, DATASET, notes, start=0.25, stop=0.75)
    assert len(part) == 8000
    assert not part[:4000].any()
    assert "0.25 of 0.50 s lie before the beginning of the sound; mended with silence" in notes[0]
    before = "the clip ends at 0.4 s, before the beginning of the sound (0.50 s)"
    assert cause(lambda: heard(late, start=0.1, stop=0.4)) == before
    assert "0.50 of 1.00 s lie after the end" in cause(lambda: heard(late, start=2.0, stop=3.0))
    assert "begins at 4 s, after the end of the sound (2.50 s)" in cause(lambda: heard(late, start=4.0))


def test_pauses_are_silence_and_are_told(tmp_path):
    path = encode(tmp_path / "a.mkv", noise(), "pcm_s16le", pause=(1.0, 0.75), picture=0.0)
    notes: list[str] = []
    whole = heard(path, REJECT, notes)
    expected = np.concatenate([noise()[:16000], np.zeros(12000), noise()[16000:]]).astype(np.float32)
    np.testing.assert_array_equal(whole, expected)
    assert "pauses at 1.00 s; 0.75 s of the clip are silence" in notes[0]
    notes.clear()
    heard(path, REJECT, notes, start=2.0, stop=2.5)
    heard(path, REJECT, notes, start=0.0, stop=0.9)
    assert not notes
    # In the second of two files that are joined the time stamps begin anew; its pause is one all the same.
    one = encode(tmp_path / "one.ts", noise(rate=48000), "mp2", rate=48000)
    two = encode(tmp_path / "two.ts", noise(rate=48000), "mp2", rate=48000, pause=(1.0, 0.75))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    assert len(heard(joined)) == len(heard(one)) + len(heard(two))
    assert len(heard(two)) == pytest.approx(len(heard(one)) + 0.75 * 48000, abs=1200)
    jump = encode(tmp_path / "b.mkv", noise(), "pcm_s16le", pause=(1.0, 5000.0))
    assert "time stamps jump by 5000 s at 1.00 s" in cause(lambda: heard(jump))


def test_no_sound_two_sounds_and_half_a_file(tmp_path):
    silent = write_video(tmp_path / "a.mp4", numbered_frames(16))
    assert cause(lambda: heard(silent)) == "it has no sound stream"
    two = encode(tmp_path / "a.ts", noise(), "aac", tracks=2)
    why = cause(lambda: heard(two))
    assert "2 sounds of equal standing: stream 0 (aac, 1 channels" in why
    assert "stream 1 (aac" in why
    for codec, suffix in (("aac", "mkv"), ("libopus", "webm"), ("aac", "flv"), ("aac", "avi"), ("vorbis", "ogg")):
        rate = RATES.get(codec, RATES.get(suffix, RATE))
        path = encode(tmp_path / f"cut.{suffix}", noise(4.0, rate), codec, rate=rate)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])
        assert "cut short" in cause(lambda path=path: heard(path)), suffix
    path = encode(tmp_path / "cut.mp4", noise(4.0), "aac", movflags="faststart")
    path.write_bytes(path.read_bytes()[:-4000])
    assert "packets of sound" in cause(lambda: heard(path))
    path.write_bytes(b"\0" * 3000)
    assert "not a video or sound file that can be opened" in cause(lambda: heard(path))


# --- headers that lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "suffix"), [("libmp3lame", "mp3"), ("vorbis", "ogg"), ("aac", "aac")])
def test_files_joined_end_to_end_are_read_to_the_end(tmp_path, codec, suffix):
    parts = [encode(tmp_path / f"{n}.{suffix}", noise(2.0 + n, seed=n), codec) for n in range(2)]
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    first, second = map(heard, parts)
    got = heard(joined)
    assert len(got) == pytest.approx(len(first) + len(second), abs=4000)  # the second one's run-in is played
    np.testing.assert_array_equal(got[: len(first) - 3000], first[:-3000])
    # Its end is the end of the second, which the first file's header knows nothing of.
    tail = slice(-16000, -4000)
    shifts = [np.abs(got[tail] - np.roll(second, shift)[tail]).max() for shift in range(-2400, 2400)]
    assert min(shifts) < 1e-4
    np.testing.assert_array_equal(heard(joined, start=3.0, stop=4.0), got[48000:64000])


def test_chained_streams_that_differ_are_named(tmp_path):
    stereo = tmp_path / "b.ogg"
    soundfile.write(stereo, np.stack([noise(), noise()], 1), RATE, format="OGG", subtype="VORBIS")
    path = encode(tmp_path / "a.ogg", noise(), "vorbis")
    path.write_bytes(path.read_bytes() + stereo.read_bytes())
    assert "after 2.00 s" in cause(lambda: heard(path))


def test_variable_mp3_without_a_frame_count(tmp_path):
    """Its header knows nothing of its length: silence at first, then noise, at very different rates."""
    samples = np.concatenate([np.zeros(4 * RATE), noise(4.0)])
    path = tmp_path / "a.mp3"
    lame = ["-q:a", "4"] if shutil.which("ffmpeg") else None
    if lame is None:
        pytest.skip("ffmpeg is not installed")
    wav = write_wav(tmp_path / "a.wav", samples, rate=RATE)
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, *lame, "-write_xing", "0", path], check=True)
    assert abs(soundfile.info(path).frames - len(samples)) > RATE  # what a header reader believes
    got = heard(path)
    assert len(got) == pytest.approx(len(samples), abs=3000)
    assert np.abs(got[: 3 * RATE]).max() < 0.01
    assert got[5 * RATE : 7 * RATE].std() > 0.1
    np.testing.assert_array_equal(heard(path, start=6.0, stop=7.0), got[6 * RATE : 7 * RATE])


# --- what it costs -------------------------------------------------------------------------------------------------


def test_a_recording_is_decoded_once_for_all_its_spans(tmp_path, monkeypatch):
    decoded: list[int] = []

    class Counting(Soundtrack):
        def __init__(self, path: Path) -> None:
            decoded.append(0)
            super().__init__(path)

        def _hold(self, block):
            decoded[-1] += 0 if block is None else len(block)
            super()._hold(block)

    monkeypatch.setattr(module, "_recordings", Kept(Counting, limit=1))
    path = encode(tmp_path / "a.mkv", noise(4.0), "flac")
    assert len(heard(path, start=0.5, stop=1.0)) == 8000
    assert decoded[0] < 2 * RATE  # no more than what was asked for
    for start in (3.0, 0.25, 2.5, 1.0):
        np.testing.assert_array_equal(
            heard(path, start=start, stop=start + 0.5),
            noise(4.0)[round(start * RATE) : round((start + 0.5) * RATE)].astype(np.float32),
        )
    assert decoded == [round(3.5 * RATE)] or (len(decoded) == 1 and decoded[0] <= 4 * RATE)
    encode(path, noise(4.0, seed=1), "flac")  # replaced: seen
    np.testing.assert_array_equal(heard(path, start=0.0, stop=0.5), noise(4.0, seed=1)[:8000].astype(np.float32))
    assert len(decoded) == 2


# --- rates that differ ---------------------------------------------------------------------------------------------


def test_mixed_sample_rates_are_told_once(tmp_path):
    root = helpers.write_dataset(tmp_path / "tiny")

    def warnings(*sets: str) -> list[str]:
        settings = resolve(sets=[*helpers.SMALL, *sets], flags={"dataset.root": root, "cache.dir": tmp_path / "cache"})
        told = [line for line in read_listing(settings).warnings if "sample rates" in line]
        assert told == [line for line in check(settings).warnings if "sample rates" in line]
        return told

    assert not warnings()
    files = sorted((root / "audio").glob("*.wav"))
    for path in files[:3]:
        write_wav(path, tone(0.5, rate=44100), rate=44100)
    (line,) = warnings()
    assert f"{len(files) - 3} at 8000 Hz, 3 at 44100 Hz" in line
    assert "modalities.audio.sample_rate=8000" in line
    assert not warnings("modalities.audio.sample_rate=16000")
