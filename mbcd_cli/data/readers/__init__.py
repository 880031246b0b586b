"""The registry of dataset readers: each turns a folder on disk into one typed `Listing` of clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

from mbcd_cli.data.modalities.base import Modality
from mbcd_cli.data.records import Clip, Rejected
from mbcd_cli.errors import SettingsError
from mbcd_cli.plugins import entry_of, plugins
from mbcd_cli.settings import DatasetSettings

GROUP = "mbcd.readers"


@dataclass(slots=True)
class Listing:
    """All that a reader knows of a dataset, without having opened its media.

    Attributes:
        name: the dataset's name in the cache and in run folders.
        clips: the clips of the selected domains, in the table's order.
        domains: names of the selected domains, in the order asked for (else of first appearance).
        label_names: one name per class; its length is the number of classes.
        modalities: settings by modality name in fusion order, with whatever the files tell filled in.
        warnings: what a user should know and might want to mend, one sentence each.
        notes: plain facts worth printing (the layout found, files ignored).
        rejected: clips whose media the reader already knows to be missing or unusable; they are not in `clips`.
    """

    name: str
    clips: list[Clip]
    domains: tuple[str, ...]
    label_names: tuple[str, ...]
    modalities: dict[str, Modality]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def survey(self) -> None:
        """Fills in what only the files tell of the modalities, and warns of what they have in different ways.

        Raises:
            MediaError: none of the files of a modality that must be looked into can be read.
        """
        for name, modality in self.modalities.items():
            media = [clip.media[name] for clip in self.clips if name in clip.media]
            self.modalities[name] = modality.resolve(media, name=name, notes=self.notes)
            self.warnings += modality.warnings(media, name=name)


Read = Callable[[DatasetSettings, Mapping[str, Modality]], Listing]


@dataclass(frozen=True, slots=True)
class ReaderEntry:
    """One reader: (dataset settings, modalities asked for or {}) -> Listing, and what it reads."""

    read: Read
    summary: str


def _lazy(module: str) -> Read:
    # Readers import this module for Listing, so the registry imports them when they are called.
    def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
        return import_module(f"mbcd_cli.data.readers.{module}").read(dataset, modalities)

    return read


READERS: dict[str, ReaderEntry] = {
    "manifest": ReaderEntry(_lazy("manifest"), "a CSV table of clips with one column per modality"),
    "demo": ReaderEntry(_lazy("demo"), "the embedded demo, generated as media files on first use"),
    "epic-kitchens": ReaderEntry(_lazy("epic_kitchens"), "EPIC-Kitchens, the three MM-SADA kitchens, eight verbs"),
    "hac": ReaderEntry(_lazy("hac"), "Human-Animal-Cartoon, seven actions"),
    "synthetic": ReaderEntry(_lazy("synthetic"), "vectors of any number of modalities, each as telling as set"),
    "digits": ReaderEntry(_lazy("digits"), "scikit-learn's handwritten digits as six groups of features"),
}


def read_dataset(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The listing by the reader that `dataset.reader` names.

    Raises:
        SettingsError: there is no such reader.
        ManifestError: the dataset's tables are wrong.
    """
    entry = entry_of(dataset.reader, GROUP, READERS, ReaderEntry)
    if entry is None:
        raise SettingsError(
            f"dataset.reader: there is no reader {dataset.reader!r}.",
            f"Choose one of: {', '.join(dict.fromkeys([*READERS, *plugins(GROUP)]))}.",
        )
    return entry.read(dataset, modalities)
