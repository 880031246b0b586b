"""What a training consists of, made from its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.encoders.layout import weights_channels_last
from mbcd_cli.errors import SettingsError
from mbcd_cli.layers import rounding_alike, share_dropout
from mbcd_cli.methods import method_class
from mbcd_cli.methods.base import Context, Method
from mbcd_cli.model import MultiModalModel, build_model
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import Randomness, seed_everything, step_seed
from mbcd_cli.runs.trunks import attach_trunks
from mbcd_cli.runtime import use_channels_last
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import AverageSettings, Settings
from mbcd_cli.training.average import Average
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.snapshots import Snapshots
from mbcd_cli.training.static_step import StaticStep
from mbcd_cli.training.step import TrainStep
from mbcd_cli.training.swad import SWAD


@dataclass(frozen=True, slots=True)
class Training:
    """`step` (with student, method, optimizer and average), its `randomness`, and `run_step`, the way steps are run
    where that is not the plain one."""

    step: TrainStep
    randomness: Randomness
    run_step: StaticStep | None = None


def assemble(
    settings: Settings, dataset: Dataset, *, device: torch.device, group: Group = ALONE, say: Say = SILENT
) -> Training:
    """Student, average, method, optimizer and step, all seeded by training.seed (first weights by training.init_seed,
    where it is set), on `device`.

    The model draws from torch's global generator; trunks of views that are not stored are attached to the dataset.

    Raises:
        SettingsError: there is no such method, it reads views that the cache does not have, batches are too small for
            it, or a CUDA graph is required where there can be none.
    """
    seed_everything(settings.training.seed)
    attach_trunks(settings, dataset, device=device, say=say)
    with _drawn_from(settings.training.init_seed):
        model = build_model(
            settings.modalities,
            settings=settings.model,
            classes=dataset.classes,
            live_trunks=settings.cache.live_trunks,
            tail_weights=dataset.tail_weights,
            trunk_weights=dataset.trunk_weights if settings.cache.live_trunks else None,
        )
    if settings.model.tails == "frozen":
        _say_what_is_random(model, settings, dataset, say)
    kind = method_class(settings.method.name)
    if kind.views > settings.cache.views > 0:
        raise SettingsError(
            f"Method {settings.method.name} reads {kind.views} views of a clip per batch, and the cache has "
            f"{settings.cache.views} (cache.views).",
            "Prepare with --views 2 or more, or with --views 0, which decodes fresh ones.",
        )
    sources = [list(dataset.domains).index(domain) for domain in settings.training.source_domains]
    return train_with(kind, model.to(device), settings, sources=sources, group=group, say=say)


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """First weights come from a seed of their own, where there is one; the training's draws go on as if from none."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train_with(
    kind: type[Method],
    model: MultiModalModel,
    settings: Settings,
    *,
    sources: Sequence[int],
    group: Group = ALONE,
    say: Say = SILENT,
) -> Training:
    """The training of `model` (where it is, as it is) with a method.

    Args:
        kind: the method's class; `settings.method` are its settings.
        sources: indices of the source domains in the dataset's list.

    Raises:
        SettingsError: batches are too small for the method, or a CUDA graph is required where there can be none.
    """
    training, runtime = settings.training, settings.runtime
    device = next(model.parameters()).device
    last = use_channels_last(runtime, device)
    if last:
        weights_channels_last(model)
    _agree(model, group)
    average = build_average(model, settings.average)
    if runtime.compile:
        for compiled in (model, *([average.model] if average is not None else [])):
            compile_tails(compiled)
    randomness = Randomness(seed=step_seed(training.seed), device=device)
    context = Context.of(
        model, randomness=randomness, average=average, precision=runtime.precision, group=group, sources=sources
    )
    method = build_method(kind, settings, context)
    _check_batch(settings, method, group)
    graph = _graph(settings, method, device, group)
    optimizer = build_optimizer(
        [*model.parameters(), *method.parameters()],
        settings.optimizer,
        groups=method.parameter_groups(),
        capturable=graph,
    )
    step = TrainStep(
        method=method,
        optimizer=optimizer,
        average=average,
        snapshots=Snapshots(model) if settings.average.snapshots else None,
        batch_norm=training.batch_norm,
        channels_last=last,
    )
    run_step = None
    if graph:
        run_step = StaticStep(step, draws=[randomness], device=device, required=runtime.cuda_graph == "on", say=say)
    return Training(step=step, randomness=randomness, run_step=run_step)


def _say_what_is_random(model: MultiModalModel, settings: Settings, dataset: Dataset, say: Say) -> None:
    """Warn of frozen encoders that nothing has trained; an array read as it is has none."""
    random = [
        name
        for name, tail in model.tails.items()
        if name not in dataset.pretrained
        and (settings.modalities[name].prepared_encoder or any(True for _ in tail.parameters()))
    ]
    if random:
        say.warn(f"{', '.join(random)}: encoders that nothing has trained are frozen; this probes random features.")


def build_average(model: MultiModalModel, settings: AverageSettings) -> Average | None:
    """The average of `model`'s weights, or None where there is to be none."""
    if settings.kind == "none":
        return None
    return (SWAD if settings.kind == "swad" else Average)(model, settings)


def build_method(kind: type[Method], settings: Settings, context: Context) -> Method:
    """The method with its own modules on the model's device and of its type.

    They are initialised from a stream of their own: what the model draws is the same whatever the method.
    """
    like = next(context.model.parameters())
    device = like.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.training.seed + 1)
        method = kind(settings.method, context).to(device=device, dtype=like.dtype)
    rounding_alike(method)
    _agree(method, context.group)
    return method


def _check_batch(settings: Settings, method: Method, group: Group) -> None:
    """Refuse batches with too few clips for the method; there are no smaller ones: a short last batch is left out."""
    training = settings.training
    least = method.least_batch if training.batch_norm == "tracked" else 1
    if training.batch_size // group.world < least:
        shared = f", shared by {group.world} processes," if group.world > 1 else ""
        raise SettingsError(
            f"training.batch_size: method {settings.method.name} has batch norms of its own, which need {least} clips "
            f"in every process; batches of {training.batch_size}{shared} have fewer.",
            f"Set training.batch_size to {least * group.world} or more, or training.batch_norm=frozen.",
        )


def _agree(module: torch.nn.Module, group: Group) -> None:
    """The same initial weights, and masks drawn for the global batch, in all processes."""
    group.average_([tensor for tensor in module.state_dict().values() if tensor.is_floating_point()])
    share_dropout(module, group)


def _graph(settings: Settings, method: Method, device: torch.device, group: Group) -> bool:
    """Whether the step is captured; collectives stay out of graphs: several processes run kernel by kernel."""
    graph = settings.runtime.cuda_graph != "off" and device.type == "cuda" and group.world == 1 and method.capturable
    if settings.runtime.cuda_graph == "on" and not graph:
        why = f" with {group.world} processes" if group.world > 1 else ""
        why += "" if method.capturable else f" of method {settings.method.name}"
        raise SettingsError(f"runtime.cuda_graph=on: there is no capture on {device}{why}.", "Use auto or off.")
    return graph


def compile_tails(model: MultiModalModel) -> None:
    """torch.compile every stage of every tail, in place; noise between the stages stays outside."""
    for tail in model.tails.values():
        for name in tail.names:
            stage = getattr(tail, name)
            if any(True for _ in stage.parameters()):
                stage.compile()
