"""Its being here puts this folder on the import path: `from helpers import ...` works in every test."""

import signal

# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
