"""What every reader must do, as checks that any can be put through, on a dataset of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mbcd_cli.data.media.condition import files_of
from mbcd_cli.data.modalities.modality import Modality, load_views
from mbcd_cli.data.readers import GROUP, READERS, Listing, ReaderEntry, read_dataset
from mbcd_cli.data.records import SPLITS, TEST_VIEW
from mbcd_cli.errors import MbcdError
from mbcd_cli.naming import name_faults
from mbcd_cli.plugins import entry_of
from mbcd_cli.settings import DatasetSettings


@dataclass(frozen=True, slots=True)
class ReaderSubject:
    """A reader to be checked: the settings that name it and a dataset, and the modalities asked for."""

    dataset: DatasetSettings
    modalities: Mapping[str, Modality]

    def listing(self) -> Listing:
        """What it reads."""
        return read_dataset(self.dataset, self.modalities)


def check_listing(subject: ReaderSubject) -> None:
    """There are clips: ids once each, names that can be file names, splits train or test, labels that have names."""
    listing = subject.listing()
    assert len(listing.clips), "it lists no clips"
    repeated = [identity for identity, count in Counter(listing.clips.ids).items() if count > 1]
    assert not repeated, f"ids that several clips have: {', '.join(repeated[:4])}"
    faults = [fault for name in (*listing.modalities, *listing.domains) for fault in name_faults("name", name)]
    assert not faults, f"{faults[0]}"
    assert {*listing.clips.domain_names} <= {*listing.domains}, "clips are of domains that it does not list"
    for clip in listing.clips:
        assert clip.split in SPLITS, f"{clip.id}: its split is {clip.split!r}"
        assert 0 <= clip.label < len(listing.label_names), f"{clip.id}: label {clip.label} has no name"
        assert clip.media.keys() <= listing.modalities.keys(), f"{clip.id}: media of modalities that it does not list"


def check_repeatable(subject: ReaderSubject) -> None:
    """Read again it lists the same clips in the same order: a cache is found by them."""
    first, second = subject.listing(), subject.listing()
    assert first.clips.digest == second.clips.digest, "clips, or their order, differ"
    for clip, again in zip(first.clips, second.clips, strict=True):
        assert clip.media == again.media, f"{clip.id}: other media"


def check_files(subject: ReaderSubject) -> None:
    """The media of every clip that it lists are there; those that are not it rejects, with the cause."""
    for clip in subject.listing().clips:
        for name, media in clip.media.items():
            gone = [str(path) for path in files_of(media) if not path.exists()]
            assert not gone, f"{clip.id}: its {name} is not there: {gone[0]}"


def check_views(subject: ReaderSubject) -> None:
    """The first clip of every modality decodes to views of the shapes that its settings promise."""
    listing = subject.listing()
    listing.survey()
    for name, modality in listing.modalities.items():
        clip = next((clip for clip in listing.clips if name in clip.media), None)
        assert clip is not None, f"no clip has {name}"
        for view in (TEST_VIEW, 0):
            (parts,) = load_views(clip, name, modality, views=[view], seed=0, dataset=subject.dataset)
            made = [(part.shape, part.dtype) for part in parts]
            told = modality.part_shapes(test=view == TEST_VIEW)
            assert made == told, f"{name} of {clip.id}: view {view} is {made}, where {told} is promised"


def check_refusal(subject: ReaderSubject) -> None:
    """A root that is not there is one of mbcd's errors; a reader that makes its media is not asked."""
    entry = entry_of(subject.dataset.reader.name, GROUP, READERS, ReaderEntry)
    if entry is None or entry.generates:
        return
    nowhere = Path(f"{subject.dataset.root}-is-not-there")
    with suppress(MbcdError):
        listing = read_dataset(subject.dataset.model_copy(update={"root": nowhere}), subject.modalities)
        raise AssertionError(f"it lists {len(listing.clips)} clips of a root that is not there, and says nothing")


READER_CHECKS: dict[str, Callable[[ReaderSubject], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def reader_checks(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> dict[str, Callable[[], None]]:
    """name -> check, of the reader that `dataset` names, on its dataset."""
    subject = ReaderSubject(dataset, modalities)
    return {name: partial(check, subject) for name, check in READER_CHECKS.items()}
