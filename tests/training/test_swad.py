"""SWAD: the valley from pinned losses, the mean of all its steps' weights, and a training that is resumed."""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from itertools import pairwise

import pytest
import torch
from fakes import MemoryDataset, Signalling, memory_settings
from torch import nn

from mbcd_cli.errors import RunError, SettingsError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.resolved import resolve
from mbcd_cli.runs.checkpoint import load_checkpoint
from mbcd_cli.settings import AverageSettings, ModelSettings
from mbcd_cli.training import train as command
from mbcd_cli.training.swad import SWAD, published_counts, valley

LONG = [1.5, 1.2, 1, 0.8, 0.7, 0.6, 0.55, 0.57, 0.6, 0.62, 0.7, 0.72, 0.75, 0.8, 0.9, 1, 1.1, 1.2, 1.3]
FLAT = [1, 0.9, 0.8, 0.7, 0.62, 0.6, 0.61, 0.6, 0.62, 0.61, 0.6, 0.63]
FALLING = [1, 0.9, 0.8, 0.7]
BRIEF = [1, 0.5, 0.6, 0.9, 1.0]
BACK = [1, 0.5, 0.6, 0.55, 0.9, 0.95, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
"""Out of the valley and in again within N_e losses."""
PAPER = {"converge": 3, "leave": 6, "tolerance": 1.3}


@pytest.mark.parametrize(
    ("losses", "first", "end"),
    [(LONG, 6, 12), (FLAT, 5, 12), (BRIEF, 1, 3), (BACK, 1, 7)],
)
def test_pinned_valleys(losses, first, end):
    assert valley(losses, **PAPER, closed=True) == (first, end)


def test_no_valley_yet_and_windows_that_are_not_whole():
    assert valley(FALLING, **PAPER, closed=True) is None
    assert valley([], **PAPER, closed=True) is None
    assert valley(BRIEF, **PAPER, closed=False) == (1, 5)
    assert valley(FALLING, converge=1, leave=1, tolerance=1.0, closed=True) == (0, 4)


@pytest.mark.parametrize(
    ("losses", "counts"),
    [
        (LONG, {5: 1, 6: 2, 7: 1, 8: 1, 9: 1, 10: 1, 11: 1}),
        (FLAT, {4: 1, 5: 2, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1, 11: 1}),
        (FALLING, None),
    ],
)
def test_pinned_counts_of_the_published_code(losses, counts):
    assert published_counts(losses, **PAPER) == counts


def queues(losses, converge, leave, tolerance):
    """The same, with the two queues of the paper's code: of the last N_s segments, and of the last N_e."""
    recent, queue = deque(maxlen=converge), deque(maxlen=leave)
    begun, ended, threshold, given = None, False, 0.0, []
    for segment in enumerate(losses):
        if ended:
            break
        recent.append(segment)
        queue.append(segment)
        if begun is None:
            if len(recent) == converge and recent[0][1] == min(loss for _, loss in recent):
                begun = recent[0][0]
                threshold = tolerance * sum(loss for _, loss in recent) / converge
                if leave < converge:
                    given = [recent[1 + place][0] for place in range(converge - leave)]
                elif leave > converge:
                    back = list(queue)[: leave - converge + 1]
                    above = [place for place, (_, loss) in enumerate(back) if loss > threshold]
                    given = [t for t, _ in back[(above[-1] + 1 if above else 0) + 1 :]]
        elif queue[0][0] >= begun:
            ended = min(loss for _, loss in queue) > threshold
            given += [] if ended else [queue[0][0]]
    if begun is None:
        return None
    while not ended and len(queue) > 1:
        queue.popleft()
        ended = min(loss for _, loss in queue) > threshold
        given += [] if ended else [queue[0][0]]
    return dict(sorted(Counter(given or [begun]).items()))


def test_counts_are_those_of_the_published_codes_queues():
    draws = random.Random(0)
    for _ in range(3000):
        count, converge, leave = draws.randint(0, 20), draws.randint(1, 5), draws.randint(1, 7)
        deep = [draws.uniform(0.3, 1.2) * (0.5 + abs(t - count / 2) / count) for t in range(count)]
        losses = [round(loss, draws.choice([1, 3])) for loss in deep]
        expected = queues(losses, converge, leave, 1.2)
        assert published_counts(losses, converge=converge, leave=leave, tolerance=1.2) == expected, losses


def student() -> MultiModalModel:
    class Tail(nn.Linear):
        dim = 2

    torch.manual_seed(0)
    settings = ModelSettings(norm="none", unimodal_head="linear", hidden=3)
    return MultiModalModel({"a": Tail(2, 2)}, settings=settings, classes=2).double()


def walk(losses, per_segment, stop_at=None):
    """A SWAD told of random weights; its averages after every segment, and all weights by segment."""
    model = student()
    settings = AverageSettings(kind="swad", **PAPER)
    average, step, history, averages = SWAD(model, settings), 0, [], []
    generator = torch.Generator().manual_seed(1)
    for t, loss in enumerate(losses):
        history.append([])
        for index in range(per_segment + t % 2):
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            step += 1
            average.update(torch.tensor(step))
            history[-1].append({n: p.detach().clone() for n, p in model.named_parameters()})
            if stop_at == (t, index):  # what a resumed process has: tensors of a file, nothing else
                again = SWAD(model, settings)
                again.model.load_state_dict(average.model_for_evaluation().state_dict())
                again.load(average.state())
                average = again
        average.validated(loss, step)
        assert len(average.state()["undecided"]) <= 6
        averages.append({n: p.detach().clone() for n, p in average.model_for_evaluation().named_parameters()})
    return averages, history


@pytest.mark.parametrize("losses", [LONG, FLAT, FALLING, BRIEF, BACK])
def test_it_is_the_mean_of_all_steps_of_the_valley_so_far(losses):
    averages, history = walk(losses, 3)
    for t, average in enumerate(averages):
        first, end = valley(losses[: t + 1], **PAPER, closed=True) or (t, t + 1)
        steps = [weights for segment in history[first:end] for weights in segment]
        for name, value in average.items():
            if name.startswith("heads."):
                torch.testing.assert_close(value, history[t][-1][name], rtol=0, atol=0)
                continue
            expected = torch.stack([weights[name] for weights in steps]).mean(dim=0)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stop_at", [(0, 0), (4, 1), (7, 2), (9, 0)])
def test_its_state_is_all_that_it_needs(stop_at):
    whole, _ = walk(FLAT, 3)
    again, _ = walk(FLAT, 3, stop_at)
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def train(run, dataset=None, *, resume=False):
    average = {"kind": "swad", "converge": 2, "leave": 2, "tolerance": 1.1}
    told = {"training": {"epochs": 8}, "average": average, "optimizer": {"lr": 0.05}, "runtime": {"device": "cpu"}}
    settings = memory_settings(method={"name": "erm"}, **told)  # other draws, on a GPU, have other valleys
    return command.train(settings, dataset or MemoryDataset(), run=run, resume=resume, overwrite=False)


def test_a_training_that_is_stopped_and_resumed_ends_in_the_same_bits(tmp_path, monkeypatch):
    summary = train(tmp_path / "whole")
    assert summary.deployed == "teacher"
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    losses = [record["validation"]["student"]["fused"]["loss"] for record in records]
    whole = load_checkpoint(tmp_path / "whole/checkpoints/last.pt")
    assert whole.training["average"]["losses"] == losses
    assert valley(losses, converge=2, leave=2, tolerance=1.1, closed=True) is not None
    assert any(a > b for a, b in pairwise(losses))
    for at in (3, 14, 29):
        run = tmp_path / str(at)
        with pytest.raises(RunError, match="Stopped by SIGTERM"):
            train(run, Signalling(at))
        train(run, resume=True)
        again = load_checkpoint(run / "checkpoints/last.pt")
        for state in ("student", "teacher"):
            one, other = getattr(whole, state), getattr(again, state)
            assert all(torch.equal(one[name], other[name]) for name in one), (at, state)
        assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    different = [n for n in whole.student if not torch.equal(whole.student[n], whole.teacher[n])]
    assert different
    assert not any(name.startswith("heads.") for name in different)


def test_what_it_cannot_be_is_refused():
    with pytest.raises(SettingsError, match="swad finds its first epoch itself"):
        resolve(method="swad", sets=["average.start=3"])
    with pytest.raises(SettingsError, match="distils from the weight average"):
        resolve(method="mbcd", sets=["average.kind=swad"])
    assert resolve(method="swad").average.kind == "swad"
    assert resolve(method="coral", sets=["average.kind=swad", "average.leave=4"]).average.leave == 4
