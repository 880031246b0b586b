"""`mbcd audit`: flags, one library call, what it returned."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from mbcd_cli import console
from mbcd_cli.cli.options import Asked, Reply, command, preset_for_reader

if TYPE_CHECKING:
    from mbcd_cli.audit.findings import Audit

_SHOWN = 10


@command(
    *("dataset.reader", "dataset.root", "dataset.reader.manifest", "dataset.name", "model.modalities"),
    *("cache.workers", "dataset.max_bad"),
    preset=True,
    examples=(
        "mbcd audit manifest --root data/av-digits",
        "mbcd audit hac --root HAC_Splits --csv audit",
        "mbcd prepare hac --root HAC --set dataset.leave_out=audit",
    ),
)
def audit(asked: Asked) -> Reply:
    """Find what leaks, repeats or lacks in a dataset before anything is trained on it.

    Copies within and across splits and domains, recordings in both splits, overlaps, scarce classes, constant clips.

    Of tables without media it says what they alone tell. Nothing is written.
    """
    settings = asked.resolve(preset_for_reader(asked))
    from mbcd_cli.audit.audit import audit

    found = audit(settings, say=console.terminal)
    return found, partial(show_audit, found)


def show_audit(found: Audit) -> None:
    """Print what `audit` returned: a summary, then the first rows of every kind of finding."""
    looked = ", ".join(f"{name} of {count}" for name, count in found.looked_at.items()) or "no media"
    console.show(f"{found.dataset}: {found.clips} clips, domains {', '.join(found.domains)}; looked at {looked}")
    for line in found.not_looked_at:
        console.show(f"not looked at: {line}")
    table = partial(console.table, most=_SHOWN)
    copies = Counter(
        (copy.how, ", ".join(copy.modalities), copy.across or "one split of a domain") for copy in found.copies
    )
    rows = [(*kind, count) for kind, count in copies.items()]
    if not rows:
        console.show("no copies")
    else:
        table("Copies", ("how", "modalities", "across", "sets of clips"), rows)
        order = sorted(found.copies, key=lambda copy: ("train and test", "domains", "").index(copy.across))
        rows = [(c.across, c.how, ", ".join(c.modalities), f"{c.likeness:.3f}", ", ".join(c.clips)) for c in order]
        table("Clips that are copies of each other", ("across", "how", "modalities", "likeness", "clips"), rows)
    if found.recordings:
        rows = [(r.name, ", ".join(r.domains), ", ".join(r.train), ", ".join(r.test)) for r in found.recordings]
        tests = Counter()
        for recording in found.recordings:
            tests[", ".join(recording.domains)] += len(recording.test)
        told = ", ".join(f"{count} test clips of {domains}" for domains, count in tests.items())
        table(f"Recordings in both splits ({told})", ("recording", "domains", "train", "test"), rows)
    if found.overlaps:
        pairs = Counter((o.domain, o.split) for o in found.overlaps)
        rows = [(*where, count) for where, count in pairs.items()]
        table("Pairs that overlap in time with different labels", ("domain", "split", "pairs"), rows)
        rows = [(o.recording, *o.clips, *o.labels, f"{o.share:.2f}") for o in found.overlaps]
        columns = ("recording", "clip", "clip", "label", "label", "share of the shorter")
        table("Clips that overlap with different labels", columns, rows)
    for shared in found.names:
        console.show(f"{len(shared.names)} names are shared by {' and '.join(shared.domains)}: {shared.names[0]}, ...")
    if found.scarce:
        rows = [(s.domain, s.split, s.label_name, s.clips) for s in found.scarce]
        table("Classes with few clips or none", ("domain", "split", "class", "clips"), rows)
    if found.constant:
        rows = [(c.clip, c.modality, c.what) for c in found.constant]
        table("Constant clips", ("clip", "modality", "what"), rows)
    console.table(
        "Labels (distance: from those of the other domains, 0 to 1)",
        ("domain", "split", "clips", "distance", *found.label_names),
        [
            (c.domain, c.split, sum(c.counts), "-" if c.distance is None else f"{c.distance:.3f}", *c.counts)
            for c in found.labels
        ],
    )
    if found.probes:
        rows = [(p.modality, f"{100 * p.accuracy:.1f}", f"{100 * p.chance:.1f}", p.clips) for p in found.probes]
        table(
            "A linear probe of the cached features for the domain", ("modality", "right %", "chance %", "clips"), rows
        )
    if found.rejected:
        rows = [(r.clip, r.modality, r.file, r.cause) for r in found.rejected]
        table("Clips that could not be decoded", ("clip", "modality", "file", "cause"), rows)
    if found.leaks:
        rows = [(leak.clip, leak.of, leak.why) for leak in found.leaks]
        table(f"{len(rows)} training clips tell of test clips", ("clip", "of", "why"), rows)
        console.say("`mbcd prepare` leaves them out with --set dataset.leave_out=audit.")
    if found.exit_code:
        bad = len({rejected.clip for rejected in found.rejected})
        console.say(
            f"error: {bad} clips could not be decoded, and --max-bad allows fewer.\n"
            f"Mend their files, or run again with --max-bad {bad}."
        )
