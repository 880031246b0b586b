"""The hello worlds of docs/extending.md as a package installed outside the clone: reader, encoder, method."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def code(words: str) -> str:
    """The one block of code on the page that holds `words`."""
    (found,) = [block for block in blocks("python") if words in block]
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What an installer would leave of the package `mbcd-hello`, and a dataset for its reader."""
    folder = tmp_path_factory.mktemp("outside")
    site = folder / "site"
    (site / "mbcd_hello-1.0.dist-info").mkdir(parents=True)
    (site / "mbcd_hello-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mbcd-hello\nVersion: 1.0\n")
    points = [re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", text).replace('"', "") for text in blocks("toml")]
    text = "\n".join(points).replace("[mbcd.methods]\n", "[mbcd.methods]\nbroken = nowhere_to_be_found:Method\n", 1)
    (site / "mbcd_hello-1.0.dist-info/entry_points.txt").write_text(text)
    (site / "hello.py").write_text(code("class Hello(Method)"))
    (site / "hello_reader.py").write_text(code("ReaderEntry("))
    (site / "hello_encoder.py").write_text(code("EncoderEntry("))
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for domain in "abc":
        for split in ("train", "test"):
            for number in range(8):
                vector = rng.normal(size=4) + 3 * (number % 2)
                np.save(folder / f"data/{domain}_{split}_{number % 2}_{number}.npy", vector.astype(np.float32))
    mbcd(folder, "prepare", "hello", "--root", "data", "--set", "modalities.vector.encoder=hello", "--workers", "0")
    return folder


def mbcd(folder: Path, *words: str, code: int = 0) -> dict | list:
    """`mbcd WORDS --json` in `folder`, with the package on the path; what it printed."""
    environ = {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mbcd_cli", *words, "--json"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


SHORT = ("--dataset", "hello", "--preset", "none", "--set", "training.batch_size=4", "--set", "training.epochs=2")


def test_the_page_ends_in_three_hello_worlds_of_ten_lines():
    assert PAGE.rindex("\n## ") == PAGE.index("\n## Hello world")
    for words in ("ReaderEntry(", "EncoderEntry(", "class Hello(Method)"):
        assert len([line for line in code(words).splitlines() if line]) <= 10, words


def test_a_sweep_over_a_method_of_ones_own_and_ours(installed):
    (installed / "mine.py").write_text(code("class Hello(Method)").replace("class Hello(Method)", "class Mine(Method)"))
    methods = ("--methods", "erm,hello,mine.py:Mine", "--targets", "c", "--seeds", "1", "--jobs", "2")
    found = mbcd(installed, "sweep", *SHORT, *methods)
    assert found["done"] == 3
    rows = {row[0] for table in found["tables"] for row in table["rows"]}
    assert {"erm", "hello", "Mine"} <= rows
    (run,) = (installed / "runs/hello").glob("hello-*/")
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert all(0 < record["entropy"] < 1 for record in steps)
    assert (run / "plots/losses.png").is_file()


def test_a_method_from_its_file_with_its_own_settings(installed):
    run = ("--target-domain", "c", "--run", "mine", "--method", "site/hello.py:Hello")
    summary = mbcd(installed, "train", *SHORT, *run, "--set", "method.weight=0.2")
    assert summary["method"] == "site/hello.py:Hello"
    assert "weight = 0.2" in (installed / "mine/settings.toml").read_text()
    wrong = mbcd(installed, "train", *SHORT, *run[:2], "--method", "hello", "--set", "method.wieght=1", code=1)
    assert "method.wieght: no such setting; did you mean method.weight?" in wrong["error"]


def test_lists_show_them_and_what_is_wrong_with_others(installed):
    methods = {row["method"]: row["what"] for row in mbcd(installed, "list", "methods")}
    assert methods["hello"] == "ERM with certain predictions."
    assert "No module named 'nowhere_to_be_found'" in methods["broken"]
    assert "of package mbcd-hello" in methods["broken"]
    encoders = {row["encoder"]: (row["reads"], row["what"]) for row in mbcd(installed, "list", "encoders")}
    assert encoders["hello"] == ("array", "one hidden layer")
    datasets = [(row["dataset"], row["kind"]) for row in mbcd(installed, "list", "datasets")]
    assert ("hello", "reader") in datasets
    assert ("hello", "prepared") in datasets


def test_the_page_s_three_pass_the_checks(installed):
    for line in re.findall(r"^mbcd (check .*)$", PAGE, flags=re.MULTILINE):
        words = line.replace("hello.py", str(installed / "site/hello.py")).replace("DIR", "data")
        assert all(promise["holds"] for promise in mbcd(installed, *words.split())["promises"])


def test_what_does_not_hold_is_told_with_its_line(installed):
    wrong = code("class Hello(Method)").replace("super().losses(batch, out)", '{"own": Term(out.fused.sum(), 1)}')
    (installed / "wrong.py").write_text(wrong)
    told = mbcd(installed, "check", "method", "wrong.py:Hello", code=1)
    broken = {one["name"]: one for one in told["promises"] if not one["holds"]}
    assert "learning" in broken
    for one in broken.values():
        assert one["why"]
        assert re.fullmatch(r"\S*wrong\.py:\d+", one["where"]), one
    assert told["cost"]["parameters"] == 0
