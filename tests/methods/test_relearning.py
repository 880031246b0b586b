"""D&R against its formulas and pinned numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from memory import MemoryEpoch
from plain import LABELS, NAMES, Plain, compare, make, small_batch
from reference_relearning import lloyd, pulled, scaled
from reference_relearning import purity as counted

from mbcd_cli.methods.relearning import clusters, purity


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("sources", [1, 2])
def test_a_step_is_erms(modalities, sources):
    compare(Plain, "d-and-r", modalities=modalities, sources=sources, average={"kind": "ema", "beta": 0.8})


def clustered(seed, modalities, mislabelled=0):
    """60 clips in three clusters that nobody can miss, of which some are called another class."""
    batch = small_batch(seed, modalities, size=60)
    y = torch.arange(60) % 3
    inputs = {}
    for name, (x,) in batch.inputs.items():
        centres = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(5), dtype=x.dtype)
        inputs[name] = (6 * centres[y] + 0.05 * x,)
    labels = y.clone()
    labels[:mislabelled] = (labels[:mislabelled] + 1) % 3
    return replace(batch, inputs=inputs, labels=labels)


def clips_of(modalities):
    return MemoryEpoch(
        lambda ahead: [clustered(1, modalities), clustered(2, modalities, mislabelled=6)],
        [clustered(3, modalities, mislabelled=21)],
    )


@pytest.mark.parametrize("modalities", [1, 3])
def test_encoders_are_pulled_after_the_epochs_that_are_named_and_nothing_else_moves(modalities):
    training, _ = make("d-and-r", {"after": [2]}, modalities=modalities)
    step, clips = training.step, clips_of(modalities)
    first = {name: value.clone() for name, value in step.model.state_dict().items()}
    for seed in range(2):
        step(small_batch(seed, modalities))
    trained = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.context.epoch.fill_(1)
    step.method.before_epoch(clips)
    assert all(torch.equal(value, trained[name]) for name, value in step.model.state_dict().items())
    purities = []
    for batches in (list(clips.training()), list(clips.validation())):
        with torch.no_grad():
            features = [step.model.eval().features(batch.inputs) for batch in batches]
        labels = torch.cat([batch.labels for batch in batches])
        rows = {n: scaled(torch.cat([h[n] for h in features])) for n in step.model.modalities}
        purities.append({n: counted(lloyd(h, list(h[:3])), labels) for n, h in rows.items()})
    assert purities[0] == {name: pytest.approx(114 / 120) for name in NAMES[:modalities]}
    step.context.epoch.fill_(2)
    step.method.before_epoch(clips)
    for name, value in step.model.state_dict().items():
        expected = trained[name]
        if name.startswith("tails."):
            modality = name.split(".")[1]
            expected = pulled(expected, first[name], *(of[modality] for of in purities))
            assert not torch.equal(expected, trained[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    vector = step(small_batch(5, modalities))
    assert step.layout.unpack(vector.tolist())["modalities"]["video"]["pulled"] == pytest.approx(
        np.tanh(3 * (114 / 120 - 39 / 60))
    )


def test_rows_that_are_fewer_or_alike_have_clusters_too():
    assert len(clusters(np.ones((2, 4)), 3, seed=0)) == 2
    assert set(clusters(np.ones((6, 4)), 3, seed=2**63 - 1)) == {0}


def test_pinned_numbers():
    found = [purity(np.array(of), LABELS.numpy()) for of in ([0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 2, 2])]
    assert found == [pytest.approx(0.833333333333, abs=1e-12), 0.5]
    assert np.tanh(3 * abs(found[0] - found[1])) == pytest.approx(0.761594155956, abs=1e-12)
