"""What the headers of a modality's files tell together, before any is decoded: lengths of arrays, rates of sound.

Letters: T steps, D values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mbcd_cli.data.media.arrays import read_array, stored_shape
from mbcd_cli.data.media.sound import stored_rate
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import ArrayModality, AudioModality, Modality

_Told = TypeVar("_Told")
_AT_ONCE = 16  # files: a network's answers take their time
_RATES_OF = 1000  # files, spread over the dataset, whose sample rates are looked at


def survey(listing: Listing) -> None:
    """Fills in what only the files tell of the modalities of `listing`, and says what they have in different ways.

    Raises:
        MediaError: none of the arrays of a modality can be read.
    """
    for name, settings in listing.modalities.items():
        media = [clip.media[name] for clip in listing.clips if name in clip.media]
        if isinstance(settings, ArrayModality):
            listing.modalities[name] = resolve(settings, media, name=name, notes=listing.notes)
        elif isinstance(settings, AudioModality) and settings.sample_rate is None:
            listing.warnings += _mixed_rates(name, media)


def resolve(
    settings: Modality, media: Sequence[Media], *, name: str = "NAME", notes: list[str] | None = None
) -> Modality:
    """Settings with what only the files tell: of arrays the dimension and, of sequences, the length of the longest.

    Args:
        settings: as the user has them; what is set stays.
        media: of every clip; the first that can be read tells whether they are vectors or sequences.
        name: the modality's.
        notes: collects what becomes of sequences of different lengths, if given.

    Raises:
        MediaError: none of the files can be read, and the dimension is not set; the error is the first one's.
    """
    if not isinstance(settings, ArrayModality) or (settings.dimension and settings.length):
        return settings
    shape, error = _first_shape(media)
    if not shape:
        if error is not None and settings.dimension is None:
            raise error
        return settings
    if len(shape) == 1:
        return settings.model_copy(update={"dimension": settings.dimension or (1 if settings.length else shape[0])})
    dimension = settings.dimension or shape[1]
    length = settings.length
    if length is None:
        shapes = _each(stored_shape, [item.path for item in media])
        steps = [shape[0] for shape in shapes if shape is not None and shape[1:] == (dimension,) and shape[0]]
        length = max(steps, default=shape[0])
        if notes is not None and steps and min(steps) < length:
            how = "padded with zeros to" if settings.fit == "pad" else "each spread over"
            notes.append(
                f"{name}: sequences of {min(steps)} to {length} steps, {how} {length}; "
                f"modalities.{name}.length sets another length, modalities.{name}.fit how they get there"
            )
    return settings.model_copy(update={"dimension": dimension, "length": length})


def _first_shape(media: Sequence[Media]) -> tuple[tuple[int, ...], MediaError | None]:
    """Shape of the first array that can be read; else (), and why the first cannot."""
    first: MediaError | None = None
    for item in media:
        try:
            return read_array(item).shape, None
        except MediaError as error:
            first = first or error
    return (), first


def _mixed_rates(name: str, media: Sequence[Media]) -> list[str]:
    paths = list(dict.fromkeys(item.path for item in media))
    paths = paths[:: -(-len(paths) // _RATES_OF) or 1]
    rates = Counter(rate for rate in _each(stored_rate, paths) if rate is not None)
    if len(rates) < 2:
        return []
    counts = ", ".join(f"{count} at {rate} Hz" for rate, count in rates.most_common())
    return [
        f"{name}: files of different sample rates ({counts}), so that one place of a spectrogram means different "
        f"frequencies and times; --set modalities.{name}.sample_rate={rates.most_common(1)[0][0]} makes them equal"
    ]


def _each(read: Callable[[Path], _Told], paths: Sequence[Path]) -> list[_Told]:
    """`read` of every file, in their order."""
    size = -(-len(paths) // _AT_ONCE) or 1
    runs = [paths[at : at + size] for at in range(0, len(paths), size)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [value for values in pool.map(lambda run: [read(path) for path in run], runs) for value in values]
