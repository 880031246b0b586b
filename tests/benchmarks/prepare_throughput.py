"""`prepare` against what bounds it: raw decoding of the same clips, and the trunk alone on the same device.

    python tests/benchmarks/prepare_throughput.py --workers 2
    python tests/benchmarks/prepare_throughput.py --encoder slowfast-r101 --clips 8 --device cuda
    python tests/benchmarks/prepare_throughput.py --encoder hf:FOLDER --cut block11 --clips 8 --workers 1
    python tests/benchmarks/prepare_throughput.py --published AST --clips 8 --workers 1

Writes clips (456 x 256, as EPIC-Kitchens') as mp4, or of sound (10 s of noise, 48 kHz, 16 bit) as wav, one training
view each.

(a) the same number of processes decodes every frame of a clip in order and turns those of one view into RGB, no more
(PyAV), or reads the samples (libsndfile);
(v) `Decoder` makes the views and hands them over, which are thrown away;
(b) the trunk runs on views that lie in memory;
(c) `Filler` does all: decode, resize, crop, trunk, rows, shards synced to disk;
(d) the bytes of those shards are written again, file by file, synced, and nothing else.

Start-up (processes, imports) is left out of all, which are timed in turn; the best of `--rounds` counts. Goal:
(c) at least 90 % of the slower of (a) and (b). On cores that others use, read the processor seconds of this process,
which has the trunk: per clip of (b) and of (c), the least of the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import soundfile
import torch

from mbcd_cli import console
from mbcd_cli.data.cache import GROUPS, CacheWriter, shard_ranges
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.media.decoding import DecodeJob, Decoder
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import Clip, Media
from mbcd_cli.encoders import build_encoder, described_encoders
from mbcd_cli.encoders.staged import TOGETHER
from mbcd_cli.preparation.filler import Filler
from mbcd_cli.preparation.trunk import cached_shapes
from mbcd_cli.runtime import configure
from mbcd_cli.settings import CacheSettings, DatasetSettings, RuntimeSettings, Settings

FRAMES = 120
PUBLISHED = {"AST": "AST", "Wav2Vec2": "Wav2Vec2", "Hubert": "Wav2Vec2", "Clap": "Clap"}
"""Sound models of transformers -> whose extractor is theirs; both are by default as they were first published."""


def write_config(folder: Path, name: str) -> None:
    """A folder of transformers' without weights."""
    import transformers

    config = getattr(transformers, f"{name}Config")(architectures=[f"{name}Model"])
    config.save_pretrained(folder)
    getattr(transformers, f"{PUBLISHED[name]}FeatureExtractor")().save_pretrained(folder)


def write_sound(path: Path, seed: int) -> None:
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.3, 0.3, 480000), 48000, "PCM_16")


def write_clip(path: Path, seed: int) -> None:
    """Moving noise: something for the codec to do."""
    rng = np.random.default_rng(seed)
    big = cv2.GaussianBlur(rng.integers(0, 256, (400, 700, 3), np.uint8), (0, 0), 2)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 60, (456, 256))
    for t in range(FRAMES):
        writer.write(np.ascontiguousarray(big[t % 120 : t % 120 + 256, 2 * (t % 100) : 2 * (t % 100) + 456]))
    writer.release()


def raw_decode(path: str, indices: list[int]) -> int:
    import av

    if path.endswith(".wav"):
        return soundfile.read(path, dtype="float32")[0].nbytes
    size, wanted = 0, set(indices)
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                size += frame.to_ndarray(format="rgb24").nbytes
    return size


def trunk_rate(trunk: torch.nn.Module, modality: Modality, device: torch.device) -> tuple[float, float]:
    """Views per second, and per processor second, of the trunk on views in memory, as many at a time as `prepare`
    takes, in 5 s or more."""
    ((shape, dtype),) = modality.part_shapes()
    rows = TOGETHER if device.type == "cuda" else 1
    random = torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, device=device)
    inputs = (random if dtype == np.uint8 else random / 256 - 0.5,)
    float(trunk(inputs)[0].sum())
    started, processor, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < 5:
        float(trunk(inputs)[0].flatten()[0])
        done += rows
    return done / (time.perf_counter() - started), done / (time.process_time() - processor)


def disk_rate(folder: Path, clips: int) -> float:
    contents = [path.read_bytes() for path in sorted(folder.glob("*.h5"))]
    begun = time.perf_counter()
    for number, content in enumerate(contents):
        with (folder / f"again-{number}").open("wb", buffering=0) as file:
            file.write(content)
            os.fsync(file)
    return clips / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default="small-video")
    parser.add_argument("--cut", default=None, help="default: layer4 of the paper's, input of a small one, or adapter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--published", choices=PUBLISHED, help="a sound model at its published shape instead")
    options = parser.parse_args()
    configure(RuntimeSettings(device=options.device, threads=options.threads))
    cv2.setNumThreads(1)
    wholly = "adapter" if ":" in options.encoder or options.published else "input"
    cut = options.cut or ("layer4" if options.encoder == "slowfast-r101" else wholly)
    told = {} if ":" in options.encoder else {"frames": 32, "short_side": 256, "crop": 224}  # else as the model wants
    with tempfile.TemporaryDirectory() as place:
        root, kind, encoder, weights_dir = Path(place), "video", options.encoder, Path()
        if options.published:
            kind, encoder, weights_dir = "audio", f"hf:{options.published}", root
            write_config(root / options.published, options.published)
            modality: Modality = AudioModality(encoder=encoder, cut=cut)
        else:
            modality = VideoModality(encoder=encoder, cut=cut, interval=2, crop_area=(0.08, 1.0), **told)
        cache = CacheSettings(views=1, workers=options.workers, random_weights=True, weights_dir=weights_dir)
        settings = described_encoders(Settings(cache=cache, modalities={kind: modality}))
        modality = settings.modalities[kind]
        device = torch.device(options.device)
        trunk, _ = build_encoder(kind, modality).cut(cut)
        trunk.to(device)
        shapes = {group: cached_shapes(kind, modality, settings, group) for group in GROUPS}
        paths = [root / f"{i}.{'mp4' if kind == 'video' else 'wav'}" for i in range(options.clips)]
        for seed, path in enumerate(paths):
            (write_clip if kind == "video" else write_sound)(path, seed)
        clips = [Clip(p.stem, "d", "train", 0, "x", {kind: Media(p)}) for p in paths]
        span = 2 * modality.frames if kind == "video" else FRAMES
        starts = np.random.default_rng(0).integers(FRAMES - span + 1, size=len(paths))
        picks = [list(range(int(s), int(s) + span, 2)) for s in starts]

        context = multiprocessing.get_context("forkserver")
        job = DecodeJob(kind, modality, DatasetSettings(), 0)
        with (
            ProcessPoolExecutor(options.workers, mp_context=context) as pool,
            Decoder(workers=options.workers, job=job) as decoder,
            console.terminal.progress("prepare") as ticker,
        ):

            def decode() -> float:
                begun = time.perf_counter()
                list(pool.map(raw_decode, map(str, paths), picks))
                return len(paths) / (time.perf_counter() - begun)

            def fill(name: str, chosen: list[Clip]) -> tuple[float, float]:
                table = Clips(chosen)
                writer = CacheWriter(
                    root / name,
                    recipe={"modality": kind},
                    modality=modality,
                    clips=table,
                    shards=shard_ranges([1] * len(chosen), limit=16),
                    domains=("d",),
                    label_names=("x",),
                    provenance={},
                    compression="none",
                )
                (root / name).mkdir()
                begun, processor = time.perf_counter(), time.process_time()
                filler = Filler(writer, decoder, table, [[0], []], trunk, shapes, device)
                filler.run(range(len(writer.shards)), ticker)
                return len(chosen) / (time.perf_counter() - begun), len(chosen) / (time.process_time() - processor)

            def views() -> float:
                begun = time.perf_counter()
                for _ in decoder.run((k, clip, [0]) for k, clip in enumerate(clips)):
                    pass
                return len(clips) / (time.perf_counter() - begun)

            list(pool.map(raw_decode, [str(paths[0])] * options.workers, [[0]] * options.workers))
            fill("start-up", clips[: 2 * options.workers])
            decoded, viewed, ran, filled, synced = [], [], [], [], []
            for number in range(options.rounds):
                decoded.append(decode())
                viewed.append(views())
                if trunk.names:
                    ran.append(trunk_rate(trunk, modality, device))
                filled.append(fill(f"round-{number}", clips))
                synced.append(disk_rate(root / f"round-{number}", len(clips)))
    decode_rate, whole = max(decoded), max(rate for rate, _ in filled)
    alone = max(rate for rate, _ in ran) if ran else None
    bound = min(rate for rate in (decode_rate, alone) if rate is not None)
    figures = {
        "clips": options.clips,
        "workers": options.workers,
        "encoder": encoder,
        "cut": cut,
        "device": str(device),
        "raw_decoding_clips_per_s": round(decode_rate, 2),
        "views_clips_per_s": round(max(viewed), 2),
        "trunk_alone_clips_per_s": None if alone is None else round(alone, 3),
        "disk_clips_per_s": round(max(synced), 2),
        "prepare_clips_per_s": round(whole, 3),
        "prepare_of_bound_percent": round(100 * whole / bound, 1),
        "trunk_alone_processor_s_per_clip": round(1 / max(rate for _, rate in ran), 3) if ran else None,
        "prepare_processor_s_per_clip": round(1 / max(rate for _, rate in filled), 3),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
