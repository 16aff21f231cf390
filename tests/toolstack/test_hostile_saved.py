"""What a saved domain says of its configuration is refused with a sentence, or makes a domain that can be looked at."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from struct import pack, unpack_from
from typing import Any

import pytest

from xenolith.dom0.migration.stream import DESCRIPTION
from xenolith.hypervisor import audit
from xenolith.toolstack.api import power_on
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.config.disk import parse_disk
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.config.grammar import ConfigFile
from xenolith.toolstack.config.vif import Nic
from xenolith.toolstack.embedded import EmbeddedToolstack

from .conftest import GUESTS

FILES = int(os.environ.get("XENOLITH_FUZZ", "300"))
HEADER, SECTION = 24, 32
TEXTS = ("", "\0", "\ud800", "\udcff", "../x", "x" * 100_000, "\x1b[2J", "a/b", "/dev/zero", "-1", "\N{BULLET}" * 300)
NUMBERS = (-1, 0, 1, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**400, -(10**400), 1 << 36)
Saved = tuple[EmbeddedToolstack, bytes, Any, bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """A machine; of a domain's file what comes before the description, the description, and what comes after."""
    place = tmp_path_factory.mktemp("saved")
    (place / "disk").write_bytes(bytes(1 << 20))
    with power_on(memory_mib=64, engine="unicorn") as machine:
        config = DomainConfig("small", kernel=str(GUESTS / "timers.elf"), target_memory_kib=4 << 10)
        config.disks = [parse_disk(ConfigFile("test"), f"{place}/disk,raw,xvda,r")]
        config.nics = [Nic(0, mac=bytes.fromhex("00163e000001"))]
        client = machine.client
        assert isinstance(client, EmbeddedToolstack)
        domain = machine.create(config)
        domain.unpause()
        client.save(domain.domid, place / "file")
        if client.domains()[1:]:
            domain.destroy()
        data = (place / "file").read_bytes()
        kind, _, stored, _, _ = unpack_from("<IIQQQ", data, HEADER)
        assert kind == DESCRIPTION
        end = HEADER + SECTION + stored
        yield client, data[:HEADER], json.loads(data[HEADER + SECTION : end]), data[end:]


def with_description(saved: Saved, description: Any) -> bytes:
    _, before, _, after = saved
    text = json.dumps(description).encode()
    return before + pack("<IIQQQ", DESCRIPTION, 0, len(text), len(text), 0) + text + after


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a JSON value."""
    yield above
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*above, key))


def mutated(description: Any, chance: random.Random) -> Any:
    """With one to three values that are something else."""
    wrong: Any = [copy.deepcopy(description)]
    for _ in range(chance.choice((1, 1, 2, 3))):
        *above, last = chance.choice(list(places(wrong[0], (0,))))
        holder = wrong
        for key in above:
            holder = holder[key]
        old = holder[last]
        same = TEXTS if isinstance(old, str) else NUMBERS if isinstance(old, int) else (*TEXTS, *NUMBERS)
        if isinstance(old, list) and chance.random() < 0.8:
            holder[last] = chance.choice((old + old, [], [chance.choice(TEXTS)], [chance.choice(NUMBERS)], old * 50))
        else:
            others = (*same, [], {}, None, True, 1.5, float("inf"))
            holder[last] = chance.choice(same if chance.random() < 0.7 else others)
    return wrong[0]


def test_mutated_configurations_are_refused_or_make_a_domain(saved: Saved, tmp_path: Path) -> None:
    client, _, description, _ = saved
    chance = random.Random(int(os.environ.get("XENOLITH_SEED", "1")))
    free, nodes = client.dom0.control.machine().free_pages, client.dom0.xenstore.statistics()
    outcomes = {"refused": 0, "restored": 0}
    for _ in range(FILES):
        (tmp_path / "wrong").write_bytes(with_description(saved, mutated(description, chance)))
        try:
            domid = client.restore(tmp_path / "wrong")
        except ToolstackError as refusal:
            assert " " in str(refusal)
            outcomes["refused"] += 1
        else:
            assert audit.check(client.dom0.hypervisor) == []
            shown = client.domains()[1].name + client.config(domid).name
            assert shown.isprintable() or "\udcff" in shown
            client.unpause(domid)
            client.destroy(domid)
            outcomes["restored"] += 1
        assert len(client.domains()) == 1
        assert client.dom0.control.machine().free_pages == free
        assert client.dom0.xenstore.statistics() == nodes
    print(outcomes)
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("max_grant_frames", 1 << 31, "a grant table of 2147483648 frames: it has 1 to 4096"),
        ("max_grant_frames", 0, "a grant table of 0 frames"),
        ("nics", [{"devid": 0, "mac": "ABY+AAAB"}] * 2, "two of its devices have the same number"),
        ("nics", [{"devid": 0, "mac": "\N{BULLET}"}], "must be base64"),
        ("max_event_channels", -1, "-1 event channels"),
        ("nics", [{"devid": 0, "mac": ""}], "is no MAC address"),
        ("nics", [{"devid": 0, "mac": "AAAA"}], "00:00:00 is no MAC address"),
        ("name", "\x1b[2J", r"its configuration says '\\x1b\[2J'"),
        ("cmdline", "\ud800", r"its configuration says '\\ud800'"),
    ],
)
def test_what_no_domain_can_have_is_said(saved: Saved, tmp_path: Path, name: str, value: object, why: str) -> None:
    client, _, description, _ = saved
    wrong = copy.deepcopy(description)
    wrong["toolstack"]["config"][name] = value
    (tmp_path / "wrong").write_bytes(with_description(saved, wrong))
    with pytest.raises(ToolstackError, match=why):
        client.restore(tmp_path / "wrong")
