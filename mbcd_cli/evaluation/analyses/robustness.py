"""Missing modalities, and modalities whose input is disturbed: the tails run once per disturbance, not per subset.

Letters: B clips in a batch, N clips, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np
import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.staged import Parts
from mbcd_cli.errors import MbcdError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.scoring.metrics import predicted, top1
from mbcd_cli.scoring.predictions import Predictions, Variant, autocast, evaluating

MAX_MODALITIES = 8
"""With more modalities the subsets (2^M) are not all computed."""
NOTHING = "none"
"""Name of the empty subset: what the fused head says when every feature is zero."""


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset of `modalities` in their order, the empty one first, the whole last."""
    return [s for size in range(len(modalities) + 1) for s in combinations(modalities, size)]


def subset_name(subset: Sequence[str]) -> str:
    """`video+audio`; `none` for the empty subset."""
    return "+".join(subset) or NOTHING


def subset_variants(model: MultiModalModel) -> dict[str, Variant]:
    """For `predict`: fused logits with every subset of modalities present, the others zero before fusion."""
    if len(model.modalities) > MAX_MODALITIES:
        return {}

    def variant(subset: tuple[str, ...]) -> Variant:
        mask = torch.tensor([[float(name in subset) for name in model.modalities]])

        def logits(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
            clips = next(iter(features.values()))
            return model.fuse(features, mask.to(clips.device).expand(len(clips), -1))

        return logits

    return {subset_name(s): variant(s) for s in subsets(model.modalities)}


@dataclass(frozen=True, slots=True)
class MissingModalities:
    """Fused top-1 (0 to 1) with each subset of modalities present, by its name, and each modality's Shapley value."""

    top1: dict[str, float]
    shapley: dict[str, float]


def missing_modalities(predictions: Predictions) -> MissingModalities:
    """With each subset of modalities present, from predictions made with `subset_variants`."""
    accuracies = {name: top1(logits, predictions.labels) for name, logits in predictions.variants.items()}
    return MissingModalities(accuracies, shapley(accuracies, list(predictions.unimodal)))


def shapley(values: Mapping[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Shapley value of each modality in the game whose worth of a subset is `values[subset_name(subset)]`.

    phi_k = sum over S without k of |S|! (M - |S| - 1)! / M! * (v(S + k) - v(S)); they add up to v(all) - v(none).
    """
    count = len(modalities)
    shares = dict.fromkeys(modalities, 0.0)
    for name in modalities:
        for subset in subsets([m for m in modalities if m != name]):
            weight = factorial(len(subset)) * factorial(count - len(subset) - 1) / factorial(count)
            joined = [m for m in modalities if m in subset or m == name]
            shares[name] += weight * (values[subset_name(joined)] - values[subset_name(subset)])
    return shares


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One way in which one modality's input is changed.

    Attributes:
        modality: which one.
        kind: what is done (`gaussian shift`, `blur`, ...).
        level: how strongly: the noise's standard deviation, or a severity from 1 to 5.
        apply: (parts at the cut, each [B, ...], on the device; clip indices [B]) -> disturbed parts.
    """

    modality: str
    kind: str
    level: float
    apply: Callable[[Parts, torch.Tensor], Parts]


@dataclass(frozen=True, slots=True)
class DisturbedAccuracy:
    """Top-1 (0 to 1) on `clips` clips under a `Disturbance`, of the fused and of the disturbed modality's own head."""

    modality: str
    kind: str
    level: float
    clips: int
    fused: float
    unimodal: float


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A set of clips (source or target) under disturbances."""

    clips: str
    records: list[DisturbedAccuracy]


def clip_noise(part: torch.Tensor, clips: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Standard normal noise of the shape of `part` [B, ...]; a clip's noise depends on (seed, clip) alone."""
    rows = [
        np.random.default_rng([seed, clip]).standard_normal(part.shape[1:], dtype=np.float32) for clip in clips.tolist()
    ]
    return torch.from_numpy(np.stack(rows)).to(part.device)


def gaussian_shift(modality: str, sigma: float, *, seed: int = 0) -> Disturbance:
    """Gaussian noise on a modality's input to its tail (the paper's Fig. 1b).

    `sigma` is in units of the standard deviation of the clip's own input (per part of the input, over channels and
    positions), so that it means the same for pixels, spectrograms and features: the signal-to-noise ratio is
    -20 log10(sigma) dB. The same noise, scaled, serves every sigma.
    """

    def apply(parts: Parts, clips: torch.Tensor) -> Parts:
        if sigma == 0:
            return parts
        out = []
        for index, part in enumerate(parts):
            values = part.to(torch.float32)
            spread = values.flatten(1).std(1, unbiased=False).reshape(-1, *[1] * (values.ndim - 1))
            out.append(values + sigma * spread * clip_noise(values, clips, seed=seed * 16 + index))
        return tuple(out)

    return Disturbance(modality, "gaussian shift", sigma, apply)


@torch.no_grad()
def disturbed_accuracy(
    model: MultiModalModel,
    batches: Iterable[Batch],
    disturbances: Sequence[Disturbance],
    *,
    device: torch.device | str,
    precision: str = "float32",
) -> list[DisturbedAccuracy]:
    """Top-1 of the fused and of the disturbed modality's own head under each disturbance, in their order.

    One pass over `batches`; per batch every tail runs once undisturbed, and then only the disturbed modality's tail
    once per disturbance. Memory does not grow with N.

    Raises:
        MbcdError: no clips.
    """
    device = torch.device(device)
    right = torch.zeros(len(disturbances), 2, dtype=torch.int64)
    clips = 0
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            labels, batch = batch.labels.cpu().numpy(), batch.to(device)
            clips += len(batch)
            inputs = model.at_cut(batch.inputs)
            clean = model.features(inputs)
            for index, disturbance in enumerate(disturbances):
                modality = disturbance.modality
                hidden = model.encode(modality, disturbance.apply(inputs[modality], batch.clips))
                fused = model.fuse({**clean, modality: hidden})
                unimodal = model.heads[modality](hidden)
                for head, logits in enumerate((fused, unimodal)):
                    right[index, head] += int((predicted(logits.float().cpu()) == labels).sum())
    if not clips:
        raise MbcdError("There are no clips to evaluate.", "Check the domains and splits that were asked for.")
    shares = [(int(fused) / clips, int(unimodal) / clips) for fused, unimodal in right]
    return [
        DisturbedAccuracy(d.modality, d.kind, float(d.level), clips, fused, unimodal)
        for d, (fused, unimodal) in zip(disturbances, shares, strict=True)
    ]
