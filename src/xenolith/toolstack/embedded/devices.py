"""Disks and networks of domains."""

from __future__ import annotations

import copy
from pathlib import Path

from xenolith.toolstack import devices, networks
from xenolith.toolstack.client import ConsoleStream, DiskInfo, NetworkInfo
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.vif import Nic
from xenolith.toolstack.embedded.part import Part


class Devices(Part):
    """What is plugged into a domain."""

    def disks(self, domid: int) -> list[DiskInfo]:
        if not domid:
            return []
        with self._table.hold(domid) as record:
            return devices.disk_infos(self.dom0, record.domain)

    def attach_disk(self, domid: int, disk: Disk) -> None:
        with self._table.hold(domid) as record:
            devices.attach_disk(self.dom0, record.domain, record.config, copy.deepcopy(disk))

    def detach_disk(self, domid: int, vdev: str, force: bool = False) -> None:
        with self._table.hold(domid) as record:
            devices.detach_disk(self.dom0, record.domain, record.config, vdev, force)

    def change_medium(self, domid: int, vdev: str, target: str) -> None:
        with self._table.hold(domid) as record:
            devices.change_medium(self.dom0, record.domain, record.config, vdev, target)

    def measure_disk(self, domid: int, vdev: str) -> None:
        with self._table.hold(domid) as record:
            devices.measure_disk(self.dom0, record.domain, vdev)

    def snapshot_disk(self, domid: int, vdev: str, path: Path) -> None:
        with self._table.hold(domid) as record:
            devices.snapshot_disk(self.dom0, record.domain, vdev, path)

    def networks(self, domid: int) -> list[NetworkInfo]:
        if not domid:
            return []
        with self._table.hold(domid) as record:
            return networks.network_infos(self.dom0, record.domain)

    def attach_network(self, domid: int, nic: Nic) -> None:
        with self._table.hold(domid) as record:
            networks.attach_network(self.dom0, record.domain, record.config, copy.deepcopy(nic))

    def detach_network(self, domid: int, devid: int, force: bool = False) -> None:
        with self._table.hold(domid) as record:
            networks.detach_network(self.dom0, record.domain, record.config, devid, force)

    def set_network_rules(self, domid: int, devid: int, rules: str) -> None:
        with self._table.hold(domid) as record:
            networks.set_network_rules(self.dom0, record.domain, record.config, devid, rules)

    def capture_network(self, domid: int, devid: int) -> ConsoleStream:
        with self._table.hold(domid) as record:
            return networks.Capturing(self.dom0, record.domain, devid)
