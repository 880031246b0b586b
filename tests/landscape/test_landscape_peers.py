"""Agreement with two published packages (dependency group `bench`), where those are correct; skipped without them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.data.records import Batch
from mbcd_cli.landscape.hessian import Hessian, top_eigenvalues
from mbcd_cli.landscape.objective import ModelObjective
from mbcd_cli.model import build_model
from mbcd_cli.settings import ModelSettings


class Fused(nn.Module):
    """The fused logits of the model, from the two vectors side by side."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Uni-modal heads do not enter the fused loss, and the packages move or differentiate every parameter.
        model.heads = nn.ModuleDict()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.fuse(self.model.features({"a": (x[:, :5],), "b": (x[:, 5:],)}))


@pytest.fixture
def case():
    torch.manual_seed(0)
    modalities = {name: ArrayModality(width=2, dimension=5) for name in ("a", "b")}
    model = build_model(modalities, settings=ModelSettings(hidden=8), classes=3).eval()
    x, labels = torch.randn(40, 10), torch.randint(0, 3, (40,))
    zeros = torch.zeros(40, dtype=torch.long)
    batch = Batch({"a": (x[:, :5],), "b": (x[:, 5:],)}, labels, zeros, zeros)
    names = tuple(name for name, _ in model.named_parameters() if not name.startswith("heads."))
    return model, x, labels, ModelObjective(model=model, batches=[batch], names=names)


def test_straight_line_between_two_models(case):
    packages = pytest.importorskip("loss_landscapes")
    metrics = pytest.importorskip("loss_landscapes.metrics")
    model, x, labels, objective = case
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs = packages.linear_interpolation(
        Fused(copy.deepcopy(model)), Fused(copy.deepcopy(other)), metrics.Loss(F.cross_entropy, x, labels), steps=5
    )
    end = dict(other.named_parameters())
    start = {name: value.detach() for name, value in objective.start.items()}
    # The package moves by 1 / steps before it measures for the first time.
    ours = [
        float(objective.measure({name: torch.lerp(value, end[name].detach(), t) for name, value in start.items()})[0])
        for t in np.arange(1, 6) / 5
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_top_eigenvalue(case):
    pyhessian = pytest.importorskip("pyhessian")
    model, x, labels, objective = case
    theirs = pyhessian.hessian(Fused(copy.deepcopy(model)), F.cross_entropy, data=(x, labels), cuda=False)
    found = theirs.eigenvalues(maxIter=1000, tol=1e-6)[0][0]
    product = Hessian(objective.terms(), objective.start)
    first = product.noise(seed=0, index=0)
    ours = top_eigenvalues(product, len(first), start=first, tolerance=1e-5)
    assert float(ours.values[0]) == pytest.approx(found, rel=1e-3)
