"""What training, evaluation and landscape read of a prepared dataset.

Letters: N clips, B clips in a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.modality_cache import ClipTable, ModalityCache
from mbcd_cli.data.online import OnlineViews
from mbcd_cli.data.records import SPLITS, Batch, Parts, Rejected

Read = Callable[[str, np.ndarray, np.ndarray], Parts]
"""(modality, clips [B], views [B]) -> parts, each [B, ...]."""


@runtime_checkable
class Dataset(Protocol):
    """Prepared modalities joined by clip; `data.dataset.CachedDataset` is the one on disk.

    Attributes:
        name, domains, label_names: of the dataset. classes: C.
        modalities: resolved settings, in fusion order. fingerprints: per modality, of what was prepared.
        clips: the clip table, N long. rejected: what could not be used; never selected.
        caches: what is on disk, per modality; empty where nothing is.
        online: decodes the training views that are not stored; None where all are.
        tail_weights, trunk_weights: modality -> initial state dict, where the encoder is not drawn by the training.
        pretrained: modalities whose encoder was prepared with trained weights.
        nbytes: of all caches.
    """

    name: str
    domains: Sequence[str]
    label_names: Sequence[str]
    classes: int
    modalities: Mapping[str, Modality]
    fingerprints: Mapping[str, str]
    clips: ClipTable
    rejected: Sequence[Rejected]
    caches: Mapping[str, ModalityCache]
    online: OnlineViews | None
    tail_weights: Mapping[str, Mapping[str, torch.Tensor]]
    trunk_weights: Mapping[str, Mapping[str, torch.Tensor]]
    pretrained: Collection[str]
    nbytes: int

    def has_test_views(self, clips: np.ndarray) -> bool:
        """Whether the test view of all these clips ([n] indices) is stored, in every modality."""

    def select(self, *, domains: Sequence[str], splits: Sequence[str] = SPLITS, limit: int | None = None) -> np.ndarray:
        """Indices ([n] int64, table order) of the usable clips of these domains and splits; `limit`: at most so many.

        Raises:
            CacheError: a domain is unknown, or nothing is left.
        """

    def batches(
        self,
        clips: np.ndarray,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        views: int = 1,
        read: Read | None = None,
    ) -> Iterator[Batch]:
        """Batches of B clips over `clips` ([n] indices), as `data.dataset.CachedDataset.batches` gives them."""
