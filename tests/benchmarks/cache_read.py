"""Reading the cache against a raw numpy.memmap of the same bytes: sequential and random, 1 and 2 threads.

    python tests/benchmarks/cache_read.py

A cache of random bytes in the paper's shape (video at layer4, one row 4.8 MB) is written with the cache's own writer;
batches of 16 rows are read through `ModalityCache.read`, and row by row from maps of the same files into arrays of the
same shape. Both from the page cache: the disk's speed is nobody's merit. The two take turns; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from mbcd_cli.data.cache import CacheWriter, Rows, Shard, shard_ranges
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.dataset import ModalityCache
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import Clip

SHAPES = ((1024, 8, 14, 14), (128, 32, 14, 14))


def write(folder: Path, *, clips: int, dtype: str, compression: str) -> ModalityCache:
    """A cache of one training view per clip."""
    folder.mkdir()
    table = [Clip(f"c{i}", "d", "train", 0, "x") for i in range(clips)]
    writer = CacheWriter(
        folder,
        recipe={"modality": "video"},
        modality=VideoModality(),
        clips=Clips(table),
        shards=shard_ranges([1] * clips, limit=64),
        domains=("d",),
        label_names=("x",),
        provenance={},
        compression=compression,
    )
    rng = np.random.default_rng(0)
    small = dtype == "int8"
    for number, span in enumerate(writer.shards):
        count = len(span)
        parts = [rng.integers(0, 100, (count, *shape), np.uint8).astype(dtype) for shape in SHAPES]
        scales = [np.ones((count, shape[0]), np.float32) if small else None for shape in SHAPES]
        none = Rows([p[:0] for p in parts], np.empty(0, np.int32), np.empty(0, np.int16), [None, None])
        rows = Rows(parts, np.arange(span.start, span.stop, dtype=np.int32), np.zeros(count, np.int16), scales)
        writer.write_shard(number, Shard({"train": rows, "test": none}, [], []))
    writer.finish()
    return ModalityCache(folder)


def raw_maps(folder: Path) -> list[list[np.memmap]]:
    maps = []
    for path in sorted(folder.glob("shard-*.h5")):
        with h5py.File(path) as file:
            parts = [file[f"train/part{i}"] for i in range(len(SHAPES))]
            maps.append([np.memmap(path, p.dtype, "r", p.id.get_offset(), p.shape) for p in parts])
    return maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cache = write(Path(place) / "video-0", clips=options.clips, dtype=options.dtype, compression="none")
        maps = raw_maps(cache.folder)
        stored = np.dtype(options.dtype)
        size = sum(int(np.prod(shape)) for shape in SHAPES) * stored.itemsize

        def ours(index: np.ndarray) -> None:
            cache.read(index, np.zeros(len(index), np.int64))

        def raw(index: np.ndarray) -> None:
            out = [np.empty((len(index), *shape), stored) for shape in SHAPES]
            for position, clip in enumerate(index):
                shard, row = divmod(int(clip), 64)
                for part, target in zip(maps[shard], out, strict=True):
                    target[position] = part[row]

        results = {}
        rng = np.random.default_rng(1)
        orders = {"sequential": np.arange(options.clips), "random": rng.permutation(options.clips)}
        for threads in (1, 2):
            for label, order in orders.items():
                batches = [order[i : i + 16] for i in range(0, len(order), 16)]
                seconds: dict[str, list[float]] = {"ours": [], "raw": []}
                with ThreadPoolExecutor(threads) as pool:
                    for turn in range(options.repeats + 1):
                        for name, read in (("ours", ours), ("raw", raw)):
                            started = time.perf_counter()
                            list(pool.map(read, batches))
                            if turn:  # the first fills the page cache
                                seconds[name].append(time.perf_counter() - started)
                rates = {k: len(order) * size / statistics.median(v) / 1e9 for k, v in seconds.items()}
                ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["raw"], strict=True))
                results[f"{label}, {threads} thread(s)"] = {
                    "reader_GB_per_s": round(rates["ours"], 2),
                    "memmap_GB_per_s": round(rates["raw"], 2),
                    "reader_of_memmap_percent": round(100 * ratio, 1),
                }
        print(json.dumps({"dtype": options.dtype, "clips": options.clips, "bytes_per_row": size, **results}, indent=2))


if __name__ == "__main__":
    main()
