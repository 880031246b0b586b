"""SWAD: the mean of all weights between two moments that the validation loss shows (Cha et al., NeurIPS 2021).

A segment is what lies between two validations: an epoch. Letters: E_t validation loss at the end of segment t.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import AverageSettings
from mbcd_cli.training.average import Average, Segment


class SWAD(Average):
    """Every step's weights enter the mean of their segment; `model` is the mean of the segments of the valley so far.

    The valley (`valley`) is found from the student's loss on the source domains' test split. Segments weigh as many
    steps as they have. Of those that may still be in or out, at most max(N_s, N_e) are kept, on the CPU. Until a valley
    begins, `model` is the last segment's mean; within the first epoch it is the student as it was at first.

    Args:
        student, settings: as for `Average`; `converge` is N_s, `leave` N_e, `tolerance` r.
    """

    reads_validation = True

    def __init__(self, student: MultiModalModel, settings: AverageSettings) -> None:
        super().__init__(student, settings)
        self.losses: list[float] = []
        self._segment = Segment(next(student.parameters()).device)
        self._sure: list[torch.Tensor] = []  # the mean of the segments that are in for good
        self._sure_steps = 0
        self._undecided: dict[int, tuple[int, list[torch.Tensor]]] = {}  # segment -> its steps and mean

    def update(self, step: torch.Tensor) -> None:
        """Take in the weights after an optimizer step; `step` [] is how many were done."""
        self._segment.update(self.tensors.students, step)

    @torch.no_grad()
    def validated(self, loss: float, step: int) -> None:
        """A segment ends with step `step`, where the student's validation loss is `loss`."""
        count, (steps, mean) = len(self.losses), self._segment.close(step)
        if steps == 0:
            return
        self.losses.append(loss)
        self._undecided[count] = steps, mean
        self._decide()
        first, end = self._valley(closed=True) or (count, count + 1)
        mean, weight = [value.clone() for value in self._sure], self._sure_steps
        for t, (steps, segment) in self._undecided.items():
            if first <= t < end:
                mean, weight = _merged(mean, weight, segment, steps)
        for own, value in zip(self.tensors.averages, mean, strict=True):
            own.copy_(value)
        for own, counter in self.tensors.counters:
            own.copy_(counter)

    def _decide(self) -> None:
        """Move what is in for good into the mean, forget what is out."""
        count, settings = len(self.losses), self.settings
        span = self._valley(closed=False)
        if span is None:
            kept = range(count - max(settings.converge - 1, 1), count)
        else:
            first, end = span
            sure = min(end, count - settings.leave + 1)
            for t in [t for t in self._undecided if first <= t < sure]:
                steps, segment = self._undecided[t]
                self._sure, self._sure_steps = _merged(self._sure, self._sure_steps, segment, steps)
            kept = range(max(first, sure), end if end == count else 0)
        self._undecided = {t: held for t, held in self._undecided.items() if t in kept}

    def _valley(self, *, closed: bool) -> tuple[int, int] | None:
        o = self.settings
        return valley(self.losses, converge=o.converge, leave=o.leave, tolerance=o.tolerance, closed=closed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside `model`: tensors and plain values."""
        return {
            "losses": list(self.losses),
            **self._segment.state(),
            "sure": self._sure,
            "sure_steps": self._sure_steps,
            "undecided": [[t, steps, segment] for t, (steps, segment) in self._undecided.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.losses = list(state["losses"])
        self._segment.load(state)
        self._sure, self._sure_steps = list(state["sure"]), state["sure_steps"]
        self._undecided = {t: (steps, list(segment)) for t, steps, segment in state["undecided"]}


def valley(
    losses: Sequence[float], *, converge: int, leave: int, tolerance: float, closed: bool
) -> tuple[int, int] | None:
    """The segments first, ..., end - 1 of the valley of the losses E_0, E_1, ..., or None before it begins.

    first is the first t with E_t = min(E_t, ..., E_{t + N_s - 1}), end the first t with
    min(E_t, ..., E_{t + N_e - 1}) > r mean(E_first, ..., E_{first + N_s - 1}); where there is none, all are in.

    Args:
        losses: E. converge, leave, tolerance: N_s, N_e, r.
        closed: no more losses come: the last windows are as long as they are.
    """
    count = len(losses)
    starts = range(count - converge + 1)
    first = next((t for t in starts if losses[t] == min(losses[t : t + converge])), None)
    if first is None:
        return None
    threshold = tolerance * sum(losses[first : first + converge]) / converge
    ends = range(first + 1, count if closed else count - leave + 1)
    return first, next((t for t in ends if min(losses[t : t + leave]) > threshold), count)


def published_counts(losses: Sequence[float], *, converge: int, leave: int, tolerance: float) -> dict[int, int] | None:
    """Segment -> how often the authors' code counts it in its mean, or None where no valley begins.

    Its mean begins anew with the first segment that it is given after the one of the minimum, which it is given once in
    the look-back and once as the oldest of its queue; the first one of the look-back it never gives. Where the valley
    begins before the queue of N_e is full, the oldest segment stays the same and is given again.

    Args:
        losses, converge, leave, tolerance: as `valley` takes them.
    """
    found = valley(losses, converge=converge, leave=leave, tolerance=tolerance, closed=True)
    if found is None:
        return None
    first, known = found[0], found[0] + converge - 1
    threshold = tolerance * sum(losses[first : known + 1]) / converge
    oldest = max(known - leave + 1, 0)
    looked_back = list(range(oldest, min(oldest + leave - converge, known) + 1)) if leave > converge else []
    above = [place for place, t in enumerate(looked_back) if losses[t] > threshold]
    given = looked_back[above[-1] + 2 if above else 1 :] or list(range(first + 1, first + 1 + converge - leave))
    for t in range(known + 1, len(losses)):
        oldest = max(t - leave + 1, 0)
        if oldest < first:
            continue
        if min(losses[oldest : t + 1]) > threshold:
            break
        given.append(oldest)
    else:
        for t in range(max(len(losses) - leave, 0) + 1, len(losses)):
            if min(losses[t:]) > threshold:
                break
            given.append(t)
    return dict(sorted(Counter(given or [first]).items()))


def _merged(
    mean: list[torch.Tensor], weight: int, other: list[torch.Tensor], steps: int
) -> tuple[list[torch.Tensor], int]:
    """The mean of `mean` (of `weight` steps, or none) and `other` (of `steps`), and its steps."""
    if not weight:
        return [value.clone() for value in other], steps
    share = steps / (weight + steps)
    return [a + share * (b - a) for a, b in zip(mean, other, strict=True)], weight + steps
