"""The network of `xenolith run`: --net [RULES] and --publish [ADDRESS:]HOST:GUEST[/udp]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.network.rules import RuleError, parse_rules
from xenolith.toolstack.client import InvalidRequest
from xenolith.toolstack.errors import UsageError
from xenolith.toolstack.networks import publication, random_mac

NET_MODULES: Final = ("xen-netfront",)
NET_HELP: Final = (
    'Give the guest a network, held by RULES if there are any: "allow out tcp/443 to *.debian.org; deny in". '
    "The outside is reached by passt, if it is installed."
)
PUBLISH_HELP: Final = (
    "Let a port of this host's lead to one of the guest's, by passt; on 127.0.0.1 if no ADDRESS says otherwise. May be "
    "repeated."
)


def parse_network(rules: str | None, published: Sequence[str]) -> tuple[VifSpec, ...]:
    """One interface, or none where neither is given. Raises UsageError."""
    if rules is None and not published:
        return ()
    try:
        parse_rules(rules or "")
        ports = tuple(map(publication, published))
    except (RuleError, InvalidRequest) as error:
        raise UsageError(str(error)) from error
    return (VifSpec(number=0, mac=random_mac(), rules=rules or "", publications=ports),)
