"""Trunks for training views that are not stored (`cache.views = 0`): `train` attaches them to the opened dataset."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mbcd_cli.data.protocol import Dataset
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.staged import Parts, Trunk
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import Settings


def attach_trunks(settings: Settings, dataset: Dataset, *, device: torch.device, say: Say = SILENT) -> None:
    """Give the dataset the trunks of the modalities whose training views are decoded on the fly, and a way to warn.

    Trunks that are part of the model (`cache.trunk_batch_norm = "batch"`) are not attached. The random state is left
    as it was.

    Raises:
        CacheError: the trunk's weights, which `prepare` stored, cannot be read, or do not fit.
    """
    online = dataset.online
    if online is None:
        return
    online.warn = say.warn
    if settings.cache.live_trunks:
        return
    for name in online.names:
        cache = dataset.caches[name]
        if cache.recipe.get("weights") is None:
            continue
        modality = dataset.modalities[name]
        with torch.random.fork_rng(devices=[]):
            trunk, _ = build_encoder(name, modality).cut(modality.cut)
        trunk.load_prepared(cache.weights("trunk.pt"), name)
        online.trunks[name] = _runner(trunk.to(device), device)


def _runner(trunk: Trunk, device: torch.device) -> Callable[[Parts], Parts]:
    return lambda parts: trunk(tuple(part.to(device) for part in parts))
