"""``python -m ridgeline``: the command line."""

from __future__ import annotations

from ridgeline.api.cli import main

main()
