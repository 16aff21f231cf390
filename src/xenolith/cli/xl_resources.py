"""The `xl` commands about what domains get: sched-credit2, vcpu-set, mem-set and mem-max.

Two of our own, in the style of sched-credit2: sched-bvt and sched-sfs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

import click

from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve, shown
from xenolith.cli.xl_cpupool import pool_named
from xenolith.toolstack.client import CpupoolInfo, DomainInfo, ToolstackError, find_domain

_DOMAIN: Final = Option("d", "The domain", long="domain", value="<Domain>")
_WEIGHT: Final = Option("w", "Its weight, from 1 to 65535", long="weight", value="<weight>")
_POOL: Final = Option("p", "Only the domains of this cpupool", long="cpupool", value="<cpupool>")

_PARAMETER: Final = Option("s", "The parameters of the cpupool itself", long="schedparam")

_NAMES: Final = {"w": "weight", "c": "cap", "b": "warp", "l": "warp_limit", "u": "unwarp"}
"""What the algorithms call the parameters that these options set."""

_SCHEDPARAMS: Final = {"r": "ratelimit", "a": "allowance"}
"""And those of a cpupool."""


def _scheduling(session: Session, options: Options, scheduler: str, columns: Sequence[tuple[str, str, int]]) -> int:
    """List or set parameters. `columns`: of each parameter its option, heading and width."""
    given = {_NAMES[letter]: _number(options[letter]) for letter, _, _ in columns if letter in options}
    if "p" in options and ("d" in options or given):
        raise Failure("Specifying a cpupool is not allowed with other options.")
    if given and "d" not in options:
        raise Failure("Must specify a domain.")
    wanted = {letter: _number(options[letter]) for letter in _SCHEDPARAMS if letter in options}
    if "s" in options:
        return _schedparam(session, pool_named(session, options.get("p", "0")), scheduler, wanted)
    if wanted:
        raise Failure("Must specify schedparam to set schedule parameter values.")
    heading = f"{'Name':<33} {'ID':>4} " + " ".join(f"{heading:>{width}}" for _, heading, width in columns)

    def row(domain: DomainInfo) -> str:
        parameters = session.client.scheduling(domain.domid)
        values = " ".join(f"{parameters[_NAMES[letter]]:{width}}" for letter, _, width in columns)
        return f"{shown(domain.name):<33} {domain.domid:4} {values}"

    if "d" in options:
        return _of_domain(
            session, resolve(session, options["d"]), scheduler, given, lambda info: f"{heading}\n{row(info)}"
        )
    if "p" in options:
        pools = [pool_named(session, options["p"])]
    else:
        pools = session.client.cpupools()
    domains = session.client.domains()
    for pool in pools:
        if pool.scheduler == scheduler:
            click.echo(f"{_pool_line(pool)}\n{heading}")
            for domain in domains:
                if domain.domid and domain.pool == pool.name:
                    click.echo(row(domain))
    if all(pool.scheduler != scheduler for pool in pools):  # xl says nothing
        used = ", ".join(f"{pool.name} uses {pool.scheduler}" for pool in pools)
        complain(f"No cpupool uses the scheduler {scheduler}; {used}.")
    return 0


def _of_domain(
    session: Session, domid: int, scheduler: str, given: dict[str, int], table: Callable[[DomainInfo], str]
) -> int:
    """Set parameters of a domain, or print them."""
    info = find_domain(session.client, domid)
    used = pool_named(session, info.pool).scheduler
    if domid and used != scheduler:
        raise Failure(f"libxl_domain_sched_params_get returned {used} not {scheduler}.")
    if not given:
        click.echo(table(info))
        return 0
    try:
        session.client.set_scheduling(domid, given)
    except ToolstackError as error:
        raise Failure(f"{error}\nlibxl_domain_sched_params_set failed.") from error
    return 0


def _schedparam(session: Session, pool: CpupoolInfo, scheduler: str, wanted: dict[str, int]) -> int:
    """Set parameters of a pool's algorithm, or print them."""
    if pool.scheduler != scheduler:
        raise Failure(f"Cpupool {pool.name}: its scheduler is {pool.scheduler}, not {scheduler}.")
    if not wanted:
        click.echo(_pool_line(pool))
        return 0
    try:
        session.client.set_schedparam(pool.name, {_SCHEDPARAMS[letter]: value for letter, value in wanted.items()})
    except ToolstackError as error:
        raise Failure(f"{error}\nlibxl_sched_{scheduler}_params_set failed.") from error
    return 0


def _pool_line(pool: CpupoolInfo) -> str:
    values = " ".join(f"{name}={value}us" for name, value in pool.schedparam.items())
    return f"Cpupool {shown(pool.name)}: {values or f'sched={pool.scheduler}'}"


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Failure(f"`{text}' is no number.")
    return int(text)


@command(
    "[-d <Domain> [-w[=WEIGHT]|-c[=CAP]]] [-s [-r RATELIMIT]] [-p CPUPOOL]",
    "Get or set the parameters of the scheduler credit2",
    _DOMAIN,
    _WEIGHT,
    Option("c", "Its cap in per cent of one pCPU; 0: none", long="cap", value="<cap>"),
    _PARAMETER,
    Option("r", "For how long nobody is preempted; 0: no limit", long="ratelimit_us", value="<microseconds>"),
    _POOL,
)
def sched_credit2(session: Session, options: Options, operands: Sequence[str]) -> int:
    return _scheduling(session, options, "credit2", [("w", "Weight", 6), ("c", "Cap", 4)])


@command(
    "[-d <Domain> [-w WEIGHT] [-b WARP] [-l LIMIT] [-u UNWARP]] [-s [-a ALLOWANCE]] [-p CPUPOOL]",
    "Get or set the parameters of the scheduler bvt",
    _DOMAIN,
    _WEIGHT,
    Option("b", "How far it is warped, in microseconds; 0: not", long="warp", value="<microseconds>"),
    Option("l", "For how long it may run warped; 0: no limit", long="limit", value="<microseconds>"),
    Option("u", "For how long it is not warped after that", long="unwarp", value="<microseconds>"),
    _PARAMETER,
    Option("a", "The context-switch allowance", long="allowance_us", value="<microseconds>"),
    _POOL,
)
def sched_bvt(session: Session, options: Options, operands: Sequence[str]) -> int:
    columns = [("w", "Weight", 6), ("b", "Warp", 8), ("l", "Limit", 8), ("u", "Unwarp", 8)]
    return _scheduling(session, options, "bvt", columns)


@command(
    "[-d <Domain> [-w WEIGHT]] [-p CPUPOOL]",
    "Get or set the parameters of the scheduler sfs",
    _DOMAIN,
    _WEIGHT,
    _POOL,
)
def sched_sfs(session: Session, options: Options, operands: Sequence[str]) -> int:
    return _scheduling(session, options, "sfs", [("w", "Weight", 6)])


@command(
    "[options] <Domain> <vCPUs>",
    "Set how many vCPUs the guest is to have online",
    Option("i", "Also more than there are pCPUs", long="ignore-host"),
    operands=2,
)
def vcpu_set(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    if not re.fullmatch(r"[0-9]{1,9}", operands[1]):
        raise Failure("Error: Invalid argument.")
    count, pcpus = int(operands[1]), session.client.host().nr_cpus
    online = sum(vcpu.online for vcpu in session.client.vcpus(domid))
    if "i" not in options and count > max(online, pcpus):
        raise Failure(
            f"You are overcommmitting! You have {pcpus} physical CPUs and want {count} vCPUs! "
            "Aborting, use --ignore-host to continue"
        )
    session.client.set_vcpus(domid, count)
    return 0


_KIB: Final = {"b": 1 / 1024, "k": 1, "m": 1 << 10, "g": 1 << 20, "t": 1 << 30}


def _kib(text: str) -> int:
    """A size as xl takes it: MiB, or what its suffix says."""
    found = re.fullmatch(r"([0-9]{1,15})([bkmgt]?)", text, re.IGNORECASE)
    if not found:
        raise Failure(f"invalid memory size: {text}")
    return int(int(found[1]) * _KIB[found[2].lower() or "m"])


@command("<Domain> <MemMB['b'|'k'|'m'|'g'|'t']>", "Set how much memory the guest is to have", operands=2)
def mem_set(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    try:
        session.client.set_memory_target(domid, _kib(operands[1]))
    except ToolstackError as error:
        raise Failure(f"{error}\ncannot set domid {domid} dynamic max memory to : {operands[1]}") from error
    return 0


@command("<Domain> <MemMB['b'|'k'|'m'|'g'|'t']>", "Set the most memory that a domain may have", operands=2)
def mem_max(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    try:
        session.client.set_max_memory(domid, _kib(operands[1]))
    except ToolstackError as error:
        raise Failure(f"{error}\ncannot set domid {domid} static max memory to : {operands[1]}") from error
    return 0
