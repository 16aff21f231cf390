"""What `xenolith template create` gives a guest besides its kernel: --root, --disk, --net, in the words of `run`."""

from __future__ import annotations

from collections.abc import Sequence

from xenolith.dom0.network.rules import RuleError, parse_rules
from xenolith.toolstack import devices
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.config.vif import Nic
from xenolith.toolstack.errors import UsageError
from xenolith.toolstack.run_disks import parse_disks
from xenolith.toolstack.run_root import find_root


def equip(config: DomainConfig, root: str, disks: Sequence[str], net: str | None) -> None:
    """Add them to the configuration of a template, which writes to overlays of its disks, whatever they say.

    `net` as for `run`: rules, or None.  Raises UsageError and RootError.
    """
    source = find_root(root).source if root else None
    if source is not None:
        config.cmdline = f"{config.cmdline or ''} root=/dev/xvda rw".strip()
    for vbd in parse_disks(disks, source):
        assert vbd.source is not None
        writable = vbd.source.writable or vbd.source.throw_away
        config.disks.append(Disk(vbd.name, str(vbd.source.path), devices.format_of(vbd.source), writable=writable))
    if net is not None:
        try:
            parse_rules(net)
        except RuleError as error:
            raise UsageError(str(error)) from error
        config.nics.append(Nic(len(config.nics), rules=net))
