"""Domains that move between this machine and others: sent, received, protected from the end of the other."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

from xenolith.dom0.migration import live
from xenolith.dom0.migration.protect import Standby
from xenolith.toolstack.client import (
    InvalidRequest,
    NewDomid,
    OnProgress,
    ProtectionInfo,
    RelocationInfo,
    RelocationRound,
    ToolstackError,
    Undetermined,
    no_progress,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded.part import Part
from xenolith.toolstack.embedded.table import DomainTable
from xenolith.toolstack.peers import HAS_COME, HAS_NOT_COME, Connection, Listener, connected
from xenolith.toolstack.protection import ProtectedDomain, patiently, stand_by, standby_directory
from xenolith.toolstack.relocation import Arrivals, ask_whether_arrived, send_domain
from xenolith.toolstack.saving import Arriving
from xenolith.toolstack.trunks import GREETING, Trunks


class Relocation(Part):
    """Where a domain runs."""

    def __init__(self, table: DomainTable) -> None:
        super().__init__(table)
        self._arrivals = Arrivals()
        self._listeners: list[Listener] = []
        self._trunks = Trunks(table.dom0)
        self.on_arrival: Callable[[int], None] = lambda domid: None  # of a domain that another daemon sent
        self.standby_directory = standby_directory()

    def send(
        self, domid: int, to: str, token: str = "", limit: float = 0, progress: OnProgress = no_progress
    ) -> RelocationInfo:
        with self._table.hold(domid) as record:
            domain, config = record.domain, self.config(domid)
            record.end_checkpoints()

            def step_aside() -> None:
                self.rename(domid, config.name + "--migratedaway")

            def come_back() -> None:
                with contextlib.suppress(ToolstackError):
                    self.rename(domid, config.name)

            try:
                figures = send_domain(self.dom0, domain, config, to, token, step_aside, progress, limit)
            except Undetermined as error:
                assert isinstance(error.__cause__, live.Undetermined)
                disks = error.__cause__.disks

                def stay() -> None:
                    live.keep(self.dom0, domain, disks)
                    come_back()

                record.stay = stay
                raise
            except ToolstackError:
                come_back()
                raise
        self._table.clone_disks.keep(config)
        self.destroy(domid, again=True)
        return RelocationInfo(
            rounds=tuple(RelocationRound(**vars(each)) for each in figures.rounds),
            last_pages=figures.last_pages,
            down_ns=figures.down_ns,
            took_ns=figures.took_ns,
        )

    def receive(self, path: Path, paused: bool = False) -> NewDomid:
        with connected(str(path), "") as connection:
            return NewDomid(self._take(connection, paused))

    def _take(self, connection: Connection, paused: bool) -> int:
        """Receive a domain; its domid."""
        domid = 0
        arrival = None
        try:
            arriving = Arriving(self.dom0, connection.source)
            arrival = self._arrivals.begin(arriving.token, connection.hang_up)
            config = copy.deepcopy(arriving.config)
            config.name += "--incoming"
            domid = self._builder.restored(config, arriving.receive)
            connection.answer(live.READY)
            arriving.wait_for_word()
            arrival.let_run(lambda: None if paused else self.unpause(domid))
        except (ToolstackError, OSError) as error:
            if domid:
                self.destroy(domid, again=True)
            with contextlib.suppress(OSError):
                connection.answer(f"{error}\n".encode())
            raise ToolstackError(f"The domain did not come: {error}") from error
        finally:
            if arrival is not None:
                arrival.give_up()
                arrival.over.set()
        with contextlib.suppress(OSError):  # the sender asks, if it does not hear it
            connection.answer(live.STARTED)
        with contextlib.suppress(ToolstackError):
            self.rename(domid, arriving.config.name)
        return domid

    def settle(self, token: str, at: str = "") -> bool:
        return ask_whether_arrived(at, token) if at else self._arrivals.settle(token)

    def listen(self, address: str) -> None:
        with self._table.lock:
            if not address:
                while self._listeners:
                    self._listeners.pop().close()
            else:
                self._listeners.append(Listener(address, self._serve_peer, self.dom0.domain.log))

    def join_network(self, to: str) -> None:
        if to:
            self._trunks.join(to)
        else:
            self._trunks.leave()

    def joined_networks(self) -> list[str]:
        return self._trunks.joined()

    def _serve_peer(self, greeting: str, connection: Connection) -> None:
        """What another daemon asks for, on a thread of its own."""
        verb, _, token = greeting.partition(" ")
        if verb == "relocate":
            self.on_arrival(self._take(connection, False))
        elif verb == "settle":
            connection.answer(HAS_COME if self._arrivals.settle(token) else HAS_NOT_COME)
        elif verb == GREETING:
            self._trunks.serve(token, connection)
        elif verb == "protect":
            stand_by(self.dom0, connection, self.standby_directory, self._take_over, self.on_arrival)
        else:
            connection.answer(b"this daemon does not know what is wanted\n")

    def _take_over(self, config: DomainConfig, standby: Standby) -> int:
        """Go on with a domain whose daemon has died."""
        received = standby.take_over()
        domid = patiently(lambda: self._builder.restored(config, lambda: received))
        self.unpause(domid)
        self.dom0.domain.log(f"d{domid}: {config.name} goes on here from epoch {standby.epoch}")
        return domid

    def protect(self, domid: int, to: str, seconds: float) -> None:
        with self._table.hold(domid) as record:
            record.end_checkpoints()
            config = self.config(domid)
        if seconds <= 0:
            with self._table.lock:
                protected, record.protected = record.protected, None
            if protected is not None:
                protected.stop()
                protected.join()
            return
        if record.protected is not None and not record.protected.info().failure:
            raise InvalidRequest(f"Domain {domid} is protected by {record.protected.to} already.")
        record.protected = ProtectedDomain(self.dom0, record.domain, config, to, seconds, record.lock)

    def protections(self) -> list[ProtectionInfo]:
        with self._table.lock:
            return [record.protected.info() for record in self._table.records.values() if record.protected is not None]
