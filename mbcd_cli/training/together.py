"""A population of trainings in one process: what `mbcd sweep` does with many small cells of one kind.

Every member is a `Trainer` that asks for its steps; all members' steps are taken at once (`population.StackedStep`).
Members that end make room for those that wait. Letters: N clips.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mbcd_cli.data.loading import ResidentRows, resident_bytes
from mbcd_cli.data.protocol import Dataset
from mbcd_cli.data.records import TEST_VIEW, Batch
from mbcd_cli.errors import MbcdError, RunError, SettingsError, StoppedError, lines_of
from mbcd_cli.files import size_text, synced_at_once
from mbcd_cli.json_values import json_values
from mbcd_cli.runs.folder import SETTINGS, open_run
from mbcd_cli.runtime import configure, free_memory, peak_memory_mb
from mbcd_cli.say import SILENT, Say, Ticker
from mbcd_cli.settings import Settings
from mbcd_cli.training.assemble import Training, assemble
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.interrupts import Interrupts
from mbcd_cli.training.population import StackedStep, StackingError
from mbcd_cli.training.static_step import WARM_UP
from mbcd_cli.training.train import ClipsOfTraining, TrainingSummary, summarise, summary_of, train, trainer_of
from mbcd_cli.training.trainer import Asking, Said, Trainer
from mbcd_cli.training.validation import Validation

RESIDENT_BYTES = 2**31
"""Rows that are kept in memory for all members: at most so many bytes of them."""
WIDTH = 64
"""Trainings under way at a time in one process, unless told otherwise: of a step of ERM on vectors each takes 1.3 ms,
and 1.5 where they are 32, 2 where they are 16."""
POPULATION_BYTES = 2**30
"""What the weights of the trainings under way, with gradients, moments and averages, take at most."""

_SYNCED = 16
"""Members whose checkpoints wait for the disk together."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A training of a population: its settings, resolved against the dataset, and its run folder."""

    settings: Settings
    run: Path
    say: Say = SILENT


Outcome = TrainingSummary | Exception


@dataclass(slots=True, eq=False)
class _Member:
    """A training under way: its parts, trainer and asking, and what it asks for; `live` until it has ended."""

    wanted: Wanted
    parts: Training
    trainer: Trainer
    asking: Asking
    asked: Batch | Validation | None
    held: ExitStack
    started: float
    first: int
    live: bool = True


def train_together(
    wanted: Sequence[Wanted],
    dataset: Dataset,
    *,
    width: int | None,
    ended: Callable[[Wanted, Outcome], None],
    say: Say = SILENT,
) -> None:
    """Train all of them, each into its own run folder; a folder that holds a run already is gone on with.

    What a member rounds to depends on nothing beside it (`layers`): each ends in the bits of its training alone,
    whoever joins and leaves. Where a step fails for all (vmap cannot take a branch on data, say) they go on one after
    another, from their last checkpoints.

    Args:
        wanted: of one kind: settings that differ in the seed, the target, the sources (as many) and numbers only.
        dataset: prepared, of all of them.
        width: trainings under way at a time, at most; None: `WIDTH`, or what `POPULATION_BYTES` allow.
        ended: told of each as soon as it ends: what `done` holds, or the error that ended it (a stop by a signal too).
        say: told how it goes.
    """
    if not wanted:
        return
    device = configure(wanted[0].settings.runtime)
    with Interrupts() as interrupts, say.progress("trainings", len(wanted)) as ticker:

        def end(one: Wanted, outcome: Outcome) -> None:
            ended(one, outcome)
            ticker.advance()

        clips = _clips(wanted, dataset, end)
        resident = _resident(dataset, list(clips.values()), device=device)
        lying = {} if resident is None else {"read": partial(_read, resident), "inputs": partial(_inputs, resident)}
        feed = Feed(dataset, device=device, **lying)
        width = min(width or fitting_width(wanted[0].settings, dataset, device=device), len(wanted))
        with suppress(MbcdError):  # each is going to be told
            memory = size_text(width * member_bytes(wanted[0].settings, dataset, device=device))
            say(f"{len(wanted)} trainings, {width} at a time: weights, gradients, moments and averages take {memory}.")
        waiting = deque(one for one in wanted if one.run in clips)
        live: list[_Member] = []
        together: list[_Member] = []
        stacked: StackedStep | None = None
        alone = ""
        while not alone:
            live = [member for member in live if member.live]
            while waiting and len(live) < width and interrupts.signal is None:
                one = waiting.popleft()
                begun = _begin(one, dataset, clips[one.run], feed, interrupts, end)
                live += [] if begun is None else [begun]
            if not live:
                return
            asking = [member for member in live if isinstance(member.asked, Validation)]
            if asking:  # one after another (docs/performance.md)
                _all_go_on([(member, _said(member)) for member in asking], end)
                continue
            if stacked is None or together != live:
                if stacked is not None:
                    stacked.release()
                    stacked = None  # its gradients and moments first
                together = live
                stacked = StackedStep([member.parts for member in live], inputs=feed.inputs, say=say)
            try:
                vectors = stacked([member.asked for member in live])
            except (RuntimeError, TypeError, StackingError, RunError) as error:
                alone = lines_of(error)[0]
                continue
            _all_go_on(list(zip(live, vectors, strict=True)), end)
        say.warn(f"These trainings cannot be stacked, and go on one after another: {alone}")
        for member in live:
            member.held.close()
        left = [*(member.wanted for member in live), *waiting]
        stacked.release()
        stacked, live, together = None, [], []  # what they hold first
        _one_by_one(left, dataset, interrupts, end)


def member_bytes(settings: Settings, dataset: Dataset, *, device: torch.device) -> int:
    """Of one of these trainings in a population: weights, their gradients and two moments; averages' weights.

    Raises:
        MbcdError: what assembling it raises.
    """
    step = assemble(settings, dataset, device=device).step
    modules = [step.model, step.method, *([] if step.average is None else [step.average.model])]
    kept = 0 if step.snapshots is None else step.snapshots.nbytes()
    parameters = (value for module in modules for value in module.parameters())
    return kept + sum(value.nbytes * (4 if value.requires_grad else 1) for value in parameters)


def step_seconds(settings: Sequence[Settings], dataset: Dataset) -> float:
    """Of a step of these trainings together, the best of four after one that warms up; nothing is written.

    Raises:
        MbcdError: as `training.train.train`. RuntimeError, TypeError: they cannot be stacked.
    """
    device = configure(settings[0].runtime)
    clips = [ClipsOfTraining.of(one, dataset).training for one in settings]
    size = min(settings[0].training.batch_size, *map(len, clips))  # fewer clips than a batch: `train` refuses them
    members, batches = [], []
    for one, its in zip(settings, clips, strict=True):
        parts = assemble(one, dataset, device=device)
        parts.randomness.own_globals()
        members.append(parts)
        told = {"batch_size": size, "seed": one.training.seed, "epoch": 0, "start": 0}
        first = Feed(dataset, device=device).training(its, **told, views=parts.step.method.views)
        batches.append(next(batch for _, batch in first))
    step, seconds = StackedStep(members), []
    for _ in range(WARM_UP + 2):  # the last one is of a captured graph, on a GPU
        started = time.monotonic()
        step(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    step.release()
    return min(seconds[1:])


def check_width(settings: Settings, dataset: Dataset, *, width: int, processes: int) -> None:
    """Refuse more trainings under way than there is memory for.

    Args:
        settings: of one of them, resolved against `dataset`.
        width: of each of `processes` populations.

    Raises:
        SettingsError: so many do not fit; it says how many do.
        MbcdError: what assembling one raises.
    """
    device = configure(settings.runtime)
    each, free = member_bytes(settings, dataset, device=device), free_memory(device)
    if free is not None and each * width * processes > free:
        most = free // (each * processes)
        where = f" in each of {processes} processes" if processes > 1 else ""
        raise SettingsError(
            f"--pack {width}: so many trainings{where} take {each * width * processes / 2**30:.3g} GB of memory, and "
            f"{free / 2**30:.3g} GB are free.",
            f"--pack {most} is the largest that fits." if most > 1 else "Use --pack off.",
        )


def fitting_width(settings: Settings, dataset: Dataset, *, device: torch.device) -> int:
    """How many trainings like this one `POPULATION_BYTES` are enough for, `WIDTH` at most."""
    try:
        each = member_bytes(settings, dataset, device=device)
    except MbcdError:  # each is going to be told
        return WIDTH
    return max(min(WIDTH, POPULATION_BYTES // max(each, 1)), 1)


def _clips(
    wanted: Sequence[Wanted], dataset: Dataset, end: Callable[[Wanted, Outcome], None]
) -> dict[Path, ClipsOfTraining]:
    """What each reads; those whose domains or splits are not there have ended."""
    found = {}
    for one in wanted:
        try:
            found[one.run] = ClipsOfTraining.of(one.settings, dataset)
        except MbcdError as error:
            end(one, error)
    return found


def _begin(
    one: Wanted,
    dataset: Dataset,
    clips: ClipsOfTraining,
    feed: Feed,
    interrupts: Interrupts,
    end: Callable[[Wanted, Outcome], None],
) -> _Member | None:
    """A member at its first step; None where it ended before."""
    with ExitStack() as held:
        try:
            resume = (one.run / SETTINGS).is_file()
            folder = held.enter_context(open_run(one.run, settings=one.settings, resume=resume, overwrite=False))
            if folder.resumed and (done := summary_of(folder)) is not None:
                end(one, done)
                return None
            parts = assemble(one.settings, dataset, device=feed.device, say=one.say)
            parts.randomness.own_globals()
            trainer = trainer_of(parts, one.settings, dataset, clips, folder=folder, feed=feed, say=one.say)
            asking = trainer.training(interrupts, Ticker())
            held.callback(asking.close)
            member = _Member(one, parts, trainer, asking, None, held, time.monotonic(), trainer.progress.step)
        except Exception as error:
            end(one, error)
            return None
        if not _goes_on(member, _advanced(member, None), end):
            return None
        member.held = held.pop_all()
        return member


def _one_by_one(
    wanted: Sequence[Wanted], dataset: Dataset, interrupts: Interrupts, end: Callable[[Wanted, Outcome], None]
) -> None:
    """Train them alone."""
    for one in wanted:
        if interrupts.signal is None:
            try:
                resume = (one.run / SETTINGS).is_file()
                outcome = train(one.settings, dataset, run=one.run, resume=resume, overwrite=False, say=one.say)
            except Exception as error:
                outcome = error
            end(one, outcome)
            if isinstance(outcome, StoppedError):  # the signal was told to that training alone
                return


def _advanced(member: _Member, answer: torch.Tensor | Said | Exception | None) -> Exception | None:
    """Hand a member the figures of its step, what its models say or what came instead (None: it begins); what has ended
    it, a `StopIteration` where it is complete, or None where it asks for more."""
    try:
        one = member.asking
        member.asked = one.throw(answer) if isinstance(answer, Exception) else one.send(answer)
    except Exception as error:
        return error
    return None


def _goes_on(member: _Member, why: Exception | None, end: Callable[[Wanted, Outcome], None]) -> bool:
    """Whether it does, where `why` is what `_advanced` has said; one that does not is let go, and its end told."""
    if why is None:
        return True
    outcome = _finished(member) if isinstance(why, StopIteration) else why
    member.held.close()
    end(member.wanted, outcome)
    return False


def _all_go_on(
    answered: Sequence[tuple[_Member, torch.Tensor | Said | Exception]], end: Callable[[Wanted, Outcome], None]
) -> None:
    """Hand every member its answer, one after another.

    Checkpoints that follow wait for the disk together, some at a time: a disk that is all but full holds few twice.
    """
    for first in range(0, len(answered), _SYNCED):
        some = answered[first : first + _SYNCED]
        with synced_at_once([member.wanted.run for member, _ in some]) as failed:
            whys = [_advanced(member, answer) for member, answer in some]
        for (member, _), why in zip(some, whys, strict=True):
            member.live = _goes_on(member, failed.get(member.wanted.run, why), end)


def _said(member: _Member) -> Said | Exception:
    """What its models say, or what ends that member."""
    try:
        return member.trainer.predicted(member.asked)
    except Exception as error:  # a signal too: its checkpoint is written
        return error


def _finished(member: _Member) -> Outcome:
    """What `done` holds, written; or why it could not be."""
    one, progress = member.wanted, member.trainer.progress
    try:
        seconds, memory = time.monotonic() - member.started, peak_memory_mb(member.trainer.device)
        where = {"settings": one.settings, "run": one.run}
        # Without plots: `mbcd evaluate` draws them; a thousand members would wait for them.
        summary = summarise(progress, **where, first=member.first, seconds=seconds, memory=memory)
        member.trainer.run.finish(json_values(summary))
        return summary
    except Exception as error:
        return error


def _resident(dataset: Dataset, clips: Sequence[ClipsOfTraining], *, device: torch.device) -> ResidentRows | None:
    """Rows that lie once in memory for all members, or None where they are too many."""
    if not clips or not dataset.caches or dataset.online is not None:
        return None
    training = np.unique(np.concatenate([one.training for one in clips]))
    testing = np.unique(np.concatenate([held.clips for one in clips for held in one.held_out]))
    if resident_bytes(dataset, training=training, testing=testing) > RESIDENT_BYTES:
        return None
    return ResidentRows(dataset, training=training, testing=testing, device=device)


def _read(resident: ResidentRows, name: str, clips: np.ndarray, views: np.ndarray) -> tuple[torch.Tensor, ...]:
    """For a step where the rows lie, all members' are taken at once; what is validated on itself."""
    if int(views[0]) == TEST_VIEW:
        return resident.read(name, clips, views)
    return (resident.rows(name, clips, views),)


def _inputs(resident: ResidentRows, name: str, rows: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What `_read` said lies there."""
    return resident.at(name, *rows)
