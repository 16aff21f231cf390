"""Making domains: new ones of a configuration, those that come from elsewhere, and clones.

All are born paused. What dom0 is to make is a `DomainSpec`, which is had of the configuration here.
"""

from __future__ import annotations

import copy
import time
import uuid as uuids
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xenolith.dom0.disks import DiskError
from xenolith.dom0.image import ImageError, load_image
from xenolith.dom0.services import DomainSpec
from xenolith.hypervisor.control import USUAL, DomainCreateError, Limits, RecordError
from xenolith.toolstack import devices, networks
from xenolith.toolstack.client import InvalidRequest, NotSupported, OnProgress, Progress, ToolstackError
from xenolith.toolstack.clones import Parent, configuration, freeze_parent
from xenolith.toolstack.config import cpuid
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded.table import DomainTable, Record

if TYPE_CHECKING:
    from xenolith.dom0.migration.restore import Received

MAPPINGS_PER_MAPTRACK_FRAME: Final = 256  # a page of Xen's struct grant_mapping


class Builder:
    """Makes the domains of a table. Methods return a domid, and raise ToolstackError; then nothing was made."""

    def __init__(self, table: DomainTable) -> None:
        self._table = table
        self._dom0 = table.dom0

    def new(self, config: DomainConfig, progress: OnProgress) -> int:
        """Of a configuration."""
        config = copy.deepcopy(config)
        with self._table.claim(config.name):
            try:
                for nic in config.nics:
                    nic.mac = nic.mac or networks.random_mac()  # the domain's as long as it is built again
                spec = self._loaded(config, progress)
                progress(Progress("building the domain", 1, 2))
                domid = self._table.add(Record(self._dom0.create(spec), config))
                progress(Progress("building the domain", 2, 2))
                return domid
            except DomainCreateError as error:
                raise ToolstackError(str(error)) from error
            except (OSError, MemoryError) as error:
                why = (error.strerror if isinstance(error, OSError) else None) or "the host has no memory left"
                wanted = config.memory_kib >> 10
                raise ToolstackError(f"a domain with {wanted} MiB of memory cannot be made: {why}") from error

    def restored(self, config: DomainConfig, receive: Callable[[], Received]) -> int:
        """Of what comes from elsewhere."""
        config = copy.deepcopy(config)
        with self._table.claim(config.name):
            try:
                with self._table.lock:
                    if config.uuid in {record.config.uuid for record in self._table.records.values()}:
                        config.uuid = uuids.uuid4()  # the domain that was saved is still there
                _check_supported(config)
                return self._table.add(Record(self._dom0.restore(self._described(config), receive()), config))
            except (DomainCreateError, RecordError) as error:
                raise ToolstackError(f"The domain cannot be restored: {error}.") from error

    def frozen(self, domid: int) -> Parent:
        """What a domain is at this moment, which goes on."""
        with self._table.hold(domid) as record:
            config = copy.deepcopy(record.config)
            try:
                return freeze_parent(
                    self._dom0,
                    record.domain,
                    self._table.clone_disks,
                    config,
                    record.newborn,
                    record.agent_answers,
                )
            except (RecordError, DiskError, OSError) as error:
                raise ToolstackError(f"Domain {domid} cannot be cloned: {error}.") from error

    def cloned(self, parent: Parent, name: str, number: int) -> int:
        """Of a frozen one."""
        config = configuration(parent, name)
        disks = self._table.clone_disks
        with self._table.claim(name):
            try:
                disks.overlay(parent.disks, config)
                domain = self._dom0.clone(self._described(config), parent.frozen, number)
            except (DomainCreateError, RecordError, DiskError, OSError, MemoryError) as error:
                disks.remove(config)
                raise ToolstackError(f"{name} cannot be made: {error}.") from error
            return self._table.add(Record(domain, config, agent_answers=parent.agent_answers, newborn=parent.macs))

    def _loaded(self, config: DomainConfig, progress: OnProgress) -> DomainSpec:
        """With the kernel and what it is given. Raises NotSupported and ToolstackError."""
        _check_supported(config)
        if config.kernel is None:
            raise InvalidRequest("The configuration names no kernel.")
        progress(Progress("loading the kernel", 0, 2))
        try:
            image = load_image(Path(config.kernel))
            ramdisk = Path(config.ramdisk).read_bytes() if config.ramdisk else b""
        except ImageError as error:
            raise ToolstackError(str(error)) from error
        except OSError as error:
            raise ToolstackError(f"cannot read {error.filename}: {error.strerror}") from error
        return replace(self._described(config), image=image, ramdisk=ramdisk)

    def _described(self, config: DomainConfig) -> DomainSpec:
        """Without what is loaded into a new one; of the scheduling parameters those that its pool's algorithm has."""
        first, *_ = pools = self._table.control.cpupools()
        pool = next((each for each in pools if each.name == config.pool), first)
        given = config.scheduler.given()
        return DomainSpec(
            name=config.name,
            image=None,
            kernel=config.kernel or "",
            cmdline=config.cmdline or "",
            memory_kib=config.memory_kib,
            max_memory_kib=config.memory_ceiling_kib,
            vcpus=config.vcpus_online,
            max_vcpus=config.vcpus_ceiling,
            disks=tuple(devices.virtual_block_device(disk) for disk in config.disks),
            nets=tuple(networks.virtual_interface(nic) for nic in config.nics),
            shares=tuple(devices.shared_folder(share, number) for number, share in enumerate(config.p9_shares)),
            limits=_limits(config),
            time_offset=_time_offset(config),
            uuid=config.uuid,
            scheduling={name: given[name] for name in pool.scheduler_parameters if name in given},
            cpupool=config.pool or "",
            hard_affinity=config.hard_affinity or (),
            soft_affinity=config.soft_affinity or (),
        )


def _check_supported(config: DomainConfig) -> None:
    """Raises NotSupported where a domain would be given what there is not."""
    lacking = config.unsupported()
    if config.bootloader:
        lacking.append("bootloader")
    if lacking:
        raise NotSupported(f"A domain cannot be given: {', '.join(lacking)}.")


def _time_offset(config: DomainConfig) -> int:
    """Seconds; the key has 32 bits and a sign."""
    offset = (config.rtc_timeoffset + (1 << 31)) % (1 << 32) - (1 << 31)
    return offset + (time.localtime().tm_gmtoff if config.localtime else 0)


def _limits(config: DomainConfig) -> Limits:
    given: dict[str, int] = {}
    if config.max_event_channels:
        given["event_channel_port"] = config.max_event_channels
    if config.max_grant_frames is not None:
        given["grant_frames"] = config.max_grant_frames
    if config.max_maptrack_frames is not None:
        given["mappings"] = config.max_maptrack_frames * MAPPINGS_PER_MAPTRACK_FRAME
    return replace(USUAL, cpuid=cpuid.changes(config.cpuid), **given)
