"""What every method must do, as checks that any class can be put through: `check_method(MyMethod)`.

They train tiny models in memory for a few steps; tests/methods runs them on every method of the registry.

Letters: B clips, M modalities, S source domains.
"""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.errors import MbcdError
from mbcd_cli.methods.base import Method, Outputs, Term
from mbcd_cli.model import MultiModalModel
from mbcd_cli.processes import ALONE, Group
from mbcd_cli.randomness import global_states, load_global_states
from mbcd_cli.settings.sources import merge
from mbcd_cli.training.assemble import Training
from mbcd_cli.training.optimizer import load_optimizer, optimizer_state
from mbcd_cli.training.population import StackedStep
from mbcd_cli.training.static_step import WARM_UP, StaticStep
from mbcd_cli.training.step import TrainStep
from mbcd_cli.training.subject import CLASSES, CLIPS, DIMENSION, Subject, own_rows, weights

ERM_TERMS = ("ce_fused", "ce")


def _equal(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    assert tensors.keys() == expected.keys(), f"{what}: other tensors ({sorted(tensors.keys() ^ expected.keys())})"
    differing = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    assert not differing, f"{what}: {', '.join(differing[:4])} differ"


def _by(gap: float) -> str:
    """How far two float64 results are apart, and what so little comes from."""
    single = "; so little is float32's rounding: parts.full_precision(x) leaves float64 as it is, x.float() does not"
    return f", by {gap:.0e}{single if gap < 1e-5 else ''}"


def _near(value: torch.Tensor, expected: torch.Tensor, what: str, *, apart: float) -> None:
    def message(_: str) -> str:
        gap = (value - expected).abs().max().item()
        return what + (_by(gap) if expected.dtype == torch.float64 else "")

    torch.testing.assert_close(value, expected, rtol=0, atol=apart, msg=message)


def check_figures(subject: Subject) -> None:
    """Any number of modalities and of source domains gives finite figures, or is refused with an `MbcdError`."""
    for modalities in (1, 2, 3, 4):
        for sources in (1, 2):
            try:
                step = subject.training(modalities=modalities, sources=sources).step
            except MbcdError:
                continue
            for seed in range(3):
                vector = step(subject.batch(seed, modalities=modalities, sources=sources))
                assert torch.isfinite(vector).all(), f"figures of step {seed + 1} with M = {modalities}, S = {sources}"
            assert step.layout is not None
            assert step.layout.scalars[0] == "total", "the first figure is the total"


def check_neutral(subject: Subject) -> None:
    """With zero weights of what it adds (or its `neutral` settings) it trains ERM's very weights."""
    quiet, kind = subject, subject.kind
    if subject.kind.neutral is not None:
        quiet = replace(subject, method=merge(subject.method, subject.kind.neutral))
    else:
        kind = _silenced(subject.kind)
    erm = replace(subject, kind=Method, method={"unimodal": _unimodal(quiet)})
    neutral = quiet.training(dropout=0.0, kind=kind).step
    plain = erm.training(dropout=0.0).step
    for seed in range(4):
        neutral(subject.batch(seed))
        plain(subject.batch(seed))
    shared = {name: value for name, value in weights(neutral).items() if not name.startswith("method.")}
    _equal(shared, weights(plain), "neutral against ERM")


def _unimodal(subject: Subject) -> str:
    return subject.kind.Settings.model_validate(dict(subject.method)).unimodal


def _silenced(kind: type[Method]) -> type[Method]:
    class Silenced(kind):
        def losses(self, batch: Batch, out: Outputs) -> dict[str, Term]:
            terms = super().losses(batch, out)
            return {n: t if n in ERM_TERMS else replace(t, weight=0.0) for n, t in terms.items()}

    return Silenced


def check_learning(subject: Subject) -> None:
    """The fused head's cross-entropy falls on one batch."""
    step = subject.training(dropout=0.0).step
    batch = subject.batch(0)
    vectors = [step(batch) for _ in range(40)]
    assert step.layout is not None
    losses = [step.layout.unpack(vector.tolist())["ce_fused"] for vector in vectors]
    last = sum(losses[-10:]) / 10  # draws of a step may be hard
    assert last < 0.7 * losses[0], f"the fused cross-entropy went from {losses[0]:.3f} to {last:.3f}"


def check_resume(subject: Subject) -> None:
    """Stopped, saved, loaded and gone on with, it ends in the same bits."""
    whole = subject.training()
    for seed in range(3):
        whole.step(subject.batch(seed))
    file = io.BytesIO()
    torch.save(
        {
            "weights": weights(whole.step),
            "average": None if whole.step.average is None else whole.step.average.state(),
            "optimizer": optimizer_state(whole.step.optimizer),
            "randomness": whole.randomness.state(),
            "global": global_states(),
        },
        file,
    )
    file.seek(0)
    for seed in range(3, 6):
        whole.step(subject.batch(seed))
    again = subject.training(seed=5)
    state = torch.load(file, weights_only=True)  # tensors and plain values only
    parts = {"student": again.step.model, "method": again.step.method}
    if again.step.average is not None:
        parts["average"] = again.step.average.model
        again.step.average.load(state["average"])
    for part, module in parts.items():
        of_part = {k.removeprefix(f"{part}."): v for k, v in state["weights"].items() if k.startswith(f"{part}.")}
        module.load_state_dict(of_part)
    load_optimizer(again.step.optimizer, state["optimizer"])
    again.randomness.load(state["randomness"])
    load_global_states(state["global"])
    again.step.context.step.fill_(3)
    for seed in range(3, 6):
        again.step(subject.batch(seed))
    _equal(weights(again.step), weights(whole.step), "resumed against whole")


def check_deployed(subject: Subject) -> None:
    """The deployed model is ERM's, tensor for tensor; own parameters are in the optimizer, once."""
    step = subject.training().step
    erm = replace(subject, kind=Method, method={}).training().step

    def shapes(model: MultiModalModel) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in model.state_dict().items()}

    assert shapes(step.model) == shapes(erm.model), "the student holds other tensors than ERM's"
    if step.average is not None:
        assert shapes(step.average.model) == shapes(erm.model), "the average holds other tensors than ERM's"
    optimized = [id(p) for group in step.optimizer.param_groups for p in group["params"]]
    own = {name: p for name, p in step.method.named_parameters() if p.requires_grad}
    left_out = [name for name, p in own.items() if optimized.count(id(p)) != 1]
    assert not left_out, f"not in the optimizer exactly once: {', '.join(left_out)}"
    inside = {id(p) for p in step.model.parameters()}
    assert not [name for name, p in own.items() if id(p) in inside], "the student is among the method's own modules"


def check_edges(subject: Subject) -> None:
    """Batches of one class, with one clip of a class, and of one domain give finite figures and weights."""
    alike, lone = torch.zeros(CLIPS, dtype=torch.int64), torch.arange(CLIPS) % CLASSES
    lone[lone == 2] = 1
    lone[0] = 2
    step = subject.training().step
    for labels, sources in ((alike, 2), (lone, 2), (None, 1), (alike, 1)):
        vector = step(subject.batch(3, labels=labels, sources=sources))
        assert torch.isfinite(vector).all(), f"figures with labels {labels} of {sources} domains"
    values = [value for value in weights(step).values() if value.is_floating_point()]
    assert all(torch.isfinite(value).all() for value in values), "weights after batches on the edge"


def check_order(subject: Subject) -> None:
    """Another order of the modalities changes nothing but rounding, in a method that is `symmetric`.

    Draws are constants here, so that they are alike for all modalities. Tensors are matched by their names; of those
    that are the method's own, dimensions of M entries (5, if it takes as many) are taken to stand in fusion order, and
    of all those of sum_k D_k entries.
    """
    if not subject.kind.symmetric:
        return
    for count in (5, 4, 3, 2):
        order = [*range(count)[::-2], *range(count)[-2::-2]]
        try:
            pair = [subject.training(order=numbers, dropout=0.0) for numbers in (range(count), order)]
        except MbcdError:
            continue
        break
    else:
        raise AssertionError("it takes no two modalities; say symmetric = False")
    step, reordered = (training.step for training in pair)
    for training in pair:
        _quieten(training)
    dims, theirs = step.model.dims, _held(reordered)
    for name, value in _held(step).items():
        assert name in theirs, f"{name}: own tensors have other names in another order of the modalities"
        theirs[name].copy_(_reordered(name, value, dims, order))
    for seed in range(3):
        batch = subject.batch(seed, modalities=count)
        expected, figures = (dict(_flat(each, each(batch))) for each in (step, reordered))
        assert expected.keys() == figures.keys()
        gaps = {name: abs(figures[name] - value) for name, value in expected.items()}
        differing = [name for name, gap in gaps.items() if gap > 1e-8]
        by = _by(max(gaps.values()))
        assert not differing, f"another order of modalities: {', '.join(differing)} differ in step {seed + 1}{by}"
    for name, value in _held(step).items():
        if name.startswith("method.") and name.endswith(("running_mean", "running_var")):
            continue  # those of one batch norm for all modalities remember the last one best; training reads none
        expected = _reordered(name, value, dims, order)
        differ = f"another order of modalities: {name} differs"
        _near(theirs[name], expected, differ, apart=1e-8)


def _quieten(training: Training) -> None:
    """Constants instead of draws, and no dropout."""
    device = training.randomness.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.3, device=device)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, 0.3, dtype=dtype, device=device)

    training.randomness.uniform, training.randomness.normal = uniform, normal
    for module in training.step.method.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _held(step: TrainStep) -> dict[str, torch.Tensor]:
    """Everything that a training changes, as it lies there."""
    parts = {"student": step.model, "method": step.method}
    if step.average is not None:
        parts["average"] = step.average.model
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def _reordered(name: str, value: torch.Tensor, dims: Mapping[str, int], order: Sequence[int]) -> torch.Tensor:
    """A tensor of a model with modalities 0, 1, ... as one with the modalities in `order` has it."""
    columns = torch.arange(sum(dims.values())).split(list(dims.values()))
    wanted = {len(torch.cat(columns)): torch.cat([columns[k] for k in order])}
    if name.startswith("method."):
        wanted[len(order)] = torch.tensor(order)
    for dim, size in enumerate(value.shape):
        if size in wanted:
            value = value.index_select(dim, wanted[size])
    return value


def _flat(step: TrainStep, vector: torch.Tensor) -> Iterator[tuple[str, float]]:
    """(name, value) of every figure, those of a modality as MODALITY.NAME."""
    assert step.layout is not None
    record = step.layout.unpack(vector.tolist())
    for modality, row in record.pop("modalities").items():
        yield from ((f"{modality}.{name}", value) for name, value in row.items())
    yield from record.items()


def check_cuts(subject: Subject) -> None:
    """Cut at any stage it does the same with trunks in the model as with what they return; live ones, too, train."""
    for cut in (*build_encoder("m0", ArrayModality(dimension=DIMENSION)).names, "adapter"):
        cached, whole, live = (subject.training(cut=cut, trunks=t, double=False) for t in (False, True, True))
        models = [whole.step.model, *([whole.step.average.model] if whole.step.average is not None else [])]
        for trunk in (trunk for model in models for trunk in model.trunks.values()):
            trunk.live = False
        for seed in range(3):
            batch = subject.batch(seed)
            with torch.no_grad():
                inputs = whole.step.model.eval().at_cut(batch.inputs)
            torch.manual_seed(seed)
            expected = cached.step(replace(batch, inputs=inputs))
            torch.manual_seed(seed)
            assert torch.equal(whole.step(batch), expected), f"cut at {cut}: figures with the trunk in the model"
            assert torch.isfinite(live.step(batch)).all(), f"cut at {cut}: figures with a live trunk"
        theirs = {name: value for name, value in weights(whole.step).items() if ".trunks." not in name}
        _equal(theirs, weights(cached.step), f"cut at {cut}: with the trunk in the model against without")


def check_precision(subject: Subject) -> None:
    """Under autocast to bfloat16, with a norm of the features and without, losses and weights are finite float32."""
    for norm in ("layer", "none"):
        step = subject.training(modalities=3, norm=norm, double=False, precision="bfloat16").step
        vectors = [step(subject.batch(seed, modalities=3)) for seed in range(3)]
        floating = [value for value in weights(step).values() if value.is_floating_point()]
        for what, values in (("figures", vectors), ("weights", floating)):
            assert {value.dtype for value in values} == {torch.float32}, f"{what} are no float32 under bfloat16"
            assert all(torch.isfinite(value).all() for value in values), f"{what} under bfloat16"


def check_static(subject: Subject) -> None:
    """On static buffers it gives the same bits; captured in a CUDA graph, where there is a GPU, the same numbers."""
    if not subject.kind.capturable:
        return
    plain, buffered = subject.training(), subject.training()
    static = StaticStep(buffered.step, draws=[buffered.randomness], device=torch.device("cpu"), required=True)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = plain.step(subject.batch(seed))
        torch.manual_seed(seed)
        assert torch.equal(static(subject.batch(seed)), expected), f"figures of step {seed + 1}"
    _equal(weights(buffered.step), weights(plain.step), "static against plain")
    if torch.cuda.is_available():
        _check_captured(subject)


def _check_captured(subject: Subject) -> None:
    plain, captured = (subject.training(device="cuda") for _ in range(2))
    for seed in range(WARM_UP + 3):
        batch = subject.batch(seed).to(torch.device("cuda"))
        torch.manual_seed(seed)
        expected = plain.step(batch)
        torch.manual_seed(seed)
        differ = f"figures of step {seed + 1} differ where it is captured in a CUDA graph"
        _near(captured.run_step(batch), expected, differ, apart=1e-9)
    _close(weights(captured.step), weights(plain.step), "captured")


def check_population(
    subject: Subject, *, apart: float = 1e-9, double: bool = True, differing: Sequence[float] = (1.0, 0.9, 0.8)
) -> None:
    """Each member of a population does what it does alone, beside one whose weights turn infinite too.

    With the same settings, and with others wherever they are numbers, of one modality (unless it is refused) and of
    four; once more where there is a GPU.

    Args:
        apart: how far figures and weights may be from those alone; 0 on a processor with our methods.
        double: in float64, or in float32.
        differing: what the members' numbers are multiplied with, where they differ.
    """
    if not subject.kind.stackable:
        return
    told = {"apart": apart, "double": double}
    _check_population(subject, (1.0, 1.0, 1.0), **told)
    for modalities in (1, 4):
        try:
            subject.training(modalities=modalities)
        except MbcdError:
            continue
        _check_population(subject, differing, modalities=modalities, **told)
    if torch.cuda.is_available() and double:
        _check_population(subject, differing, device="cuda")


def _check_population(
    subject: Subject,
    factors: Sequence[float],
    *,
    device: str = "cpu",
    modalities: int = 2,
    apart: float = 1e-9,
    double: bool = True,
) -> None:
    seeds, broken = range(3), 1
    made = partial(subject.training, device=device, modalities=modalities, double=double)

    def batch(seed: int, number: int) -> Batch:
        return subject.batch(10 * seed + number, modalities=modalities).to(torch.device(device))

    steps = 4 if device == "cpu" else WARM_UP + 3  # captured, where the method allows it
    alone: dict[int, tuple[list[torch.Tensor], dict[str, torch.Tensor]]] = {}
    for seed in seeds:
        training = made(seed=seed, shrunk=factors[seed])
        figures = [training.step(batch(seed, number)) for number in range(steps)]
        alone[seed] = figures, weights(training.step)
    members = []
    for seed in seeds:
        members.append(made(seed=seed, shrunk=factors[seed]))
        members[-1].randomness.own_globals()
    stacked = StackedStep(members)
    with torch.no_grad():
        next(members[broken].step.model.parameters()).fill_(float("inf"))
    for number in range(steps):
        vectors = stacked([batch(seed, number) for seed in seeds])
        for seed in set(seeds) - {broken}:
            differ = f"figures of step {number + 1} differ from those of a training alone"
            _near(vectors[seed], alone[seed][0][number], differ, apart=apart)
    for seed in set(seeds) - {broken}:
        _close(weights(members[seed].step), alone[seed][1], "in a population", apart=apart)


def _close(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str, *, apart: float = 1e-9
) -> None:
    for name, value in tensors.items():
        differ = f"{name} differs {where} from that of a plain training"
        _near(value, expected[name], differ, apart=apart)


def check_processes(subject: Subject) -> None:
    """Two processes with half of each batch do what one does with all of it (batch norm frozen)."""
    with tempfile.TemporaryDirectory() as folder:
        # Autograd's threads of a GPU do not survive a fork.
        start = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
        children = [start.Process(target=_as_rank, args=(subject, Path(folder), rank)) for rank in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        codes = [child.exitcode for child in children]
        assert codes == [0, 0], f"the processes ended with {codes}"
        shared = torch.load(Path(folder) / "0.pt", weights_only=True)
    alone = _share(subject, ALONE)
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        _near(shared[name], value, f"{name}: two processes against one", apart=1e-8)


def _share(subject: Subject, group: Group) -> dict[str, torch.Tensor]:
    step = subject.training(group=group, batch_norm="frozen").step
    for seed in range(3):
        step(own_rows(subject.batch(seed), group))
    return weights(step)


def _as_rank(subject: Subject, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.save(_share(subject, Group(rank=rank, world=2)), folder / f"{rank}.pt")
    dist.destroy_process_group()


CHECKS: dict[str, Callable[[Subject], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def method_checks(
    method: str | type[Method], settings: Mapping[str, object] | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) of every check of a method, to parametrise a test with."""
    subject = Subject.of(method, settings)
    for name, check in CHECKS.items():
        yield name, partial(check, subject)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a method beside ERM, on the tiny models: its step's time over ERM's, and parameters of its own."""

    step: float
    parameters: int


def method_cost(method: str | type[Method], settings: Mapping[str, object] | None = None) -> Cost:
    """What a method's step costs; the medians of steps taken in turns with ERM's."""
    steps = [Subject.of(kind, told).training().step for kind, told in ((method, settings), (Method, None))]
    spent: list[list[float]] = [[], []]
    subjects = [Subject.of(method, settings), Subject(Method)]
    for seed in range(30):
        for step, subject, seconds in zip(steps, subjects, spent, strict=True):
            batch = subject.batch(seed)
            started = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - started)
    ratio = sorted(spent[0])[len(spent[0]) // 2] / sorted(spent[1])[len(spent[1]) // 2]
    return Cost(round(ratio, 2), sum(p.numel() for p in steps[0].method.parameters()))


def check_method(method: str | type[Method], settings: Mapping[str, object] | None = None) -> None:
    """Put a method through all checks.

    Args:
        method: a class, or a name that `--method` takes.
        settings: what is laid over the defaults of its settings.

    Raises:
        AssertionError: it fails one; says which tensors or figures.
        SettingsError: it lacks a part.
    """
    for _, check in method_checks(method, settings):
        check()
