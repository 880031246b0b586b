"""The settings of our methods, apart from their classes: a flag is checked without importing torch.

`XSettings` are those of the class `X`; a method that stands in another package keeps them beside its class.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mbcd_cli.settings import Count, Fraction, MethodSettings, Names, NonNegative, Positive, Slice

Epochs = Annotated[int, Field(ge=0)]


class DropoutSettings(Slice):
    """Modality dropout before fusion (AMD, Eq. 2-4)."""

    strategy: Literal["none", "fixed", "adaptive"] = "adaptive"
    """No modality dropout, one fixed rate, or the adaptive rate of Eq. 3-4."""
    rate: Fraction = 0.5
    """Rate of the fixed strategy."""
    score: Literal["confidence", "true_class"] = "confidence"
    """What s_k sums: the largest class probability (the paper), or the true class's (a label-aware variant)."""


class ConsistencySettings(Slice):
    """Gradient consistency (GCC, Eq. 5-6)."""

    order: Literal["off", "first", "second"] = "first"
    """No inner step, one whose gradient is a constant (the reference), or one that is differentiated through."""
    alpha: NonNegative = 1e-4
    """Learning rate of the inner step."""


class FeatureNoiseSettings(Slice):
    """Feature augmentation by noise on feature statistics (DSU), in the first student pass only."""

    enabled: bool = True
    """Apply DSU."""
    probability: Fraction = 0.5
    """Probability that one call applies the noise."""


class DistillationSettings(Slice):
    """Collaborative distillation from the teacher (Eq. 8)."""

    enabled: bool = True
    """Add lambda * L_dis to the objective."""
    weight: NonNegative = 1.0
    """lambda of Eq. 9."""


class MBCDSettings(MethodSettings):
    """MBCD (Eq. 9) and its switches."""

    average_kind: ClassVar = "ema"

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (Eq. 9), or only probe detached features, to be reported."""
    dropout: DropoutSettings = DropoutSettings()
    """Modality dropout."""
    consistency: ConsistencySettings = ConsistencySettings()
    """Gradient consistency."""
    distillation: DistillationSettings = DistillationSettings()
    """Distillation."""
    feature_noise: FeatureNoiseSettings = FeatureNoiseSettings()
    """Feature noise."""

    @property
    def needs_average(self) -> bool:
        """Whether it distils from the teacher."""
        return self.distillation.enabled

    @model_validator(mode="after")
    def _coherent(self):
        if self.consistency.order != "off" and self.unimodal != "joint":
            raise ValueError("gradient consistency steps along uni-modal gradients: set method.unimodal=joint")
        return self


class RNANetSettings(MethodSettings):
    """RNA-Net."""

    weight: NonNegative = 1.0
    """lambda, the weight of the norms' alignment."""
    priority: Names = ("video", "flow", "audio")
    """Modalities whose norm is the numerator of a ratio, first ones first; all others follow in fusion order."""


class OGMGESettings(MethodSettings):
    """OGM-GE."""

    alpha: NonNegative = 0.8
    """Strength of the modulation: kappa = 1 - tanh(alpha rho)."""
    noise: bool = True
    """Add Gaussian noise to the modulated gradients (GE); without it the method is OGM."""
    start: Epochs = 0
    """Epochs before the modulation begins (the authors' later code: 6)."""
    stop: Epochs = 51
    """Epochs after which it has ended."""


class OPMSettings(MethodSettings):
    """OPM."""

    rate: Fraction = 0.5
    """q_0, the drop rate of a modality that barely dominates."""
    strength: NonNegative = 0.5
    """lambda, by how much the rate grows with dominance."""
    probability: Fraction = 0.7
    """Probability that a batch is modulated."""
    start: Epochs = 6
    """Epochs before the modulation begins."""


class SimMMDGSettings(MethodSettings):
    """SimMMDG."""

    translation: NonNegative = 0.1
    """Weight of the translation of each modality's feature into the others'."""
    contrast: NonNegative = 3.0
    """Weight of the supervised contrast of the shared halves."""
    distance: NonNegative = 0.7
    """Weight of the distance between the shared and the specific half of a feature."""
    hidden: Count = 2048
    """Width of the projections and translators."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""


class MOOSASettings(SimMMDGSettings):
    """MOOSA."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (the paper), or only probe detached features."""
    weighting: Literal["clip", "batch", "off"] = "clip"
    """Entropy weights of the heads per clip (the paper), of batch means (the public benchmark), or a plain sum."""
    weighting_temperature: Positive = 1.0
    """T of the entropy weights."""
    entropy: NonNegative = 0.001
    """Weight of the entropy minimisation."""
    jigsaw: NonNegative = 1.0
    """Weight of the jigsaw of feature parts."""
    parts: Count | None = None
    """s, parts of a feature in the jigsaw; default: 4 of one or two modalities, 2 of more (the authors')."""
    permutations: Count = 128
    """P, permutations of the jigsaw; all, where there are fewer."""
    masked: Fraction = 0.3
    """r, the fraction of a feature's entries that is hidden from the translators."""


class CMRFSettings(MethodSettings):
    """CMRF; the step from which weights are averaged, and the distillation begins, is `average.start`."""

    average_kind: ClassVar = "sma"
    average_start: ClassVar = 100

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders (the paper), or only probe detached features, to be reported."""
    unimodal_weight: NonNegative = 2.0
    """Weight of the uni-modal cross-entropies."""
    contrast: NonNegative = 3.0
    """Weight of the supervised contrast of the projected features."""
    distillation: NonNegative = 3.0
    """Weight of the distillation of interpolated teacher features."""
    modality_weights: dict[str, NonNegative] = Field(default={"audio": 0.5})
    """w_k of a modality, in its cross-entropy and distillation; 1 for those that are not named."""
    beta: Positive = 0.1
    """Both parameters of the Beta distribution of the interpolation."""
    hidden: Count = 2048
    """Width of the projections."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""

    @property
    def needs_average(self) -> bool:
        """It distils from the teacher, which is what it deploys."""
        return True


class GMPSettings(MethodSettings):
    """GMP."""

    unimodal: Literal["joint", "probe"] = "joint"
    """Uni-modal heads train with their encoders, or only probe detached features, to be reported."""
    unimodal_weight: NonNegative = 3.0
    """Weight of the uni-modal cross-entropies."""
    domain_weight: NonNegative = 0.5
    """Weight of the domain losses in the encoders' gradients."""
    reversal: NonNegative = 0.3
    """b, what the domain gradient is multiplied with (and reversed) on its way into the encoders."""
    alpha_class: NonNegative = 0.5
    """Strength of the modulation of the classification gradients."""
    alpha_domain: NonNegative = 0.5
    """Strength of the modulation of the domain gradients."""
    norm_with_head: bool = False
    """The norm of a classification gradient includes its head's part, as in the public benchmark; not in the paper."""
    hidden: Count = 512
    """Width of the adversary."""
