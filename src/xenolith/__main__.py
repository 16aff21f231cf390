"""`python -m xenolith` is the `xenolith` command."""

from xenolith.cli.entry import xenolith

xenolith()
