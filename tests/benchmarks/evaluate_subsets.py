"""What all subsets of modalities cost beside one plain pass: `python tests/benchmarks/evaluate_subsets.py`.

Three small encoders on random input (CPU, or CUDA where there is one); the best of several interleaved rounds.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from mbcd_cli.data.modalities import default_modality
from mbcd_cli.data.records import Batch
from mbcd_cli.evaluation.analyses.robustness import subset_variants, subsets
from mbcd_cli.model import build_model
from mbcd_cli.scoring.predictions import predict
from mbcd_cli.settings import ModelSettings

CLIPS, BATCH, ROUNDS = 256, 64, 7


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modalities = {name: default_modality(name) for name in ("video", "audio", "flow")}
    model = build_model(modalities, settings=ModelSettings(), classes=8).to(device)
    rng = np.random.default_rng(0)
    shapes = {"video": (3, 16, 56, 56), "flow": (2, 16, 56, 56), "audio": (1, 257, 126)}
    batches = []
    for start in range(0, CLIPS, BATCH):
        inputs = {n: (torch.tensor(rng.integers(0, 256, (BATCH, *s)), dtype=torch.uint8),) for n, s in shapes.items()}
        index = torch.arange(start, start + BATCH)
        batches.append(Batch(inputs, index % 8, torch.zeros(BATCH, dtype=torch.int64), index))
    variants = subset_variants(model)

    def seconds(**options) -> float:
        started = time.perf_counter()
        predict(model, batches, device=device, **options)
        return time.perf_counter() - started

    seconds()
    plain, all_subsets = [], []
    for _ in range(ROUNDS):
        plain.append(seconds())
        all_subsets.append(seconds(variants=variants))
    one, every = min(plain), min(all_subsets)
    print(f"{device}: {CLIPS} clips, one pass {one:.3f} s, all {len(subsets(model.modalities))} subsets {every:.3f} s")
    print(f"ratio {every / one:.3f} (aim: at most 1.3)")


if __name__ == "__main__":
    main()
