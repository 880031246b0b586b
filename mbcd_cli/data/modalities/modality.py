"""What a kind of modality is: its settings, and how they turn a clip's media into the tensors an encoder reads.

A clip has K random training views and one deterministic test view; a file is decoded once for all views asked for. What
is random about a view comes from (seed, clip id, modality, view number) alone, so that it is the same for any number of
workers and in any order. Media libraries are imported when media are read: every command reads settings.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import numpy as np

from mbcd_cli.data.corruptions import Corrupt, Corruption
from mbcd_cli.data.records import TEST_VIEW, Clip, Media
from mbcd_cli.settings import DatasetSettings, ModalitySettings

ViewParts = tuple[np.ndarray, ...]
Draws = Callable[[str], list[np.random.Generator | None]]
"""Modality -> the random numbers of each of its views asked for; None for the test view, which has none."""
_Named = TypeVar("_Named")
_Told = TypeVar("_Told")
_AT_ONCE = 16
"""Files that are asked for together. Where a file system takes a millisecond to answer (a network's, here a sleep), one
after the other takes 14 times as long for sizes, 4 times for headers of sound; on a local disk 0.3 to 0.7 times, which
is 2 to 80 us a file."""


class Modality(ModalitySettings, ABC):
    """Settings of one modality; each kind is a class, in a file of its own.

    Attributes:
        words: those in a modality's name that tell the kind (`video_left` is video).
        suffixes: of files that are of this kind whatever their column is called.
        also_in: suffixes of another kind's files that may hold this one, where the column's name says so.
        framed: files are frames, of which single ones may be missing, and which sound may follow.
        spanned: a table's spans in time hold for its files.
        clocked: a span in frames is one of the video's frames.
        computed_from: kind of the modality that it can be computed from.
        raw: values are what the files hold, in the shape they have there: it matters what rounding takes from them.
        encoder_settings: those that an encoder from files decides where the user did not (`Wants.settings`).
        stated_seconds: of one worker for one clip, where no clip is there to be timed.
    """

    words: ClassVar[tuple[str, ...]] = ()
    suffixes: ClassVar[tuple[str, ...]] = ()
    also_in: ClassVar[tuple[str, ...]] = ()
    framed: ClassVar[bool] = False
    spanned: ClassVar[bool] = True
    clocked: ClassVar[bool] = False
    computed_from: ClassVar[str | None] = None
    raw: ClassVar[bool] = False
    encoder_settings: ClassVar[tuple[str, ...]] = ()
    stated_seconds: ClassVar[float] = 0.1

    @classmethod
    def decoder(cls) -> str:
        """What decodes such files, with versions; enters the fingerprint of a cache."""
        return ""

    @property
    def random(self) -> bool:
        """Whether training views differ; where they do not, nothing is drawn for them."""
        return True

    @property
    def guide(self) -> str | None:
        """Modality whose views' frames these views follow, if any."""
        return None

    @property
    def corruptions(self) -> Mapping[str, Corrupt]:
        """What the decoded media can suffer, by name."""
        return {}

    def corrupted(self, values: np.ndarray, corruption: Corruption | None, *more: object) -> np.ndarray:
        """Decoded values after a corruption, which may need `more`; as they are without one, and at severity 0."""
        if corruption is None or not corruption.severity:
            return values
        return self.corruptions[corruption.name](values, corruption.severity, corruption.rng, *more)

    @abstractmethod
    def views(
        self,
        media: Media,
        name: str,
        draws: Draws,
        *,
        dataset: DatasetSettings,
        notes: list[str] | None,
        corruption: Corruption | None = None,
    ) -> list[ViewParts]:
        """As `load_views`, with the random numbers drawn: per view its parts, [...] each as `part_shapes` says.

        Raises:
            MediaError: the file cannot be used.
        """

    @abstractmethod
    def part_shapes(self, *, test: bool = False) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each part of a view, known without media.

        Args:
            test: of the test view, which may differ from a training view.

        Raises:
            MediaError: the shape is not known before `resolve`.
        """

    def resolve(self, media: Sequence[Media], *, name: str = "NAME", notes: list[str] | None = None) -> Self:
        """Settings with what only the files tell.

        Args:
            media: of every clip.
            name: the modality's.
            notes: collects what becomes of files that differ, if given.

        Raises:
            MediaError: none of the files can be read; the error is the first one's.
        """
        return self

    def warnings(self, media: Sequence[Media], *, name: str) -> list[str]:
        """What the files' headers have in different ways, that a user might want to mend."""
        return []

    @classmethod
    def cell_files(cls, cell: str) -> list[str]:
        """The files (at most two) that a cell of a table names."""
        return [cell]

    @classmethod
    def cell_row(cls, cell: str) -> str | None:
        """What follows the file that a cell names and says which of its rows is meant; None where nothing does."""
        return None

    @classmethod
    def may_hold(cls, paths: Sequence[Path]) -> bool:
        """Whether files with a suffix of `also_in` are of this kind."""
        return True


def load_views(
    clip: Clip,
    name: str,
    modality: Modality,
    *,
    views: Sequence[int],
    seed: int,
    dataset: DatasetSettings,
    notes: list[str] | None = None,
    corruption: Corruption | None = None,
) -> list[ViewParts]:
    """The views of one modality of a clip, decoded once.

    Args:
        clip: the clip; `clip.media[name]` says where its media lies.
        name: the modality's name.
        modality: its settings.
        views: view numbers; `TEST_VIEW` is the deterministic one, others are random training views.
        seed: with the clip's id, fixes every random view.
        dataset: limits on bad media.
        notes: collects what was mended on the way (missing frames), if given.
        corruption: what is done to the decoded media first.

    Returns:
        One tuple of parts per view asked for, as `modality.part_shapes` says.

    Raises:
        MediaError: the file cannot be used.
    """

    def draws(of: str) -> list[np.random.Generator | None]:
        if not modality.random:
            return [None] * len(views)
        return [None if view == TEST_VIEW else view_generator(seed, clip.id, of, view) for view in views]

    if corruption is None:
        return modality.views(clip.media[name], name, draws, dataset=dataset, notes=notes)
    own = replace(corruption, rng=view_generator(seed, clip.id, f"{name} {corruption.name}", TEST_VIEW))
    return modality.views(clip.media[name], name, draws, dataset=dataset, notes=notes, corruption=own)


def view_generator(seed: int, clip: str, name: str, view: int) -> np.random.Generator:
    """The random numbers of one view; independent of process, order and machine."""
    digest = hashlib.sha256("\0".join((str(seed), clip, name, str(view))).encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big"))))


def spread_places(count: int, wanted: int, rng: np.random.Generator | None) -> np.ndarray:
    """The middle of each of `wanted` equal segments of `count` places, or a random place of it: [wanted] ascending."""
    offsets = np.full(wanted, 0.5) if rng is None else rng.random(wanted)
    return np.minimum(((np.arange(wanted) + offsets) * count / wanted).astype(np.int64), count - 1)


def each_file(read: Callable[[_Named], _Told], files: Sequence[_Named]) -> list[_Told]:
    """`read` of every file (a path, or a clip's media), in their order."""
    size = -(-len(files) // _AT_ONCE) or 1
    runs = [files[at : at + size] for at in range(0, len(files), size)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [value for values in pool.map(lambda run: [read(file) for file in run], runs) for value in values]
