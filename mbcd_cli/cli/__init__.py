"""The command line: flags in, exit codes out. The only room that prints."""

from mbcd_cli.cli.app import app, main

__all__ = ["app", "main"]
