"""The registry of dataset readers: each turns a folder on disk into one typed `Listing` of clips."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from mbcd_cli.data.clips import Clips
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.records import Rejected
from mbcd_cli.errors import ManifestError, SettingsError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.plugins import entry_of, plugins, summaries_of
from mbcd_cli.settings import DatasetSettings, ManifestSettings, ReaderSettings

GROUP = "mbcd.readers"


@dataclass(slots=True)
class Listing:
    """All that a reader knows of a dataset, without having opened its media.

    Attributes:
        name: the dataset's name in the cache and in run folders.
        clips: the clips of the selected domains, in the table's order; whatever sequence is given becomes columns.
        domains: names of the selected domains, in the order asked for (else of first appearance).
        label_names: one name per class; its length is the number of classes.
        modalities: settings by modality name in fusion order, with whatever the files tell filled in.
        warnings: what a user should know and might want to mend, one sentence each.
        notes: plain facts worth printing (the layout found, files ignored).
        rejected: clips whose media the reader already knows to be missing or unusable; they are not in `clips`.
        gone: clips that were left out (`leave_out`).
        tables: files that, with the media themselves, say all of this; empty where more than files does, or folders do.
    """

    name: str
    clips: Clips
    domains: tuple[str, ...]
    label_names: tuple[str, ...]
    modalities: dict[str, Modality]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    gone: Clips = field(default_factory=Clips)

    def __post_init__(self) -> None:
        if not isinstance(self.clips, Clips):
            self.clips = Clips(self.clips)

    def leave_out(self, ids: Collection[str]) -> None:
        """Goes on without some clips."""
        gone, clips = {*ids}, self.clips
        self.clips = Clips(clip for clip in clips if clip.id not in gone)
        self.gone = Clips(clip for clip in clips if clip.id in gone)

    def survey(self) -> None:
        """Fills in what only the files tell of the modalities, and warns of what they have in different ways.

        Raises:
            MediaError: none of the files of a modality that must be looked into can be read.
        """
        for name, modality in self.modalities.items():
            media = self.clips.media_of(name)
            self.modalities[name] = modality.resolve(media, name=name, notes=self.notes)
            self.warnings += modality.warnings(media, name=name)


class NoMediaError(ManifestError):
    """None of a dataset's media are there.

    Attributes:
        listing: its clips by the tables alone, with media where they are to be expected.
    """

    listing: Listing


ReadListing = Callable[[DatasetSettings, Mapping[str, Modality]], Listing]


@dataclass(frozen=True, slots=True)
class ReaderEntry:
    """One reader.

    Attributes:
        read: (dataset settings, modalities asked for or {}) -> Listing.
        summary: what it reads, in a line.
        settings: its settings' class, where it has some of its own (or what else makes their defaults).
        generates: it makes its media where they are not there yet.
        narrations: (dataset settings, domains) -> class -> what was said of its training clips in these domains, where
            its tables hold such texts; it opens no other domain's.
    """

    read: ReadListing
    summary: str
    settings: Callable[[], ReaderSettings] = ReaderSettings
    generates: bool = False
    narrations: Callable[[DatasetSettings, Sequence[str]], Mapping[str, Sequence[str]]] | None = None


def _ours(
    module: str,
    summary: str,
    *,
    settings: str | type[ReaderSettings] = ReaderSettings,
    generates: bool = False,
    narrates: bool = False,
) -> ReaderEntry:
    # Readers import this module for Listing, so the registry imports them when they are called.
    def part(where: str) -> Callable[..., Listing | ReaderSettings]:
        module, _, name = where.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), name)

    def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
        return part(f"{module}:read")(dataset, modalities)

    def narrations(dataset: DatasetSettings, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return part(f"{module}:narrations")(dataset, domains)

    own = (lambda: part(settings)()) if isinstance(settings, str) else settings
    return ReaderEntry(read, summary, own, generates, narrations if narrates else None)


_SPLITS = "places:SplitSettings"
READERS: dict[str, ReaderEntry] = {
    "manifest": _ours("manifest", "a CSV table of clips with one column per modality", settings=ManifestSettings),
    "demo": _ours(
        "demo", "the embedded demo, generated as media files on first use", settings="demo:DemoSettings", generates=True
    ),
    "epic-kitchens": _ours(
        "epic_kitchens", "EPIC-Kitchens, the three MM-SADA kitchens, eight verbs", settings=_SPLITS, narrates=True
    ),
    "hac": _ours("hac", "Human-Animal-Cartoon, seven actions", settings=_SPLITS),
    "synthetic": _ours(
        "synthetic",
        "vectors of any number of modalities, as telling as set",
        settings="synthetic:SyntheticSettings",
        generates=True,
    ),
    "digits": _ours("digits", "scikit-learn's handwritten digits as six groups of features", generates=True),
}


def reader_settings(name: str) -> ReaderSettings:
    """The default settings of a reader; of one that is not installed here, those that every reader has.

    Raises:
        SettingsError: an installed package's reader cannot be imported.
    """
    entry = entry_of(name, GROUP, READERS, ReaderEntry)
    return (entry.settings if entry is not None else ReaderSettings)().model_copy(update={"name": name})


def reader_summaries() -> list[tuple[str, str]]:
    """(name, what it reads or what is wrong with it) of all readers."""
    entries = summaries_of(GROUP, READERS, ReaderEntry)
    return [(name, entry if isinstance(entry, str) else entry.summary) for name, entry in entries]


def narrations_of(dataset: DatasetSettings, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Class -> what was said of its training clips in these domains, by the dataset's reader.

    Raises:
        SettingsError: its tables have no such texts. ManifestError: tables that are missing, or wrong.
    """
    entry = entry_of(dataset.reader.name, GROUP, READERS, ReaderEntry)
    if entry is None or entry.narrations is None:
        every = summaries_of(GROUP, READERS, ReaderEntry)
        having = [name for name, one in every if not isinstance(one, str) and one.narrations]
        raise SettingsError(
            f"Reader {dataset.reader.name} of {dataset.name} has no narrations.",
            f"Set dataset.reader to one that has ({', '.join(having)}), or write a file of prompts.",
        )
    return entry.narrations(dataset, domains)


def read_dataset(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The listing by the reader that `dataset.reader.name` names.

    Raises:
        SettingsError: there is no such reader.
        ManifestError: the dataset's tables are wrong, or name no clips.
    """
    entry = entry_of(dataset.reader.name, GROUP, READERS, ReaderEntry)
    if entry is None:
        names = dict.fromkeys([*READERS, *plugins(GROUP)])
        raise SettingsError(
            f"dataset.reader: there is no reader {dataset.reader.name!r}.",
            f"{did_you_mean(dataset.reader.name, names)}Choose one of: {', '.join(names)}.",
        )
    own = type(entry.settings())
    if not isinstance(dataset.reader, own):  # settings that were not merged by `resolved`
        dataset = dataset.model_copy(update={"reader": own.model_validate(dataset.reader.model_dump())})
    listing = entry.read(dataset, modalities)
    if not (len(listing.clips) or listing.rejected):
        where = f" below {dataset.root}" if dataset.root else ""
        raise ManifestError(f"Reader {dataset.reader.name} finds no clips{where}.", "Check --root.")
    return listing
