"""D&R: diagnosing and re-learning (Wei et al., ECCV 2024).

Letters: N clips, M modalities, C classes, D_k features of modality k.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Annotated

import numpy as np
import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.methods.base import Context, EpochClips, Figures, Method, Outputs, Term
from mbcd_cli.methods.parts import full_precision
from mbcd_cli.settings import AROUND, Count, MethodSettings, NonNegative


class DiagnosingRelearningSettings(MethodSettings):
    """D&R."""

    after: tuple[Count, ...] = (5, 10, 15)
    """Epochs after each of which encoders are pulled back (the authors': 20, 40, 60 of 90)."""
    strength: Annotated[NonNegative, AROUND] = 3.0
    """What the difference of the purities is multiplied with."""


class DiagnosingRelearning(Method):
    """ERM whose encoders are pulled back to what they began with: theta_k <- w_k theta_k(0) + (1 - w_k) theta_k.

    w_k = tanh(3 |P_train - P_val|) after each of some epochs; P = (1 / N) sum over C clusters of the count of their
    largest class, clusters by k-means of h_k in eval mode, each column scaled to [-1, 1], of the sources' training
    clips and of their test split. Parameters only: running statistics and the optimizer's moments stay.
    """

    Settings = DiagnosingRelearningSettings
    settings: DiagnosingRelearningSettings

    def __init__(self, settings: DiagnosingRelearningSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.first = copy.deepcopy(context.model.tails).requires_grad_(False)
        self.register_buffer("pulled", torch.zeros(len(context.model.modalities)))

    @property
    def least_batch(self) -> int:
        """One clip: the copy never runs."""
        return 1

    @torch.no_grad()
    def before_epoch(self, clips: EpochClips) -> None:
        """Pull the encoders, if it is time; `pulled`, w_k of the last time, stays for the figures."""
        if int(self.context.epoch) not in self.settings.after:
            return
        with closing(clips.training()) as batches:
            training = self.purities(batches, seed=clips.seed, shared=True)
        with closing(clips.validation()) as batches:
            validation = self.purities(batches, seed=clips.seed, shared=False)
        shares = np.tanh(self.settings.strength * np.abs(training - validation))
        for share, (name, weights) in zip(shares.tolist(), self.context.model.theta().items(), strict=True):
            first = dict(self.first[name].named_parameters())
            for key, value in weights.items():
                value += share * (first[key] - value)
        self.pulled.copy_(torch.from_numpy(shares))

    def purities(self, batches: Iterator[Batch], *, seed: int, shared: bool) -> np.ndarray:
        """P of every modality, [M]; `shared`: batches are this process' rows of the global ones."""
        model, group = self.context.model.eval(), self.context.group
        labels: list[torch.Tensor] = []
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in model.modalities}
        for batch in batches:
            with self.context.autocast():
                features = model.features(self.at_cut(batch).inputs)
            labels.append(group.gather(batch.labels) if shared else batch.labels)
            for name, h in features.items():
                h = full_precision(h)
                rows[name].append(group.gather(h) if shared else h)
        y = torch.cat(labels).cpu().numpy()
        found = [torch.cat(of_modality).cpu().double().numpy() for of_modality in rows.values()]
        return np.array([purity(clusters(h, model.classes, seed=seed), y) for h in found])

    def figures(
        self, batch: Batch, out: Outputs, loss: torch.Tensor, terms: Mapping[str, Term], **more: torch.Tensor
    ) -> Figures:
        """Those of every method and `pulled`, w_k of the last pull [M]."""
        return super().figures(batch, out, loss, terms, **more, pulled=self.pulled.clone())


def clusters(h: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """k-means of the rows of h [N, D], each column scaled to [-1, 1] -> the number of each row's cluster, [N]."""
    from sklearn.cluster import KMeans  # takes a second to import
    from sklearn.exceptions import ConvergenceWarning

    low, high = h.min(axis=0), h.max(axis=0)
    scaled = 2 * (h - low) / np.where(high > low, high - low, 1) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
        return KMeans(min(count, len(h)), n_init=10, random_state=seed % 2**32).fit_predict(scaled)


def purity(clusters_of: np.ndarray, y: np.ndarray) -> float:
    """Share of the clips [N] that are of the largest class of their cluster."""
    return sum(int(np.bincount(y[clusters_of == c]).max()) for c in np.unique(clusters_of)) / len(y)
