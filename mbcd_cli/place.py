"""Which process of a job this is, and what of the work is its own.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without them a process is alone. Apart from `processes` because a command
that fails says which process it is, and needs no torch for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mbcd_cli.errors import SettingsError

T = TypeVar("T")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
UNSET = "Start the processes with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run alone."


@dataclass(frozen=True)
class Place:
    """This process' place among those of one job; alone it is 0 of 1.

    Attributes:
        rank: 0 to W - 1.
        world: W.
        local: its number among those of this machine, where a launcher gave one.
    """

    rank: int = 0
    world: int = 1
    local: int | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone prints, and writes what all have made."""
        return self.rank == 0

    def share(self, pieces: Sequence[T]) -> Sequence[T]:
        """Those of `pieces` (a list, or the rows of an array) that are this process', by their positions alone."""
        return pieces[self.rank :: self.world]


def this_process(environ: Mapping[str, str] = os.environ) -> Place:
    """The place that a launcher gave this process, by RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        SettingsError: they are no numbers, contradict each other, or one is missing (left over from something else).
    """
    given = {name: environ[name] for name in LAUNCH_VARIABLES if environ.get(name)}
    for name, value in given.items():
        if not value.isdecimal():
            raise SettingsError(f"The environment variable {name} is {value!r}, not a number.", UNSET)
    rank, world, local = (int(given[name]) if name in given else None for name in LAUNCH_VARIABLES)
    if rank is None and (world or 1) > 1:
        raise SettingsError(f"The environment variable WORLD_SIZE is {world}, and RANK is not set.", UNSET)
    place = Place(rank or 0, 1 if world is None else world, local)
    if place.rank >= place.world:
        raise SettingsError(f"RANK is {place.rank}, and WORLD_SIZE is {'not set' if world is None else world}.", UNSET)
    return place
