"""``python -m mace_fast.cli``: the command line where the package is not installed."""

from mace_fast.cli import main

main()
