"""Fakes of `launch`: pieces, units and an engine that are words in memory; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbcd_cli.launch.launch import Ended
from mbcd_cli.launch.unit import Order, State


@dataclass(frozen=True)
class MemoryPiece:
    """The one fake of `mbcd_cli.launch.unit.Piece`."""

    key: str
    folder: Path

    @property
    def name(self) -> str:
        return f"piece {self.key}"


@dataclass
class MemoryUnit:
    """The one fake of `mbcd_cli.launch.unit.Unit`: `states` says where its pieces stand, by key."""

    pieces: Sequence[MemoryPiece]
    states: dict[str, State] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def order(self, threads: int) -> Order:
        return Order("", (), "")

    def write(self, piece: MemoryPiece) -> None:
        self.written.append(piece.key)

    def state(self, piece: MemoryPiece) -> State:
        return self.states.get(piece.key, "waiting")

    def error(self, piece: MemoryPiece) -> str:
        return f"{piece.name} is wrong"


@dataclass
class MemoryEngine:
    """The one fake of `mbcd_cli.launch.launch.Engine`.

    Attributes:
        ends: key of a unit -> how each of its turns ends: (code, states of its pieces then, what else `Ended` says).
        there: keys of units that an earlier command has handed over.
        taken: keys, in the order in which they were submitted.
    """

    ends: Mapping[str, list[tuple[int | None, Mapping[str, State], Mapping[str, object]]]]
    room: int = 2
    there: Sequence[str] = ()
    taken: list[str] = field(default_factory=list)
    stopped: int = 0
    _units: list[MemoryUnit] = field(default_factory=list)

    def find(self, units: Sequence[MemoryUnit]) -> Sequence[MemoryUnit]:
        found = [unit for unit in units if unit.pieces[0].key in self.there]
        self._units += found
        return found

    def submit(self, units: Sequence[MemoryUnit]) -> None:
        assert len(units) <= self.room
        self.taken += [unit.pieces[0].key for unit in units]
        self._units += units

    def wait(self, seconds: float) -> None:
        pass

    def ended(self) -> Iterator[Ended]:
        units, self._units = self._units, []
        for unit in units:
            code, states, more = self.ends[unit.pieces[0].key].pop(0)
            unit.states |= states
            yield Ended(unit, code, **more)

    def running(self) -> Mapping[str, str]:
        return {unit.pieces[0].key: "here" for unit in self._units}

    def stop(self) -> None:
        self.stopped += 1
