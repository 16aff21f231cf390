"""The `xl` commands about where vCPUs run: vcpu-pin and cpupool-*.

Messages and columns are those of xl 4.17.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve, shown
from xenolith.toolstack.client import CpupoolInfo, ToolstackError
from xenolith.toolstack.config.cpus import CpuSetError, HostTopology, format_cpu_set, parse_cpu_set
from xenolith.toolstack.config.grammar import ConfigError, ConfigFile, read_config

LEAVE: Final = "-"  # an affinity that stays as it is


def pool_named(session: Session, word: str) -> CpupoolInfo:
    """The cpupool of this name; 0 is the first one."""
    pools = session.client.cpupools()
    for pool in pools:
        if pool.name == word:
            return pool
    if word == "0":
        return pools[0]
    raise Failure(f"unknown cpupool '{word}'")


def _cpus(session: Session, text: str) -> frozenset[int]:
    try:
        return parse_cpu_set(text, HostTopology.uniform(session.client.host().nr_cpus))
    except CpuSetError as error:
        raise Failure(str(error)) from error


@command(
    "[options] <Domain> <vCPU|all> <Hard affinity|-|all> <Soft affinity|-|all>",
    "Set on which pCPUs a vCPU may run, and on which it had best run",
    Option("f", "Also where the pCPU is pinned otherwise for a while", long="force"),
    operands=3,
    can_dry_run=True,
)
def vcpu_pin(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    vcpu = None
    if operands[1].isascii() and operands[1].isdigit():
        vcpu = int(operands[1][:9])
    elif operands[1] != "all":
        raise Failure(f"Error: Invalid argument {operands[1]} as VCPU.")
    elif "f" in options:
        raise Failure("Error: --force and 'all' as VCPU not allowed.")
    words = operands[2], operands[3] if len(operands) > 3 else LEAVE
    hard, soft = (None if word == LEAVE else _cpus(session, word) for word in words)
    if session.dry_run:
        pcpus = session.client.host().nr_cpus
        line = LEAVE if hard is None else format_cpu_set(hard, pcpus)
        click.echo(f"cpumap: {line}" + (f" {format_cpu_set(soft, pcpus)}" if soft is not None else ""))
        return 0
    try:
        session.client.set_affinity(domid, vcpu, hard, soft)
    except ToolstackError as error:
        which = "." if vcpu is None else f" for vcpu `{vcpu}'."
        raise Failure(f"{error}\nCould not set affinity{which}") from error
    return 0


@command(
    "[options] [<ConfigFile>] [Variable=value ...]",
    "Make a cpupool as a file, or settings, say: name, sched, cpus",
    Option("f", "The file", long="defconfig", value="FILE"),
    Option("n", "Only say what would be made", long="dryrun"),
    can_dry_run=True,
)
def cpupool_create(session: Session, options: Options, operands: Sequence[str]) -> int:
    files = [word for word in operands if "=" not in word]
    filename = options.get("f") or (files.pop(0) if files else "")
    if files:
        click.echo(cpupool_create.usage(), nl=False)
        return 1
    text = "\n".join(word for word in operands if "=" in word) + "\n"
    if filename:
        try:
            text = Path(filename).read_text(encoding="utf-8", errors="surrogateescape") + "\n" + text
        except OSError as error:
            raise Failure(f"Failed to read config file: {filename}: {error.strerror}") from error
    source = filename or "command line"
    from xenolith.toolstack.host import SCHEDULERS

    try:
        config = read_config(text, source)
    except ConfigError as error:
        raise Failure("\n".join([*error.diagnostics, "Failed to parse config file: Invalid argument"])) from error
    pools = session.client.cpupools()
    name = config.string("name") or Path(filename).name
    if not name:
        raise Failure("Missing cpupool name!")
    if any(pool.name == name for pool in pools):
        raise Failure(f'Pool name "{name}" already exists')
    scheduler = config.string("sched") or pools[0].scheduler
    if scheduler not in SCHEDULERS:
        raise Failure("Unknown scheduler")
    cpus = _cpus_of(session, config, pools)
    click.echo(f'Using config file "{source}"')
    click.echo(f"cpupool name:   {shown(name)}\nscheduler:      {scheduler}\nnumber of cpus: {len(cpus)}")
    if "n" in options or session.dry_run:
        return 0
    try:
        session.client.create_cpupool(name, scheduler, cpus)
    except ToolstackError as error:
        raise Failure(f"{error}\nerror on creating cpupool") from error
    return 0


def _cpus_of(session: Session, config: ConfigFile, pools: Sequence[CpupoolInfo]) -> frozenset[int]:
    """What the keys nodes and cpus name; those in a cpupool already are refused."""
    free = frozenset(range(session.client.host().nr_cpus)).difference(*(pool.cpus for pool in pools))
    if "nodes" in config.settings:
        cpus = free if "0" in config.strings("nodes") else frozenset()
        if not cpus:
            raise Failure("no free cpu found")
        return cpus
    wanted = config.strings("cpus") if config.is_list("cpus") else [config.string("cpus") or ""]
    cpus = frozenset().union(*(_cpus(session, text) for text in wanted))
    for cpu in sorted(cpus - free):
        raise Failure(f"cpu {cpu} illegal or not free")
    return cpus


@command(
    "[-c|--cpus] [<CPU Pool>]",
    "List the cpupools, or one",
    Option("c", "With the pCPUs of each", long="cpus"),
    modifies=False,
)
def cpupool_list(session: Session, options: Options, operands: Sequence[str]) -> int:
    pools = session.client.cpupools()
    if operands:
        pools = [pool for pool in pools if operands[0] in (pool.name, "0" if pool is pools[0] else pool.name)]
        if not pools:
            raise Failure(f"Pool '{operands[0]}' does not exist")
    click.echo(f"{'Name':<19}" + ("CPU list" if "c" in options else "CPUs   Sched     Active   Domain count"))
    for pool in pools:
        row = ",".join(str(cpu) for cpu in sorted(pool.cpus))
        if "c" not in options:
            row = f"{len(pool.cpus):3} {pool.scheduler:>9}       y       {pool.domains:4}"
        click.echo(f"{shown(pool.name):<19}{row}")
    return 0


@command("<CPU Pool>", "End a cpupool that has no domains", operands=1)
def cpupool_destroy(session: Session, options: Options, operands: Sequence[str]) -> int:
    pool = pool_named(session, operands[0])
    try:
        session.client.destroy_cpupool(pool.name)
    except ToolstackError as error:
        raise Failure(f"{error}\nCan't destroy cpupool '{operands[0]}'") from error
    return 0


@command("<CPU Pool> <new name>", "Give a cpupool another name", operands=2)
def cpupool_rename(session: Session, options: Options, operands: Sequence[str]) -> int:
    pool = pool_named(session, operands[0])
    try:
        session.client.rename_cpupool(pool.name, operands[1])
    except ToolstackError as error:
        raise Failure(f"{error}\nCan't rename cpupool '{operands[0]}'") from error
    return 0


@command("<CPU Pool> <CPU list>", "Give a cpupool pCPUs that are in none", operands=2)
def cpupool_cpu_add(session: Session, options: Options, operands: Sequence[str]) -> int:
    cpus, pool = _cpus(session, operands[1]), pool_named(session, operands[0])
    try:
        session.client.add_to_cpupool(pool.name, cpus)
    except ToolstackError as error:
        return complain(f"{error}\nsome cpus may not have been added to {operands[0]}")
    return 0


@command("<CPU Pool> <CPU list>", "Take pCPUs from a cpupool", operands=2)
def cpupool_cpu_remove(session: Session, options: Options, operands: Sequence[str]) -> int:
    cpus, pool = _cpus(session, operands[1]), pool_named(session, operands[0])
    try:
        session.client.remove_from_cpupool(pool.name, cpus)
    except ToolstackError as error:
        return complain(f"{error}\nSome cpus may have not or only partially been removed from '{operands[0]}'.")
    return 0


@command("<Domain> <CPU Pool>", "Move a domain to a cpupool", operands=2)
def cpupool_migrate(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    session.client.move_to_cpupool(domid, pool_named(session, operands[1]).name)
    return 0


@command("", "Refused: Xen's makes a cpupool of each NUMA node, and here there is one node")
def cpupool_numa_split(session: Session, options: Options, operands: Sequence[str]) -> int:
    if len(session.client.cpupools()) > 1:
        raise Failure("splitting not possible, already cpupools in use")
    raise Failure(
        "splitting not possible: this machine has one NUMA node, and all its pCPUs are in one cpupool already"
    )
