"""mbcd: Modality-Balanced Collaborative Distillation for multi-modal domain generalization."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mbcd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
