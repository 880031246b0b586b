from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from evaluation_cases import make_dataset, make_settings

from mbcd_cli.errors import MbcdError
from mbcd_cli.evaluation.analyses import robustness as r
from mbcd_cli.evaluation.analyses.corruptions import corruption_means, mean_records
from mbcd_cli.model import build_model
from mbcd_cli.scoring.predictions import predict


@pytest.fixture
def model(settings, dataset):
    torch.manual_seed(1)
    return build_model(dataset.modalities, settings=settings.model, classes=dataset.classes).eval()


def three_modalities():
    array = {"kind": "array", "dimension": 6, "width": 2}
    settings = make_settings()
    settings = settings.model_validate({**settings.model_dump(), "modalities": dict.fromkeys(("a", "b", "c"), array)})
    rng = np.random.default_rng(3)
    dataset = make_dataset(make_settings())
    dataset.modalities = settings.modalities
    dataset.arrays = {n: torch.tensor(rng.normal(size=(60, 6)), dtype=torch.float32) for n in "abc"}
    torch.manual_seed(5)
    return build_model(dataset.modalities, settings=settings.model, classes=4).eval(), dataset


def test_subsets_zero_the_features_of_the_missing_modalities():
    model, dataset = three_modalities()
    clips = dataset.select()
    predictions = predict(
        model,
        dataset.batches(clips, batch_size=7, training=False),
        device="cpu",
        features=True,
        variants=r.subset_variants(model),
    )
    assert set(predictions.variants) == {"none", "a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"}
    for name, logits in predictions.variants.items():
        columns = [f if k in name.split("+") else torch.zeros_like(f) for k, f in predictions.features.items()]
        with torch.no_grad():
            torch.testing.assert_close(logits, model.fused_head(torch.cat(columns, 1)), rtol=1e-5, atol=1e-6)
    assert torch.equal(predictions.variants["a+b+c"], predictions.fused)
    figures = r.missing_modalities(predictions)
    expected = (predictions.variants["a+c"].argmax(1) == predictions.labels).double().mean()
    assert figures.top1["a+c"] == pytest.approx(float(expected))
    assert figures.shapley == r.shapley(figures.top1, ["a", "b", "c"])
    assert dataset.passes == 1, "all subsets come from one pass"


def test_too_many_modalities_give_no_subsets(model):
    model.modalities = tuple(f"m{i}" for i in range(r.MAX_MODALITIES + 1))
    assert r.subset_variants(model) == {}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shapley_is_the_mean_marginal_worth_over_all_orders(count):
    names = list("abcd")[:count]
    rng = np.random.default_rng(count)
    worth = {r.subset_name(s): float(rng.random()) for s in r.subsets(names)}
    expected = dict.fromkeys(names, 0.0)
    orders = list(permutations(names))
    for order in orders:
        present: list[str] = []
        for name in order:
            before = worth[r.subset_name([n for n in names if n in present])]
            present.append(name)
            expected[name] += (worth[r.subset_name([n for n in names if n in present])] - before) / len(orders)
    shares = r.shapley(worth, names)
    assert shares == pytest.approx(expected)
    assert sum(shares.values()) == pytest.approx(worth[r.subset_name(names)] - worth["none"])


def test_gaussian_shift_has_the_stated_spread_and_does_not_depend_on_the_batches():
    scale = torch.tensor([1, 2, 4, 8, 1, 1.0]).reshape(6, 1, 1, 1)
    part = torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * scale + 5
    clips = torch.arange(10, 16)
    shift = r.gaussian_shift("video", 0.5)
    (shifted,) = shift.apply((part,), clips)
    noise = (shifted - part).flatten(1)
    torch.testing.assert_close(noise.std(1), 0.5 * part.flatten(1).std(1), rtol=0.05, atol=0)
    assert (noise.mean(1).abs() < 0.05 * noise.std(1)).all()
    (alone,) = shift.apply((part[3:4],), clips[3:4])
    assert torch.equal(alone[0], shifted[3])
    (twice,) = r.gaussian_shift("video", 1.0).apply((part,), clips)
    torch.testing.assert_close(twice - part, 2 * (shifted - part), rtol=1e-4, atol=1e-4)
    assert r.gaussian_shift("video", 0.0).apply((part,), clips)[0] is part
    # uint8 frames are shifted as numbers, not wrapped around.
    frames = torch.full((1, 3, 2, 8, 8), 250, dtype=torch.uint8)
    frames[..., :4] = 0
    (loud,) = r.gaussian_shift("video", 2.0).apply((frames,), torch.tensor([0]))
    assert loud.dtype == torch.float32
    assert loud.max() > 255


def test_two_parts_of_one_input_get_different_noise():
    part = torch.randn(2, 4, 5)
    one, two = r.gaussian_shift("video", 1.0).apply((part, part), torch.tensor([0, 1]))
    assert not torch.allclose(one, two)


def test_disturbed_accuracy_equals_predicting_disturbed_inputs(model, dataset):
    clips = dataset.select()
    ones = [r.gaussian_shift(name, sigma) for name in ("video", "audio") for sigma in (0.0, 1.0, 3.0)]
    records = r.disturbed_accuracy(model, dataset.batches(clips, batch_size=9, training=False), ones, device="cpu")
    assert dataset.passes == 1
    for record, one in zip(records, ones, strict=True):
        arrays = dict(dataset.arrays)
        (arrays[one.modality],) = one.apply((arrays[one.modality],), torch.arange(len(clips)))
        with torch.no_grad():
            fused, unimodal = model({n: (v,) for n, v in arrays.items()})
        labels = torch.as_tensor(dataset.labels)
        assert record.fused == pytest.approx(float((fused.argmax(1) == labels).double().mean()))
        own = unimodal[one.modality]
        assert record.unimodal == pytest.approx(float((own.argmax(1) == labels).double().mean()))
        assert (record.modality, record.level, record.clips) == (one.modality, one.level, len(clips))
    with pytest.raises(MbcdError, match="no clips"):
        r.disturbed_accuracy(model, [], ones, device="cpu")
    # Without a prediction a clip is wrong, not of the first class.
    torch.nn.init.constant_(next(model.heads["video"].parameters()), float("nan"))
    (diverged,) = r.disturbed_accuracy(
        model, dataset.batches(clips, batch_size=9, training=False), ones[:1], device="cpu"
    )
    assert (diverged.fused, diverged.unimodal) == (records[0].fused, 0.0)


def test_means_over_corruptions_are_of_the_severities_that_every_kind_has():
    def record(kind: str, level: float, fused: float) -> r.DisturbedAccuracy:
        return r.DisturbedAccuracy("video", kind, level, 10, fused, fused / 2)

    records = [record("fog", 1, 0.8), record("fog", 5, 0.4), record("snow", 5, 0.2)]
    assert [(one.level, one.fused) for one in mean_records(records)] == [(5, pytest.approx(0.3))]
    (mean,) = corruption_means(records).values()
    assert (mean.kinds, mean.severities, mean.fused, mean.unimodal) == (2, [5], pytest.approx(0.3), pytest.approx(0.15))
    assert not corruption_means(records[:1] + records[2:])
