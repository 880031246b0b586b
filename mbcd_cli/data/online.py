"""Training views that are not stored (`cache.views = 0`): decoded afresh in every epoch, by worker processes.

Letters: B clips in a batch, M modalities.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from mbcd_cli.data.clips import Clips, MediaColumn
from mbcd_cli.data.media.decoding import DecodeJob, Decoder
from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.records import Clip, Media, Parts
from mbcd_cli.errors import MediaError
from mbcd_cli.settings import DatasetSettings, Settings

_FILES = {"path", "path_v", "clock"}
_APART = 2**32
"""Between the numbers of two views of one epoch: more than there are epochs."""


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where one modality's media lie, and how to decode them: what the index of its cache keeps as JSON.

    Attributes:
        root: the dataset's folder, absolute.
        seed: of the views.
        dataset: limits on bad media.
        media: of every clip.
    """

    root: Path
    seed: int
    dataset: DatasetSettings
    media: Sequence[Media]

    @classmethod
    def of(cls, settings: Settings, clips: Clips, name: str) -> Self:
        """That of modality `name`."""
        root = (settings.dataset.root or Path()).resolve()
        return cls(root, settings.cache.seed, settings.dataset, clips.media[name])

    def to_json(self) -> str:
        """JSON in which files are told relative to the root."""
        entries = []
        for media in self.media:
            entry = {key: value for key, value in asdict(media).items() if value is not None}
            for key in _FILES & entry.keys():  # unlike resolve, realpath bears a loop of links
                entry[key] = os.path.relpath(os.path.realpath(entry[key]), self.root)
            entries.append(entry)
        dataset = self.dataset.model_dump(mode="json", exclude={"root", "reader"})
        return json.dumps({"root": str(self.root), "seed": self.seed, "dataset": dataset, "media": entries})

    @classmethod
    def from_json(cls, text: str, *, root: Path | None) -> Self:
        """What `to_json` told, of media that lie below `root` where they are not where they were."""
        told = json.loads(text)
        base = Path(told["root"]) if root is None else root.resolve()
        media = MediaColumn(
            Media(**{key: base / value if key in _FILES else value for key, value in entry.items()})
            for entry in told["media"]
        )
        return cls(base, int(told["seed"]), DatasetSettings.model_validate(told["dataset"]), media)


class OnlineViews:
    """Decodes the training views of some modalities, in the order asked for.

    What is random about a view comes from (seeds, clip, modality, epoch) alone: the same for any number of workers.
    All modalities take the view of the same number, so that sound follows the very frames that the video shows.

    Attributes:
        trunks: modality -> its frozen trunk, parts -> parts at the cut; where there is none, parts stay decoded.
        warn: hears of what is mended where `prepare` was told to reject.

    Args:
        described: modality -> the JSON of its `MediaSource`.
        modalities: their settings.
        ids: of the clip table.
        root: the dataset's folder, where it is not where it was.
        workers: decoding processes; 0 decodes in this one.
    """

    def __init__(
        self,
        described: Mapping[str, str],
        modalities: Mapping[str, Modality],
        *,
        ids: Sequence[str],
        root: Path | None,
        workers: int,
    ) -> None:
        self.modalities = dict(modalities)
        self.trunks: dict[str, Callable[[Parts], Parts]] = {}
        self.warn: Callable[[str], None] = lambda message: None
        self._ids, self._workers = ids, workers
        self._sources = {name: MediaSource.from_json(text, root=root) for name, text in described.items()}
        self._strict = any(source.dataset.missing_frames == "reject" for source in self._sources.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Modalities that are decoded on the fly."""
        return tuple(self._sources)

    def batches(
        self, index: Sequence[np.ndarray], *, seed: int, epoch: int, views: int = 1
    ) -> Iterator[dict[str, Parts]]:
        """Per batch of clips [B] the parts of every modality at the cut, each [B, ...].

        Args:
            index: the batches' clips; all of them are decoded ahead of use, some at a time.
            seed, epoch: of the training; another epoch shows other views.
            views: views of every clip, V, from one decoding: rows [V B], those of a clip after one another.

        Raises:
            MediaError: a file can no longer be used.
        """
        jobs = {
            name: DecodeJob(
                name,
                self.modalities[name],
                # A clip that `prepare` took cannot be left out in the middle of an epoch.
                source.dataset.model_copy(update={"missing_frames": "nearest"}),
                mixed_seed(source.seed, seed),
            )
            for name, source in self._sources.items()
        }
        shown = [epoch + number * _APART for number in range(views)]
        items = (
            (int(row), Clip(self._ids[row], "", "train", 0, "", {name: source.media[row]}), shown, jobs[name])
            for batch in index
            for name, source in self._sources.items()
            for row in batch
        )
        ahead = 2 * len(self._sources) * max((len(batch) for batch in index), default=0)
        with Decoder(workers=self._workers) as decoder, closing(decoder.run_jobs(items, ahead=ahead)) as stream:
            for batch in index:
                inputs = {}
                for name in self._sources:
                    columns = []
                    for _ in batch:
                        decoded = next(stream)
                        if decoded.rejected is not None:
                            bad = decoded.rejected
                            raise MediaError(bad.file, bad.cause, f"Clip {bad.clip}: mend it, then prepare again.")
                        if decoded.notes and self._strict:
                            self._strict = False
                            self.warn(f"mended in a training view, as others may be: {decoded.notes[0]}")
                        columns.extend(decoded.parts)
                    parts = tuple(torch.from_numpy(np.stack(part)) for part in zip(*columns, strict=True))
                    trunk = self.trunks.get(name)
                    inputs[name] = parts if trunk is None else trunk(parts)
                yield inputs


def mixed_seed(stored: int, training: int) -> int:
    """One seed of the views from the cache's and the training's."""
    return int(np.random.SeedSequence([stored, training]).generate_state(1, np.uint64)[0])
