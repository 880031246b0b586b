"""Stands for what trains a cell: notes that it was called, then does what the file `<folder>.say` asks for, by word.

ok: finish. fail: an error of the user's. kill: die as by the kernel. quit: end with
exit code 1, without a word. slow: wait until `<folder>.go` is there. alone: as slow, and whatever becomes of its owner.
wait-2.5: take so many seconds.
Every call takes the next word; without a word left it finishes. It holds the cell's lock as the real one does, and ends
with its owner.
"""

import json
import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from mbcd_cli import checksums
from mbcd_cli.files import write_json
from mbcd_cli.launch.unit import BUSY_CODE, DONE_CODE, FAILED_CODE, known
from mbcd_cli.launch.warm import end_with_owner
from mbcd_cli.locks import lock
from mbcd_cli.say import Say


def serve(arguments: list[str], _: Say) -> int:
    """RUN_FOLDER, THREADS; the exit code."""
    say = Path(f"{arguments[0]}.say")
    if not say.exists() or "alone" not in say.read_text():
        end_with_owner()
    return work(Path(arguments[0]), arguments[1])


def serve_pack(arguments: list[str], _: Say) -> int:
    """Stands for what trains a population: THREADS, WIDTH, RUN_FOLDER, ...; one after another."""
    threads, _, *folders = arguments
    return max(work(Path(folder), threads) for folder in folders)


def work(folder: Path, threads: str) -> int:
    """Do what is asked for."""
    calls = Path(f"{folder}.calls")
    with ExitStack() as held:
        mine = lock(Path(f"{folder}.lock"))
        if mine is None:
            return BUSY_CODE
        held.enter_context(mine)
        if (folder / "results.json").exists():
            return DONE_CODE
        held.enter_context(known(mine))
        number = len(calls.read_text().splitlines()) if calls.exists() else 0
        with calls.open("a") as file:
            file.write(
                f"{threads} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('MBCD_TRAINING__EPOCHS')}\n"
            )
        say = Path(f"{folder}.say")
        words = say.read_text().split() if say.exists() else []
        word = words[number] if number < len(words) else "ok"
        assert re.fullmatch(r"ok|kill|quit|fail|slow|alone|wait-[\d.]+", word), f"nobody knows {word}"
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "quit":
            os._exit(FAILED_CODE)
        if word == "fail":
            write_json(Path(f"{folder}.failed"), {"error": "no such clip", "remedy": "add it"})
            return FAILED_CODE
        while word in ("slow", "alone") and not Path(f"{folder}.go").exists():
            time.sleep(0.01)
        if word.startswith("wait-"):
            time.sleep(float(word.removeprefix("wait-")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.toml").write_text("")
        (folder / "done").write_text("{}")
        told = Path(f"{folder}.toml").read_text() if Path(f"{folder}.toml").exists() else ""
        (folder / "results.json").write_text(json.dumps({"of": checksums.of_text(told)}))
        with Path(f"{folder}.ends").open("a") as file:
            file.write("trained to its end\n")
    return DONE_CODE
