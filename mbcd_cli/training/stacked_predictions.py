"""What many models of the same shapes say on held-out clips, as one model of stacked weights.

Letters: K models, N clips.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

from mbcd_cli.model import MultiModalModel
from mbcd_cli.scoring.predictions import Predictions, autocast
from mbcd_cli.training.alike import by_name
from mbcd_cli.training.feed import Feed
from mbcd_cli.training.stacked import replace_modules

CLIPS = 128
"""Clips per pass: what a clip's logits round to must not depend on how many models there are."""


def stackable(model: MultiModalModel) -> bool:
    """Whether `predict_stacked` rounds a model alike, whatever models are beside it: not where it convolves."""
    return not any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


@torch.no_grad()
def predict_stacked(
    models: Sequence[MultiModalModel], clips: Sequence[np.ndarray], feed: Feed, *, precision: str
) -> list[Predictions]:
    """What `scoring.predictions.predict` says of each model, but for rounding.

    Args:
        models: of the same shapes, on the feed's device.
        clips: of each, [N] indices into the clip table.
        feed: reads the clips' test views.
        precision: as `predict` has it.
    """
    template = _template(models[0])
    weights = {name: torch.stack(tensors) for name, *tensors in by_name(models)}
    shared = all(np.array_equal(one, clips[0]) for one in clips)
    read = [feed.testing(one, batch_size=CLIPS) for one in (clips[:1] if shared else clips)]
    passes = []
    with autocast(feed.device, precision):
        for batches in zip(*read, strict=True):
            inputs = {
                name: tuple(
                    same[0].expand(len(models), *same[0].shape) if shared else torch.stack(same)
                    for same in zip(*(batch.inputs[name] for batch in batches), strict=True)
                )
                for name in batches[0].inputs
            }
            fused, unimodal = vmap(lambda own, its: functional_call(template, own, (its,)))(weights, inputs)
            passes.append(
                (
                    batches * (len(models) if shared else 1),
                    fused.to("cpu", torch.float32),
                    {name: logits.to("cpu", torch.float32) for name, logits in unimodal.items()},
                )
            )
    return [
        Predictions(
            **{
                of: torch.cat([getattr(batches[k], of).cpu() for batches, _, _ in passes])
                for of in ("labels", "domains", "clips")
            },
            fused=torch.cat([fused[k] for _, fused, _ in passes]),
            unimodal={
                name: torch.cat([unimodal[name][k] for _, _, unimodal in passes]) for name in models[0].modalities
            },
        )
        for k in range(len(models))
    ]


def _template(model: MultiModalModel) -> MultiModalModel:
    """A copy without weights of its own, whose modules stack."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    template = copy.deepcopy(model, memo).eval()
    replace_modules(template, [model], None)
    return template
