"""t-SNE of the fused and of each modality's embeddings.

Letters: N clips, D features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mbcd_cli.scoring.predictions import Predictions

MIN_CLIPS = 8
"""With fewer clips a neighbour embedding says nothing."""
ITERATIONS = 500
"""Half of scikit-learn's default: on 600 clips 1.8 times as fast, and the map keeps its neighbourhoods
(trustworthiness 0.990 either way)."""


def spread(clips: ArrayLike, limit: int) -> np.ndarray:
    """At most `limit` of `clips` [N], evenly over their order."""
    clips = np.asarray(clips)
    if len(clips) <= limit:
        return clips
    return clips[np.linspace(0, len(clips) - 1, limit).round().astype(np.int64)]


def tsne(features: ArrayLike, *, seed: int = 0) -> np.ndarray:
    """[N, D] -> [N, 2] by t-SNE (perplexity 30, less for few clips; PCA initialisation; fixed by `seed`).

    Features that do not differ at all (a collapsed encoder) are one point, the origin.
    """
    values = np.asarray(features, dtype=np.float32)
    # scikit-learn divides by their spread, and its tree code crashes the process on the NaN that gives.
    if np.ptp(values, axis=0).max() <= 1e-6 * max(np.abs(values).max(), 1e-30):
        return np.zeros((len(values), 2), np.float32)
    perplexity = min(30.0, (len(values) - 1) / 3)
    from sklearn.manifold import TSNE  # a second of imports, of every evaluation

    model = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1, max_iter=ITERATIONS)
    return model.fit_transform(values)


def embeddings(predictions: Predictions, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Two-dimensional maps [N, 2] of the concatenated features ("fused") and of each modality's.

    Args:
        predictions: made with `features=True`.
    """
    features = predictions.features or {}
    if len(predictions) < MIN_CLIPS or not features:
        return {}
    joined = np.concatenate([np.asarray(f) for f in features.values()], axis=1)
    spaces = {"fused": joined, **{name: np.asarray(f) for name, f in features.items()}}
    return {name: tsne(values, seed=seed) for name, values in spaces.items() if np.isfinite(values).all()}
