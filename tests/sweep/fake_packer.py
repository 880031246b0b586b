"""Stands for a population's process: does with each of its cells, one after another, what `fake_worker` does."""

import subprocess
import sys
from itertools import takewhile

threads, _ = sys.argv[1:]
folders = [line.rstrip("\n") for line in takewhile("\n".__ne__, sys.stdin)]
codes = [subprocess.run([sys.executable, "-m", "fake_worker", folder, threads]).returncode for folder in folders]
sys.exit(max(codes))
