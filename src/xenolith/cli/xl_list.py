"""The `xl` commands that look and change nothing: list, vcpu-list, vm-list, info, uptime, claims, dmesg, domid...

Columns are those of xl 4.17, which scripts cut by position.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

import click

from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, printable, resolve, shown
from xenolith.toolstack.client import DomainInfo, HostInfo, VcpuInfo

_REASON_LETTERS: Final = "-rscwS"  # by shutdown reason

_LIST_HEADING: Final = "Name                                        ID   Mem VCPUs\tState\tTime(s)"


@command(
    "[options] [Domain]",
    "List all domains, or one",
    Option("l", "Print the configurations as JSON", long="long"),
    Option("v", "Add UUIDs, shutdown reasons and security labels", long="verbose"),
    Option("Z", "Add security labels", long="context"),
    Option("c", "Add the cpupool of each domain", long="cpupool"),
    Option("n", "Add the NUMA nodes of each domain", long="numa"),
    modifies=False,
)
def list_(session: Session, options: Options, operands: Sequence[str]) -> int:
    if len(operands) > 1:
        click.echo(list_.usage(), nl=False)
        return 1
    domains = session.client.domains()
    if operands:
        domid = resolve(session, operands[0])
        domains = [domain for domain in domains if domain.domid == domid]
        if not domains:
            raise Failure(f"Error: Domain '{operands[0]}' does not exist.")
    if "l" in options:
        click.echo(_details(session, domains))
        return 0
    heading = _LIST_HEADING
    heading += "   UUID                            Reason-Code\tSecurity Label" if "v" in options else ""
    heading += "   Security Label" if "Z" in options and "v" not in options else ""
    heading += "         Cpupool" if "c" in options else ""
    heading += " NODE Affinity" if "n" in options else ""
    click.echo(heading)
    for domain in domains:
        click.echo(_row(domain) + _extra_columns(domain, options))
    return 0


def _row(domain: DomainInfo) -> str:
    memory_mib = (domain.memory_kib + domain.outstanding_kib) // 1024
    columns = f"{shown(domain.name):<40} {domain.domid:5} {memory_mib:5} {domain.vcpus_online:5}"
    return f"{columns}     {state_letters(domain)}  {domain.cpu_time_ns / 1e9:8.1f}"


def state_letters(domain: DomainInfo) -> str:
    """Six columns: running, blocked, paused, shut down, why, dying."""
    reason = (domain.shutdown_reason or 0) if domain.shutdown else 0
    why = _REASON_LETTERS[reason] if 0 <= reason < len(_REASON_LETTERS) else "?"
    flags = zip("rbps", (domain.running, domain.blocked, domain.paused, domain.shutdown), strict=True)
    return "".join(letter if on else "-" for letter, on in flags) + why + ("d" if domain.dying else "-")


def _extra_columns(domain: DomainInfo, options: Options) -> str:
    label = f" {domain.security_label or '-':>16}"
    columns = ""
    if "v" in options:
        reason = f"{domain.shutdown_reason or 0:x}" if domain.shutdown else "-"
        columns += f" {domain.uuid} {reason:>8}"
    if "v" in options or "Z" in options:
        columns += label
    if "c" in options:
        columns += f"{domain.pool:>16}"
    if "n" in options:
        columns += " all"  # there is one NUMA node
    return columns


def _details(session: Session, domains: Iterable[DomainInfo]) -> str:
    """The configurations of the domains as JSON."""
    from xenolith.toolstack.config.as_json import Json, live_config_json, render

    client = session.client
    scheduler = client.host().scheduler
    documents: list[Json] = [
        {"domid": domain.domid, "config": live_config_json(client.config(domain.domid), domain.domid, scheduler)}
        for domain in domains
    ]
    return render(documents)


@command("", "List the memory that domains have claimed", modifies=False)
def claims(session: Session, options: Options, operands: Sequence[str]) -> int:
    click.echo(f"{_LIST_HEADING}  Claimed")
    for domain in session.client.domains():
        click.echo(f"{_row(domain)} {domain.outstanding_kib // 1024:5}")
    return 0


@command("", "List the domains by UUID", modifies=False)
def vm_list(session: Session, options: Options, operands: Sequence[str]) -> int:
    click.echo("UUID                                  ID    name")
    for domain in session.client.domains():
        click.echo(f"{domain.uuid}  {domain.domid}    {shown(domain.name):<30}")
    return 0


@command("[Domain, ...]", "List the vCPUs of all or some domains", modifies=False)
def vcpu_list(session: Session, options: Options, operands: Sequence[str]) -> int:
    client = session.client
    pcpus = client.host().nr_cpus
    click.echo(f"{'Name':<32} {'ID':>5} {'VCPU':>5} {'CPU':>5} {'State':>5} {'Time(s)':>9} Affinity (Hard / Soft)")
    names = {domain.domid: domain.name for domain in client.domains()}
    for domid in [resolve(session, word) for word in operands] or list(names):
        for vcpu in client.vcpus(domid):
            click.echo(_vcpu_row(names.get(domid, ""), domid, vcpu, pcpus))
    return 0


def _vcpu_row(name: str, domid: int, vcpu: VcpuInfo, pcpus: int) -> str:
    from xenolith.toolstack.config.cpus import format_cpu_set

    place = f"{'-':>5} {'-':>3}-p " if not vcpu.online else ""
    if vcpu.online:
        place = f"{vcpu.cpu:5} {'r' if vcpu.running else '-':>3}{'b' if vcpu.blocked else '-'}- "
    hard, soft = format_cpu_set(vcpu.hard_affinity, pcpus), format_cpu_set(vcpu.soft_affinity, pcpus)
    return f"{shown(name):<32} {domid:5} {vcpu.vcpu:5}{place}{vcpu.cpu_time_ns / 1e9:9.1f}  {hard} / {soft}"


@command(
    "[options] [Key]",
    "Print what is known of the host and the hypervisor, or one key of it",
    Option("n", "Add the CPU and NUMA topology", long="numa"),
    modifies=False,
)
def info(session: Session, options: Options, operands: Sequence[str]) -> int:
    host = session.client.host()
    lines = _info_lines(host)
    if operands and "n" not in options:
        wanted = operands[0]
        for key, value in lines:
            if key.startswith(wanted):
                click.echo(value)
        return 0
    if "n" in options:
        lines = lines[:_PHYSICAL_LINES] + _numa_lines(host) + lines[_PHYSICAL_LINES:]
    for key, value in lines:
        click.echo(f"{key:<23}: {value}" if key else value)
    return 0


_PHYSICAL_LINES: Final = 18  # how many lines of `xl info` come before those about Xen


def _info_lines(host: HostInfo) -> list[tuple[str, str]]:
    mib = 1024
    extra = f"{host.xen_major}.{host.xen_minor}{host.xen_extra}"
    lines: list[tuple[str, object]] = [
        ("host", host.host),
        ("release", host.release),
        ("version", host.version),
        ("machine", host.machine),
        ("nr_cpus", host.nr_cpus),
        ("max_cpu_id", host.nr_cpus - 1),
        ("nr_nodes", host.nr_nodes),
        ("cores_per_socket", host.cores_per_socket),
        ("threads_per_core", host.threads_per_core),
        ("cpu_mhz", f"{host.cpu_khz // 1000}.{host.cpu_khz % 1000:03}"),
        ("hw_caps", ":".join(f"{word:08x}" for word in host.hw_caps)),
        ("virt_caps", " ".join(host.virt_caps)),
        ("total_memory", host.total_memory_kib // mib),
        ("free_memory", host.free_memory_kib // mib),
        ("sharing_freed_memory", host.sharing_freed_kib // mib),
        ("sharing_used_memory", host.sharing_used_kib // mib),
        ("outstanding_claims", host.outstanding_claims_kib // mib),
        ("free_cpus", host.free_cpus),
        ("xen_major", host.xen_major),
        ("xen_minor", host.xen_minor),
        ("xen_extra", host.xen_extra),
        ("xen_version", extra),
        ("xen_caps", "".join(f"{capability} " for capability in host.xen_caps)),
        ("xen_scheduler", host.scheduler),
        ("xen_pagesize", host.page_size),
        ("platform_params", f"virt_start={host.virt_start:#x}"),
        ("xen_changeset", host.changeset),
        ("xen_commandline", host.commandline),
        ("cc_compiler", host.compiler),
        ("cc_compile_by", host.compile_by),
        ("cc_compile_domain", host.compile_domain),
        ("cc_compile_date", host.compile_date),
        ("build_id", host.build_id),
        ("xend_config_format", 4),
        ("engine", host.engine),
        ("xenstore_socket", host.xenstore_socket or "none"),
    ]
    return [(key, str(value)) for key, value in lines]


def _numa_lines(host: HostInfo) -> list[tuple[str, str]]:
    """All on one node: this machine has no other."""
    rows = ["cpu:    core    socket     node"]
    rows += [f"{cpu:3}:    {cpu:4}     {0:4}     {0:4}" for cpu in range(host.nr_cpus)]
    devices = ["device           node", "No device topology data available"]
    memory = f"   0:    {host.total_memory_kib // 1024:6}     {host.free_memory_kib // 1024:6}      10"
    return [
        ("", "cpu_topology           :"),
        *(("", row) for row in rows),
        ("", "device topology        :"),
        *(("", row) for row in devices),
        ("", "numa_info              :"),
        ("", "node:    memsize    memfree    distances"),
        ("", memory),
    ]


@command(
    "[-s] [Domain, ...]",
    "Print for how long all or some domains have been up",
    Option("s", "Short form"),
    modifies=False,
)
def uptime(session: Session, options: Options, operands: Sequence[str]) -> int:
    wanted = [resolve(session, word) for word in operands]
    domains = {domain.domid: domain for domain in session.client.domains()}
    now = time.time()
    if "s" not in options:
        click.echo(f"{'Name':<33} {'ID':>4} Uptime")
    for domid in wanted or list(domains):
        if domid not in domains:
            complain(f"Domain {domid} does not exist.")
            continue
        domain = domains[domid]
        seconds = max(0, int(now - domain.start_time))
        if "s" in options:
            clock = time.strftime("%H:%M:%S", time.localtime(now))
            click.echo(f" {clock} up {format_uptime(seconds, '')}, {shown(domain.name)} ({domid})")
        else:
            click.echo(f"{shown(domain.name):<33} {domid:4} {format_uptime(seconds, f':{seconds % 60:02}')}")
    return int(any(domid not in domains for domid in wanted))


def format_uptime(seconds: int, tail: str) -> str:
    """Days, hours and minutes; `tail` is what follows the minutes."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:2}:{rest % 3600 // 60:02}{tail}"
    if days == 0:
        return clock
    return f"{days} day, {clock}" if days == 1 else f"{days} days, {clock}"


@command("[-c]", "Print the hypervisor's log", Option("c", "Clear it after printing", long="clear"), modifies=False)
def dmesg(session: Session, options: Options, operands: Sequence[str]) -> int:
    click.echo(printable(session.client.dmesg()), nl=False)
    if "c" in options:
        session.client.clear_dmesg()
    return 0


@command("<DomainName>", "Print the id of a domain name", operands=1, modifies=False)
def domid(session: Session, options: Options, operands: Sequence[str]) -> int:
    for domain in session.client.domains():
        if domain.name == operands[0]:
            click.echo(domain.domid)
            return 0
    return complain(f"Can't get domid of domain name '{operands[0]}', maybe this domain does not exist.")


@command("<DomainId>", "Print the name of a domain id", operands=1, modifies=False)
def domname(session: Session, options: Options, operands: Sequence[str]) -> int:
    if not operands[0].isascii() or not operands[0].isdigit():
        return complain("Invalid domain id.\n")
    for domain in session.client.domains():
        if domain.domid == int(operands[0]):
            click.echo(shown(domain.name))
            return 0
    return complain(f"Can't get domain name of domain id '{int(operands[0])}', maybe this domain does not exist.")
