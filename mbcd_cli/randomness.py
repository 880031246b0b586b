"""Every random draw of a training step that is not a head's nn.Dropout, from one seeded generator.

nn.Dropout draws from torch's global generators, which `seed_everything` seeds and checkpoints save.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F


class Randomness:
    """Draws for feature noise and modality masks, on the model's device, in the order they are asked for.

    Args:
        seed: seed of the generator.
        device: device the draws are made on (a CUDA generator gives other numbers than a CPU one).
    """

    def __init__(self, *, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(seed)
        self._globals: dict = {}

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), [*shape] float32."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal, [*shape] of floating type `dtype`."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    @property
    def generators(self) -> list[torch.Generator]:
        """All that are this object's own."""
        return [self.generator, *([self.dropout] if self._globals else [])]

    def own_globals(self) -> None:
        """From now on the global generators' draws are this object's own (`kept`), going on from where they are."""
        self._globals = global_states()
        self.dropout = self._global.clone_state()

    @property
    def _global(self) -> torch.Generator:
        """What nn.Dropout draws from on the device."""
        if self.device.type != "cuda":
            return torch.default_generator
        return torch.cuda.default_generators[self._index]

    @property
    def _index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    @contextmanager
    def as_globals(self) -> Iterator[None]:
        """Within, nn.Dropout draws this object's own."""
        generator = self._global
        if self.device.type == "cuda":  # the state itself: a CUDA graph may be captured within
            outside = generator.graphsafe_get_state()
            generator.graphsafe_set_state(self.dropout)
            try:
                yield
            finally:
                generator.graphsafe_set_state(outside)
            return
        outside = generator.get_state()
        generator.set_state(self.dropout.get_state())
        try:
            yield
        finally:
            self.dropout.set_state(generator.get_state())
            generator.set_state(outside)

    def kept(self, ones: torch.Tensor, *, rate: float) -> torch.Tensor:
        """What nn.Dropout makes of `ones`, [*] where `dropout` draws: 0 (probability `rate`), else 1 / (1 - rate)."""
        if self.device.type != "cuda":
            return torch.empty_like(ones).bernoulli_(1 - rate, generator=self.dropout).div_(1 - rate)
        with self.as_globals():  # its kernel spreads the numbers otherwise than bernoulli_'s
            return F.dropout(ones, rate)

    def globals(self) -> dict:
        """States of the global generators, or of what stands for them here (see `global_states`)."""
        if not self._globals:
            return global_states()
        own = self.dropout.get_state()
        if self.device.type != "cuda":
            return self._globals | {"torch": own}
        return self._globals | {"cuda": [own if k == self._index else s for k, s in enumerate(self._globals["cuda"])]}

    def load_globals(self, states: dict) -> None:
        """Go on from what `globals` returned."""
        if not self._globals:
            load_global_states(states)
            return
        if self.device.type != "cuda":
            self._globals = states
            self.dropout.set_state(states["torch"].cpu())
        elif len(states["cuda"]) == torch.cuda.device_count():
            self._globals = states
            self.dropout.set_state(states["cuda"][self._index].cpu())
        else:  # of another machine: as in a training alone, dropout begins anew
            self._globals = states | {"cuda": self._globals["cuda"]}

    def state(self) -> torch.Tensor:
        """State to go on from, a CPU uint8 tensor [n]."""
        return self.generator.get_state()

    def load(self, state: torch.Tensor) -> None:
        """Go on from `state`."""
        self.generator.set_state(state.cpu())


def step_seed(seed: int) -> int:
    """The seed of the step's own draws in a training of this seed.

    Not the same one: torch's global generator, seeded with it, draws the first weights, and a generator of equal seed
    would begin with the very same uniform numbers.
    """
    words = np.random.SeedSequence([seed % 2**64, 1]).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_states() -> dict:
    """States of the global generators, as tensors and primitives (so that weights_only loading works)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        # Asking begins with CUDA: on every GPU, which a training on a processor has no use for.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def load_global_states(states: dict) -> None:
    """Go on from what `global_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_initialized() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
