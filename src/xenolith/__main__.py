"""`python -m xenolith` is the `xenolith` command."""

from xenolith.cli.main import main

main()
