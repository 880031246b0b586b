"""TensorBoard events of a run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mbcd_cli.files import unwritable


class Events:
    """Writes nested records as scalars named by their path.

    At once and in this thread: TensorBoard's own writer has another one, which tells a full disk to nobody.

    Args:
        folder: where the event files go.
        purge_after: on resume, TensorBoard hides what was written after this step.

    Raises:
        FileError: they cannot be written; so do the methods.
    """

    def __init__(self, folder: Path, *, purge_after: int = 0) -> None:
        # TensorBoard reads files in the order of their names.
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        self._write(file_version="brain.Event:2")
        if purge_after:
            self._write(step=purge_after + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, prefix: str, record: Mapping[str, object], step: int) -> None:
        """{"a": {"b": 1.0}} -> scalar `prefix/a/b`; what is no number is left out."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _named(prefix, record)]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **content: object) -> None:
        try:
            RecordWriter(self._file).write(Event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> Exception:
        return unwritable(self._path, error, place="--run", then="go on with --resume")


def _named(prefix: str, record: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _named(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{key}", float(value)
