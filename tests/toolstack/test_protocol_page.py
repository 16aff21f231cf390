"""docs/control-protocol.md says what the program does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from xenolith.cli.manual import pages
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.daemon.codec import decode
from xenolith.toolstack.daemon.protocol import (
    MAX_MESSAGE_BYTES,
    MESSAGES,
    METHODS,
    VERSION,
    Hello,
    from_bytes,
    to_bytes,
)

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "control-protocol.md").read_text()


def test_the_page_names_every_message_and_every_request() -> None:
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert set(MESSAGES) <= named
    assert set(METHODS) <= named


def test_what_is_made_from_definitions_is_up_to_date() -> None:
    for path, text in pages(DOCS).items():
        assert path.read_text() == text, f"{path.name} is not what `make docs` would write"


def test_the_examples_on_the_page_are_messages() -> None:
    lines = re.findall(r"^    (?:client|daemon)  (\{.*\})$", PAGE, re.M)
    assert len(lines) > 6
    for line in lines:
        message = from_bytes(line.encode())
        assert json.loads(to_bytes(message)[4:]) == json.loads(line)


def test_the_smallest_configuration_on_the_page_is_one() -> None:
    smallest = re.search(r"configuration is `(\{.*?\})`", PAGE)
    assert smallest is not None
    assert decode(DomainConfig, json.loads(smallest[1])).kernel == "/boot/vmlinuz"


def test_the_numbers_on_the_page_are_right() -> None:
    assert f"This is version {VERSION}." in PAGE
    assert f"{MAX_MESSAGE_BYTES >> 20} MiB" in PAGE
    frame = to_bytes(Hello(VERSION))
    assert f"00 00 00 {frame[3]:02x} {frame[4:].decode()}" in PAGE
