"""The whole step on static buffers, captured once in a CUDA graph and replayed.

Letters: B clips.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.errors import RunError, lines_of
from mbcd_cli.randomness import Randomness
from mbcd_cli.say import SILENT, Say

WARM_UP = 3
"""Steps run kernel by kernel first: optimizer states and workspaces must exist before a capture."""


class StaticStep:
    """`step(batch)` with every batch copied to the same buffers.

    On CUDA the step is captured after `WARM_UP` ordinary ones and replayed from then on: masks, noise, gradients,
    optimizer and average included. On other devices (and as the twin that tests compare with) the step runs as
    usual, on the buffers. A batch of another size runs as usual too. Kernel by kernel a step of MBCD at the paper's
    shapes takes 1.5 times as long in float32 and 2.1 times in bfloat16 (NVIDIA H200, batch 16; docs/performance.md).

    Args:
        step: of a training, or of many at once; optimizers must be capturable on CUDA.
        draws: those of the step; generators that it has drawn from are registered with the graph.
        device: where the step runs.
        required: raise when a capture fails, rather than warn and go on without.
        say: told where a capture failed.
    """

    def __init__(
        self,
        step: Callable[[Batch], torch.Tensor],
        *,
        draws: Sequence[Randomness],
        device: torch.device,
        required: bool,
        say: Say = SILENT,
    ) -> None:
        self.step = step
        self._generators = [generator for one in draws for generator in one.generators]
        self._drawn: set[torch.Generator] = set()
        self._device = device
        self.required = required
        self._say = say
        self._static: Batch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._vector: torch.Tensor | None = None
        self._done = 0
        self._given_up = False

    def __call__(self, batch: Batch) -> torch.Tensor:
        """One step on `batch` (on the device); its figures, a tensor of its own.

        Raises:
            RunError: the capture failed and is required.
        """
        self._done += 1
        if self._given_up or (self._static is not None and not self._fits(batch)):
            return self.step(batch)
        if self._device.type != "cuda":
            return self.step(self._filled(batch)).clone()
        if self._done <= WARM_UP:
            return self._on_side_stream(batch)
        static = self._filled(batch)
        if self._graph is None and not self._capture(static):
            return self.step(batch)
        self._graph.replay()
        return self._vector.clone()

    def _fits(self, batch: Batch) -> bool:
        return [(t.shape, t.dtype) for t in _tensors(batch)] == [(t.shape, t.dtype) for t in _tensors(self._static)]

    def _filled(self, batch: Batch) -> Batch:
        """The static buffers, holding `batch`."""
        if self._static is None:
            self._static = Batch(
                inputs={name: tuple(map(torch.empty_like, parts)) for name, parts in batch.inputs.items()},
                labels=torch.empty_like(batch.labels),
                domains=torch.empty_like(batch.domains),
                clips=torch.empty_like(batch.clips),
            )
        for buffer, value in zip(_tensors(self._static), _tensors(batch), strict=True):
            buffer.copy_(value, non_blocking=True)
        return self._static

    def _on_side_stream(self, batch: Batch) -> torch.Tensor:
        """An ordinary step where captures happen, so that its workspaces are the ones the graph finds."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        before = [generator.get_state() for generator in self._generators]
        with torch.cuda.stream(stream):
            vector = self.step(batch)
        for generator, state in zip(self._generators, before, strict=True):
            if not torch.equal(state, generator.get_state()):
                self._drawn.add(generator)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        vector.record_stream(torch.cuda.current_stream(self._device))
        return vector

    def _capture(self, static: Batch) -> bool:
        """Record the step; nothing is computed. A failure leaves the training as it was."""
        generators = [torch.cuda.default_generators[torch.cuda.current_device()], *self._generators]
        states = [generator.get_state() for generator in generators]
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self._drawn:  # no others: each takes two launches in every replay
                graph.register_generator_state(generator)
            gc.collect()  # a graph of before that went amid a capture would end it
            torch.cuda.synchronize(self._device)
            # Other threads may read ahead meanwhile: page-locked copies, and the trunks of views that are not stored.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._vector = self.step(static)
        except (RuntimeError, NotImplementedError) as error:
            torch.cuda.synchronize(self._device)
            for generator, state in zip(generators, states, strict=True):
                generator.graphsafe_set_state(generator.clone_state())  # some versions leave them as if in a capture
                generator.set_state(state)
            self._given_up, self._static, self._vector = True, None, None
            reason = lines_of(error)[0]
            if self.required:
                raise RunError(
                    f"The step cannot be captured in a CUDA graph: {reason}", "Set runtime.cuda_graph=off."
                ) from error
            self._say.warn(f"no CUDA graph ({reason}); the step runs kernel by kernel.")
            return False
        self._graph = graph
        return True


def _tensors(batch: Batch) -> list[torch.Tensor]:
    parts = [part for name in batch.inputs for part in batch.inputs[name]]
    return [*parts, batch.labels, batch.domains, batch.clips]
