"""The `xl` commands about virtual network interfaces: network-attach, network-list, network-detach."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve, shown
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.config.grammar import ConfigError, ConfigFile
from xenolith.toolstack.config.vif import parse_vif


@command("<Domain> [vif-spec-component(s)]", "Give a domain another virtual network interface", operands=1)
def network_attach(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    devid = 1 + max((each.devid for each in session.client.networks(domid)), default=-1)
    file = ConfigFile("command line")
    try:
        nic = parse_vif(file, ",".join(operands[1:]), devid)
    except ConfigError:
        raise Failure("\n".join(file.diagnostics)) from None
    for line in file.diagnostics:
        complain(line)
    try:
        session.client.attach_network(domid, nic)
    except ToolstackError as error:
        raise Failure(f"{error}\nlibxl_device_nic_add failed.") from error
    return 0


@command("<Domain(s)>", "List virtual network interfaces for a domain", operands=1, modifies=False)
def network_list(session: Session, options: Options, operands: Sequence[str]) -> int:
    click.echo(
        f"{'Idx':<3} {'BE':<2} {'Mac Addr.':<17} {'handle':<6} {'state':<5} {'evt-ch':<6} "
        f"{'tx-':>5}/{'rx-ring-ref':<5} {'BE-path':<30}"
    )
    status = 0
    for word in operands:
        try:
            nets = session.client.networks(resolve(session, word))
        except (Failure, ToolstackError):
            status = complain(f"{shown(word)} is an invalid domain identifier")
            continue
        for net in nets:
            click.echo(
                f"{net.devid:<3} {net.backend_domid:<2} {net.mac} {net.devid:6} {net.state:5} {net.event_channel:6} "
                f"{net.tx_ring_ref:5}/{net.rx_ring_ref:<11} {net.backend_path:<30}"
            )
    return status


@command(
    "[options] <Domain> <DevId|mac>",
    "Take a virtual network interface from a domain",
    Option("f", "Also where the guest does not let go of it", long="force"),
    operands=2,
)
def network_detach(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    devid = find_interface(session, domid, operands[1])
    try:
        session.client.detach_network(domid, devid, "f" in options)
    except ToolstackError as error:
        raise Failure(f"{error}\nlibxl_device_nic_remove failed.") from error
    return 0


def find_interface(session: Session, domid: int, word: str) -> int:
    """The number of the interface that a word means: its number or its MAC. Raises Failure."""
    if re.fullmatch(r"[0-9]{1,9}", word, re.ASCII):
        return int(word)
    for net in session.client.networks(domid):
        if net.mac == word.lower():
            return net.devid
    raise Failure(f"Unknown device {shown(word)}.")
