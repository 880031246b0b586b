"""What the demo dataset's clips show and sound like: looks, motions, sounds, places.

Letters: T frames, H W pixels, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from scipy import signal

DOMAINS = ("kitchen", "workshop", "garden")
VERBS = ("take", "put", "open", "close", "wash", "cut", "stir", "pour")
FRAMES, FPS, SIDE = 16, 16, 64
SAMPLE_RATE, SAMPLES = 8000, 8000
FLOW_BOUND = 8.0
"""Pixels per frame that the flow files' grey range covers each way; 128 is no motion."""


@dataclass(frozen=True, slots=True)
class Look:
    """Which colour, shape and mat (each 0 to 7) a clip's object has."""

    colour: int
    shape: int
    mat: int


# --- looks -----------------------------------------------------------------------------------------------------

# Saturated colours (R, G, B) that stay apart under every domain's light.
_COLOURS = np.array(
    [
        (225, 50, 45),
        (245, 150, 30),
        (240, 225, 60),
        (70, 190, 70),
        (50, 200, 210),
        (50, 90, 220),
        (150, 60, 200),
        (240, 120, 180),
    ],
    np.float32,
)


def _star(points: int, inner: float, turn: float = 0.0) -> np.ndarray:
    """Corners [2 points, 2] of a star of outer radius 1; inner = cos(pi / points) makes it a regular polygon."""
    angles = np.arange(2 * points) * np.pi / points + turn
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


_SHAPES = (
    _star(12, np.cos(np.pi / 12)),
    _star(4, np.cos(np.pi / 4), np.pi / 4),
    _star(3, np.cos(np.pi / 3), -np.pi / 2),
    _star(4, 0.35),
    _star(5, 0.45, -np.pi / 2),
    _star(6, np.cos(np.pi / 6)),
    _star(8, 0.6),
    _star(2, 0.5),
)


# --- video -----------------------------------------------------------------------------------------------------


def _background(domain: str, mat: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A place with its mat, [H, W, 3] float RGB before lighting; wider than the frame so that the camera can sway."""
    side = SIDE + 16
    if domain == "kitchen":
        image = np.full((side, side, 3), (170, 172, 176), np.float32) + rng.normal(0, 14, 3).astype(np.float32)
    elif domain == "workshop":
        image = np.full((side, side, 3), (150, 125, 100), np.float32)
        for _ in range(14):
            x, y = rng.integers(-10, side, 2)
            w, h = rng.integers(5, 30, 2)
            tone = float(rng.uniform(80, 170)) * np.array([1.0, 0.85, 0.65])
            cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + h)), tone.tolist(), -1)
        image += cv2.GaussianBlur(rng.normal(0, 25, (side, side, 1)).astype(np.float32), (0, 0), 1)[..., None]
    else:
        rough = sum(
            cv2.resize(rng.normal(0, 1, (n, n)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
            for n in (5, 10, 20)
        )
        image = np.array((110, 140, 100), np.float32) + rough[..., None] * np.array((10, 15, 9), np.float32)
    centre = (int(side / 2 + rng.integers(-6, 7)), int(side / 2 + 14 + rng.integers(-3, 4)))
    axes = (int(rng.integers(28, 40)), int(rng.integers(13, 18)))
    layer = image.copy()
    cv2.ellipse(layer, centre, axes, 0, 0, 360, mat.tolist(), -1, cv2.LINE_AA)
    return 0.25 * image + 0.75 * layer


def _light(domain: str, image: np.ndarray, rng: np.random.Generator, gain: float) -> np.ndarray:
    """The domain's light, colour cast and sensor noise: float RGB -> uint8 RGB."""
    if domain == "kitchen":
        image, noise = image * 1.05, 2.0
    elif domain == "workshop":
        x = np.linspace(1.1, 0.8, SIDE, dtype=np.float32)[None, :, None]
        image, noise = image * np.array((1.1, 0.97, 0.78), np.float32) * x, 4.0
    else:
        image, noise = image * np.array((0.72, 0.84, 0.86), np.float32), 6.0
    image = image * gain + rng.normal(0, noise, image.shape).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _ramp(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth step from 0 to 1 over a random part of the clip."""
    start, length = rng.uniform(0, 0.35), rng.uniform(0.4, 0.65)
    u = np.clip((t - start) / length, 0, 1)
    return u * u * (3 - 2 * u)


def _motion(verb: str, rng: np.random.Generator) -> np.ndarray:
    """The object's path, [T, 5]: x and y in pixels, the two scales, and the angle in radians."""
    t = np.arange(FRAMES) / FRAMES
    path = np.zeros((FRAMES, 5))
    path[:, 2:4] = 1
    reach = rng.uniform(11, 16)
    turns = 2 * np.pi * (rng.uniform(2.2, 3.6) * t + rng.random())
    if verb in ("take", "put"):
        sign = -1 if verb == "take" else 1
        path[:, 1] = sign * reach * (2 * _ramp(t, rng) - 1)
    elif verb in ("open", "close"):
        u = _ramp(t, rng) if verb == "open" else 1 - _ramp(t, rng)
        path[:, 2] = 0.3 + 1.1 * u
        path[:, 3] = 1.15 - 0.2 * u
    elif verb == "wash":
        path[:, 0] = 0.6 * reach * np.sin(turns)
    elif verb == "cut":
        path[:, 1] = 0.6 * reach * (1 - 2 * np.abs(np.sin(turns / 2)))
    elif verb == "stir":
        turns = rng.choice((-1, 1)) * turns * 0.7
        path[:, 0], path[:, 1] = 0.7 * reach * np.cos(turns), 0.7 * reach * np.sin(turns)
    else:
        path[:, 4] = rng.choice((-1, 1)) * _ramp(t, rng) * rng.uniform(1.5, 2.1)
    path[:, :2] += np.cumsum(rng.normal(0, 0.35, (FRAMES, 2)), axis=0)
    return path


def _fill(image: np.ndarray, corners: np.ndarray, colour: np.ndarray) -> None:
    """Draw a filled polygon [N, 2] with its rim, at a sixteenth of a pixel."""
    points = [np.rint(corners * 16).astype(np.int32)]
    cv2.fillPoly(image, points, colour.tolist(), cv2.LINE_AA, 4)
    cv2.polylines(image, points, True, (colour * 0.45).tolist(), 1, cv2.LINE_AA, 4)


def render(verb: str, domain: str, look: Look, rng: np.random.Generator) -> np.ndarray:
    """A clip's frames, uint8 RGB [T, H, W, 3]."""
    colour = np.clip(_COLOURS[look.colour] + rng.normal(0, 12, 3), 0, 255).astype(np.float32)
    background = _background(domain, _COLOURS[look.mat], rng)
    path = _motion(verb, rng)
    base = np.array([SIDE / 2, SIDE / 2]) + rng.uniform(-8, 8, 2)
    size, turn = rng.uniform(11, 15), rng.uniform(-0.4, 0.4)
    gain = rng.uniform(0.75, 1.15)
    sway = np.cumsum(rng.normal(0, 0.4, (FRAMES, 2)), axis=0)
    drops = rng.uniform(0, 1, (5, 2))
    frames = []
    for t, (x, y, sx, sy, angle) in enumerate(path):
        dx, dy = np.clip(sway[t], -7, 7)
        shift = np.array([[1, 0, dx - 8], [0, 1, dy - 8]])
        frame = cv2.warpAffine(background, shift, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
        c, s = np.cos(angle + turn), np.sin(angle + turn)
        at = base + np.array([x + dx, y + dy])
        corners = _SHAPES[look.shape] * size
        corners = corners @ np.array([[c, s], [-s, c]]) * (sx, sy) + at
        _fill(frame, corners, colour)
        if verb == "pour" and abs(angle) > 0.5:
            for phase, aside in drops:
                fall = (phase + t / 6) % 1
                drop = at + np.array([np.sign(angle) * size * (0.9 + 0.3 * aside), 2 + fall * 22])
                _fill(frame, _SHAPES[0] * 1.6 + drop, colour)
        frames.append(_light(domain, frame, rng, gain))
    return np.stack(frames)


def optical_flow(frames: np.ndarray) -> np.ndarray:
    """Optical flow (OpenCV DIS) of uint8 RGB frames as grey levels, uint8 [T, H, W, 2]; the last frame repeats."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow = np.stack([dis.calc(a, b, None) for a, b in pairwise(grey)])
    flow = np.concatenate([flow, flow[-1:]])
    return np.clip(np.rint(128 + flow * (127 / FLOW_BOUND)), 0, 255).astype(np.uint8)


# --- sound -----------------------------------------------------------------------------------------------------


def _band(noise: np.ndarray, low: float, high: float) -> np.ndarray:
    """`noise` [S] band-passed to low..high Hz."""
    sos = signal.butter(2, (low, high), "bandpass", fs=SAMPLE_RATE, output="sos")
    return signal.sosfilt(sos, noise)


def _strike(t: np.ndarray, at: float, partials: np.ndarray, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A struck body that begins `at` seconds: partials (Hz) that ring down with time constant `decay` (s)."""
    u = np.maximum(t - at, 0)
    ring = sum(np.sin(2 * np.pi * f * u + rng.uniform(0, 6)) for f in partials) / len(partials)
    return (t >= at) * np.exp(-u / decay) * ring


def _sound(verb: str, rng: np.random.Generator) -> np.ndarray:
    """What a verb sounds like without a room, float [S], peak about 1; pitch, tempo, onset and timbre vary."""
    t = np.arange(SAMPLES) / SAMPLE_RATE
    pitch = 2 ** rng.uniform(-0.5, 0.5)
    onset, length = rng.uniform(0.05, 0.3), rng.uniform(0.4, 0.65)
    u = np.clip((t - onset) / length, 0, 1)
    inside = np.sin(np.pi * u) ** 0.5 * ((u > 0) & (u < 1))
    noise = rng.normal(0, 1, SAMPLES)
    if verb in ("take", "put"):
        # A swish whose band rises (take), or falls and ends in a thud (put).
        slope = u if verb == "take" else 1 - u
        phase = 2 * np.pi * np.cumsum(300 * pitch * 2 ** (2.2 * slope)) / SAMPLE_RATE
        sound = inside * signal.lfilter([1], [1, -0.95], noise) * 0.5 * np.sin(phase)
        if verb == "put":
            sound = sound + 1.5 * _strike(t, onset + 0.9 * length, np.array([110, 170, 260]) * pitch, 0.05, rng)
    elif verb in ("open", "close"):
        # A creaking hinge: a buzz whose pitch rises (open) or falls (close).
        slope = u if verb == "open" else 1 - u
        phase = 2 * np.pi * np.cumsum(140 * pitch * 2 ** (1.4 * slope)) / SAMPLE_RATE
        sound = inside * sum(np.sin(k * phase + rng.uniform(0, 6)) / k**0.7 for k in range(1, 9))
        sound = sound * (1 + 0.6 * np.interp(t, np.linspace(0, 1, 40), rng.normal(0, 1, 40)))
    elif verb == "wash":
        # Rubbing: wide noise that swells and fades.
        rate = rng.uniform(3, 5)
        sound = _band(noise, 500 * pitch, 2400 * pitch) * (0.15 + np.sin(np.pi * (rate * t + rng.random())) ** 2)
    elif verb == "cut":
        # Dry knocks, regular and fast.
        times = np.arange(rng.uniform(0, 0.12), 1, 1 / rng.uniform(6, 9))
        knocks = sum((t >= a) * np.exp(-np.maximum(t - a, 0) / 0.012) for a in times + rng.normal(0, 0.008, len(times)))
        sound = knocks * _band(noise, 700 * pitch, 2500 * pitch) * 2
    elif verb == "stir":
        # Metal on a pot: ringing, inharmonic, slower.
        times = np.arange(rng.uniform(0, 0.2), 1, 1 / rng.uniform(3, 4.5))
        partials = np.array([900, 1430, 2210, 2900]) * pitch**0.5 * rng.uniform(0.95, 1.05, 4)
        sound = sum(rng.uniform(0.5, 1) * _strike(t, a + rng.normal(0, 0.015), partials, 0.07, rng) for a in times)
        sound = sound + 0.06 * _band(noise, 300, 2500)
    else:
        # Bubbles: many short rising tones over a soft hiss.
        sound = 0.15 * _band(noise, 600, 2000)
        for _ in range(int(rng.integers(22, 40))):
            v = np.maximum(t - rng.uniform(0, 0.95), 0)
            f = rng.uniform(350, 900) * pitch
            sound = sound + rng.uniform(0.2, 0.7) * (v > 0) * np.exp(-v / 0.018) * np.sin(
                2 * np.pi * f * v * (1 + 9 * v)
            )
    return sound / (np.abs(sound).max() + 1e-9)


def _room(domain: str, dry: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sound [S] as heard in the domain: echo, background and level; float within -1..1."""
    t = np.arange(SAMPLES) / SAMPLE_RATE
    noise = rng.normal(0, 1, SAMPLES)
    # Someone else is at work in the same room, less loud.
    other = _sound(rng.choice(VERBS), rng)
    dry = dry / np.std(dry) + rng.uniform(0.4, 0.9) * other / np.std(other)
    decay, wet = {"kitchen": (0.02, 0.3), "workshop": (0.06, 0.5), "garden": (0.005, 0.1)}[domain]
    tail = rng.normal(0, 1, int(6 * decay * SAMPLE_RATE)) * np.exp(
        -np.arange(int(6 * decay * SAMPLE_RATE)) / (decay * SAMPLE_RATE)
    )
    heard = dry + wet * signal.fftconvolve(dry, tail / np.linalg.norm(tail))[:SAMPLES]
    if domain == "kitchen":
        hum = sum(np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) / k for k, f in enumerate((100, 200, 300), 1))
        ambience, level = hum + 0.3 * noise, 0.5
    elif domain == "workshop":
        engine = (signal.lfilter([0.3], [1, -0.7], noise) + 0.3 * rng.normal(0, 1, SAMPLES)) * (
            1 + 0.25 * np.sin(2 * np.pi * 27 * t)
        )
        ambience, level = engine, 0.8
    else:
        gusts = signal.lfilter([0.1], [1, -0.9], noise) * np.interp(t, np.linspace(0, 1, 6), rng.uniform(0.4, 1.6, 6))
        ambience, level = gusts * 2 + 0.3 * noise, 0.15
    ratio = 10 ** (-rng.uniform(-5, 5) / 20)
    mixed = heard / (np.std(heard) + 1e-9) + ratio * ambience / np.std(ambience)
    return mixed / np.abs(mixed).max() * level * 10 ** (rng.uniform(-6, 0) / 20)


def record(verb: str, domain: str, rng: np.random.Generator) -> np.ndarray:
    """A clip's sound, float [S] within -1..1."""
    return _room(domain, _sound(verb, rng), rng)
