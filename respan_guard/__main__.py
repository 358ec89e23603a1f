"""`python -m respan_guard` is `respan-guard`."""

from respan_guard.cli import main

main()
