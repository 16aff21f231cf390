"""`xenolith demo`: several Debian domains at once, and the proof that one's crash is not another's.

Three roles. The *worker* hashes a chain of values, each the SHA-256 of the one before; half way it waits for a word on
its console. The *crasher* panics its kernel on purpose. The *pair* has two virtual CPUs and keeps both busy. Only when
the crash has been noticed is the worker told to go on, so what it does afterwards is done beside a dead domain; its
result is then compared with the host's own computation of the chain.

On a terminal the consoles are shown side by side under a live table; elsewhere their lines are printed with the
domain's name in front. The exit status is 0 if everything came out as it must.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import click
from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from xenolith.abi.hypercalls import SHUTDOWN_crash, SHUTDOWN_poweroff
from xenolith.debian.framing import CommandOutput, new_nonce
from xenolith.debian.initramfs import InitramfsError, build_initramfs, kernel_arguments
from xenolith.debian.packages import GuestUnavailable, obtain
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import ImageError, load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, DomainInfo
from xenolith.machine.engines.protocol import EngineError

MEMORY_MIB: Final = 96
LINES_SHOWN: Final = 14
PLAIN_WIDTH: Final = 110  # columns, where the output is no terminal
REFRESH_SECONDS: Final = 0.25
DEADLINE_SECONDS: Final = 300
SEED: Final = "xenolith"
LINKS: Final = 60  # of the worker's chain

WORKER: Final = f"""
hash={SEED}
for link in $(seq 1 {LINKS}); do
    hash=$(echo "$hash" | sha256sum)
    hash=${{hash%% *}}
    [ $((link % 10)) -ne 0 ] || echo "link $link: $hash"
    if [ $link -eq {LINKS // 2} ]; then
        echo "half way, waiting for a word from dom0"
        read word </dev/console
        echo "dom0 said: $word"
    fi
done
echo "result $hash"
"""
CRASHER: Final = """
echo "$(uname -sr), about to panic"
echo c >/proc/sysrq-trigger
"""
PAIR: Final = """
echo "$(nproc) processors"
for job in 1 2 3 4; do
    (seq 1 20000 | sort -r | md5sum | sed "s/^/job $job: /") &
done
wait
"""
GO: Final = "go on"


@dataclass
class Actor:
    """One domain of the demo and what is known of it."""

    role: str
    script: str
    vcpus: int = 1
    nonce: str = field(default_factory=new_nonce)
    output: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_SHOWN))
    info: DomainInfo | None = None
    traps_per_second: float = 0.0
    verdict: str = ""
    changed: threading.Event = field(default_factory=threading.Event)  # there is new output, or the end

    def __post_init__(self) -> None:
        self.framing = CommandOutput(self.nonce)


class Show:
    """How the demo is watched: its actors' output and state, as they come."""

    def __init__(self, actors: list[Actor]) -> None:
        self.actors = actors
        self.engine = ""
        self.started = time.monotonic()

    def table(self) -> Table:
        table = Table(title=f"Engine {self.engine}, {time.monotonic() - self.started:.1f} s", title_justify="left")
        for column in ("Domain", "ID", "State", "MiB", "vCPUs", "CPU (s)", "Traps/s", "Result"):
            table.add_column(column, justify="left" if column in ("Domain", "State", "Result") else "right")
        for actor in self.actors:
            info = actor.info
            if info is None:
                table.add_row(actor.role, "", "not yet made")
                continue
            table.add_row(
                actor.role,
                str(info.domid),
                _state(info),
                str(info.total_pages >> 8),
                str(info.online_vcpus),
                f"{info.cpu_time / 1e9:.1f}",
                f"{actor.traps_per_second:,.0f}",
                actor.verdict,
            )
        return table

    def screen(self) -> Group:
        consoles = Table.grid(expand=True)
        for _ in self.actors:
            consoles.add_column(ratio=1)
        consoles.add_row(
            *(
                Panel(
                    Text("\n".join(actor.lines), no_wrap=True, overflow="ellipsis"),
                    title=actor.role,
                    height=LINES_SHOWN + 2,
                )
                for actor in self.actors
            )
        )
        return Group(self.table(), consoles)


def _state(info: DomainInfo) -> str:
    if info.shutdown:
        return {SHUTDOWN_poweroff: "powered off", SHUTDOWN_crash: "crashed"}.get(
            info.shutdown_reason or 0, f"shut down ({info.shutdown_reason})"
        )
    return "paused" if info.paused else "blocked" if info.blocked else "running"


@click.command()
@click.option(
    "--engine",
    type=click.Choice(["auto", "unicorn", "kvm", "adaptive"]),
    default="auto",
    envvar="XENOLITH_ENGINE",
    show_default=True,
    help="What executes guest code. Environment: XENOLITH_ENGINE.",
)
def demo(engine: str) -> None:
    """Boot several Debian domains side by side and show that they are isolated."""
    actors = [Actor("worker", WORKER), Actor("crasher", CRASHER), Actor("pair", PAIR, vcpus=2)]
    show = Show(actors)
    logging.getLogger("xenolith").setLevel(logging.ERROR)
    terminal = Terminal() if sys.stdout.isatty() else Terminal(width=PLAIN_WIDTH)
    try:
        with power_on([MEMORY_MIB] * len(actors), engine) as dom0:
            show.engine = dom0.engine
            if terminal.is_terminal:
                with Live(get_renderable=show.screen, console=terminal, refresh_per_second=4):
                    failures = _perform(dom0, actors, lambda role, line: None, lambda: None)
            else:
                print(f"Booting {', '.join(actor.role for actor in actors)}: Debian on {dom0.engine}.", flush=True)
                failures = _perform(
                    dom0,
                    actors,
                    lambda role, line: print(f"{role:>8} | {line}", flush=True),
                    lambda: terminal.print(show.table()),
                )
    except (EngineError, DomainCreateError, GuestUnavailable, ImageError, InitramfsError) as error:
        raise click.ClickException(str(error)) from error
    if not terminal.is_terminal:  # there it is still to be seen
        terminal.print(show.table())
    for failure in failures:
        terminal.print(f"FAILED: {failure}", markup=False)
    if failures:
        sys.exit(1)
    terminal.print(
        "Every domain has memory of its own, and ring 0 keeps it so: the crasher's kernel panicked, the others never "
        "noticed, and what the worker computed beside the dead domain is what the host computes."
    )


def _perform(
    dom0: Dom0, actors: list[Actor], print_line: Callable[[str, str], None], crash_noticed: Callable[[], None]
) -> list[str]:
    """The demo itself; what went wrong. Calls `print_line` with each line of each domain's output."""
    guest = obtain()
    image = load_image(guest.elf)
    domains: dict[str, GuestDomain] = {}
    for actor in actors:
        ramdisk = build_initramfs(guest.busybox, command=["/bin/sh", "-c", actor.script], nonce=actor.nonce)
        domain = dom0.create(
            DomainSpec(
                name=actor.role,
                image=image,
                kernel=str(guest.kernel),
                ramdisk=ramdisk,
                cmdline=kernel_arguments(actor.vcpus, command=True),
                memory_kib=MEMORY_MIB << 10,
                vcpus=actor.vcpus,
            )
        )
        domains[actor.role] = domain
        threading.Thread(target=_follow, args=(domain, actor, print_line), daemon=True).start()
    for domain in domains.values():
        dom0.start(domain)
    stop = threading.Event()
    meter = threading.Thread(target=_measure, args=(dom0, actors, domains, stop), daemon=True)
    meter.start()
    try:
        return _direct(domains, {actor.role: actor for actor in actors}, crash_noticed)
    finally:
        stop.set()
        meter.join()


def _direct(domains: dict[str, GuestDomain], actors: dict[str, Actor], crash_noticed: Callable[[], None]) -> list[str]:
    """Wait for the crash, then let the worker go on, and check what everybody did."""
    worker, crasher, pair = actors["worker"], actors["crasher"], actors["pair"]
    crash = domains["crasher"].wait(DEADLINE_SECONDS)
    if crash is None or crash.shutdown_reason != SHUTDOWN_crash:
        return [f"the crasher did not crash: {crash}"]
    crasher.verdict = "panicked, as it should"
    if not _await(worker, lambda: "half way" in worker.output):
        return ["the worker never got half way"]
    crash_noticed()
    domains["worker"].console.write(GO.encode() + b"\n")
    failures = []
    for actor in (worker, pair):
        end = domains[actor.role].wait(DEADLINE_SECONDS)
        if end is None or end.shutdown_reason != SHUTDOWN_poweroff:
            failures.append(f"the {actor.role} did not power off: {end}")
        _await(actor, lambda actor=actor: actor.framing.exit_status is not None)  # type: ignore[misc]
    if f"result {_chain()}" in worker.output:
        worker.verdict = "right: the host computes the same"
    else:
        failures.append(f"the worker's result is not the host's, {_chain()}")
    expected = hashlib.md5("".join(f"{line}\n" for line in sorted(map(str, range(1, 20001)), reverse=True)).encode())
    if pair.output.count(expected.hexdigest()) == 4 and "2 processors" in pair.output:
        pair.verdict = "right: 4 jobs on 2 vCPUs"
    else:
        failures.append("the pair's jobs did not all give the host's result")
    return failures


def _await(actor: Actor, condition: Callable[[], bool]) -> bool:
    """Wait until the actor's output makes the condition true."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if not actor.changed.wait(max(0.0, deadline - time.monotonic())):
            return False
        actor.changed.clear()
    return True


def _chain() -> str:
    value = SEED
    for _ in range(LINKS):
        value = hashlib.sha256(f"{value}\n".encode()).hexdigest()
    return value


def _follow(domain: GuestDomain, actor: Actor, print_line: Callable[[str, str], None]) -> None:
    """Take a domain's console apart into its command's output and lines to show."""
    rest = ""
    with domain.console.open_reader(Overflow.WAIT) as reader:
        while data := reader.read():
            output = actor.framing.feed(data).decode("utf-8", "replace")
            actor.output += output
            *lines, rest = (rest + output).replace("\r", "").split("\n")
            actor.lines.extend(lines)
            for line in lines:
                print_line(actor.role, line)
            actor.changed.set()
    actor.changed.set()


def _measure(dom0: Dom0, actors: list[Actor], domains: dict[str, GuestDomain], stop: threading.Event) -> None:
    """Keep the table's numbers fresh."""
    before = time.monotonic()
    while True:
        stopping = stop.wait(REFRESH_SECONDS)
        now = time.monotonic()
        for actor in actors:
            info = dom0.control.info(domains[actor.role].domid)
            if actor.info is not None:
                actor.traps_per_second = (info.traps - actor.info.traps) / (now - before)
            actor.info = info
        before = now
        if stopping:
            return
