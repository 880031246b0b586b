"""`mbcd audit`: what of a dataset leaks, repeats or lacks, from its tables, its media and its cache."""

from __future__ import annotations

from collections.abc import Sequence

from mbcd_cli.audit.copies import find_copies, of_all_modalities
from mbcd_cli.audit.domain_probe import probe_domains
from mbcd_cli.audit.findings import Audit, Constant, Copies, Leak, Recording
from mbcd_cli.audit.listed import label_counts, overlaps, scarce_classes, shared_names, shared_recordings
from mbcd_cli.audit.prints import Glance, Print
from mbcd_cli.data.clips import Clips
from mbcd_cli.data.dataset import open_dataset
from mbcd_cli.data.media.decoding import DecodeJob, Decoder
from mbcd_cli.data.modalities import asked_modalities
from mbcd_cli.data.prepared import prepared_datasets
from mbcd_cli.data.readers import Listing, NoMediaError, read_dataset
from mbcd_cli.data.records import SPLITS, TEST_VIEW
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings


def audit(settings: Settings, *, say: Say = SILENT) -> Audit:
    """All that can be found out about a dataset: without its media what its tables tell, without a cache no probe.

    Raises:
        SettingsError: no such reader. ManifestError: the tables are wrong. CacheError: its cache is damaged.
    """
    there = True
    try:
        listing = read_dataset(settings.dataset, asked_modalities(settings))
    except NoMediaError as error:
        listing, there = error.listing, False
    found = audit_listing(settings, listing, decoded=there, say=say)
    if not there:
        found.not_looked_at.insert(0, f"media: none are below {settings.dataset.root}; this is what its tables tell")
    if listing.name in prepared_datasets(settings.cache.dir):
        dataset = open_dataset(settings, name=listing.name)
        for name in say.over(dataset.modalities, "probing the cache"):
            probe = probe_domains(dataset, name)
            if probe is not None:
                found.probes.append(probe)
            else:
                found.not_looked_at.append(f"cached features of {name}: no two domains have clips enough for a probe")
    else:
        found.not_looked_at.append(f"cached features: {listing.name} is not prepared in {settings.cache.dir}")
    return found


def audit_listing(settings: Settings, listing: Listing, *, decoded: bool = True, say: Say = SILENT) -> Audit:
    """What clips that are listed tell, and their media where they are to be `decoded`; no cache is looked at."""
    clips, labels = listing.clips, listing.label_names
    found = Audit(listing.name, len(clips), listing.domains, labels, rejected=list(listing.rejected))
    alike: list[Copies] = []
    for name in listing.modalities:
        prints: Sequence[Print | None] = [None] * len(clips)
        if any(media.computed for media in clips.media_of(name)[:1]):
            found.not_looked_at.append(f"{name}: it is computed from the video, whose copies are found")
            continue
        if decoded:
            prints = _prints(settings, listing, name, found, say)
            found.looked_at[name] = sum(held is not None for held in prints)
        alike += find_copies(clips, name, listing.modalities[name], prints)
    found.copies = of_all_modalities(alike)
    found.recordings = shared_recordings(clips)
    found.overlaps = overlaps(clips, labels)
    found.labels = label_counts(clips, len(labels))
    found.scarce = scarce_classes(found.labels, labels)
    found.names = shared_names(clips, next(iter(listing.modalities)))
    if not any(clips.groups):
        found.not_looked_at.append(
            "recordings: nothing tells which clips are of one (a column `group` of the manifest)"
        )
    found.leaks = leaks_of(clips, found.copies, found.recordings)
    bad = len({rejected.clip for rejected in found.rejected})
    found.exit_code = 0 if settings.dataset.tolerates(bad, len(clips)) else 3
    return found


def _prints(settings: Settings, listing: Listing, name: str, found: Audit, say: Say) -> list[Print | None]:
    """The print of every clip; what cannot be decoded, or is constant, goes to `found`."""
    clips, column = listing.clips, listing.clips.media[name]
    job = DecodeJob(name, Glance(listing.modalities[name]), settings.dataset, settings.cache.seed)
    prints: list[Print | None] = [None] * len(clips)
    items = ((index, clips[index], [TEST_VIEW]) for index in range(len(clips)) if column.has(index))
    # A row is read sooner than another process is told of it.
    workers = 0 if column.packed == len(column) else settings.cache.workers
    with Decoder(workers=workers, job=job) as decoder, say.progress(f"looking at {name}", len(clips)) as ticker:
        for decoded in decoder.run(items):
            ticker.advance()
            if decoded.rejected is not None:
                found.rejected.append(decoded.rejected)
                continue
            held = prints[decoded.index] = Print.of(decoded.parts[0])
            if held.constant:
                found.constant.append(Constant(clips.ids[decoded.index], name, held.constant))
    return prints


def leaks_of(clips: Clips, alike: Sequence[Copies], recordings: Sequence[Recording]) -> list[Leak]:
    """Training clips that are copies of a test clip, or of a recording of which there are test clips, in table order.

    The test splits stay as they are, so that accuracies can be compared with others'.
    """
    splits = dict(zip(clips.ids, clips.splits.tolist(), strict=True))
    leaks: dict[str, Leak] = {}
    for copies in alike:
        if copies.across == "train and test":
            test = next(clip for clip in copies.clips if SPLITS[splits[clip]] == "test")
            for clip in copies.clips:
                if SPLITS[splits[clip]] == "train":
                    leaks.setdefault(clip, Leak(clip, test, f"{copies.how} ({', '.join(copies.modalities)})"))
    for recording in recordings:
        for clip in recording.train:
            leaks.setdefault(clip, Leak(clip, recording.test[0], f"both of recording {recording.name}"))
    return [leaks[clip] for clip in clips.ids if clip in leaks]
