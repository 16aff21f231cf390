"""The how-tos of CONTRIBUTING.md work as they are written."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from dom0.frontends import FakeDom0, Follower, running_store, state
from hypervisor.bare import DATA, BareMachine, read, write
from xenolith.abi.errno import EFAULT, EINVAL
from xenolith.abi.hypercalls import HYPERVISOR_sched_op, SHUTDOWN_poweroff
from xenolith.abi.io_ring import REQ_PROD, RSP_PROD
from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.rings import SharedRing
from xenolith.dom0.xenbus import Xenbus
from xenolith.hypervisor.sched.simulator import SECOND, Simulator, hog

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
sys.path.insert(0, str(HOWTO))
import greeting  # noqa: E402
import lottery  # noqa: E402
import upper  # noqa: E402


def test_every_howto_is_named_in_contributing_and_short() -> None:
    text = (HOWTO.parents[1] / "CONTRIBUTING.md").read_text()
    for path in HOWTO.glob("*.py"):
        assert f"docs/howto/{path.name}" in text
        assert len([line for line in path.read_text().splitlines() if line.strip()]) < 60, path.name


def test_lottery_shares_a_pcpu_by_tickets() -> None:
    machine = Simulator(lottery.Lottery(1), 1)
    tasks = [machine.add(domid, hog(), tickets=100 * domid) for domid in (1, 2, 3)]
    machine.run(60 * SECOND)
    for task, share in zip(tasks, (1, 2, 3), strict=True):
        assert task.cpu_time == pytest.approx(60 * SECOND * share / 6, rel=0.1)


@pytest.mark.slow
def test_lottery_runs_two_debian_domains(capsys: pytest.CaptureFixture[str]) -> None:
    lottery.main("unicorn")
    printed = capsys.readouterr().out
    assert "heads ran" in printed and "tails ran" in printed


def test_a_guest_is_greeted() -> None:
    machine = BareMachine()
    domain = machine.domain()
    greeting.install(domain)
    answers: list[int] = []

    def program() -> Generator[tuple[int, ...], int, None]:
        for va, size in ((DATA, 64), (DATA, 5), (DATA, 0), (DATA, 65), (0x123, 64)):
            answers.append((yield greeting.HYPERVISOR_greet, va, size))
        write(domain.vcpus[0], DATA + 128, SHUTDOWN_poweroff.to_bytes(4, "little"))
        yield HYPERVISOR_sched_op, 2, DATA + 128

    ended = machine.ended()
    machine.run(domain, program())
    assert ended.wait(60)
    assert answers == [len("hello d1v0"), 5, -EINVAL, -EINVAL, -EFAULT]
    assert read(domain.vcpus[0], DATA, 10) == b"hello d1v0"
    machine.close()


def test_text_comes_back_in_capitals() -> None:
    dom0 = FakeDom0()
    ring = SharedRing(memoryview(dom0.grant(8)), upper.MESSAGE.size)
    with running_store() as store:
        store.mkdir("/local/domain/7", ["n0", "r7"])
        xenbus = Xenbus(store, dom0.log)
        device = xenbus.plug(7, 0, upper.UpperBackend(dom0.hypercalls, 7), {}, {})
        states = Follower(store, f"{device.directory}/state")
        store.write(f"{device.frontend}/ring-ref", "8")
        store.write(f"{device.frontend}/event-channel", "3")
        store.write(f"{device.frontend}/state", state(S.INITIALISED))
        states.wait(state(S.CONNECTED))
        with dom0.notified:
            ring.bytes[ring.offset(0) : ring.offset(0) + upper.MESSAGE.size] = upper.MESSAGE.pack(5, 5, b"hello")
            ring.words[3] = 1  # RSP_EVENT: notify at the first response
            ring.words[REQ_PROD] = 1
            dom0.event()
            assert dom0.notified.wait_for(lambda: ring.words[RSP_PROD] == 1, 60)
        assert upper.MESSAGE.unpack_from(ring.bytes, ring.offset(0)) == (5, 5, b"HELLO".ljust(48, b"\0"))
        ring.words[REQ_PROD] = 1000  # a producer that lies
        dom0.event()
        states.wait(state(S.CLOSING))
        xenbus.remove(device)
        states.close()
    assert not dom0.mapped and "broke the protocol" in dom0.lines[0]


def test_what_the_tour_names_exists() -> None:
    text = (HOWTO.parent / "tour.md").read_text()
    links = re.findall(r"\]\(\.\./(src/[^)]+)\)", text)
    assert len(links) > 20
    root = HOWTO.parents[1]
    sources = {link: (root / link).read_text() for link in links}
    code = "\n".join(sources.values())
    for name in re.findall(r"`([A-Za-z_]+)`", text):
        if name not in ("slow", "set_pte", "make", "bounce"):
            assert re.search(rf"\b{name}\b", code), f"{name} is nowhere in the files that the tour links"
