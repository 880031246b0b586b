"""Errors a user can act on: each says what went wrong, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

FOREIGN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading raises where a file is whole, and its contents are not what is written into such a file."""
_LONG = re.compile(r"(?<!\S)(\S{200})\S{5000,}(\S{60})")
"""A word that is longer than any path: a file's contents, and nothing to read."""


def lines_of(error: BaseException) -> list[str]:
    """What an error of another library says, by the line, none of them empty; its kind where it says nothing."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


class MbcdError(Exception):
    """A problem the user can mend; the command line prints it without a traceback and exits with 1.

    Args:
        message: what is wrong, naming the file, clip or setting.
        remedy: what to do about it, one sentence; may be empty where the message says it.
        details: what `--json` gives besides.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", details: Mapping[str, object] | None = None) -> None:
        message, remedy = (_LONG.sub(r"\1 ... \2", text) for text in (message, remedy))
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message

    def __reduce__(self):  # so that errors cross process boundaries whole
        return type(self), (self.message, self.remedy, self.details)


class UsageError(MbcdError):
    """Options that contradict each other, or one that is needed and missing."""

    exit_code = 2


class SettingsError(MbcdError):
    """Settings that do not validate, or contradict each other."""


class ManifestError(MbcdError):
    """A dataset's table is wrong; the message lists every bad line."""


class MediaError(MbcdError):
    """One media file cannot be used; `prepare` records it and goes on with the other clips.

    Args:
        file: the file (or folder of frames).
        cause: what is wrong with it, without its name.
        remedy: what to do about it.
    """

    def __init__(self, file: object, cause: str, remedy: str = "") -> None:
        super().__init__(f"{file}: {cause}", remedy)
        self.file = str(file)
        self.cause = cause

    def __reduce__(self):
        return type(self), (self.file, self.cause, self.remedy)


class CacheError(MbcdError):
    """A cache is missing, incomplete, stale or damaged."""


class CheckpointError(MbcdError):
    """A checkpoint is missing, damaged, hostile or belongs to other settings."""


class RunError(MbcdError):
    """A run folder is in the way, missing or incomplete, or training had to end."""


class StoppedError(RunError):
    """A signal stopped the training, at a checkpoint."""


class BusyError(RunError):
    """Another process works on the run."""


class FileError(MbcdError):
    """A file or folder cannot be written (a full disk, missing rights), or a log is damaged."""
