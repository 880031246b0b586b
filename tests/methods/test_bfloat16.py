"""Every rival under autocast to bfloat16: modules of its own run in it, losses in float32."""

from __future__ import annotations

import pytest
import torch
from plain import make, small_batch

CLASSICS = ("mixup", "coral", "mmd", "dann", "mer-dg", "sam", "miro", "agm", "mmpareto")
TOLD = {"rna-net": {}, "ogm-ge": {}, "opm": {"start": 0}, "gmp": {}}
TOLD |= {method: {"hidden": 8} for method in ("simmmdg", "moosa", "cmrf", "nel", "jat", "jat-benchmark")}


@pytest.mark.parametrize("method", [*TOLD, *CLASSICS])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_losses_are_finite_and_in_float32(method, norm):
    torch.set_num_threads(1)
    step = make(method, TOLD.get(method), modalities=3, norm=norm)[0].step
    step.context.precision = "bfloat16"
    for module in (step.model, step.method, *([step.average.model] if step.average is not None else [])):
        module.float()
    step._dtype = torch.float32
    for seed in range(2):
        vector = step(small_batch(seed, 3, views=step.method.views))
    assert vector.dtype == torch.float32
    assert torch.isfinite(vector).all()
