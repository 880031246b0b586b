"""One training step at the paper's shapes: ours from the cut, the naive formulation, and the floor.

    python tests/benchmarks/train_step.py --batch 2 --repeats 3 --threads 1
    python tests/benchmarks/train_step.py --device cuda --batch 16 --repeats 20
    python tests/benchmarks/train_step.py --method all --batch 2 --repeats 2

With `--method`, methods of the registry (`all`: one of every class) against ERM: each in a process of its own (on a GPU
all in one), where its step and ERM's are timed in turn; `step` and `memory` are ratios to ERM's step and to the peak
memory of ERM's. `own` is what the method adds, timed alone, in units of ERM's step: its step on a model without
encoders less ERM's there, and the teacher's forward pass and the average's update where it has them. `of_sum` is
step / (1 + own).

`naive` is written plainly here, as a port of the method would be: it runs the frozen trunk anew for each of its three
passes, in float32 and eager mode with torch's own convolutions, takes the gradients in separate backward passes and
averages the teacher tensor by tensor. `live` is our step where the trunk follows the training as the reference's does
(`cache.trunk_batch_norm = "batch"`), from decoded frames: the trunk runs twice, the student's and the teacher's.
`floor` is the tail's forward pass timed alone x 9 (three forward passes and, at two forwards each, three backward
ones) at the quicker of the two memory layouts, with our convolutions. All are timed in turn, round by round, in one
process; the least time of each counts. Weights are random; ratios within one run are what counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import torch
from torch.nn import functional as F

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.convolution import Conv3d
from mbcd_cli.encoders.layout import channels_last, weights_channels_last
from mbcd_cli.encoders.staged import Tail
from mbcd_cli.errors import MbcdError
from mbcd_cli.methods import METHODS, method_class
from mbcd_cli.methods.base import Context
from mbcd_cli.model import MultiModalModel
from mbcd_cli.randomness import Randomness
from mbcd_cli.resolved import resolve, validate
from mbcd_cli.runtime import configure, peak_memory_mb
from mbcd_cli.settings import RuntimeSettings, Settings
from mbcd_cli.training.assemble import compile_tails, train_with
from mbcd_cli.training.average import Average
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.static_step import StaticStep
from mbcd_cli.training.step import TrainStep

PRESET = Path(__file__).resolve().parents[2] / "presets" / "epic-kitchens.toml"
CLASSES = 8


_ON_GPU: dict[tuple[str, bool], tuple[torch.nn.Module, Tail]] = {}
"""Encoders made once for all cases of a run on a GPU: drawing their weights takes seconds."""


def build(tree: Settings, device: torch.device, *, live: bool = False):
    """Trunks and the model of the paper (which holds them where they are live), random weights from one seed."""
    torch.manual_seed(0)
    trunks, tails = {}, {}
    for name in tree.model.modalities:
        modality = tree.modalities[name]
        if (name, live) in _ON_GPU:
            trunks[name], tails[name] = copy.deepcopy(_ON_GPU[name, live])
            continue
        trunks[name], tails[name] = build_encoder(name, modality).cut(modality.cut, live=live)
        if device.type == "cuda":
            _ON_GPU[name, live] = copy.deepcopy((trunks[name].to(device), tails[name].to(device)))
    model = MultiModalModel(tails, settings=tree.model, classes=CLASSES, trunks=trunks if live else None)
    return torch.nn.ModuleDict(trunks).to(device), model.to(device)


def raw_batch(tree: Settings, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Decoded frames (uint8) and spectrograms, as the trunks take them."""
    inputs = {}
    for name in tree.model.modalities:
        ((shape, dtype),) = tree.modalities[name].part_shapes()
        random = torch.rand(size, *shape)
        inputs[name] = ((random * 255).to(torch.uint8) if dtype.kind == "u" else random - 0.5).to(device)
    return inputs


class NaiveStep:
    """The step as one would write it down: see the module's docstring."""

    def __init__(self, trunks, model, tree: Settings) -> None:
        self.trunks, self.model, self.settings = trunks, model, tree.method
        for module in (*trunks.modules(), *model.modules()):
            if isinstance(module, Conv3d):
                module.__class__ = torch.nn.Conv3d  # as published: torch's own
        for module in trunks.modules():  # as the reference: the trunk's batch norm sees the batch
            module.training = True
        self.teacher_trunks, self.teacher = copy.deepcopy(trunks), copy.deepcopy(model).eval()
        for module in self.teacher_trunks.modules():
            module.training = False
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=False, fused=False)

    def at_cut(self, trunks, inputs):
        with torch.no_grad():
            return {name: trunks[name]((value,)) for name, value in inputs.items()}

    @staticmethod
    def noise(x):
        """DSU as published."""
        dims = tuple(range(2, x.dim()))
        mean, std = x.mean(dims, keepdim=True), (x.var(dims, keepdim=True) + 1e-6).sqrt()
        spread_mean, spread_std = (mean.var(0, keepdim=True) + 1e-6).sqrt(), (std.var(0, keepdim=True) + 1e-6).sqrt()
        new_mean = mean + torch.randn_like(mean) * spread_mean
        new_std = std + torch.randn_like(std) * spread_std
        return (x - mean) / std * new_std + new_mean

    def noised(self, parts):
        return tuple(map(self.noise, parts)) if torch.rand(1).item() < 0.5 else parts

    def __call__(self, inputs, labels) -> float:
        model, alpha, weight = self.model, self.settings.consistency.alpha, self.settings.distillation.weight
        names = model.modalities
        with torch.no_grad():
            cut = self.at_cut(self.teacher_trunks, inputs)
            target = self.teacher.fuse(self.teacher.features(cut)).softmax(1).clamp(min=1e-12)
        model.train()
        cut = self.at_cut(self.trunks, inputs)
        pooled = {name: model.pool(name, cut[name], self.noised) for name in names}
        logits = model.unimodal(model.normalised(pooled))
        ce = {name: F.cross_entropy(logits[name], labels) for name in names}
        kl = sum(F.kl_div(one.log_softmax(1), target, reduction="batchmean") for one in logits.values())
        s = [one.detach().softmax(1).max(1).values.sum().item() for one in logits.values()]
        ratios = [sum(s[k] / s[j] for j in range(len(s)) if j != k) / (len(s) - 1) for k in range(len(s))]
        drop = torch.tanh(torch.tensor([max(r - 1, 0) for r in ratios]))
        keep = (torch.rand(len(labels), len(s)) >= drop).float().to(labels.device)
        self.optimizer.zero_grad()
        theta = {name: list(model.tails[name].named_parameters()) for name in names}
        theta = {name: [(key, p) for key, p in pairs if p.requires_grad] for name, pairs in theta.items()}
        gradients = {
            name: torch.autograd.grad(ce[name], [p for _, p in theta[name]], retain_graph=True) for name in names
        }
        (sum(ce.values()) + weight * kl).backward()
        before = {name: [p.detach().clone() for _, p in theta[name]] for name in names}
        with torch.no_grad():
            for name in names:
                for (_, p), g in zip(theta[name], gradients[name], strict=True):
                    p -= alpha * g
        cut = self.at_cut(self.trunks, inputs)
        fused = model.fuse(model.features(cut), keep)
        loss = F.cross_entropy(fused, labels) + weight * F.kl_div(fused.log_softmax(1), target, reduction="batchmean")
        loss.backward()
        with torch.no_grad():
            for name in names:
                for (_, p), old in zip(theta[name], before[name], strict=True):
                    p.copy_(old)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in (
                *zip(self.teacher.state_dict().values(), model.state_dict().values(), strict=True),
                *zip(self.teacher_trunks.state_dict().values(), self.trunks.state_dict().values(), strict=True),
            ):
                if old.is_floating_point():
                    old.copy_(0.999 * old + 0.001 * new)
        return loss.item() + sum(one.item() for one in ce.values())


def ours(
    tree: Settings,
    device: torch.device,
    *,
    precision: str,
    last: bool,
    live: bool = False,
    graph: bool = True,
    compiled: bool = False,
):
    """The step as `mbcd train` assembles it, captured in a CUDA graph on a GPU."""
    _, model = build(tree, device, live=live)
    if last:
        weights_channels_last(model)
    randomness = Randomness(seed=0, device=device)
    graph = graph and device.type == "cuda"
    average = Average(model, tree.average)
    if compiled:
        compile_tails(model)
        compile_tails(average.model)
    context = Context.of(model, randomness=randomness, average=average, precision=precision)
    step = TrainStep(
        method=method_class(tree.method.name)(tree.method, context),
        optimizer=build_optimizer(model.parameters(), tree.optimizer, capturable=graph),
        average=average,
        channels_last=last,
    )
    return StaticStep(step, draws=[randomness], device=device, required=True) if graph else step


def floor(tree: Settings, device: torch.device, batch: Batch, *, precision: str, last: bool):
    """The tails' forward pass alone."""
    _, model = build(tree, device)
    tails = model.tails.eval()
    inputs = {name: tuple(part.float() for part in parts) for name, parts in batch.inputs.items()}
    if last:
        weights_channels_last(tails)
        inputs = {name: tuple(map(channels_last, parts)) for name, parts in inputs.items()}

    @torch.no_grad()
    def call():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for name, parts in inputs.items():
                tails[name](parts)

    return call


def profiled(call) -> dict[str, object]:
    """Of three calls on a GPU: the share of the time that kernels run, how many a call, and the longest by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    busy, end, whole = 0.0, spans[0][0], max(stop for _, stop in spans) - spans[0][0]
    for begin, stop in spans:
        busy, end = busy + max(stop - max(begin, end), 0.0), max(stop, end)
    each: dict[str, float] = {}
    for e in kernels:
        each[e.name[:90]] = each.get(e.name[:90], 0.0) + e.time_range.elapsed_us()
    longest = sorted(each.items(), key=lambda item: -item[1])[:24]
    shares = {name: round(time / sum(each.values()), 3) for name, time in longest}
    return {
        "busy": round(busy / whole, 3),
        "kernels": len(kernels) // 3,
        "ms": round(whole / 3000, 2),
        "shares": shares,
    }


class Scale(torch.nn.Module):
    """A tail of one parameter: features as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.factor * x


def training_of(name: str, device: torch.device, *, encoders: bool = True):
    """A training of the paper's model with a method of the registry, random weights; without encoders on features."""
    tree = resolve(preset="epic-kitchens", environ={}, method=name)
    runtime = tree.runtime.model_copy(update={"device": str(device), "precision": "float32"})
    tree = tree.model_copy(update={"runtime": runtime})
    _, model = build(tree, device)
    if not encoders:
        tails = {n: Tail({"scale": Scale(), "pool": torch.nn.Identity()}, dim=d) for n, d in model.dims.items()}
        model = MultiModalModel(tails, settings=tree.model, classes=CLASSES).to(device)
    return train_with(method_class(name), model, tree, sources=(0, 1)), tree


def measured(name: str, cut: dict[str, tuple[torch.Tensor, ...]], options) -> dict[str, float]:
    """Least seconds of a method's step and ERM's, of what it adds, and the peak memory before ERM's was there."""
    device = torch.device(options.device)
    if device.type == "cuda":  # one process measures all methods
        build(resolve(preset="epic-kitchens", environ={}, method="erm"), device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    there = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    clock = time.process_time if options.cpu_time else time.perf_counter
    views = method_class(name).views
    clips = torch.arange(options.batch, device=device)

    def batch(inputs, repeats: int) -> Batch:
        rows = clips.repeat_interleave(repeats)
        inputs = {n: tuple(part.to(device)[rows] for part in parts) for n, parts in inputs.items()}
        return Batch(inputs=inputs, labels=rows % CLASSES, domains=rows % 2, clips=rows)

    def timed(call) -> float:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    def run(training, made: Batch):
        step = training.run_step or training.step
        return lambda: step(made)

    training, tree = training_of(name, device)
    calls = {"step": run(training, batch(cut, views))}
    for _ in range(5 if device.type == "cuda" else 1):  # a graph is captured after three steps
        calls["step"]()
    memory = peak_memory_mb(device) - there
    calls["erm"] = run(training_of("erm", device)[0], batch(cut, 1))
    features = {n: (torch.randn(options.batch, d, device=device),) for n, d in training.step.model.dims.items()}
    for key, method, repeats in (("own", name, views), ("own_erm", "erm", 1)):
        calls[key] = run(training_of(method, device, encoders=False)[0], batch(features, repeats))
    average = training.step.average
    if average is not None:
        step, inputs = training.step.context.step, batch(cut, views).inputs
        calls["update"] = lambda: average.update(step)
        if tree.method.needs_average:
            calls["teacher"] = torch.no_grad()(lambda: average.model(inputs))
    for call in calls.values():
        for _ in range(5 if device.type == "cuda" else 1):
            timed(call)
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(options.repeats):
        for key, call in calls.items():
            times[key].append(timed(call))
    return {**{key: min(values) for key, values in times.items()}, "memory": memory}


def _in_turn(name: str, cut: str, options) -> dict[str, float]:
    """`measured` of a method: in this process on a GPU, which tells its memory, else in one of its own."""
    if options.device.startswith("cuda"):
        return measured(name, torch.load(cut), options)
    words = [sys.executable, __file__, *sys.argv[1:], "--child", f"{name}:{cut}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


def methods_against_erm(options) -> None:
    """A table of ratios, a line per method."""
    names = options.method.split(",")
    if names == ["all"]:
        names = list({entry.where: name for name, entry in reversed(METHODS.items())}.values())[::-1]
    tree = resolve(preset="epic-kitchens", environ={}, method="erm")
    with tempfile.TemporaryDirectory() as folder:
        trunks, _ = build(tree, torch.device("cpu"))
        inputs = raw_batch(tree, options.batch, torch.device("cpu"))
        with torch.no_grad():
            cut = {name: tuple(part.half() for part in trunks[name]((value,))) for name, value in inputs.items()}
        torch.save(cut, Path(folder) / "cut.pt")
        del trunks, inputs
        found: dict[str, dict[str, float]] = {}
        if options.device.startswith("cuda"):  # cuDNN tries its kernels once, in workspaces that would count as ERM's
            _in_turn("erm", f"{folder}/cut.pt", options)
        print(f"{'method':14} {'step':>6} {'memory':>6} {'own':>6} {'of_sum':>6}", flush=True)
        for name in ["erm", *(name for name in names if name != "erm")]:
            try:
                found[name] = one = _in_turn(name, f"{folder}/cut.pt", options)
            except (MbcdError, RuntimeError) as error:
                print(f"{name:14} {str(error).splitlines()[-1]}", flush=True)
                continue
            own = one["own"] - one["own_erm"] + one.get("update", 0) + one.get("teacher", 0)
            step, own = one["step"] / one["erm"], own / one["erm"]
            memory = one["memory"] / found.get("erm", one)["memory"]
            print(f"{name:14} {step:6.2f} {memory:6.2f} {own:6.2f} {step / (1 + own):6.2f}", flush=True)
    print(json.dumps({"device": options.device, "threads": options.threads, "batch": options.batch, "measured": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-naive", action="store_true", help="leave the naive step out")
    parser.add_argument("--live", action="store_true", help="time the step with live trunks too")
    parser.add_argument("--method", help="methods against ERM: names of the registry, or all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help="time the step without a CUDA graph too")
    parser.add_argument("--compiled", action="store_true", help="time the step with compiled tails too")
    parser.add_argument("--profile", action="store_true", help="tell which kernels the steps run (CUDA)")
    parser.add_argument("--deterministic", action="store_true", help="with deterministic kernels, as training asks")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds (on a busy machine)")
    options = parser.parse_args()
    runtime = {"device": options.device, "threads": options.threads, "compile": options.compiled}
    configure(RuntimeSettings(deterministic=options.deterministic, **runtime))
    if options.child:
        name, _, path = options.child.partition(":")
        print(json.dumps(measured(name, torch.load(path), options)))
        return
    if options.method:
        methods_against_erm(options)
        return
    device = torch.device(options.device)
    tree = validate(tomllib.loads(PRESET.read_text(encoding="utf-8")))
    inputs = raw_batch(tree, options.batch, device)
    labels = torch.arange(options.batch, device=device) % CLASSES
    trunks, model = build(tree, device)
    cut = {name: tuple(part.half() for part in trunks[name]((value,))) for name, value in inputs.items()}
    batch = Batch(inputs=cut, labels=labels, domains=labels, clips=labels)
    decoded = {name: (value,) for name, value in inputs.items()}
    decoded = Batch(inputs=decoded, labels=labels, domains=labels, clips=labels)
    clock = time.process_time if options.cpu_time else time.perf_counter

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(call) -> float:
        wait()
        start = clock()
        call()
        wait()
        return clock() - start

    cases = {}
    for precision in ("float32", "bfloat16"):
        for layout, last in (("contiguous", False), ("channels-last", True)):
            call = floor(tree, device, batch, precision=precision, last=last)
            cases[f"forward {precision} {layout}"] = call
        # What runtime.channels_last = auto takes.
        last = device.type == "cuda" or precision == "bfloat16"
        step = ours(tree, device, precision=precision, last=last)
        cases[f"step {precision}"] = lambda step=step: step(batch)
        others = {"plain": {"graph": False}} if options.plain else {}
        others |= {"compiled": {"compiled": True}} if options.compiled else {}
        for name, how in others.items():
            step = ours(tree, device, precision=precision, last=last, **how)
            cases[f"{name} {precision}"] = lambda step=step: step(batch)
        if options.live:
            step = ours(tree, device, precision=precision, last=last, live=True)
            cases[f"live {precision}"] = lambda step=step: step(decoded)
    if not options.no_naive:
        naive = NaiveStep(trunks, model, tree)
        cases["naive"] = lambda: naive(inputs, labels)
    begun = time.perf_counter()
    for name, call in cases.items():
        for _ in range(5 if device.type == "cuda" else 1):  # a graph is captured after three steps
            first = timed(call)
        print(f"warm-up: {name} {first:.2f} s, {time.perf_counter() - begun:.0f} s since the start", flush=True)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, call in cases.items():
            times[name].append(timed(call))
    least = {name: min(values) for name, values in times.items()}
    result = {"device": str(device), "threads": options.threads, "batch": options.batch, "torch": torch.__version__}
    result["seconds"] = {name: [round(value, 4) for value in values] for name, values in times.items()}
    for precision in ("float32", "bfloat16"):
        nine = 9 * min(least[f"forward {precision} {layout}"] for layout in ("contiguous", "channels-last"))
        step = least[f"step {precision}"]
        result[precision] = {"step_s": round(step, 4), "floor_s": round(nine, 4), "of_floor": round(step / nine, 3)}
        for name in ("naive", f"live {precision}", f"plain {precision}", f"compiled {precision}"):
            if name in least:
                result[precision][f"{name.split()[0]}_of_step"] = round(least[name] / step, 2)
    result["peak_memory_mb"] = peak_memory_mb(device)
    print(json.dumps(result, indent=1), flush=True)
    for precision in ("float32", "bfloat16") if options.profile else ():
        print(json.dumps({precision: profiled(cases[f"step {precision}"])}, indent=1), flush=True)


if __name__ == "__main__":
    main()
