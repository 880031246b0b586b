"""Copies among clips: exact ones by checksums, near ones by their prints, looked up in a tree of marks, not all pairs.

A pair is a candidate where a mark of one is among the nearest marks of the other's within `Nearness.reach`; marks are
projected on their 16 principal directions first, which brings no two further apart. Candidates are then compared whole.
How the limits were chosen is in docs/audit.md.

Letters: N clips, K marks of one, D values of a mark, Q marks asked for, P pairs, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mbcd_cli.audit.findings import Copies, How
from mbcd_cli.audit.listed import across, same_files
from mbcd_cli.audit.prints import MIRROR, Print, unit_columns
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.frames import FrameModality
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.modalities.video import VideoModality

DIMENSIONS, NEAREST = 16, 12
_SAMPLE, _TOGETHER = 20_000, 20_000
_EMPHASIS, _KEPT = 0.7, 0.5


@dataclass(frozen=True, slots=True)
class Nearness:
    """How near two clips of a kind are copies.

    Attributes:
        reach: distance of two marks of length 1, within which their clips are compared.
        least: likeness of copies.
        asked: marks of a clip that are looked up.
    """

    reach: float
    least: float
    asked: int


OF_FRAMES, OF_SOUND, OF_ARRAYS = Nearness(0.25, 0.988, 4), Nearness(0.5, 0.84, 8), Nearness(0.35, 0.98, 1)


def find_copies(clips: Clips, name: str, modality: Modality, prints: Sequence[Print | None]) -> list[Copies]:
    """All copies in one modality.

    Args:
        prints: of every clip; None where it could not be decoded, or nobody tried.
    """
    telling = [index for index, held in enumerate(prints) if held is not None and len(held.marks)]
    exact, told = _sets(telling, lambda index: prints[index].content), {*telling}
    named = same_files(clips, name)
    found = [_copies(clips, name, "same file", 1.0, rows) for rows in named if not {*rows} <= told]
    one_file = {index: rows for rows in named for index in rows}
    for rows in exact.values():
        if len(rows) > 1:
            how: How = "same content"
            if prints[rows[0]].file and len({prints[index].file for index in rows}) == 1:
                how = "same bytes"
            if {*rows} <= {*one_file.get(rows[0], ())}:
                how = "same file"
            found.append(_copies(clips, name, how, 1.0, rows))
    firsts = list(exact)
    for a, b, how, likeness in near_pairs([prints[index] for index in firsts], modality):
        rows = sorted([*exact[firsts[a]], *exact[firsts[b]]])
        found.append(_copies(clips, name, how, likeness, rows))
    return found


def of_all_modalities(alike: Sequence[Copies]) -> list[Copies]:
    """The same copies of several modalities as one."""
    found: dict[tuple[How, tuple[str, ...]], Copies] = {}
    for copies in alike:
        seen = found.setdefault((copies.how, copies.clips), copies)
        if seen is not copies:
            names, likeness = (*seen.modalities, *copies.modalities), max(seen.likeness, copies.likeness)
            found[copies.how, copies.clips] = replace(seen, modalities=names, likeness=likeness)
    return list(found.values())


def _sets(rows: Sequence[int], key: Callable[[int], str]) -> dict[int, list[int]]:
    """First of every set of rows with one key -> all of it."""
    sets: dict[str, list[int]] = {}
    for row in rows:
        sets.setdefault(key(row), []).append(row)
    return {members[0]: members for members in sets.values()}


def _copies(clips: Clips, name: str, how: How, likeness: float, rows: Sequence[int]) -> Copies:
    return Copies((name,), how, round(likeness, 4), tuple(clips.ids[index] for index in rows), across(clips, rows))


def near_pairs(prints: Sequence[Print], modality: Modality) -> Iterator[tuple[int, int, How, float]]:
    """(a, b, how, likeness) of every two clips that are nearly the same, a before b."""
    if len(prints) < 2:
        return
    marks = [held.marks for held in prints]
    nearness = OF_ARRAYS
    if isinstance(modality, FrameModality):
        nearness = OF_FRAMES
    elif isinstance(modality, AudioModality):
        nearness = OF_SOUND
        waves = lru_cache(maxsize=4096)(lambda index: emphasised(prints[index].wave))
    else:
        marks = unit_columns(marks)
    seen: dict[tuple[int, int], tuple[How, float]] = {}
    ways: dict[How, np.ndarray | int] = {"near": 1} | (
        {"mirrored": MIRROR} if isinstance(modality, VideoModality) else {}
    )
    for how, sign in ways.items():
        for a, b in candidates(marks, [sign * rows for rows in marks], nearness).tolist():
            if nearness is OF_SOUND:
                value = correlation(waves(a), waves(b))
            else:
                value = covered(marks[a], sign * marks[b])
            if value >= nearness.least and value > seen.get((a, b), ("", 0.0))[1]:
                seen[a, b] = how, value
    yield from ((a, b, *told) for (a, b), told in sorted(seen.items()))


def candidates(marks: Sequence[np.ndarray], asked: Sequence[np.ndarray], nearness: Nearness) -> np.ndarray:
    """Pairs of clips worth a comparison, [P, 2] int64, each once and ascending.

    Args:
        marks: [K, D] of every clip. asked: the same, or what is looked up instead (mirrored).
    """
    from scipy.spatial import cKDTree

    points = np.concatenate(marks)
    owners = np.repeat(np.arange(len(marks)), [len(rows) for rows in marks])
    picks = [np.unique(np.linspace(0, len(rows) - 1, 2 * nearness.asked + 1).astype(int)[1::2]) for rows in asked]
    queries = np.concatenate([rows[pick] for rows, pick in zip(asked, picks, strict=True)])
    askers = np.repeat(np.arange(len(marks)), [len(pick) for pick in picks])
    basis = principal(points)
    tree = cKDTree(points @ basis)
    most = min(NEAREST + max(len(rows) for rows in marks), len(points))
    found = []
    for at in range(0, len(queries), _TOGETHER):
        some = queries[at : at + _TOGETHER] @ basis
        distances, hits = tree.query(some, k=[*range(1, most + 1)], distance_upper_bound=nearness.reach, workers=-1)
        row, column = np.nonzero(np.isfinite(distances))
        hit, asker = hits[row, column], askers[at + row]
        apart = np.linalg.norm(points[hit] - queries[at + row], axis=1)
        worth = (owners[hit] != asker) & (apart <= nearness.reach)
        row, hit, asker = row[worth], hit[worth], asker[worth]
        # Of every query the nearest few: `row` ascends, and so do the distances within it.
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        both = np.stack([asker, owners[hit]])[:, rank < NEAREST]
        found.append(np.unique(both.min(axis=0) * len(marks) + both.max(axis=0)))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), len(marks)), axis=1)


def principal(points: np.ndarray) -> np.ndarray:
    """[n, D] -> [D, d <= 16] orthonormal: the directions in which (a sample of) the points differ most."""
    sample = points[:: -(-len(points) // _SAMPLE)]
    _, _, directions = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)
    return directions[:DIMENSIONS].T


def covered(a: np.ndarray, b: np.ndarray) -> float:
    """How well one clip's marks [K, D] are all found in the other's: the mean of their best cosines, 1 in a copy that
    was cut."""
    cosines = a @ b.T
    return float(max(cosines.max(axis=1).mean(), cosines.max(axis=0).mean()))


def emphasised(wave: np.ndarray) -> np.ndarray:
    """[S] -> [S] float32 of energy 1, high frequencies raised: hum and pitch are alike in many recordings."""
    wave = wave.astype(np.float32)
    wave = np.append(wave[:1], wave[1:] - _EMPHASIS * wave[:-1])
    return wave / np.sqrt((wave**2).sum() + 1e-12)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The largest correlation of two waves (energy 1) over all shifts that leave both half of their energy."""
    from scipy.fft import irfft, next_fast_len, rfft

    size = next_fast_len(len(a) + len(b), real=True)
    products = irfft(rfft(a, size).conj() * rfft(b, size), size)
    shifts = np.arange(1 - len(a), len(b))
    energies = []
    for wave, begin in ((a, np.maximum(0, -shifts)), (b, np.maximum(0, shifts))):
        summed = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
        length = np.minimum(len(a), len(b) - shifts) - np.maximum(0, -shifts)
        energies.append(summed[begin + length] - summed[begin])
    enough = (energies[0] >= _KEPT) & (energies[1] >= _KEPT)
    if not enough.any():
        return 0.0
    return float(np.abs(products[shifts[enough]] / np.sqrt(energies[0] * energies[1])[enough]).max())
