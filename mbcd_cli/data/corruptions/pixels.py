"""Corruptions of frames: the fifteen kinds of ImageNet-C (Hendrycks & Dietterich 2019), written from their formulas.

They act on frames whose short side has been resized, before the crop. Lengths are ImageNet-C's, which are meant for a
side of 224 pixels, scaled by the short side over 224: a severity means the same in small frames. What the scene or the
lens has (fog, frost, glass, bends, the direction of a motion) stands still over a clip's frames; what the sensor has,
and snow, is drawn anew for every frame. The strengths are those of `imagecorruptions` 1.1.2 (Michaelis et al. 2019),
but for

- glass: pixels are displaced once, in all directions alike (its sweeps shift the frame besides); more at severity 5;
- frost: crystals are drawn (ImageNet-C lays photographs of frost over the image), stronger at severities 4 and 5;
- fog: the cloud is a sum of octaves of noise, not of midpoints displaced, and the same at every severity, not rougher
  and rougher; severity 4 is stronger than 3.

Letters: N frames, H W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import cv2
import numpy as np

from mbcd_cli.data.corruptions import Corrupt

_SIDE = 224
"""Pixels of the side that lengths are told for."""


def _pixels(values: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8."""
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


def _each(frames: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`change` of every frame [H, W, C], from 0 to 1."""
    return np.stack([_pixels(change(frame.astype(np.float32) / 255).reshape(frame.shape)) for frame in frames])


def _unit(frames: np.ndarray) -> float:
    """Pixels of [N, H, W, C] to one of a side of 224."""
    return min(frames.shape[1:3]) / _SIDE


def _gaussian_noise(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """x + s n, n of a standard normal distribution."""
    spread = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return _each(frames, lambda x: x + spread * rng.standard_normal(x.shape, np.float32))


def _shot_noise(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Poisson(p x) / p: p photons make white."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return _each(frames, lambda x: rng.poisson(photons * x) / photons)


def _impulse_noise(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A share of the values is 0 or 1, with equal chances."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]

    def change(x: np.ndarray) -> np.ndarray:
        chance = rng.random(x.shape, np.float32)
        return np.where(chance < share / 2, 0, np.where(chance > 1 - share / 2, 1, x))

    return _each(frames, change)


def _defocus_blur(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The mean over a disc, whose rim is as soft as a pixel is wide."""
    radius = (3, 4, 6, 8, 10)[severity - 1] * _unit(frames)
    reach = np.arange(-int(radius + 1), int(radius + 1) + 1)
    disc = np.clip(radius + 0.5 - np.hypot(*np.meshgrid(reach, reach)), 0, 1)
    return _each(frames, lambda x: cv2.filter2D(x, -1, disc / disc.sum()))


def _glass_blur(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blurred, pixels displaced at random by d in each direction, blurred again."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 5, 2))[severity - 1]
    unit, (height, width) = _unit(frames), frames.shape[1:3]
    # Standard deviation of two draws a sweep from -reach to reach - 1: sweeps also pass on what was displaced before.
    far = unit * np.sqrt(2 * times * (4 * reach**2 - 1) / 12)
    shift = np.rint(far * rng.standard_normal((2, height, width))).astype(int)
    down, right = np.mgrid[:height, :width] + shift
    down, right = down.clip(0, height - 1), right.clip(0, width - 1)

    def change(x: np.ndarray) -> np.ndarray:
        blurred = cv2.GaussianBlur(x, (0, 0), sigma * unit).reshape(x.shape)
        return cv2.GaussianBlur(blurred[down, right], (0, 0), sigma * unit)

    return _each(frames, change)


def _smear(length: float, sigma: float, degrees: float) -> np.ndarray:
    """Kernel of a motion: half a Gaussian along a line that leaves the middle."""
    reach = int(np.ceil(length))
    way = np.linspace(0, length, 4 * reach + 1)
    weights = np.exp(-0.5 * (way / sigma) ** 2)
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))
    down, right = (reach + 1 + way * turn(np.deg2rad(degrees)) for turn in (np.sin, np.cos))
    for y in (0, 1):
        for x in (0, 1):  # shared by the four pixels around every point
            share = np.abs(1 - y - down % 1) * np.abs(1 - x - right % 1)
            np.add.at(kernel, (down.astype(int) + y, right.astype(int) + x), weights * share)
    return kernel / kernel.sum()


def _motion_blur(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Smeared within 45 degrees of the horizontal."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    unit, degrees = _unit(frames), rng.uniform(-45, 45)
    kernel = _smear(2 * radius * unit, sigma * unit, degrees)
    return _each(frames, lambda x: cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE))


def _zoom_blur(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The mean of the frame and of itself enlarged more and more."""
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    height, width = frames.shape[1:3]

    def enlarged(x: np.ndarray, factor: float) -> np.ndarray:
        rest = (1 - factor) / 2
        matrix = np.array([[factor, 0, rest * (width - 1)], [0, factor, rest * (height - 1)]])
        return cv2.warpAffine(x, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)

    return _each(frames, lambda x: np.mean([x, *(enlarged(x, f) for f in np.arange(1, end, step))], axis=0))


def _snow(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Flakes, smeared as they fall, over a whitened frame."""
    level, size, least, radius, sigma, kept = (
        (0.1, 3, 0.5, 10, 4, 0.8),
        (0.2, 2, 0.5, 12, 4, 0.7),
        (0.55, 4, 0.9, 12, 8, 0.7),
        (0.55, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    height, width = frames.shape[1:3]
    tall, wide = (round(side / _unit(frames)) for side in (height, width))  # drawn for a side of 224
    kernel = _smear(2 * radius, sigma, rng.uniform(45, 135))

    def change(x: np.ndarray) -> np.ndarray:
        drawn = rng.normal(level, 0.3, (int(np.ceil(tall / size)), int(np.ceil(wide / size))))
        flakes = cv2.resize(drawn, (wide, tall), interpolation=cv2.INTER_LINEAR)
        flakes = cv2.filter2D(np.where(flakes < least, 0, flakes.clip(0, 1)), -1, kernel)
        flakes = cv2.resize(flakes, (width, height), interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
        white = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
        return white + (flakes + flakes[::-1, ::-1])[..., None]

    return _each(frames, change)


def _cloud(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """[H, W] from 0 to 1: octaves of noise, each `decay` times weaker than the one of twice its size."""
    side, cloud, strength = max(height, width), np.zeros((height, width), np.float32), 1.0
    cells = 2
    while cells <= side:
        octave = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
        cloud += strength * cv2.resize(octave, (side, side), interpolation=cv2.INTER_CUBIC)[:height, :width]
        cells, strength = 2 * cells, strength / decay
    cloud -= cloud.min()
    return cloud / max(cloud.max(), 1e-6)


def _frost(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """a x + b f: crystals f, bluish, that grow from the border of the pane."""
    kept, strength = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.75), (0.6, 0.85))[severity - 1]
    height, width = frames.shape[1:3]
    down, right = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    # Where a cloud crosses its middle there are ridges: needles and feathers.
    needles = np.mean([(1 - np.abs(2 * _cloud(height, width, 1.6, rng) - 1)) ** 4 for _ in range(2)], axis=0)
    grown = 0.35 + 0.45 * np.maximum(np.abs(down), np.abs(right)) + 0.2 * needles
    ice = (grown * (0.55 + needles)).clip(0, 1)[..., None] * np.array([0.86, 0.94, 1.0])
    return _each(frames, lambda x: kept * x + strength * ice)


def _fog(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """(x + s cloud) m / (m + s), m being the brightest value."""
    strength = (1.5, 2, 2.5, 2.75, 3)[severity - 1]
    cloud = _cloud(*frames.shape[1:3], 1.7**2, rng)[..., None]
    return _each(frames, lambda x: (x + strength * cloud) * x.max() / (x.max() + strength))


def _brightness(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The value of hue, saturation and value, raised."""
    raised = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]

    def change(x: np.ndarray) -> np.ndarray:
        value = x.max(axis=-1, keepdims=True)
        brighter = np.minimum(value + raised, 1)
        return np.where(value > 0, x * brighter / np.maximum(value, 1e-6), brighter)

    return _each(frames, change)


def _contrast(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Drawn towards the mean of the frame's channel."""
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]

    def change(x: np.ndarray) -> np.ndarray:
        mean = x.mean(axis=(0, 1), keepdims=True)
        return mean + kept * (x - mean)

    return _each(frames, change)


def _elastic_transform(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Bent: every pixel is displaced, neighbours alike."""
    far = (1.02, 1.32, 1.73, 2.04, 2.44)[severity - 1] * _unit(frames)
    height, width = frames.shape[1:3]

    def field() -> np.ndarray:
        noise = cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), 0.01 * min(height, width))
        return far * noise / noise.std()

    down, right = np.mgrid[:height, :width].astype(np.float32)
    down, right = down + field(), right + field()
    return _each(frames, lambda x: cv2.remap(x, right, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _pixelate(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Made smaller, and large again without smoothing."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = frames.shape[1:3]
    small = (max(int(share * width), 1), max(int(share * height), 1))

    def change(x: np.ndarray) -> np.ndarray:
        reduced = cv2.resize(x, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(reduced, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)

    return _each(frames, change)


def _jpeg_compression(frames: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Through a JPEG of low quality; channels that are no colours, each alone."""
    quality = (25, 18, 15, 10, 7)[severity - 1]

    def through(picture: np.ndarray) -> np.ndarray:
        _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)

    if frames.shape[-1] == 3:
        return np.stack([through(frame[..., ::-1])[..., ::-1] for frame in frames])
    return np.stack([np.stack([through(c) for c in _planes(frame)], axis=-1) for frame in frames])


def _planes(frame: np.ndarray) -> Iterator[np.ndarray]:
    return (np.ascontiguousarray(frame[..., channel]) for channel in range(frame.shape[-1]))


PIXELS: Mapping[str, Corrupt] = {
    "gaussian-noise": _gaussian_noise,
    "shot-noise": _shot_noise,
    "impulse-noise": _impulse_noise,
    "defocus-blur": _defocus_blur,
    "glass-blur": _glass_blur,
    "motion-blur": _motion_blur,
    "zoom-blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic-transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg-compression": _jpeg_compression,
}
"""Name -> corruption of frames [N, H, W, 3] uint8."""
_NO_COLOURS = ("gaussian-noise", "impulse-noise", "defocus-blur", "elastic-transform", "pixelate", "jpeg-compression")
FLOW_PIXELS = {name: PIXELS[name] for name in _NO_COLOURS}
"""Those that mean something where the two channels are motions: [N, H, W, 2] uint8."""
