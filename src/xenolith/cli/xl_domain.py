"""The `xl` commands that do something to an existing domain: pause, shutdown, destroy, rename, dump-core and so on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click

from xenolith.cli.progress import progress_bar
from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve
from xenolith.toolstack.client import (
    Client,
    DomainNotFound,
    EventKind,
    EventStream,
    ShutdownRequest,
    ToolstackError,
    Trigger,
)

_SIDE_BY_SIDE: Final = 64  # how many domains are asked at the same time; the daemon has 128 connections

_STOP_OPTIONS: Final = (
    Option("a", "All domains but domain 0", long="all"),
    Option("F", "Accepted for HVM's sake, without effect for paravirtual domains"),
    Option("w", "Wait until the domains have ended", long="wait"),
)


@command("<Domain>", "Stop a domain for a while", operands=1)
def pause(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.pause(resolve(session, operands[0]))
    return 0


@command("<Domain>", "Let a paused domain go on", operands=1)
def unpause(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.unpause(resolve(session, operands[0]))
    return 0


@command("[options] <Domain>", "End a domain at once", Option("f", "Even domain 0"), operands=1)
def destroy(session: Session, options: Options, operands: Sequence[str]) -> int:
    word = operands[0]
    supervision = session.toolstack.supervision
    try:
        domid = resolve(session, word)
    except Failure:
        if supervision.abandon(word):
            return 0  # it was between two lives
        raise
    if domid == 0 and "f" not in options:
        raise Failure("Not destroying domain 0; use -f to force.\nIt is the domain that runs this toolstack.\n")
    name = next((domain.name for domain in session.client.domains() if domain.domid == domid), word)
    try:
        session.client.destroy(domid)
    except ToolstackError as error:
        if not (isinstance(error, DomainNotFound) and supervision.abandon(name)):
            raise Failure(f"{error}\ndestroy failed (rc={error.rc})") from error
    supervision.abandon(name)  # it may have ended by itself a moment before, to be built again
    return 0


@command("[options] <-a|Domain>", "Ask a domain to power off", *_STOP_OPTIONS)
def shutdown(session: Session, options: Options, operands: Sequence[str]) -> int:
    return _ask_to_stop(session, options, operands, ShutdownRequest.POWEROFF)


@command("[options] <-a|Domain>", "Ask a domain to reboot", *_STOP_OPTIONS)
def reboot(session: Session, options: Options, operands: Sequence[str]) -> int:
    return _ask_to_stop(session, options, operands, ShutdownRequest.REBOOT)


_DOING = {ShutdownRequest.POWEROFF: "Shutting down", ShutdownRequest.REBOOT: "Rebooting"}
_WHAT = {ShutdownRequest.POWEROFF: "shutdown", ShutdownRequest.REBOOT: "reboot"}


def _ask_to_stop(session: Session, options: Options, operands: Sequence[str], request: ShutdownRequest) -> int:
    if not operands and "a" not in options:
        raise Failure("You must specify -a or a domain id.\n")
    client = session.client
    if "a" in options:
        domids = [domain.domid for domain in client.domains() if domain.domid != 0]
    else:
        try:
            domids = [resolve(session, operands[0])]
        except Failure:
            if request is ShutdownRequest.POWEROFF and session.toolstack.supervision.abandon(operands[0]):
                return 0  # it was between two lives
            raise
    events = client.subscribe() if "w" in options else None
    try:
        failures = _ask_all(client, domids, request)
        for domid, error in failures.items():
            of_many = f"Domain {domid}: " if len(domids) > 1 else ""
            complain(f"{of_many}{error}\n{_WHAT[request]} failed (rc={error.rc})")
        if events is not None:
            _wait_for_ends(client, events, [domid for domid in domids if domid not in failures])
    finally:
        if events is not None:
            events.close()
    return int(bool(failures))


def _ask_all(client: Client, domids: Sequence[int], request: ShutdownRequest) -> dict[int, ToolstackError]:
    """Ask all of them side by side, since a guest may take long to take note; what went wrong, by domid."""
    ended = {domain.domid for domain in client.domains() if domain.shutdown}
    failures = {}

    def ask(domid: int) -> None:
        try:
            client.request_shutdown(domid, request)
        except ToolstackError as error:
            failures[domid] = error

    for domid in domids:
        complain(f"Domain {domid} has shut down already" if domid in ended else f"{_DOING[request]} domain {domid}")
    with ThreadPoolExecutor(min(len(domids), _SIDE_BY_SIDE) or 1) as askers:
        for _ in askers.map(ask, domids):
            pass
    return {domid: failures[domid] for domid in domids if domid in failures}


def _wait_for_ends(client: Client, events: EventStream, domids: Sequence[int]) -> None:
    """Wait until each of the domains has shut down or was destroyed. The events must begin before they were asked."""
    if not domids:
        return
    complain(f"Waiting for {len(domids)} domains")
    waiting = set(domids)
    there = {domain.domid: domain for domain in client.domains()}
    for domid in domids:
        if domid not in there:
            _tell_end(waiting, domid, None)
        elif there[domid].shutdown:
            _tell_end(waiting, domid, there[domid].shutdown_reason or 0)
    while waiting:
        event = events.get()
        if event is None:
            raise Failure("The toolstack ended before the domains did.")
        if event.kind is EventKind.SHUTDOWN:
            _tell_end(waiting, event.domid, event.reason or 0)
        elif event.kind is EventKind.DESTROYED:
            _tell_end(waiting, event.domid, None)


def _tell_end(waiting: set[int], domid: int, reason: int | None) -> None:
    if domid in waiting:
        waiting.discard(domid)
        how = "destroyed" if reason is None else f"shut down, reason code {reason}"
        complain(f"Domain {domid} has been {how}")


@command("<Domain> <NewDomainName>", "Give a domain another name", operands=2)
def rename(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    try:
        session.client.rename(domid, operands[1])
    except ToolstackError as error:
        raise Failure(f"{error}\nCan't rename domain '{operands[0]}'.") from error
    return 0


@command("<Domain> <letter>", "Send a magic sysrq key to a domain", operands=2)
def sysrq(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    if len(operands[1]) != 1:
        complain("Invalid sysrq.\n")
        click.echo(sysrq.usage(), nl=False)
        return 1
    session.client.sysrq(domid, operands[1])
    return 0


@command(
    "<Domain> <nmi|reset|init|power|sleep|s3resume> [<VCPU>]",
    "Send a trigger to a domain",
    operands=2,
)
def trigger(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    if operands[1].lower() not in list(Trigger):
        raise Failure(f'Invalid trigger "{operands[1]}"')
    vcpu = 0
    if len(operands) > 2:
        if operands[2].isascii() and operands[2].isdigit():
            vcpu = int(operands[2])
        else:
            complain("Invalid vcpuid, using default vcpuid=0.\n")
    session.client.trigger(domid, Trigger(operands[1].lower()), vcpu)
    return 0


@command("<Domain> <filename>", "Write a core file of a domain", operands=2)
def dump_core(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    try:
        with progress_bar() as progress:
            session.client.dump_core(domid, Path(operands[1]).absolute(), progress)
    except ToolstackError as error:
        raise Failure(f"{error}\ncore dump failed (rc={error.rc})") from error
    return 0


@command(
    "[options] <Domain>",
    "Attach to a domain's console; Ctrl-] leaves it",
    Option("t", "Console type: pv", value="<type>"),
    Option("n", "Console number", value="<number>"),
    Option("e", "What leaves the console, ^] if not given", value="<character>"),
    operands=1,
    modifies=False,
)
def console(session: Session, options: Options, operands: Sequence[str]) -> int:
    from xenolith.cli.terminal import attach, escape_character

    if options.get("t", "pv") not in ("pv", "serial", "vuart"):
        raise Failure("console type supported are: pv, serial, vuart")
    domid = _living_or_departed(session, operands[0])
    if options.get("t", "pv") != "pv":
        raise Failure(f"Domain {domid} has no {options['t']} console: paravirtual domains have pv consoles only.")
    number = options.get("n", "0")
    if not number.isascii() or not number.isdigit():
        raise Failure(f"`{number}' is no console number.")
    attach(session.client.open_console(domid, int(number)), escape_character(options.get("e", "^]")))
    return 0


def _living_or_departed(session: Session, word: str) -> int:
    """Like `resolve`; a domain that went a moment ago still has a name, for whoever wants to know what it printed."""
    try:
        return resolve(session, word)
    except Failure:
        for domain in session.client.departed():
            if domain.name == word:
                return domain.domid
        raise
