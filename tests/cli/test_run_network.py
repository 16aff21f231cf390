"""The network of `xenolith run`, as its command line says it."""

from __future__ import annotations

import pytest

from xenolith.dom0.network.frame import TCP, UDP
from xenolith.dom0.network.port import Publication
from xenolith.toolstack.errors import UsageError
from xenolith.toolstack.run_network import parse_network


def test_without_either_option_there_is_no_interface() -> None:
    assert parse_network(None, ()) == ()


def test_rules_and_published_ports() -> None:
    (vif,) = parse_network("deny in", ["8080:80", "0.0.0.0:53:53/udp"])
    assert vif.rules == "deny in"
    assert vif.publications == (Publication(TCP, "127.0.0.1", 8080, 80), Publication(UDP, "0.0.0.0", 53, 53))
    (vif,) = parse_network(None, ["8080:80"])
    assert vif.rules == ""


@pytest.mark.parametrize(
    ("rules", "published"),
    [("allow", []), ("", ["80"]), ("", ["80:0"]), ("", ["70000:1"]), ("", ["1.2.3:1:1"]), ("", ["1:1/icmp"])],
)
def test_what_cannot_be_understood(rules: str, published: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_network(rules, published)
