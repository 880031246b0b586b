"""TensorBoard events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Events:
    """Writes nested records as scalars named by their path.

    Args:
        folder: where the event files go.
        purge_after: on resume, TensorBoard hides what was written after this step.
    """

    def __init__(self, folder: Path, *, purge_after: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_after + 1 if purge_after else None)

    def scalars(self, prefix: str, record: Mapping[str, object], step: int) -> None:
        """{"a": {"b": 1.0}} -> scalar `prefix/a/b`; what is no number is left out."""
        for key, value in record.items():
            if isinstance(value, Mapping):
                self.scalars(f"{prefix}/{key}", value, step)
            elif isinstance(value, (int, float)):
                self._writer.add_scalar(f"{prefix}/{key}", value, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
