"""What can serve as a name (of a clip, domain, dataset or modality), and the nearest of the names that there are."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

_OWN = {"fused", "label", "in-domain", "all", "tails", "fused_head", "average"}
"""Heads, columns of exports and groups of parameters that stand beside the modalities under names of ours."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")


def name_faults(what: str, value: str) -> list[str]:
    """What is wrong with a name of a user's: it becomes a file name, a command-line word and a table cell."""
    if _PLAIN.fullmatch(value):  # nearly all are, and there may be a million: 9 times as long without
        return []
    if not value:
        return [f"{what} is empty"]
    if (
        len(value.encode()) > 200
        or value.startswith((".", "-"))
        or value != value.strip()
        or re.search(r'[/\\:*?"<>|]', value)
        or any(unicodedata.category(character)[0] == "C" for character in value)
    ):
        return [
            f"{what} {value[:60]!r} cannot serve as a name (up to 200 bytes, no . or - in front, "
            'no space at its ends, no control characters, none of / \\ : * ? " < > |)'
        ]
    return []


def modality_faults(name: str) -> list[str]:
    """What is wrong with the name of a modality."""
    if len(name) > 64 or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        return [f"modality name {name[:60]!r}: use up to 64 letters, digits, - and _, a letter first"]
    if name.lower() in _OWN:
        return [f"modality name {name!r} is used for something else in results: choose another"]
    return []


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`Did you mean video? `, or nothing where no name is near."""
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), list(folded), n=1)
    return f"Did you mean {folded[close[0]]}? " if close else ""
