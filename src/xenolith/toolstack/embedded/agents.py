"""The conversation with the agent in a guest: begun when somebody asks for it, and kept."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from xenolith.toolstack.agent.session import AgentUnavailable, Session
from xenolith.toolstack.clones import introduction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xenolith.dom0.services import Dom0
    from xenolith.toolstack.embedded.table import DomainTable, Record

AGENT_SECONDS: Final = 120.0  # that a guest may take to boot until its agent answers


def bring_to_life(dom0: Dom0, record: Record, macs: Mapping[int, bytes]) -> None:
    """Let a clone run for the first time. The first that it hears is who it is, if it has an agent."""
    domain = record.domain
    told = introduction(dom0, domain, record.config.name, macs)
    console = domain.channel.open(0) if domain.channel else None
    session = Session(console) if console is not None else None
    if session is not None and console is not None and console.input_room > 2 * sum(len(each.body) for each in told):
        session.greet(*told)
        dom0.start(domain)
    else:
        dom0.start(domain)
        if session is not None:
            session.greet(*told)
    record.newborn, record.agent = None, session


def agent_of(table: DomainTable, domid: int) -> Session:
    """The conversation with a guest's agent. Raises AgentUnavailable, and as `DomainTable.record` does."""
    record = table.record(domid)
    domain, info = record.domain, table.control.info(domid)
    if info.paused or info.shutdown:
        raise AgentUnavailable(f"Nothing runs in domain {domid}: it {'has shut down' * info.shutdown or 'is paused'}.")
    with record.agent_lock:
        if record.agent is not None and not record.agent.ended:
            if not record.agent_answers:
                record.agent.wait(AGENT_SECONDS)
            return record.agent
        deadline = time.monotonic() + AGENT_SECONDS
        console = domain.channel.open(AGENT_SECONDS) if domain.channel else None
        if console is None:
            raise AgentUnavailable(f"The guest of domain {domid} does not use the channel of an agent.")
        session = Session(console)
        try:
            session.greet()
            session.wait(max(1.0, deadline - time.monotonic()))
        except AgentUnavailable:
            session.close()
            raise
        record.agent, record.agent_answers = session, True
        return session
