"""What runs inside domains: their consoles, commands that their agents run, templates to run commands in."""

from __future__ import annotations

import contextlib
from typing import Final

from xenolith.dom0.console import Console, ConsoleClosed, Overflow
from xenolith.toolstack.client import (
    ConsoleStream,
    Execution,
    InvalidRequest,
    OnProgress,
    ProcessStream,
    TemplateInfo,
    no_progress,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded.agents import agent_of
from xenolith.toolstack.embedded.part import Part
from xenolith.toolstack.embedded.table import DomainTable
from xenolith.toolstack.embedded.templates import Templates

TYPING_SECONDS: Final = 1.0  # how long input waits for a guest that does not read


class Inside(Part):
    """What a guest says and does."""

    def __init__(self, table: DomainTable) -> None:
        super().__init__(table)
        self._templates = Templates(self, self._builder, table.clone_disks)

    def open_console(self, domid: int, number: int = 0) -> ConsoleStream:
        if number:
            raise InvalidRequest(f"Domain {domid} has no console {number}.")
        return _Attachment(self._console(domid))

    def _console(self, domid: int) -> Console:
        """Its primary console, also of a domain that went a moment ago."""
        departed = {each.info.domid: each.console for each in self._table.departed()}
        return departed[domid] if domid in departed else self._table.record(domid).domain.console

    def console_history(self, domid: int) -> bytes:
        return self._console(domid).scrollback

    def execute(self, domid: int, execution: Execution) -> ProcessStream:
        return agent_of(self._table, domid).execute(execution)

    def create_template(
        self,
        name: str,
        config: DomainConfig,
        warm_up: Execution | None = None,
        ready: int = 4,
        progress: OnProgress = no_progress,
    ) -> None:
        self._table.check_open()
        self._templates.create(name, config, warm_up, ready, progress)

    def templates(self) -> list[TemplateInfo]:
        return self._templates.infos()

    def remove_template(self, name: str) -> None:
        self._templates.remove(name)

    def run_template(self, name: str, execution: Execution) -> ProcessStream:
        self._table.check_open()
        return self._templates.run(name, execution)


class _Attachment:
    """A terminal on a console: it may fall behind, and may type more than the guest takes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reader = console.open_reader(Overflow.DROP_OLDEST)

    def read(self, timeout: float | None = None) -> bytes | None:
        return self._reader.read(timeout)

    def write(self, data: bytes) -> None:
        with contextlib.suppress(ConsoleClosed):
            while data and (taken := self._console.write(data, TYPING_SECONDS)):
                data = data[taken:]

    def close(self) -> None:
        self._reader.close()
