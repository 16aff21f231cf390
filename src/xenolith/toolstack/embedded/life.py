"""The life of domains: made, paused, asked to shut down, suspended, destroyed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from xenolith.dom0 import domain_tree
from xenolith.hypervisor.control import DomainCreateError
from xenolith.toolstack.client import (
    DomainEvent,
    EventKind,
    InvalidRequest,
    NewDomid,
    NotAcknowledged,
    NotSupported,
    OnProgress,
    Progress,
    ShutdownRequest,
    ToolstackError,
    Trigger,
    no_progress,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.dump import dump_domain
from xenolith.toolstack.embedded.agents import bring_to_life
from xenolith.toolstack.embedded.part import Part
from xenolith.toolstack.embedded.table import DomainTable

ACKNOWLEDGE_SECONDS: Final = 60.0  # as libxl


class Life(Part):
    """What becomes of a domain."""

    def __init__(self, table: DomainTable) -> None:
        super().__init__(table)
        self._acknowledge_seconds = ACKNOWLEDGE_SECONDS

    def create(self, config: DomainConfig, progress: OnProgress = no_progress) -> NewDomid:
        return NewDomid(self._builder.new(config, progress))

    def pause(self, domid: int) -> None:
        with self._table.hold(domid):
            self._control.pause(domid)

    def unpause(self, domid: int) -> None:
        with self._table.hold(domid) as record:
            try:
                if record.stay is not None:
                    record.stay()
                    record.stay = None
                elif record.newborn is not None:
                    bring_to_life(self.dom0, record, record.newborn)
                else:
                    self.dom0.start(record.domain)
            except DomainCreateError as error:
                raise ToolstackError(f"domain {domid} cannot go on here: {error}") from error
            except RuntimeError as error:  # Python's, for a thread that the host does not give
                raise ToolstackError(f"domain {domid} cannot be started: {error}") from error

    def destroy(self, domid: int, again: bool = False) -> None:
        with self._table.lock:
            record = self._table.record(domid)
            record.last_seen = next(info for info in self.domains() if info.domid == domid)
            record.leaving.set()  # who is busy with it gives up
        with record.lock:
            if domid not in self._table.records:
                return  # somebody else was quicker
            record.end_checkpoints()
            self.dom0.destroy(record.domain)
            if not again:
                self._table.clone_disks.remove(record.config)
            self._table.clone_disks.reap()
            self._table.remove(record)
        if record.protected is not None:
            record.protected.join()  # the other side knows that it is not wanted any more
        self._table.wake_waiters(record)
        self._table.hub.publish(DomainEvent(EventKind.DESTROYED, domid))

    def rename(self, domid: int, name: str) -> None:
        with self._table.hold(domid) as record:
            config = record.config
            if name != config.name:
                with self._table.claim(name):
                    config.name = name
            for path in (f"{domain_tree.home(domid)}/name", f"/vm/{config.uuid}/name"):
                self.dom0.xenstore.write(path, name)

    def request_shutdown(self, domid: int, request: ShutdownRequest) -> None:
        if self._table.record(domid).domain.end is None:
            self._ask_guest(domid, "shutdown", str(request))
        elif request is ShutdownRequest.REBOOT:
            raise InvalidRequest(f"Domain {domid} has shut down already and cannot be asked to reboot.")

    def suspend(self, domid: int) -> None:
        domain = self._table.record(domid).domain
        self._ask_guest(domid, "shutdown", "suspend")
        if domain.wait(self._acknowledge_seconds) is None:
            raise NotAcknowledged(f"Domain {domid} did not suspend itself.")

    def resume(self, domid: int) -> None:
        try:
            with self._table.hold(domid) as record:
                self.dom0.resume(record.domain)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    def soft_reset(self, domid: int) -> None:
        self._table.record(domid)
        raise NotSupported("Soft reset is not supported.")

    def sysrq(self, domid: int, key: str) -> None:
        with self._table.hold(domid):
            self.dom0.xenstore.write(f"{domain_tree.home(domid)}/control/sysrq", key)

    def trigger(self, domid: int, trigger: Trigger, vcpu: int = 0) -> None:
        with self._table.hold(domid):
            if trigger is not Trigger.NMI:
                raise InvalidRequest(f"Trigger {trigger} is for HVM domains; a PV domain can be sent nmi.")
            try:
                self._control.send_nmi(domid, vcpu)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error

    def _ask_guest(self, domid: int, node: str, value: str) -> None:
        """Write a control node and wait until the guest has emptied it, or has ended."""
        path = f"{domain_tree.home(domid)}/control/{node}"
        done = threading.Event()

        def look(_: str) -> None:
            if not self.dom0.xenstore.get(path):
                done.set()

        with self._table.hold(domid) as record:
            domain = record.domain
            with self._table.lock:
                record.waiters.add(done)
            self.dom0.xenstore.write(path, value)
        watch = self.dom0.xenstore.watch(path, look)
        try:
            if domain.end is None and not done.wait(self._acknowledge_seconds) and domain.end is None:
                with self._table.hold(domid):
                    self.dom0.xenstore.write(path, "")
                raise NotAcknowledged(f"Domain {domid} did not acknowledge control/{node} = {value}.")
        finally:
            watch.cancel()
            with self._table.lock:
                record.waiters.discard(done)

    def dump_core(self, domid: int, path: Path, progress: OnProgress = no_progress) -> None:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a core must be absolute: {path}.")
        with self._table.hold(domid) as record:
            leaving = record.leaving

            def report(done: Progress) -> None:
                if leaving.is_set():
                    raise ToolstackError(f"Domain {domid} is being destroyed.")
                progress(done)

            self._control.pause(domid)
            try:
                dump_domain(self._control, domid, record.domain.spec.name, path, report)
            finally:
                self._control.unpause(domid)
