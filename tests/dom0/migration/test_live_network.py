"""A guest that is relocated keeps its connections with domains of both daemons, and gets its published ports again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dom0.netfront import why_no_passt
from machines import DEADLINE_SECONDS, Machine
from relocating import check, counting, follow, relocate, said
from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.network.frame import TCP
from xenolith.dom0.network.port import Publication
from xenolith.dom0.network.trunk import Trunk
from xenolith.dom0.services import Dom0

pytestmark = pytest.mark.slow

ECHO = "echo there 1; nc -l -p 9 -e cat"
# What is sent over one connection comes back over it, and says its number.
TALK = """
talk() {
    i=0
    while :; do
        i=$((i+1))
        echo "a $i"
        case $i in *0) sleep 0.02;; esac
    done
}
talk | nc 10.213.0.10 9
"""
ANSWER = """
printf '#!/bin/sh\\nread line; echo "$line again"\\n' >/answer; chmod +x /answer
echo there 1
while :; do nc -l -p 7 -e /answer; done
"""


def vif(number: int, *publications: Publication) -> VifSpec:
    mac = b"\0\x16\x3e\0\0" + bytes([number])
    return VifSpec(number=0, mac=mac, ip=f"10.213.0.{number}", publications=publications)


@contextlib.contextmanager
def trunk(here: Dom0, there: Dom0) -> Iterator[None]:
    """The two are one network."""
    ends = socket.socketpair()
    with contextlib.ExitStack() as files:
        threads = []
        for dom0, end in zip((here, there), ends, strict=True):
            files.enter_context(end)
            source, out = files.enter_context(end.makefile("rb")), files.enter_context(end.makefile("wb"))

            def hang_up(end: socket.socket = end) -> None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

            carried = Trunk(dom0.network.router, source, out, hang_up, print)
            threads.append(threading.Thread(target=carried.run))
            threads[-1].start()
        try:
            yield
        finally:
            carried.close()
            for thread in threads:
                thread.join()


def relocate_while_it_talks(machines: tuple[Machine, Machine], here: Dom0, there: Dom0) -> None:
    peer = here.create(counting(script=ECHO, nets=[vif(10)]))
    here.start(peer)
    follow(peer.console, "there 1")
    domain = here.create(counting(script=TALK, nets=[vif(11)]))
    here.start(domain)
    follow(domain.console, "a 5")
    hosts = here, there
    for _ in range(5):
        domain, figures = relocate(*hosts, domain)
        print(figures)
        hosts = hosts[1], hosts[0]
        goal = said(domain.console.scrollback.decode(), "a")[-1] + 50
        check(follow(domain.console, f"a {goal}").partition("\n")[2], first=None)
    for machine in machines:
        machine.check_invariants()
    hosts[0].destroy(domain)
    here.destroy(peer)


def test_a_connection_stays_open_while_one_of_its_domains_is_relocated(engine_name: str) -> None:
    machines = Machine(300, engine_name), Machine(300, engine_name)
    with machines[0].dom0 as here, machines[1].dom0 as there:
        with trunk(here, there):
            relocate_while_it_talks(machines, here, there)
        assert not here.network.router.remotes
        assert not there.network.router.remotes


@pytest.mark.skipif(bool(why_no_passt()), reason=why_no_passt() or "")
def test_published_ports_are_open_where_a_guest_has_come(engine_name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(question: str) -> str:
        until = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < until:
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection,
            ):
                connection.sendall(question.encode() + b"\n")
                answer = connection.recv(100)
                if answer:
                    return answer.decode()
        return ""

    machines = Machine(200, engine_name), Machine(200, engine_name)
    with machines[0].dom0 as here, machines[1].dom0 as there:
        domain = here.create(counting(script=ANSWER, nets=[vif(11, Publication(TCP, "127.0.0.1", port, 7))]))
        here.start(domain)
        follow(domain.console, "there 1")
        assert ask("one") == "one again\n"
        with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as open_one:
            domain, _ = relocate(here, there, domain)
            open_one.settimeout(DEADLINE_SECONDS)
            with contextlib.suppress(ConnectionError):
                assert open_one.recv(100) == b""  # it has ended, and whoever waits is told
        assert ask("two") == "two again\n"
        domain, _ = relocate(there, here, domain)
        assert ask("three") == "three again\n"
        here.destroy(domain)
