"""How long the paper's encoders take: trunk (once per view, in prepare) and layer4 (forward and backward, per step).

    python tests/benchmarks/encoder_speed.py --device cpu --batch 1 --repeats 3

GFLOP are 2 x multiply-adds, counted by torch on the shapes of the paper's preset; weights are random.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mbcd_cli.encoders import build_encoder
from mbcd_cli.resolved import validate

PRESET = Path(__file__).resolve().parents[2] / "presets" / "epic-kitchens.toml"


def seconds(call, *, repeats: int, device: torch.device) -> float:
    """Least time of `repeats` calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="clips per pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="convolutions in bfloat16 (autocast)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    tree = validate(tomllib.loads(PRESET.read_text(encoding="utf-8")))
    results = {}
    for name, modality in tree.modalities.items():
        torch.manual_seed(0)
        trunk, tail = build_encoder(name, modality).cut(modality.cut)
        trunk.to(device)
        tail.to(device).train()
        ((shape, dtype),) = modality.part_shapes()
        kind = torch.uint8 if dtype.kind == "u" else torch.float32
        inputs = (torch.randint(0, 256, (options.batch, *shape), device=device).to(kind),)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            with FlopCounterMode(display=False) as counter:
                parts = trunk(inputs)
            trunk_gflop = counter.get_total_flops() / options.batch / 1e9
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                tail(parts)
            tail_gflop = counter.get_total_flops() / options.batch / 1e9
            stored = tuple(part.half() for part in parts)

            def step(tail=tail, stored=stored) -> None:
                tail.zero_grad(set_to_none=True)
                tail(stored).square().mean().backward()

            trunk_s = seconds(lambda t=trunk, x=inputs: t(x), repeats=options.repeats, device=device)
            step_s = seconds(step, repeats=options.repeats, device=device)
        results[name] = {
            "encoder": modality.encoder,
            "trunk_gflop": round(trunk_gflop, 1),
            "trunk_clips_per_s": round(options.batch / trunk_s, 3),
            "trunk_gflop_per_s": round(trunk_gflop * options.batch / trunk_s, 1),
            "layer4_gflop": round(tail_gflop, 1),
            "layer4_step_clips_per_s": round(options.batch / step_s, 3),
            "layer4_step_gflop_per_s": round(3 * tail_gflop * options.batch / step_s, 1),
            "bytes_at_the_cut_float16": sum(part.numel() * 2 for part in parts) // options.batch,
        }
    print(json.dumps({"device": str(device), "threads": torch.get_num_threads(), "batch": options.batch, **results}))


if __name__ == "__main__":
    main()
