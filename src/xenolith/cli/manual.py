"""What is written about commands and requests, made from their definitions: `python -m xenolith.cli.manual docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from xenolith.toolstack.daemon import page


def pages(directory: Path) -> dict[Path, str]:
    """The files below `directory` (docs/) that are made here, as they should be."""
    protocol = directory / "control-protocol.md"
    return {protocol: page.with_table(protocol.read_text())}


def main() -> None:
    for path, text in pages(Path(sys.argv[1])).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
