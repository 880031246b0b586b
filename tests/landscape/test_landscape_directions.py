from __future__ import annotations

import numpy as np
import pytest
import torch

from mbcd_cli.data.modalities.array import ArrayModality
from mbcd_cli.errors import SettingsError
from mbcd_cli.landscape.directions import Sphere, dot, gaussian, move, move_many, moving_names, norm
from mbcd_cli.model import build_model
from mbcd_cli.settings import ModelSettings


@pytest.fixture
def start():
    g = torch.Generator().manual_seed(3)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=g),
        "conv.bias": torch.randn(4, generator=g),
        "linear.weight": torch.randn(5, 4, generator=g),
    }


def flat(vector):
    return np.concatenate([t.double().numpy().ravel() for t in vector.values()])


def test_noise_depends_on_seed_index_and_name_only(start):
    whole = gaussian(start, seed=1, index=0)
    part = gaussian({"linear.weight": start["linear.weight"].double()}, seed=1, index=0)
    assert torch.equal(whole["linear.weight"].double(), part["linear.weight"])
    for other in (gaussian(start, seed=2, index=0), gaussian(start, seed=1, index=1)):
        assert not torch.equal(whole["linear.weight"], other["linear.weight"])
    many = flat(gaussian({"w": torch.zeros(200_000)}, seed=0, index=0))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


def test_filters_of_a_direction_are_as_long_as_those_of_the_weights(start):
    direction = Sphere(start).sample(seed=0, index=0)
    assert "conv.bias" not in direction
    for name, d in direction.items():
        w = start[name].numpy()
        for filter_w, filter_d in zip(w, d.numpy(), strict=True):
            assert np.linalg.norm(filter_d) == pytest.approx(np.linalg.norm(filter_w), rel=1e-5)
    moved = Sphere(start, biases="move").sample(seed=0, index=0)
    assert moved["conv.bias"].norm().item() == pytest.approx(start["conv.bias"].norm().item(), rel=1e-5)


@pytest.mark.parametrize("normalisation", ["layer", "adaptive", "relative", "absolute"])
def test_length_of_other_normalisations(start, normalisation):
    direction = Sphere(start, normalisation, "move").sample(seed=0, index=0)
    w, d = flat(start), flat(direction)
    if normalisation == "layer":
        for name in start:
            assert direction[name].norm().item() == pytest.approx(start[name].norm().item(), rel=1e-5)
    elif normalisation == "adaptive":
        assert np.linalg.norm(d / np.abs(w)) == pytest.approx(np.sqrt(len(w)), rel=1e-5)
    else:
        length = np.linalg.norm(w) if normalisation == "relative" else 1.0
        assert np.linalg.norm(d) == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("normalisation", ["filter", "layer", "adaptive", "relative", "absolute"])
def test_steepest_beats_every_random_perturbation(start, normalisation):
    sphere = Sphere(start, normalisation, "move")
    slope = gaussian(start, seed=9, index=0)
    best = dot(slope, sphere.steepest(slope)).item()
    others = [dot(slope, sphere.sample(seed=0, index=i)).item() for i in range(200)]
    assert best > max(others)
    # On the sphere already: projecting changes nothing.
    steepest = sphere.steepest(slope)
    np.testing.assert_allclose(flat(sphere.project(steepest)), flat(steepest), rtol=1e-5)


def test_zero_filters_do_not_move():
    start = {"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}
    direction = Sphere(start).sample(seed=0, index=0)["w"]
    assert torch.equal(direction[0], torch.zeros(2))
    assert direction[1].norm().item() == pytest.approx(5)
    assert torch.isfinite(Sphere(start, "adaptive").sample(seed=0, index=0)["w"]).all()


def test_rescaling_layers_leaves_the_filter_normalised_loss_alone():
    """relu(x W1) W2 is the same function for (c W1, W2 / c), and so is every perturbed one."""
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(20, 5).double(), torch.randn(6, 5).double(), torch.randn(3, 6).double()

    def function(p):
        return torch.relu(x @ p["w1"].T) @ p["w2"].T

    def perturbed(scale):
        start = {"w1": w1 * scale, "w2": w2 / scale}
        return function(move(start, [Sphere(start).sample(seed=4, index=0)], [0.7]))

    torch.testing.assert_close(perturbed(1.0), perturbed(50.0), rtol=1e-9, atol=1e-9)
    absolute = {"w1": w1 * 50, "w2": w2 / 50}
    unlike = function(move(absolute, [Sphere(absolute, "absolute").sample(seed=4, index=0)], [0.7]))
    assert not torch.allclose(perturbed(1.0), unlike, rtol=1e-2)


def test_many_points_at_once_are_the_single_ones(start):
    directions = [gaussian(start, seed=0, index=0), {"conv.bias": torch.ones(4)}]
    where = torch.tensor([[0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)
    many = move_many(start, directions, where)
    for p in range(2):
        one = move(start, directions, where[p].tolist())
        for name in start:
            torch.testing.assert_close(many[name][p], one[name])


def test_groups(model):
    every = set(dict(model.named_parameters()))
    assert set(moving_names(model, group="all", loss="total")) == every
    fused = set(moving_names(model, group="all"))
    assert fused == {n for n in every if not n.startswith("heads.")}
    assert all(n.startswith("tails.video.") for n in moving_names(model, group="video"))
    assert set(moving_names(model, group="tails")) | set(moving_names(model, group="fused_head")) == fused
    with pytest.raises(SettingsError, match=r"smell(.|\n)*video, audio"):
        moving_names(model, group="smell")


def test_biases_alone_cannot_move_when_still():
    with pytest.raises(SettingsError, match="biases"):
        Sphere({"b": torch.ones(3)}).sample(seed=0, index=0)


def test_norm_is_accumulated_in_float64():
    assert norm({"a": torch.full((10_000_000,), 1e-4)}) == pytest.approx(1e-4 * np.sqrt(1e7), rel=1e-6)


def test_frozen_stages_of_a_tail_never_move():
    modalities = {"a": ArrayModality(width=2, dimension=3)}
    model = build_model(modalities, settings=ModelSettings(hidden=4), classes=2)
    everything = moving_names(model, group="a")
    model.tails["a"].frozen = ("layer1",)
    still = {n for n in everything if ".layer1." in n}
    assert still
    assert set(everything) - set(moving_names(model, group="a")) == still
