from __future__ import annotations

import numpy as np
import pytest
import torch
from landscape_cases import make_model
from torch.nn import functional as F

from mbcd_cli.errors import MbcdError
from mbcd_cli.landscape.directions import Sphere, move, move_many, moving_names
from mbcd_cli.landscape.objective import ModelObjective


def build(model, dataset, *, group="all", clips=None, batch_size=9, **options):
    names = moving_names(model, group=group, loss=options.get("loss", "fused"))
    clips = np.arange(50) if clips is None else clips
    batches = list(dataset.batches(clips, batch_size=batch_size, training=False))
    return ModelObjective(model=model, batches=batches, names=names, **options)


def direct(model, dataset, clips, loss="fused"):
    """Loss and accuracy by the whole model on all clips at once, in float64."""
    (batch,) = dataset.batches(clips, batch_size=len(clips), training=False)
    model = model.double().eval()
    with torch.no_grad():
        fused, unimodal = model({n: tuple(p.double() for p in parts) for n, parts in batch.inputs.items()})
        value = F.cross_entropy(fused, batch.labels)
        if loss == "total":
            value = value + sum(F.cross_entropy(u, batch.labels) for u in unimodal.values())
    return value.item(), (fused.argmax(1) == batch.labels).double().mean().item()


@pytest.mark.parametrize("group", ["all", "tails", "fused_head", "video", "audio"])
@pytest.mark.parametrize("loss", ["fused", "total"])
def test_measures_what_the_whole_model_gives(model, dataset, group, loss):
    objective = build(model, dataset, group=group, loss=loss)
    moved = move(objective.start, [Sphere(objective.start).sample(seed=0, index=0)], [0.6])
    before = direct(make_copy(model), dataset, np.arange(50), loss)
    assert objective.measure(objective.start).tolist() == pytest.approx(before, rel=1e-5)
    other = make_copy(model)
    other.load_state_dict({**other.state_dict(), **moved})
    after = direct(other, dataset, np.arange(50), loss)
    assert after[0] != pytest.approx(before[0], rel=1e-4)
    assert objective.measure(moved).tolist() == pytest.approx(after, rel=1e-5)


def make_copy(model):
    import copy

    return copy.deepcopy(model)


@pytest.mark.parametrize("group", ["all", "video", "fused_head"])
def test_points_together_are_the_points_alone(model, dataset, group):
    objective = build(model, dataset, group=group, points_per_pass=4)
    directions = [Sphere(objective.start).sample(seed=0, index=i) for i in (0, 1)]
    where = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-0.3, 0.2], [0.9, 0.9]])
    many = objective.measure_many(move_many(objective.start, directions, where))
    for row, (a, b) in zip(many, where.tolist(), strict=True):
        assert row.tolist() == pytest.approx(
            objective.measure(move(objective.start, directions, [a, b])).tolist(), rel=1e-5
        )


def test_a_short_last_batch_counts_by_its_clips(model, dataset):
    values = [build(model, dataset, batch_size=size).measure({}).tolist() for size in (7, 50, 49)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[2] == pytest.approx(values[1], rel=1e-6)


def test_terms_sum_to_the_loss_and_have_gradients(model, dataset):
    objective = build(model, dataset, dtype=torch.float64)
    leaves = {n: t.clone().requires_grad_() for n, t in objective.start.items()}
    total = sum(term(leaves) for term in objective.terms())
    assert len(objective.terms()) == 6
    assert total.item() == pytest.approx(objective.measure(objective.start)[0].item(), rel=1e-12)
    total.backward()
    # A central difference along one direction.
    d = Sphere(objective.start).sample(seed=0, index=0)
    h = 1e-5
    up, down = (objective.measure(move(objective.start, [d], [s]))[0].item() for s in (h, -h))
    slope = sum((leaves[n].grad * d[n]).sum().item() for n in d)
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5)


def test_the_callers_model_is_untouched_even_after_errors(model, dataset):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    model.train()
    clips = np.arange(40)
    calibration = list(dataset.batches(clips, batch_size=20, training=False))
    objective = build(model, dataset, batch_norm="recalibrated", calibration=calibration)
    objective.measure(move(objective.start, [Sphere(objective.start).sample(seed=0, index=0)], [1.0]))
    with pytest.raises(RuntimeError):
        objective.measure({"tails.video.layer1.0.weight": torch.zeros(1, 2, 3)})
    with pytest.raises(KeyboardInterrupt):
        _interrupted(objective)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    # and neither is the objective's own state
    fresh = build(model, dataset, batch_norm="recalibrated", calibration=calibration)
    assert objective.measure(objective.start).tolist() == fresh.measure(fresh.start).tolist()


def _interrupted(objective):
    stage = objective._stages["audio"]

    def stop(*_):
        raise KeyboardInterrupt

    handle = stage.layer2.register_forward_hook(stop)
    try:
        objective.measure(objective.start)
    finally:
        handle.remove()


def test_recalibrated_statistics_are_those_of_the_perturbed_network(settings, dataset):
    """With one calibration batch, recalibration is that batch's statistics: train mode gives the same logits."""
    model = make_model(settings, dataset, seed=5)
    (batch,) = dataset.batches(np.arange(30), batch_size=30, training=False)
    names = moving_names(model, group="all")
    objective = ModelObjective(
        model=model, batches=[batch], names=names, batch_norm="recalibrated", calibration=[batch]
    )
    moved = move(objective.start, [Sphere(objective.start).sample(seed=0, index=0)], [1.0])
    other = make_copy(model)
    other.load_state_dict({**other.state_dict(), **moved})
    for module in other.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.train()
            module.momentum = 1.0
    with torch.no_grad():
        other(batch.inputs)  # the running variance is the unbiased one; evaluation then uses it
        loss = F.cross_entropy(other.eval()(batch.inputs)[0], batch.labels).item()
    assert objective.measure(moved)[0].item() == pytest.approx(loss, rel=1e-4)
    running = ModelObjective(model=model, batches=[batch], names=names)
    assert running.measure(moved)[0].item() != pytest.approx(loss, rel=1e-2)


def test_recalibration_weights_batches_by_their_clips(settings, dataset):
    model = make_model(settings, dataset, seed=5)
    names = moving_names(model, group="all")
    batches = list(dataset.batches(np.arange(50), batch_size=40, training=False))
    objective = ModelObjective(
        model=model, batches=batches, names=names, batch_norm="recalibrated", calibration=batches
    )
    buffers = objective._calibrated({}, objective._calibration, objective._stages)
    layer = model.tails["video"].layer1[0]
    with torch.no_grad():
        means = [layer(b.inputs["video"][0]).mean(0) for b in batches]
    expected = (40 * means[0] + 10 * means[1]) / 50
    torch.testing.assert_close(buffers["tails.video.layer1.1.running_mean"], expected, rtol=1e-4, atol=1e-5)


def test_frozen_tails_run_once(model, dataset):
    calls = []
    hook = lambda module, *_: calls.append(module)  # noqa: E731
    objective = build(model, dataset, group="audio")
    handles = [m.register_forward_hook(hook) for m in objective._model.tails["video"].modules()]
    objective.measure(objective.start)
    assert not calls
    for handle in handles:
        handle.remove()


def test_no_clips(model, dataset):
    with pytest.raises(MbcdError, match="no clips"):
        ModelObjective(model=model, batches=[], names=moving_names(model, group="all"))
    with pytest.raises(MbcdError, match="recalibrate"):
        build(model, dataset, batch_norm="recalibrated")
