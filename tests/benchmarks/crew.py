"""What sharing a cache costs: simulated workers take all its shards, one after another, and compute nothing.

    python tests/benchmarks/crew.py --shards 15625 --workers 1,8,64,512

15,625 shards are 1,000,000 clips of 64. All workers step in turns in one process; their calls of the system are counted
by what they do: a look whether a shard is there, a lock tried, a plan read.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

from mbcd_cli.data.cache import shard_path
from mbcd_cli.locks import lock
from mbcd_cli.place import Place
from mbcd_cli.preparation import crew as room
from mbcd_cli.preparation.crew import Crew


def measure(folder: Path, shards: int, workers: int) -> tuple[float, Counter[str]]:
    """Seconds of the processor, of all workers together, until all shards are there; how often they asked for what."""
    counts: Counter[str] = Counter()
    exists, read = Path.exists, Path.read_text

    def counted(name, call):
        def inner(*arguments, **options):
            counts[name] += 1
            return call(*arguments, **options)

        return inner

    crews = [Crew(folder, "plan", Place(rank, workers)) for rank in range(workers)]
    with (
        patch.object(Path, "exists", counted("looks", exists)),
        patch.object(Path, "read_text", counted("plans read", read)),
        patch.object(room, "lock", counted("locks tried", lock)),
    ):
        started = time.process_time()
        for crew in crews:
            crew.lead()
        at_work = {crew: crew.free(range(shards), lambda number: exists(shard_path(folder, number))) for crew in crews}
        while at_work:
            for crew, numbers in list(at_work.items()):
                number = next(numbers, None)
                if number is None:
                    del at_work[crew]
                    continue
                shard_path(folder, number).touch()
                crew.give(number)
        seconds = time.process_time() - started
    for crew in crews:
        crew.__exit__()
    return seconds, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=15_625)
    parser.add_argument("--workers", default="1,8,64,512")
    arguments = parser.parse_args()
    print("workers  ms per shard  looks  locks tried  plans read (each per shard)")
    for workers in map(int, arguments.workers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            seconds, counts = measure(Path(folder), arguments.shards, workers)
        per = {name: count / arguments.shards for name, count in counts.items()}
        print(
            f"{workers:7d}  {1000 * seconds / arguments.shards:12.2f}  {per['looks']:5.1f}  {per['locks tried']:11.2f}"
            f"  {per['plans read']:10.1f}"
        )


if __name__ == "__main__":
    main()
