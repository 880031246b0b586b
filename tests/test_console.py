"""What a terminal of 80 columns, and a pipe, show."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console

from mbcd_cli import console, say


def test_the_bar_fits_80_columns_and_its_note_has_a_line_of_its_own(monkeypatch):
    screen = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "err", screen)
    note = "epoch 1/3 loss 2.173 (fused 0.661, KL 0.010) video r 1.02 p 0.02 audio r 0.98 p 0.03"
    with console.terminal.progress("training", 96) as bar:
        bar.advance(12)
        bar.describe(note)
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", screen.file.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("12/96" in line and "training" in line for line in lines)
    assert any("loss 2.173 (fused 0.661, KL 0.010) video r 1.02 p 0.02" in line for line in lines)


def test_a_pipe_hears_rate_and_end_once_a_minute(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(say.time, "monotonic", lambda: now[0])
    ticker = say.Ticker("work", 300, lines.append)
    for second in range(150):
        now[0] = float(second + 1)
        ticker.advance()
    assert len(lines) == 2
    assert re.fullmatch(r"work: 60/300 \(1\.0/s, 240 s left, until \d\d:\d\d\)", lines[0])


def test_slow_work_is_told_in_seconds_each():
    assert [say.pace(rate) for rate in (12.34, 0.5, 1 / 353)] == ["12.3/s", "0.5/s", "353 s each"]


def test_words_of_a_table_are_broken_only_where_they_have_to_be(monkeypatch):
    screen = Console(file=StringIO(), width=52)
    monkeypatch.setattr(console, "out", screen)
    columns = ["checkpoint", "statistics", "unadapted", "what it is of"]
    row = ["best", "recomputed", "93.8 ± 1.2", "a name of many words, which has room to wrap"]
    console.table("t", columns, [row])
    console.table("t", columns, [[*row[:3], "/a/path/of/one/word/only"]])
    lines = screen.file.getvalue().splitlines()
    assert all(len(line) <= 52 for line in lines)
    words = [word for line in lines for word in re.split(r"[ │┃]+", line)]
    assert all(words.count(word) == 2 for word in (*columns[:3], *row[:2], "±"))
    assert any("93.8 ± 1.2" in line for line in lines)
    assert "/a/path/of/one/wo rd/only" in " ".join(filter(None, words))


def test_names_are_shown_as_they_are(capsys, monkeypatch):
    console.table("[bold]:cat:", ("[red]a", "b"), [(":dog:", "[x]")], to_stderr=True)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("[bold]:cat:", "[red]a", ":dog:", "[x]"))


def test_a_name_neither_steers_the_terminal_nor_stops_it(capsys):
    name = "clip\x1b]0;title\x07\x9b31m\udcff"
    console.say(f"error: {name}")
    console.warn(name)
    console.show(name)
    console.table(name, (name,), [(name,)])
    shown = "".join(capsys.readouterr())
    assert not set("\x1b\x07\x9b") & set(shown)
    assert shown.count(r"clip\x1b]0;title\x07\x9b31m\udcff") == 6


def test_tables_whose_titles_begin_alike_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "tables_folder", tmp_path)
    begin = "digits, " + "+".join(f"modality-{n}" for n in range(40))
    titles = [f"{begin}: accuracy", f"{begin}: regret", "\u6771\u4eac", "\u5927\u962a", "\u2605", "\u2606"]
    for title in titles:
        console.table(title, ("what",), [(title,)])
    assert sorted(file.read_text(encoding="utf-8").split()[-1].strip('"') for file in tmp_path.iterdir()) == sorted(
        title.split()[-1] for title in titles
    )
