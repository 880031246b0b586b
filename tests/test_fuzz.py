"""Random settings, extreme, wrong and missing: always a valid tree or one message, never a surprise."""

from __future__ import annotations

import tomllib

import pytest
from commands import DRAWS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbcd_cli.data.modalities import KINDS
from mbcd_cli.data.readers import READERS, reader_settings
from mbcd_cli.errors import MbcdError
from mbcd_cli.files import flatten
from mbcd_cli.methods import METHODS, method_class
from mbcd_cli.resolved import resolve, validate
from mbcd_cli.settings import Settings
from mbcd_cli.settings.sources import to_toml

LONGEST = 20_000
"""Characters of the longest message: no value is repeated at length."""


def paths() -> list[str]:
    """Every setting: of the tree, of all methods, readers and kinds of modality; and names that are none."""
    found = [f"{group}.{field}" for group, part in Settings.model_fields.items() for field in _fields(part.annotation)]
    for name in METHODS:
        found += [f"method.{path}" for path in flatten(method_class(name).Settings().model_dump())]
    found += [f"dataset.reader.{path}" for name in READERS for path in flatten(reader_settings(name).model_dump())]
    found += [f"modalities.{name}.{field}" for name, kind in KINDS.items() for field in kind.model_fields]
    return sorted({*found, *Settings.model_fields, "nothing", "training.epoch", "a.b.c", "method.name", ""})


def _fields(group: object) -> list[str]:
    return list(getattr(group, "model_fields", ()))


NUMBERS = ["0", "-1", "1", "3", "0.5", "1e308", "-1e308", "1e-320", "nan", "inf", "9" * 30, "9" * 5000, "2147483648"]
WORDS = [
    "",
    "''",
    "x",
    "none",
    "all",
    "../../x",
    "/",
    "~",
    ".",
    "-x",
    "a/b",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "ü" * 300,
    "🐈",
]
NESTED = [
    "[]",
    "{}",
    "[[]]",
    "[1, 'a']",
    "{a = 1}",
    "[" * 3000,
    "true",
    "1979-05-27",
    "video,audio",
    "['type', 'fused']",
]
CHOICES = [*METHODS, *READERS, *KINDS, "float16", "ema", "swad", "5%", "200%", "test", "cuda:99", "bfloat16"]
VALUES = st.sampled_from([*NUMBERS, *WORDS, *NESTED, *CHOICES]) | st.text(max_size=20)
ASSIGNMENTS = st.lists(st.builds("{}={}".format, st.sampled_from(paths()), VALUES), min_size=1, max_size=4)
LAYER = st.dictionaries(
    st.sampled_from(list(Settings.model_fields)),
    st.none() | st.integers() | st.text(max_size=5) | st.dictionaries(st.text(max_size=8), st.integers(), max_size=2),
    max_size=2,
)


def holds(sets: list[str], flags: dict[str, object]) -> None:
    """What these say is a tree that survives being saved, or one message of a bearable length."""
    try:
        found = resolve(sets=sets, flags=flags)
    except MbcdError as error:
        refused = error
    else:
        assert validate(tomllib.loads(to_toml(found))) == found
        return
    assert refused.message
    assert len(str(refused)) < LONGEST


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sets=ASSIGNMENTS, flags=LAYER)
def test_any_setting_is_a_tree_or_one_message(sets, flags):
    holds(sets, flags)


@pytest.mark.stress
@settings(max_examples=DRAWS, deadline=None, suppress_health_check=list(HealthCheck))
@given(sets=ASSIGNMENTS, flags=LAYER)
def test_ten_thousand_settings(sets, flags):
    holds(sets, flags)
