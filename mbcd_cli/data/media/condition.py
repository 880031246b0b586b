"""What a clip's media are at the moment, told without opening them: what fingerprints and repeated work go by."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from stat import S_ISDIR

from mbcd_cli.data.media.folders import folder_span, frames_of, names_digest
from mbcd_cli.data.records import Media
from mbcd_cli.errors import MediaError


def files_of(media: Media) -> list[Path]:
    """All that one modality of a clip is read from."""
    return [path for path in (media.path, media.path_v, media.clock) if path is not None]


def holding(path: Path) -> int | str:
    """Bytes of a file, the digest of the names of a folder's images, -1 where nothing can be seen."""
    try:
        status = path.stat()
    except OSError:
        return -1
    return names_digest(path) if S_ISDIR(status.st_mode) else status.st_size


def condition(media: Media) -> str:
    """Digest of the sizes, times of change and rights of a clip's files, in folders those of its own frames."""
    seen: list[object] = []
    for path in files_of(media):
        seen.append([str(path.name), *_look(path), holding(path)])
        try:
            if path.is_dir():
                frames = frames_of(path)
                seen += [[name, *_look(path / name)] for name in frames.within(*folder_span(media, frames))]
        except (MediaError, OSError) as error:
            seen.append(str(getattr(error, "cause", error)))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _look(path: Path) -> list[int | bool | None]:
    try:
        status = path.stat()
    except OSError as error:
        return [error.errno]
    # The time at which a folder changed tells of its other clips too; its frames are looked at one by one.
    times = [] if S_ISDIR(status.st_mode) else [status.st_mtime_ns]
    return [status.st_size if times else 0, *times, os.access(path, os.R_OK)]
