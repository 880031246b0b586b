"""Other ways to run the same step: static buffers, channels-last, compiled; and on CUDA, captured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from fakes import MemoryDataset, memory_settings
from small import KINDS_ALL, make_step, small_batch, small_model

from mbcd_cli.data.modalities.audio import AudioModality
from mbcd_cli.data.modalities.video import VideoModality
from mbcd_cli.data.records import Batch
from mbcd_cli.encoders import build_encoder
from mbcd_cli.encoders.layout import channels_last, match_layout, weights_channels_last
from mbcd_cli.errors import SettingsError
from mbcd_cli.model import MultiModalModel
from mbcd_cli.settings import ModelSettings, OptimizerSettings
from mbcd_cli.training import train as command
from mbcd_cli.training.assemble import assemble, compile_tails
from mbcd_cli.training.optimizer import build_optimizer
from mbcd_cli.training.static_step import StaticStep
from mbcd_cli.training.step import TrainStep

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def of(order: str) -> dict:
    """MBCD's settings with an inner step of this order."""
    return {"consistency": {"order": order}}


def assert_same_state(one: TrainStep, two: TrainStep, **close) -> None:
    for mine, theirs in ((one.model, two.model), (one.average.model, two.average.model)):
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[key], value, msg=key, **close)


@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_static_buffers_change_nothing(order):
    plain, inner = (make_step(small_model(3, KINDS_ALL, dropout=0.5), settings=of(order)) for _ in range(2))
    static = StaticStep(inner, draws=[inner.context.randomness], device=torch.device("cpu"), required=True)
    vectors = []
    for seed in range(6):
        # One batch of another size in between, as a short last batch would be.
        batch = small_batch(3, KINDS_ALL, size=5 if seed == 3 else 7, seed=seed)
        torch.manual_seed(seed)
        expected = plain(batch)
        torch.manual_seed(seed)
        vectors.append((static(batch), expected))
    for have, expected in vectors:  # compared at the end: nothing returned may live in a buffer
        assert torch.equal(have, expected)
    assert_same_state(plain, inner, rtol=0, atol=0)


def frames_model(dropout: float = 0.0) -> MultiModalModel:
    """A video and a sound tail with 3-D and 2-D convolutions, in float64."""
    torch.manual_seed(0)
    video = VideoModality(frames=4, short_side=16, crop=16, width=2)
    tails = {
        "video": build_encoder("video", video).cut("input")[1],
        "audio": build_encoder("audio", AudioModality(width=2)).cut("input")[1],
    }
    return MultiModalModel(tails, settings=ModelSettings(hidden=6, dropout=dropout), classes=3).double()


def frames_batch(seed: int, size: int = 4) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(
        inputs={
            "video": (torch.randint(0, 256, (size, 3, 8, 32, 32), generator=g, dtype=torch.uint8),),
            "audio": (torch.randn(size, 1, 33, 40, generator=g).half(),),
        },
        labels=torch.randint(0, 3, (size,), generator=g),
        domains=torch.zeros(size, dtype=torch.int64),
        clips=torch.arange(size),
    )


def test_channels_last_gives_the_same_numbers():
    plain = make_step(frames_model())
    model = frames_model()
    weights_channels_last(model)
    moved = model.tails["video"].layer2[0].weight
    assert moved.is_contiguous(memory_format=torch.channels_last_3d)
    assert not moved.is_contiguous()
    last = make_step(model, channels_last=True)
    for seed in range(4):
        expected, have = plain(frames_batch(seed)), last(frames_batch(seed))
        torch.testing.assert_close(have, expected, rtol=0, atol=1e-10)
    assert_same_state(plain, last, rtol=0, atol=1e-9)


def test_gradients_take_the_layout_of_their_weights():
    """A fused optimizer walks weight and gradient in memory order: other strides would mix values up."""
    values = torch.randn(3, 2, 1, 2, 2)
    weight = torch.nn.Parameter(channels_last(values.clone()))
    weight.grad = torch.randn(3, 2, 1, 2, 2)
    gradient = weight.grad.clone()
    assert weight.grad.stride() != weight.stride()
    match_layout(weight)
    assert weight.grad.stride() == weight.stride()
    assert torch.equal(weight.grad, gradient)
    build_optimizer([weight], OptimizerSettings(name="sgd", lr=0.5, weight_decay=0, momentum=0)).step()
    torch.testing.assert_close(weight.data, values - 0.5 * gradient)


def test_axes_of_one_place_need_no_copy():
    weight = torch.nn.Parameter(channels_last(torch.randn(3, 2, 1, 1, 1)))
    weight.grad = torch.randn(3, 2, 1, 1, 1)
    where = weight.grad.data_ptr()
    match_layout(weight)
    assert weight.grad.stride() == weight.stride()
    assert weight.grad.data_ptr() == where


def test_graphs_are_refused_where_there_is_no_gpu():
    settings = memory_settings(runtime={"cuda_graph": "on", "device": "cpu"})
    with pytest.raises(SettingsError, match="cuda_graph"):
        assemble(settings, MemoryDataset(), device=torch.device("cpu"))


def test_compiled_tails_give_the_same_numbers(monkeypatch):
    """With a compiler that only traces: what is compiled is the stages, and they still see theta'."""
    compiled = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: (compiled.append(self), real(self, backend="eager"))[1]
    )
    plain = make_step(small_model(2, KINDS_ALL))
    model = small_model(2, KINDS_ALL)
    step = make_step(model)
    compile_tails(model)
    compile_tails(step.average.model)
    assert len(compiled) == 4
    for seed in range(2):
        batch = small_batch(2, KINDS_ALL, seed=seed)
        torch.testing.assert_close(step(batch), plain(batch), rtol=0, atol=1e-10)
    assert_same_state(plain, step, rtol=0, atol=1e-10)


@needs_cuda
@pytest.mark.parametrize("order", ["off", "first", "second"])
def test_a_captured_step_equals_an_ordinary_one(order):
    device = torch.device("cuda")
    plain, inner = (
        make_step(small_model(3, KINDS_ALL).to(device), settings=of(order), capturable=True) for _ in range(2)
    )
    static = StaticStep(inner, draws=[inner.context.randomness], device=device, required=True)
    for seed in range(8):
        batch = small_batch(3, KINDS_ALL, seed=seed).to(device)
        torch.testing.assert_close(static(batch), plain(batch), rtol=0, atol=1e-9)
    assert static._graph is not None
    assert_same_state(plain, inner, rtol=0, atol=1e-9)


@needs_cuda
def test_a_captured_bfloat16_step_draws_anew_each_time():
    device = torch.device("cuda")
    model = frames_model(dropout=0.5).float().to(device)
    weights_channels_last(model)
    # The weights stand still, so that only noise, masks and head dropout can change the figures.
    step = make_step(model, capturable=True, lr=1e-30, precision="bfloat16", channels_last=True)
    static = StaticStep(step, draws=[step.context.randomness], device=device, required=True)
    vectors = [static(frames_batch(0).to(device)) for _ in range(8)]
    assert static._graph is not None
    assert all(not torch.equal(a, b) for a, b in pairwise(vectors[4:]))
    assert torch.isfinite(torch.stack(vectors)).all()


@needs_cuda
@pytest.mark.parametrize("runtime", [{}, {"precision": "bfloat16"}, {"cuda_graph": "on"}, {"prefetch": 0}])
def test_training_on_a_gpu_learns(tmp_path, monkeypatch, runtime):
    settings = memory_settings(training={"epochs": 12}, runtime={"device": "cuda", **runtime})
    summary = command.train(settings, MemoryDataset(), run=tmp_path / "run", resume=False, overwrite=False)
    assert summary.best.validation >= 0.9
