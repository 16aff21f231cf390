"""`xl trigger DOMAIN nmi`: what a guest sees of it."""

from __future__ import annotations

import xenolith
from xenolith.toolstack.client import ConsoleStream, Trigger

from .catalogue import PASSED, PREBUILT


def printed(console: ConsoleStream, until: str) -> str:
    """What appears on the console up to this text, or to its end."""
    text = ""
    while until not in text and (data := console.read(timeout=60)):
        text += data.decode()
    assert until in text
    return text


def test_an_nmi_wakes_a_guest_and_runs_its_callback_once(engine_name: str) -> None:
    with xenolith.power_on(64, engine=engine_name) as machine:
        config = xenolith.DomainConfig(
            "nmi", kernel=str(PREBUILT / "nmi.elf"), cmdline="external=3", target_memory_kib=16 << 10
        )
        domain = machine.create(config)
        console = domain.console()
        domain.unpause()
        for number in (1, 2, 3):
            printed(console, f"ready for NMI {number}\n")
            machine.client.trigger(domain.domid, Trigger.NMI, 0)
        assert PASSED.search(printed(console, "FAILED=0\n"))
        console.close()


def test_an_nmi_does_nothing_to_a_guest_without_a_callback(engine_name: str) -> None:
    with xenolith.power_on(64, engine=engine_name) as machine:
        domain = machine.create(
            xenolith.DomainConfig(
                "hello", kernel=str(PREBUILT / "hello.elf"), cmdline="console_io", target_memory_kib=16 << 10
            )
        )
        console = domain.console()
        machine.client.trigger(domain.domid, Trigger.NMI, 0)  # it finds it when it begins
        domain.unpause()
        assert PASSED.search(printed(console, "FAILED=0\n"))
        assert domain.wait(timeout=60) is xenolith.State.SHUTDOWN
        assert domain.info.shutdown_reason == 0
        console.close()
