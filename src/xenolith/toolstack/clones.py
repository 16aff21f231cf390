"""Clones, for the toolstack: what a frozen domain was, and the configuration of one that begins as it.

A clone has the configuration of its parent but for what only one can have: a name and a uuid, disks of its own
(`clone_disks`), for each interface a MAC and the address that follows from it.  Ports that the parent publishes stay
the parent's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from xenolith.dom0.migration.clone import freeze
from xenolith.toolstack.agent.frames import Frame, identity, interface
from xenolith.toolstack.networks import random_mac

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xenolith.dom0.migration.clone import FrozenDomain
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.toolstack.clone_disks import CloneDisks, KeptDisks
    from xenolith.toolstack.config.domain import DomainConfig


@dataclass(frozen=True)
class Parent:
    """A domain as it was frozen. Close it when no more clones are wanted."""

    config: DomainConfig
    frozen: FrozenDomain
    disks: KeptDisks
    macs: Mapping[int, bytes]  # by devid, as the guest knows them
    agent_answers: bool  # its guest's agent is known to

    def close(self) -> None:
        self.frozen.close()
        self.disks.close()


def freeze_parent(
    dom0: Dom0,
    domain: GuestDomain,
    disks: CloneDisks,
    config: DomainConfig,
    macs: Mapping[int, bytes] | None,
    agent_answers: bool,
) -> Parent:
    """Take a domain as it is; it goes on. `macs` where they are not those of its configuration.

    Raises NotSupported, RecordError, DiskError and OSError.
    """
    disks.tidy(domain)
    names = disks.names(domain)
    try:
        frozen = freeze(dom0, domain, names)
    except BaseException:
        disks.note(domain, names).close()
        raise
    try:
        kept = disks.note(domain, names)
    except BaseException:
        frozen.close()
        raise
    if macs is None:
        macs = {nic.devid: nic.mac for nic in config.nics if nic.mac}
    return Parent(config, frozen, kept, macs, agent_answers)


def configuration(parent: Parent, name: str) -> DomainConfig:
    """A clone's, but for its disks."""
    config = copy.deepcopy(parent.config)
    config.name, config.uuid = name, uuid4()
    for nic in config.nics:
        nic.mac, nic.ip, nic.publish = random_mac(), None, []
    return config


def introduction(dom0: Dom0, domain: GuestDomain, name: str, macs: Mapping[int, bytes]) -> list[Frame]:
    """What the agent in a clone is told before anything else: its interfaces, and who it is."""
    router = dom0.network.router
    told = [
        interface(macs[number], net.backend.spec.mac, net.backend.vif.address, router.netmask, router.address)
        for number, net in sorted(domain.nets.items())
        if number in macs
    ]
    return [*told, identity(name)]
