"""Stands for a cell's process: notes that it was called, then does what the file `<folder>.say` asks for, line by line.

ok: finish. fail: an error of the user's. kill: die as by the kernel. slow: wait until `<folder>.go` is there. Every
call takes the next line; without a line left it finishes. It holds the cell's lock as the real one does.
"""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from mbcd_cli.files import write_json

folder = Path(sys.argv[1])
calls = Path(f"{folder}.calls")
lock = Path(f"{folder}.lock").open("a")  # noqa: SIM115 (held to the end)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(75)
number = len(calls.read_text().splitlines()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(f"{sys.argv[2]} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('MBCD_TRAINING__EPOCHS')}\n")
say = Path(f"{folder}.say")
words = say.read_text().split() if say.exists() else []
word = words[number] if number < len(words) else "ok"
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "fail":
    write_json(Path(f"{folder}.failed"), {"error": "no such clip", "remedy": "add it"})
    sys.exit(1)
while word == "slow" and not Path(f"{folder}.go").exists():
    time.sleep(0.01)
folder.mkdir(parents=True, exist_ok=True)
(folder / "settings.toml").write_text("")
(folder / "results.json").write_text("{}")
(folder / "done").write_text("{}")
