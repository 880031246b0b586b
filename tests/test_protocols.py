"""Every protocol of the package has one fake, which has all that the protocol names."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "mbcd_cli"
sys.path += [str(HERE / room) for room in ("landscape", "sweep", "training")]
FAKES = {
    "Dataset": "memory:ArrayDataset",
    "Weights": "memory:MemoryWeights",
    "EpochClips": "memory:MemoryEpoch",
    "WeightAverage": "small:LentAverage",
    "LossFunction": "landscape_cases:Quadratic",
    "Engine": "units:MemoryEngine",
    "Piece": "units:MemoryPiece",
    "Unit": "units:MemoryUnit",
}
PROTOCOLS = {
    node.name: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
}


def test_each_has_one():
    assert FAKES.keys() == PROTOCOLS.keys()


@pytest.mark.parametrize("name", FAKES)
def test_it_has_what_the_protocol_names(name):
    protocol = getattr(import_module(PROTOCOLS[name]), name)
    module, _, kind = FAKES[name].partition(":")
    fake = getattr(import_module(module), kind)
    own = {field.name for field in fields(fake)} if is_dataclass(fake) else set()
    parts = ast.walk(ast.parse(inspect.getsource(fake)))
    own |= {part.attr for part in parts if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)}
    for attribute in {*vars(protocol), *protocol.__annotations__}:
        if attribute.startswith("_"):
            continue
        told, has = getattr(protocol, attribute, None), getattr(fake, attribute, None)
        assert has is not None or attribute in own, attribute
        if inspect.isfunction(told):
            wanted, taken = (list(inspect.signature(one).parameters) for one in (told, has))
            assert taken[: len(wanted)] == wanted, attribute
