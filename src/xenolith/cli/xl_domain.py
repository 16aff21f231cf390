"""The `xl` commands that do something to an existing domain: pause, shutdown, destroy, rename, dump-core and so on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from xenolith.cli.progress import progress_bar
from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve
from xenolith.toolstack.client import EventKind, EventStream, ShutdownRequest, ToolstackError, Trigger

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
    domid = resolve(session, operands[0])
    if domid == 0 and "f" not in options:
        raise Failure("Not destroying domain 0; use -f to force.\nIt is the domain that runs this toolstack.\n")
    try:
        session.client.destroy(domid)
    except ToolstackError as error:
        raise Failure(f"{error}\ndestroy failed (rc={error.rc})") from error
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
    if "a" in options:
        domids = [domain.domid for domain in session.client.domains() if domain.domid != 0]
    else:
        domids = [resolve(session, operands[0])]
    events = session.client.subscribe() if "w" in options else None
    try:
        for domid in domids:
            complain(f"{_DOING[request]} domain {domid}")
            try:
                session.client.request_shutdown(domid, request)
            except ToolstackError as error:
                raise Failure(f"{error}\n{_WHAT[request]} failed (rc={error.rc})") from error
        if events is not None:
            _wait_for_ends(events, set(domids))
    finally:
        if events is not None:
            events.close()
    return 0


def _wait_for_ends(events: EventStream, domids: set[int]) -> None:
    """Wait until each of the domains has shut down or was destroyed."""
    complain(f"Waiting for {len(domids)} domains")
    while domids:
        event = events.get()
        if event is None:
            raise Failure("The toolstack ended before the domains did.")
        if event.domid not in domids:
            continue
        if event.kind is EventKind.SHUTDOWN:
            complain(f"Domain {event.domid} has been shut down, reason code {event.reason}")
        elif event.kind is EventKind.DESTROYED:
            complain(f"Domain {event.domid} has been destroyed")
        else:
            continue
        domids.discard(event.domid)


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
    domid = resolve(session, operands[0])
    if options.get("t", "pv") != "pv":
        raise Failure(f"Domain {domid} has no {options['t']} console: paravirtual domains have pv consoles only.")
    number = options.get("n", "0")
    if not number.isascii() or not number.isdigit():
        raise Failure(f"`{number}' is no console number.")
    attach(session.client.open_console(domid, int(number)), escape_character(options.get("e", "^]")))
    return 0
