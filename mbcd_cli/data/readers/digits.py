"""scikit-learn's handwritten digits (1797 images of 8x8) as six modalities, in three domains.

Modalities: the four quadrants of the image (16 values each), its profile (sums of rows and columns, 16), and the
magnitudes of its low frequencies (15). Domains: upright, rotated by 25 degrees, noisy. Every image is in one domain.

Letters: N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.ndimage import rotate

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.generated import Vectors, generate, read_vectors, write_vectors
from mbcd_cli.errors import ManifestError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import DatasetSettings

VERSION = 1
DOMAINS = ("upright", "rotated", "noisy")
DEGREES, NOISE = 25.0, 0.25
MODALITIES = ("northwest", "northeast", "southwest", "southeast", "profile", "spectrum")


def features(images: np.ndarray) -> dict[str, np.ndarray]:
    """Images [N, 8, 8] in 0..1 -> modality -> [N, 15 or 16] float32."""
    frequencies = np.abs(np.fft.rfft2(images))[:, :3, :5] / 8
    return {
        "northwest": images[:, :4, :4].reshape(-1, 16),
        "northeast": images[:, :4, 4:].reshape(-1, 16),
        "southwest": images[:, 4:, :4].reshape(-1, 16),
        "southeast": images[:, 4:, 4:].reshape(-1, 16),
        "profile": np.concatenate([images.mean(axis=1), images.mean(axis=2)], axis=1),
        "spectrum": frequencies.reshape(-1, 15),
    }


def digit_vectors(seed: int = 0) -> Vectors:
    """The dataset in memory; a quarter of every domain's images is its test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images / 16.0
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images, labels = images[order], bunch.target[order].astype(int)
    domains = np.arange(len(images)) % len(DOMAINS)
    splits = (np.arange(len(images)) // len(DOMAINS) % 4 == 3).astype(int)
    turned = rotate(images[domains == 1], DEGREES, axes=(2, 1), reshape=False, order=1)
    images[domains == 1] = np.clip(turned, 0, 1)
    noisy = images[domains == 2] + rng.normal(0, NOISE, images[domains == 2].shape)
    images[domains == 2] = np.clip(noisy, 0, 1)
    return Vectors(features(images), labels, domains, splits, DOMAINS, [str(digit) for digit in range(10)])


def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The clips of the dataset, written to `dataset.root` (default: mbcd-digits) first.

    Raises:
        ManifestError: the folder holds something else, cannot be written, or modalities are asked for that it lacks.
    """
    unknown = [name for name in modalities if name not in MODALITIES]
    if unknown:
        raise ManifestError(
            f"The digits have modalities {', '.join(MODALITIES)}, and no {unknown[0]}.",
            f"{did_you_mean(unknown[0], MODALITIES)}Correct --modalities.",
        )
    root = dataset.root or Path("mbcd-digits")
    marker = {"generator": "mbcd digits", "version": VERSION}
    generate(root, marker, lambda folder: write_vectors(folder, digit_vectors()))
    return read_vectors(dataset, modalities, root=root, has=MODALITIES)
