from __future__ import annotations

import pytest
import torch

from mbcd_cli.errors import MbcdError
from mbcd_cli.model import build_model
from mbcd_cli.scoring.predictions import predict


@pytest.fixture
def model(settings, dataset):
    torch.manual_seed(1)
    return build_model(dataset.modalities, settings=settings.model, classes=dataset.classes)


def test_one_pass_equals_the_model_clip_by_clip_whatever_the_batches(model, dataset):
    clips = dataset.select(domains=("tilted", "street"), splits=("test",))
    streamed = predict(model, dataset.batches(clips, batch_size=5, training=False), device="cpu", features=True)
    model.eval()
    for row, clip in enumerate(clips):
        fused, unimodal = model({n: (v[clip : clip + 1],) for n, v in dataset.arrays.items()})
        torch.testing.assert_close(streamed.fused[row], fused[0], rtol=1e-5, atol=1e-6)
        for name, logits in unimodal.items():
            torch.testing.assert_close(streamed.unimodal[name][row], logits[0], rtol=1e-5, atol=1e-6)
    assert streamed.clips.tolist() == clips.tolist()
    assert streamed.labels.tolist() == dataset.labels[clips].tolist()
    assert streamed.domains.tolist() == dataset.domain[clips].tolist()
    assert {n: tuple(f.shape) for n, f in streamed.features.items()} == {n: (len(clips), 16) for n in dataset.arrays}
    # The features are those that the heads read.
    torch.testing.assert_close(model.fuse(streamed.features), streamed.fused, rtol=1e-5, atol=1e-6)


def test_modes_and_buffers_are_left_as_they_were(model, dataset):
    model.train()
    model.tails["audio"].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    predict(model, dataset.batches(dataset.select(), training=False), device="cpu")
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_modes_are_restored_when_a_batch_fails(model, dataset):
    def failing():
        yield from dataset.batches(dataset.select()[:4], training=False)
        raise RuntimeError("cut off")

    model.train()
    with pytest.raises(RuntimeError, match="cut off"):
        predict(model, failing(), device="cpu")
    assert model.training


def test_no_clips_is_one_clear_error(model):
    with pytest.raises(MbcdError, match="no clips"):
        predict(model, [], device="cpu")


def test_bfloat16_returns_float32_near_the_float32_result(model, dataset):
    clips = dataset.select()[:8]
    exact = predict(model, dataset.batches(clips, training=False), device="cpu")
    rounded = predict(model, dataset.batches(clips, training=False), device="cpu", precision="bfloat16")
    assert rounded.fused.dtype == torch.float32
    assert not torch.equal(rounded.fused, exact.fused)
    torch.testing.assert_close(rounded.fused, exact.fused, rtol=0.1, atol=0.1)
    with pytest.raises(MbcdError, match="precision"):
        predict(model, [], device="cpu", precision="float8")


def test_rows_selects_every_column(model, dataset):
    full = predict(model, dataset.batches(dataset.select(), training=False), device="cpu", features=True)
    part = full.rows(full.domains == 2)
    assert set(part.domains.tolist()) == {2}
    assert len(part) == int((dataset.domain == 2).sum()) == len(part.fused) == len(part.features["audio"])
