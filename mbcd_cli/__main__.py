"""`python -m mbcd_cli`: the same as `mbcd` (for torchrun)."""

from mbcd_cli.cli import main

main()
