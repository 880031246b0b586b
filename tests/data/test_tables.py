"""Split tables: pickled frames without pandas, and pickles that would rather run something."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

import pytest

from mbcd_cli.data.readers.pickled_tables import read_csv, read_pickled_frame, read_table
from mbcd_cli.errors import ManifestError

SPLITS = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm-sada-splits"
TABLES = [f"D{number}_{split}" for number in (1, 2, 3) for split in ("train", "test")]


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the MM-SADA split tables are not beside the clone")
@pytest.mark.parametrize("name", TABLES)
def test_pickled_table_equals_the_csv_one(name):
    pickled, plain = read_table(SPLITS / f"{name}.pkl"), read_table(SPLITS / f"{name}.csv")
    assert list(pickled) == list(plain)
    assert {column: [str(value) for value in values] for column, values in pickled.items()} == plain
    assert isinstance(pickled["start_frame"][0], int)


class Runs:
    """Asks the unpickler to call something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": lambda: Runs(os.system, "touch executed"),
    "mkdir": lambda: Runs(os.mkdir, "executed"),
    "eval": lambda: Runs(eval, "__import__('os').mkdir('executed')"),
    "getattr": lambda: Runs(getattr, "x", "upper"),
    "inside a list": lambda: [1, {"a": (Runs(os.mkdir, "executed"),)}],
}


@pytest.mark.parametrize("kind", list(HOSTILE))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickle_executes_nothing(tmp_path, monkeypatch, kind, protocol):
    monkeypatch.chdir(tmp_path)
    Path("D1_train.pkl").write_bytes(pickle.dumps(HOSTILE[kind](), protocol))
    with pytest.raises(ManifestError, match="nothing of it was executed") as caught:
        read_pickled_frame(Path("D1_train.pkl"))
    assert "CSV" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["D1_train.pkl"]


def test_hand_written_opcodes_find_no_way_around_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = [
        b"cos\nmkdir\n(S'executed'\ntR.",  # GLOBAL, REDUCE
        b"(S'executed'\nios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nS'executed'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x08executed\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x08builtins\x8c\x0bslice.__new\x93.",  # a dotted way out of an allowed name
        b"cnumpy\nndarray.__class__\n.",
    ]
    for program in programs:
        Path("x.pkl").write_bytes(program)
        with pytest.raises(ManifestError, match="nothing of it was executed"):
            read_pickled_frame(Path("x.pkl"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps([1, 2]), b"\x80\x04N."])
def test_what_is_no_frame_is_one_clear_error(tmp_path, content):
    path = tmp_path / "D1_train.pkl"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"D1_train\.pkl: no pickled table"):
        read_pickled_frame(path)


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the MM-SADA split tables are not beside the clone")
def test_truncated_and_flipped_pickles_never_escape(tmp_path):
    whole = (SPLITS / "D1_test.pkl").read_bytes()
    path = tmp_path / "x.pkl"
    for cut in range(0, len(whole), 1717):
        path.write_bytes(whole[:cut])
        with pytest.raises(ManifestError):
            read_pickled_frame(path)
    for at in range(0, 1500, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 0x15
        path.write_bytes(damaged)
        with contextlib.suppress(ManifestError):
            read_pickled_frame(path)


def test_csv_rows_of_another_length_are_listed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3\n4,5,6\n")
    with pytest.raises(ManifestError, match="rows 3, 4 do not have"):
        read_csv(path)
    path.write_bytes(b"a,b\n\xff,2\n")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_csv(path)
    path.write_text("\ufeffa,b\n 1 ,2\n\n")
    assert read_csv(path) == {"a": ["1"], "b": ["2"]}
