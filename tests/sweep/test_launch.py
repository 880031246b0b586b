"""What becomes of units, however the engine says that they ended."""

from __future__ import annotations

import pytest
from units import MemoryEngine, MemoryPiece, MemoryUnit

from mbcd_cli.launch.launch import KILLS, begin, launch
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, FAILED_CODE

DONE = (DONE_CODE, {}, {})


def run(tmp_path, ends, *, pieces=(), watch=lambda board: None, retry_failed=False, states=None, **more):
    """Units a, b, ... of one piece each; `pieces` are further ones of the first."""
    keys = [[key] for key in ends]
    keys[0] += pieces
    units = [MemoryUnit([MemoryPiece(key, tmp_path / key) for key in own], dict(states or {})) for own in keys]
    engine = MemoryEngine({key: list(turns) for key, turns in ends.items()}, **more)
    board = launch(begin(units, retry_failed=retry_failed), engine, watch=watch, poll=0.0)
    assert (engine.stopped, board.waiting, board.handed, board.elsewhere) == (1, {}, {}, {})
    return board, engine, units


def test_units_are_handed_over_as_there_is_room(tmp_path):
    boards = []
    board, engine, units = run(
        tmp_path, {"a": [DONE], "b": [DONE], "c": [DONE]}, watch=lambda b: boards.append(b.running)
    )
    assert [piece.key for piece in board.done] == engine.taken == ["a", "b", "c"]
    assert [unit.written for unit in units] == [["a"], ["b"], ["c"]]
    assert boards[1] == {"a": "here", "b": "here"}


def test_what_is_done_or_failed_is_not_run_again_unasked(tmp_path):
    states = {"a": "done", "b": "failed"}
    board, engine, _ = run(tmp_path, {"a": [], "b": [], "c": [DONE]}, states=states)
    assert (engine.taken, board.failed) == (["c"], {"b": "piece b is wrong"})
    board, engine, _ = run(tmp_path, {"a": [], "b": [DONE], "c": [DONE]}, states=states, retry_failed=True)
    assert (engine.taken, board.failed) == (["b", "c"], {})


def test_what_an_earlier_command_handed_over_is_waited_for(tmp_path):
    board, engine, _ = run(tmp_path, {"a": [DONE], "b": [DONE]}, there=["a"])
    assert (engine.taken, len(board.done)) == (["b"], 2)


def test_a_failure_is_told_by_the_unit_and_one_without_a_word_is_begun_again(tmp_path):
    told, silent = (FAILED_CODE, {"a": "failed"}, {}), (FAILED_CODE, {}, {})
    board, engine, _ = run(tmp_path, {"a": [told], "b": [silent, DONE]})
    assert (board.failed, engine.taken) == ({"a": "piece a is wrong"}, ["a", "b", "b"])


@pytest.mark.parametrize(("code", "words"), [(-9, "killed by signal 9"), (7, "ended with exit code 7")])
def test_a_killed_one_is_begun_again_but_not_for_ever(tmp_path, code, words):
    board, engine, _ = run(tmp_path, {"a": [(code, {}, {})] * (KILLS + 1)})
    assert len(engine.taken) == KILLS + 1
    assert f"{words}, {KILLS + 1} times" in board.failed["a"]


def test_one_that_says_nothing_of_its_process_is_begun_again_for_ever(tmp_path):
    """A node that dies is nobody's failure."""
    board, engine, _ = run(tmp_path, {"a": [*[(None, {}, {})] * (KILLS + 5), DONE]})
    assert (len(engine.taken), board.failed) == (KILLS + 6, {})


def test_one_that_the_engine_gives_up_is_not_begun_again(tmp_path):
    gone = (None, {}, {"again": False, "why": "cancelled"})
    board, _, _ = run(tmp_path, {"a": [gone], "b": [(None, {"b": "done"}, {"again": False, "why": "cancelled"})]})
    assert (board.failed, [piece.key for piece in board.done]) == ({"a": "cancelled"}, ["b"])


def test_one_that_others_work_on_is_looked_at_until_it_is_through(tmp_path):
    unit_states = {}

    def watch(board):
        if board.elsewhere:
            (unit,) = board.units
            unit_states[len(unit_states)] = unit.states["a"]
            unit.states["a"] = "running" if len(unit_states) < 3 else "done"

    board, engine, _ = run(tmp_path, {"a": [(BUSY_CODE, {"a": "running"}, {})]}, watch=watch)
    assert (len(engine.taken), [piece.key for piece in board.done]) == (1, ["a"])
    assert len(unit_states) == 3


def test_pieces_of_a_unit_are_told_by_their_folders(tmp_path):
    """One is done, one failed, one was cut off with the process: that one alone is handed over again."""
    cut_off = (-9, {"a": "done", "a2": "failed", "a3": "interrupted"}, {})
    board, engine, (unit,) = run(tmp_path, {"a": [cut_off, DONE]}, pieces=["a2", "a3"])
    assert ([piece.key for piece in board.done], list(board.failed)) == (["a", "a3"], ["a2"])
    assert (engine.taken, unit.written) == (["a", "a"], ["a", "a2", "a3", "a3"])


def test_leaving_stops_the_engine_first(tmp_path):
    engine = MemoryEngine({"a": [DONE]})

    def watch(board):
        if board.running:
            raise KeyboardInterrupt

    board = begin([MemoryUnit([MemoryPiece("a", tmp_path / "a")])], retry_failed=False)
    with pytest.raises(KeyboardInterrupt):
        launch(board, engine, watch=watch, poll=0.0)
    assert (engine.stopped, board.stopping) == (1, True)
