from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mbcd_cli.json_values import OPTIONAL, json_values


@dataclass(frozen=True)
class Inner:
    loss: float
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Record:
    file: Path
    accuracy: float | None = None
    by_name: dict[str, Inner] = field(default_factory=dict)
    measured: Inner | None = field(default=None, metadata=OPTIONAL)


def test_records_become_what_json_holds():
    record = Record(Path("a/b.h5"), by_name={"x": Inner(float("nan"), (1.0, float("inf")))})
    values = json_values(record)
    assert values == {"file": "a/b.h5", "accuracy": None, "by_name": {"x": {"loss": None, "curve": [1.0, None]}}}
    assert json_values([Record(Path("c"), measured=Inner(0.5))])[0]["measured"] == {"loss": 0.5, "curve": []}
    json.dumps(values, allow_nan=False)
