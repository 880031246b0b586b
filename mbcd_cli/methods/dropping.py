"""A pass of the student with feature noise in the tails and modality dropout before fusion: JAT's, and ADMMDG's."""

from __future__ import annotations

import torch

from mbcd_cli.data.records import Batch
from mbcd_cli.encoders.staged import Noise
from mbcd_cli.methods.base import Context, Method, Outputs
from mbcd_cli.methods.feature_noise import FeatureNoise, FeatureNoiseSettings
from mbcd_cli.methods.parts import keep_at_least_one
from mbcd_cli.model import TailWeights
from mbcd_cli.settings import Fraction, MethodSettings


class DroppingSettings(MethodSettings):
    """Of methods whose fused head sees clips without some of their modalities."""

    dropout: Fraction = 0.5
    """Rate at which clips lose a modality before fusion, never all of them; 0: none."""
    feature_noise: FeatureNoiseSettings = FeatureNoiseSettings()
    """Feature noise."""


class DroppingMethod(Method):
    """The fused head sees features of which every clip loses each modality with some probability, never all.

    Letters: B clips of this process, M modalities.
    """

    settings: DroppingSettings

    def __init__(self, settings: DroppingSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._drops = settings.dropout > 0
        self._noise = None
        if settings.feature_noise.enabled:
            self._noise = FeatureNoise(
                settings=settings.feature_noise, randomness=context.randomness, group=context.group
            )

    def forward(self, batch: Batch, *, noise: Noise | None = None, theta: TailWeights | None = None) -> Outputs:
        """One pass of the student, with feature noise in the tails and modality dropout before fusion."""
        model = self.context.model
        with self.context.autocast():
            pooled = model.pooled(batch.inputs, noise=noise or self._noise, theta=theta)
            features = model.normalised(pooled)
            unimodal = model.unimodal(self.seen_by_heads(features))
            return Outputs(pooled, features, unimodal, model.fuse(features, self.kept(len(batch))))

    def kept(self, clips: int) -> torch.Tensor | None:
        """What the fused head sees of this process' clips, [B, M] of 0 and 1; None: all of it."""
        group = self.context.group
        if not self._drops:
            return None
        uniform = self.context.randomness.uniform(clips * group.world, len(self.context.model.modalities))
        return group.own(keep_at_least_one(uniform, self.settings.dropout))
