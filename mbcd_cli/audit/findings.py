"""What an audit finds: records that are tables, JSON, and what `dataset.leave_out` goes by.

Letters: C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mbcd_cli.data.records import Rejected

How = Literal["same file", "same bytes", "same content", "near", "mirrored"]
Across = Literal["train and test", "domains", ""]


@dataclass(frozen=True, slots=True)
class Copies:
    """Clips that are copies of each other.

    Attributes:
        modalities: in which they are.
        how: the table names one file (or span of it) for both; files of the same bytes; the same frames, sound or
            values once decoded; nearly the same; or nearly the same once mirrored.
        likeness: 1, or how near they are at the most: the cosine (of sound the correlation).
        clips: two or more ids; of near ones that have exact copies, all of these.
        across: whether they are in both splits, or (in one split) in several domains.
    """

    modalities: tuple[str, ...]
    how: How
    likeness: float
    clips: tuple[str, ...]
    across: Across


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording or source video of which both splits have clips.

    Attributes:
        name: what the table calls it. domains: of its clips.
        train, test: ids.
    """

    name: str
    domains: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two clips of one recording that overlap in time and have different labels.

    Attributes:
        share: of the shorter one's time that both have.
        across: as of `Copies`.
    """

    recording: str
    clips: tuple[str, str]
    labels: tuple[str, str]
    share: float
    domain: str
    split: str
    across: Across


@dataclass(frozen=True, slots=True)
class ScarceClass:
    """A class of which a domain's split has few clips, or none."""

    domain: str
    split: str
    label_name: str
    clips: int


@dataclass(frozen=True, slots=True)
class SharedNames:
    """Names of files that two domains have both: different clips, as far as names tell."""

    domains: tuple[str, str]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A clip that shows or says nothing, and of what it is constant."""

    clip: str
    modality: str
    what: str


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Clips per class of a domain's split.

    Attributes:
        counts: [C].
        distance: total variation distance from the labels of the other domains, all splits: 0 alike, 1 nothing shared;
            None where there is no other domain.
    """

    domain: str
    split: str
    counts: tuple[int, ...]
    distance: float | None


@dataclass(frozen=True, slots=True)
class DomainProbe:
    """How well a linear classifier tells the domain from one modality's cached features.

    Attributes:
        accuracy: on clips that it was not fitted to, the mean over domains. chance: of guessing, 1 / domains.
        clips: that it was fitted and tried on, in turns.
    """

    modality: str
    accuracy: float
    chance: float
    clips: int


@dataclass(frozen=True, slots=True)
class Leak:
    """A training clip that tells of a test clip: what `dataset.leave_out = "audit"` leaves out.

    Attributes:
        clip: of the train split. of: the first test clip that it tells of.
        why: how it does.
    """

    clip: str
    of: str
    why: str


@dataclass(slots=True)
class Audit:
    """All that was found.

    Attributes:
        looked_at: modality -> clips that were decoded.
        not_looked_at: what could not be, and why, a line each.
        exit_code: 3 where more clips could not be decoded than `dataset.max_bad`.
    """

    dataset: str
    clips: int
    domains: tuple[str, ...]
    label_names: tuple[str, ...]
    looked_at: dict[str, int] = field(default_factory=dict)
    not_looked_at: list[str] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    scarce: list[ScarceClass] = field(default_factory=list)
    names: list[SharedNames] = field(default_factory=list)
    constant: list[Constant] = field(default_factory=list)
    labels: list[LabelCounts] = field(default_factory=list)
    probes: list[DomainProbe] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    exit_code: int = 0
