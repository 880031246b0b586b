"""Our corruptions of frames against `imagecorruptions`. Needs the group `peer` (`uv sync --group peer`)."""

from __future__ import annotations

import importlib.util
from functools import partial

import numpy as np
import pytest
from test_corruptions import scene

from mbcd_cli.data.corruptions import SEVERITIES
from mbcd_cli.data.corruptions.pixels import FLOW_PIXELS, PIXELS

if importlib.util.find_spec("imagecorruptions") is None:
    pytest.skip("the dependency group `peer` is not installed", allow_module_level=True)

SAME = {"brightness": 2, "contrast": 2, "defocus-blur": 12, "zoom-blur": 24, "pixelate": 12, "jpeg-compression": 12}
"""Without random numbers: how far single values may be apart, by rounding and at edges; their mean is within 2."""
OURS = ("frost", "fog", "glass-blur")
"""Deliberately others, as `corruptions.pixels` says; what is drawn anew is alike in strength."""
CHANNEL_BY_CHANNEL = ("gaussian-noise", "impulse-noise", "defocus-blur", "elastic-transform", "pixelate")
"""Of those that flow has: the peer, which takes three channels, can be given flow with one of them twice."""


@pytest.fixture(scope="module")
def corrupt():
    """(frame, kind, severity) -> the peer's frame."""
    from imagecorruptions import corrupt

    np.random.seed(0)
    return lambda frame, kind, severity: corrupt(frame, severity, kind.replace("-", "_"))


def psnr(out: np.ndarray, frames: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((out.astype(np.float64) - frames) ** 2)))


@pytest.mark.parametrize("kind", [kind for kind in PIXELS if kind not in OURS])
def test_a_kind_is_as_the_peer_has_it(kind, corrupt):
    frames = scene(224, 256)
    for severity in SEVERITIES:
        theirs = np.stack([corrupt(frame, kind, severity) for frame in frames])
        apply = partial(PIXELS[kind], severity=severity, rng=np.random.default_rng(severity))
        ours = np.concatenate([apply(frame[None]) for frame in frames])
        if kind in SAME:
            inner = (slice(None), slice(16, -16), slice(16, -16))
            apart = np.abs(ours[inner].astype(int) - theirs[inner])
            assert apart.mean() < 2, severity
            assert np.quantile(apart, 0.99) <= SAME[kind], severity
        else:
            assert psnr(ours, frames) == pytest.approx(psnr(theirs, frames), abs=1.5), severity


@pytest.mark.parametrize("kind", CHANNEL_BY_CHANNEL)
def test_flow_is_corrupted_as_the_peer_corrupts_channels(kind, corrupt):
    flow = scene(224, 224, 2)
    for severity in SEVERITIES:
        theirs = np.stack([corrupt(frame[..., [0, 1, 0]], kind, severity)[..., :2] for frame in flow])
        ours = np.concatenate([FLOW_PIXELS[kind](f[None], severity, np.random.default_rng(severity)) for f in flow])
        if kind in SAME:
            assert np.abs(ours.astype(int) - theirs)[:, 16:-16, 16:-16].mean() < 2, severity
        else:
            assert psnr(ours, flow) == pytest.approx(psnr(theirs, flow), abs=1.5), severity
