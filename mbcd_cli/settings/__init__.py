# ruff: noqa: F401
"""The settings tree and what each field is for; `sources` reads layers, `resolved` lays them together."""

from mbcd_cli.settings.flags import FLAGS, flag_of
from mbcd_cli.settings.ranges import AROUND, Range
from mbcd_cli.settings.roles import (
    ForWeights,
    Role,
    Slice,
    fields_for,
)
from mbcd_cli.settings.tree import (
    AdaptSettings,
    AverageSettings,
    CacheSettings,
    Count,
    DatasetSettings,
    EvaluationSettings,
    Fraction,
    LandscapeSettings,
    ManifestSettings,
    MethodSettings,
    ModalitySettings,
    ModelSettings,
    Names,
    NonNegative,
    OptimizerSettings,
    Positive,
    RaySettings,
    ReaderSettings,
    RuntimeSettings,
    Settings,
    role_of,
)
