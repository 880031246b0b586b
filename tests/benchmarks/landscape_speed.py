"""Landscape against the packages `loss-landscapes` 3.0.6 and `pyhessian` 0.1, on the same model and data in
one run.

    uv run --group bench python tests/benchmarks/landscape_speed.py

Both packages are for this benchmark only. A small audio-visual model, briefly trained on random clips so
that its Hessian has large eigenvalues; one CPU thread and process time (other processes do not count), or
CUDA where there is one. Prints one JSON object: seconds of both sides, their ratio, and the relative errors
of the top eigenvalue against a float64 one.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss_landscapes
import loss_landscapes.metrics
import torch
from loss_landscapes.model_interface.model_wrapper import GeneralModelWrapper
from pyhessian import hessian as PyHessian
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import Batch
from mbcd_cli.landscape.directions import Sphere, moving_names
from mbcd_cli.landscape.hessian import Hessian, top_eigenvalues
from mbcd_cli.landscape.objective import ModelObjective
from mbcd_cli.landscape.store import GridStore, axis
from mbcd_cli.landscape.surface import fill_grid
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.runtime import float32_products
from mbcd_cli.settings import ModelSettings


class Fused(nn.Module):
    """The fused logits alone: what the packages are to evaluate."""

    def __init__(self, model: MultiModalModel) -> None:
        super().__init__()
        self.tails, self.fused_head = model.tails, model.fused_head
        self._model = [model]  # in a list, so that uni-modal heads are no parameters of this module

    def forward(self, inputs: Any) -> torch.Tensor:
        model = self._model[0]
        return model.fuse(model.features(inputs.parts if isinstance(inputs, Inputs) else inputs))


class Inputs:
    """Makes a dict of inputs look like the tensor that pyhessian expects."""

    def __init__(self, parts: dict[str, tuple[torch.Tensor, ...]]) -> None:
        self.parts = parts

    def to(self, _: Any) -> Inputs:
        return self

    def cuda(self, **_: Any) -> Inputs:
        return self  # they are there already

    def size(self, _: int) -> int:
        return len(next(iter(self.parts.values()))[0])


def trained(clips: int, batch: int, device: torch.device) -> tuple[MultiModalModel, list[Batch]]:
    """The model and its clips in batches."""
    torch.manual_seed(0)
    modalities = {"video": VideoModality(width=8, frames=8), "audio": AudioModality(width=8)}
    model = build_model(modalities, settings=ModelSettings(hidden=64), classes=10).to(device)
    batches = []
    for _ in range(clips // batch):
        inputs = {
            "video": (torch.randint(0, 256, (batch, 3, 8, 56, 56), dtype=torch.uint8),),
            "audio": (torch.randn(batch, 1, 64, 64),),
        }
        zeros = torch.zeros(batch, dtype=torch.long)
        batches.append(Batch(inputs, torch.randint(0, 10, (batch,)), zeros, zeros).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        for one in batches:
            loss = F.cross_entropy(model(one.inputs)[0], one.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():  # loss-landscapes divides by every filter's norm and fails where one is zero
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return model.eval(), batches


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of process time (wall time with CUDA), and the result."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started, result


def surface_theirs(model: MultiModalModel, batches: list[Batch], *, head: bool, points: int) -> None:
    fused = Fused(copy.deepcopy(model))
    wrapped = GeneralModelWrapper(fused, [fused.fused_head], lambda m, x: m(x)) if head else fused
    inputs = {n: (torch.cat([b.inputs[n][0] for b in batches]),) for n in batches[0].inputs}
    metric = loss_landscapes.metrics.Loss(F.cross_entropy, inputs, torch.cat([b.labels for b in batches]))
    with batches[0].labels.device:  # its random directions are made on torch's default device
        loss_landscapes.random_plane(wrapped, metric, distance=1, steps=points, normalization="filter")


@float32_products()
def surface_ours(model: MultiModalModel, batches: list[Batch], *, head: bool, points: int) -> None:
    """Everything counts: copying the model, preparing the clips, directions, the file."""
    names = moving_names(model, group="fused_head" if head else "all")
    loss = ModelObjective(model=model, batches=batches, names=names, device=batches[0].labels.device)
    directions = [Sphere(loss.start).sample(seed=0, index=index) for index in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        x = axis(1.0, points)
        with GridStore(Path(folder) / "surface.h5", x=x, y=x, identity={}) as store:
            fill_grid(store, loss, directions)


def eigenvalue_theirs(model: MultiModalModel, batches: list[Batch]) -> float:
    data: list[tuple[Inputs, torch.Tensor]] = [(Inputs(b.inputs), b.labels) for b in batches]
    cuda = batches[0].labels.is_cuda
    fused = Fused(copy.deepcopy(model))
    if len(data) == 1:
        found = PyHessian(fused, F.cross_entropy, data=data[0], cuda=cuda)
    else:
        found = PyHessian(fused, F.cross_entropy, dataloader=data, cuda=cuda)
    return found.eigenvalues()[0][0]


@float32_products()
def eigenvalue_ours(
    model: MultiModalModel, batches: list[Batch], *, dtype: torch.dtype = torch.float32, tolerance: float = 1e-3
) -> float:
    names = moving_names(model, group="all")
    device = batches[0].labels.device
    loss = ModelObjective(model=model, batches=batches, names=names, device=device, dtype=dtype)
    hessian = Hessian(loss.terms(), loss.start)
    start = hessian.noise(seed=0, index=0)
    found = top_eigenvalues(hessian, hessian.n, start=start, tolerance=tolerance, dtype=dtype)
    return float(found.values[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--points", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batches = trained(arguments.clips, arguments.batch, device)
    report: dict[str, Any] = {"device": str(device), **vars(arguments)}
    for name, head in (("all_parameters", False), ("fused_head", True)):
        rounds = [
            [
                timed(lambda f=f, head=head: f(model, batches, head=head, points=arguments.points), device)[0]
                for f in (surface_theirs, surface_ours)
            ]
            for _ in range(arguments.rounds)
        ]
        theirs, ours = (min(column) for column in zip(*rounds, strict=True))
        report[f"surface_{name}"] = {"loss_landscapes": theirs, "mbcd": ours, "ratio": theirs / ours}
    for name, chosen in (("one_batch", batches[:1]), ("all_batches", batches)):
        exact = eigenvalue_ours(model, chosen, dtype=torch.float64, tolerance=1e-9)
        theirs, value = timed(lambda chosen=chosen: eigenvalue_theirs(model, chosen), device)
        ours, found = timed(lambda chosen=chosen: eigenvalue_ours(model, chosen), device)
        report[f"top_eigenvalue_{name}"] = {
            "pyhessian": theirs,
            "mbcd": ours,
            "ratio": theirs / ours,
            "pyhessian_error": abs(value / exact - 1),
            "mbcd_error": abs(found / exact - 1),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
