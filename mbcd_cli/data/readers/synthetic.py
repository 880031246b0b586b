"""The synthetic dataset: vectors in any number of modalities, each as telling as `dataset.reader.informativeness` says.

A clip of class y in domain d has in modality k the vector `a_k mu_k[y] + b R_d,k[y] + noise`: class means mu_k and the
domain's own displacements of every class R are random directions of length 1 in 16 dimensions, the noise has standard
deviation 1 per value. a_k is the modality's informativeness, b the domain shift: what is learnt of a class in one place
is displaced in another, less harmfully the larger a_k is.

Letters: N clips, D values, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mbcd_cli.data.modalities.modality import Modality
from mbcd_cli.data.readers import Listing
from mbcd_cli.data.readers.generated import Vectors, generate, read_vectors, write_vectors
from mbcd_cli.errors import ManifestError
from mbcd_cli.naming import did_you_mean
from mbcd_cli.settings import DatasetSettings, NonNegative, ReaderSettings


class SyntheticSettings(ReaderSettings):
    """Vectors that are drawn."""

    informativeness: tuple[NonNegative, ...] = (4.0, 2.0, 1.0, 0.5)
    """Distance of the classes in each modality, in units of the noise; the order is the modalities'."""
    domain_shift: NonNegative = 1.0
    """Distance of the domains in each modality, in units of the noise."""


VERSION = 1
DOMAINS = ("north", "east", "south")
CLASSES, DIMENSION = 8, 16
TRAIN, TEST = 24, 12  # clips per class and domain


def names(count: int) -> tuple[str, ...]:
    """m1, m2, ..."""
    return tuple(f"m{k + 1}" for k in range(count))


def _directions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def synthetic_vectors(informativeness: Sequence[float], *, domain_shift: float) -> Vectors:
    """The dataset in memory; modality k's draws depend on k alone, so that more modalities change none."""
    per_domain = CLASSES * (TRAIN + TEST)
    labels = np.tile(np.repeat(np.arange(CLASSES), TRAIN + TEST), len(DOMAINS))
    domains = np.repeat(np.arange(len(DOMAINS)), per_domain)
    splits = (np.arange(len(labels)) % (TRAIN + TEST) >= TRAIN).astype(int)
    values = {}
    for k, (name, a) in enumerate(zip(names(len(informativeness)), informativeness, strict=True)):
        rng = np.random.default_rng([0, k])
        means = _directions(rng, CLASSES, DIMENSION)
        displaced = _directions(rng, len(DOMAINS), CLASSES, DIMENSION)
        noise = rng.normal(size=(len(labels), DIMENSION))
        values[name] = a * means[labels] + domain_shift * displaced[domains, labels] + noise
    order = np.random.default_rng([0, 1000]).permutation(len(labels))
    return Vectors(
        values={name: rows[order] for name, rows in values.items()},
        labels=labels[order],
        domains=domains[order],
        splits=splits[order],
        domain_names=DOMAINS,
        label_names=[f"class{c}" for c in range(CLASSES)],
    )


def read(dataset: DatasetSettings, modalities: Mapping[str, Modality]) -> Listing:
    """The clips of the dataset that the settings describe, generated first when `dataset.root` is empty.

    Raises:
        ManifestError: the folder holds something else, cannot be written, or modalities are asked for that it lacks.
    """
    informativeness, domain_shift = list(dataset.reader.informativeness), dataset.reader.domain_shift
    has = names(len(informativeness))
    unknown = [name for name in modalities if name not in has]
    if unknown:
        raise ManifestError(
            f"The synthetic dataset has modalities {', '.join(has)}, and no {unknown[0]}.",
            f"{did_you_mean(unknown[0], has)}dataset.reader.informativeness has one value per modality.",
        )
    root = dataset.root or Path(f"mbcd-synthetic-{len(has)}")
    marker = {
        "generator": "mbcd synthetic",
        "version": VERSION,
        "informativeness": informativeness,
        "domain_shift": domain_shift,
    }
    made = partial(synthetic_vectors, informativeness, domain_shift=domain_shift)
    generate(root, marker, lambda folder: write_vectors(folder, made()))
    return read_vectors(dataset, modalities, root=root, has=has)
