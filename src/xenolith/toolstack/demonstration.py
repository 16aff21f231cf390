"""The demonstration: several Debian domains at once, and the proof that one's crash is not another's.

Three roles. The *worker* hashes a chain of values, each the SHA-256 of the one before; half way it waits for a word on
its standard input. The *crasher* panics its kernel on purpose. The *pair* has two virtual CPUs and keeps both busy.
Only when the crash has been noticed is the worker told to go on, so what it does afterwards is done beside a dead
domain; its result is then compared with the host's own computation of the chain.

How it is watched is the caller's affair (`Audience`): `xenolith demo` shows it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from xenolith.abi.hypercalls import SHUTDOWN_crash, SHUTDOWN_poweroff
from xenolith.debian.framing import CommandOutput, input_chunk, new_nonce
from xenolith.debian.initramfs import Command, InitramfsError, build_initramfs, kernel_arguments
from xenolith.debian.packages import DebianGuest, GuestUnavailable, obtain
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import ImageError, load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, DomainInfo
from xenolith.machine.engines.protocol import EngineError
from xenolith.toolstack.errors import ToolstackError

MEMORY_MIB: Final = 96
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
        read word
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
    info: DomainInfo | None = None
    traps_per_second: float = 0.0
    verdict: str = ""
    changed: threading.Event = field(default_factory=threading.Event)  # there is new output, or the end

    def __post_init__(self) -> None:
        self.framing = CommandOutput(self.nonce)

    @property
    def state(self) -> str:
        """In a word."""
        info = self.info
        if info is None:
            return "not yet made"
        if info.shutdown:
            return {SHUTDOWN_poweroff: "powered off", SHUTDOWN_crash: "crashed"}.get(
                info.shutdown_reason or 0, f"shut down ({info.shutdown_reason})"
            )
        if not self.framing.started:
            return "booting"
        return "paused" if info.paused else "blocked" if info.blocked else "running"


class Audience(Protocol):
    """Who watches. Called by several threads."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def line(self, role: str, line: str) -> None:
        """A line of a domain's output."""

    def crash_noticed(self) -> None:
        """The crasher has crashed, and the worker is half way."""

    def refresh(self) -> None:
        """The actors' numbers are fresh; several times a second."""


class DemonstrationFailed(ToolstackError):
    """The demonstration cannot be given here; the text says why."""


def cast() -> list[Actor]:
    return [Actor("worker", WORKER), Actor("crasher", CRASHER), Actor("pair", PAIR, vcpus=2)]


def perform(actors: list[Actor], engine: str, audience: Audience) -> list[str]:
    """The demonstration itself; what went wrong. Raises DemonstrationFailed when it cannot begin."""
    audience.stage("looking for Debian's kernel, which the first run downloads")
    try:
        guest = obtain()
        audience.stage("trying the engines")
        with power_on([MEMORY_MIB] * len(actors), engine) as dom0:
            audience.stage(f"Debian on {dom0.engine}")
            return _perform(dom0, actors, guest, audience)
    except (EngineError, DomainCreateError, GuestUnavailable, ImageError, InitramfsError, OSError) as error:
        raise DemonstrationFailed(str(error)) from error


def _perform(dom0: Dom0, actors: list[Actor], guest: DebianGuest, audience: Audience) -> list[str]:
    image = load_image(guest.elf)
    domains: dict[str, GuestDomain] = {}
    for actor in actors:
        ramdisk = build_initramfs(guest.busybox, command=Command(["/bin/sh", "-c", actor.script], actor.nonce))
        domain = dom0.create(
            DomainSpec(
                name=actor.role,
                image=image,
                kernel=str(guest.kernel),
                ramdisk=ramdisk,
                cmdline=kernel_arguments(actor.vcpus),
                memory_kib=MEMORY_MIB << 10,
                vcpus=actor.vcpus,
            )
        )
        domains[actor.role] = domain
        threading.Thread(target=_follow, args=(domain, actor, audience), daemon=True).start()
    for domain in domains.values():
        dom0.start(domain)
    stop = threading.Event()
    meter = threading.Thread(target=_measure, args=(dom0, actors, domains, stop, audience), daemon=True)
    meter.start()
    try:
        return _direct(domains, {actor.role: actor for actor in actors}, audience)
    finally:
        stop.set()
        meter.join()


def _direct(domains: dict[str, GuestDomain], actors: dict[str, Actor], audience: Audience) -> list[str]:
    """Wait for the crash, then let the worker go on, and check what everybody did."""
    worker, crasher, pair = actors["worker"], actors["crasher"], actors["pair"]
    crash = domains["crasher"].wait(DEADLINE_SECONDS)
    if crash is None or crash.shutdown_reason != SHUTDOWN_crash:
        return [f"the crasher did not crash: {crash}"]
    crasher.verdict = "panicked, as it should"
    if not _await(worker, lambda: "half way" in worker.output):
        return ["the worker never got half way"]
    audience.crash_noticed()
    domains["worker"].console.write(input_chunk(GO.encode() + b"\n", sysrq=True))
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


def _follow(domain: GuestDomain, actor: Actor, audience: Audience) -> None:
    """Take a domain's console apart into its command's output and lines to show."""
    rest = ""
    with domain.console.open_reader(Overflow.WAIT) as reader:
        while data := reader.read():
            output = actor.framing.feed(data).decode("utf-8", "replace")
            actor.output += output
            *lines, rest = (rest + output).replace("\r", "").split("\n")
            for line in lines:
                audience.line(actor.role, line)
            actor.changed.set()
    actor.changed.set()


def _measure(
    dom0: Dom0, actors: list[Actor], domains: dict[str, GuestDomain], stop: threading.Event, audience: Audience
) -> None:
    """Keep the actors' numbers fresh."""
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
        audience.refresh()
        if stopping:
            return
