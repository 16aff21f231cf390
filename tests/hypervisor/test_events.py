"""Event channels: what a guest sees in shared_info, and what each operation refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import pack, unpack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi import hypercalls as abi
from xenolith.abi.errno import EEXIST, EFAULT, EINVAL, ENOENT, ENOSPC, ENOSYS, EOPNOTSUPP, EPERM, ESRCH
from xenolith.abi.layout import U64, VCPU_INFO_PENDING_SEL
from xenolith.hypervisor import events
from xenolith.hypervisor.domain import Domain, Vcpu
from xenolith.hypervisor.hypercalls.event_channel_op import do_event_channel_op, do_event_channel_op_compat

from .bare import DATA, BareMachine, pending, read, set_mask, upcall_pending, write


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    yield machine
    machine.close()


def op(vcpu: Vcpu, cmd: int, argument: bytes) -> int:
    write(vcpu, DATA, argument)
    return do_event_channel_op(vcpu, cmd, DATA)


def selector(vcpu: Vcpu) -> int:
    address = vcpu.info + VCPU_INFO_PENDING_SEL
    (word,) = U64.unpack(vcpu.domain.memory.b[address : address + 8])
    return int(word)


def test_an_unmasked_port_sets_its_bit_its_word_in_the_selector_and_the_upcall_byte(machine: BareMachine) -> None:
    domain = machine.domain()
    vcpu = domain.vcpus[0]
    port = domain.events.bind_ipi(0)
    assert domain.events.send(port) == 0
    assert pending(domain, port)
    assert selector(vcpu) == 1 << port // 64
    assert upcall_pending(vcpu)


def test_a_masked_port_only_becomes_pending_and_unmasking_makes_up_for_the_rest(machine: BareMachine) -> None:
    domain = machine.domain()
    vcpu = domain.vcpus[0]
    port = domain.events.bind_ipi(0)
    set_mask(domain, port, True)
    domain.events.send(port)
    assert pending(domain, port)
    assert not upcall_pending(vcpu)
    assert op(vcpu, abi.EVTCHNOP_unmask, pack("<I", port)) == 0
    assert upcall_pending(vcpu)
    assert selector(vcpu) == 1


def test_an_event_for_one_vcpu_leaves_the_others_alone(machine: BareMachine) -> None:
    domain = machine.domain(vcpus=3)
    port = domain.events.bind_ipi(2)
    domain.events.send(port)
    assert [upcall_pending(vcpu) for vcpu in domain.vcpus] == [False, False, True]


def test_two_domains_notify_each_other(machine: BareMachine) -> None:
    one, two = machine.domain(), machine.domain()
    vcpu_one, vcpu_two = one.vcpus[0], two.vcpus[0]
    assert op(vcpu_one, abi.EVTCHNOP_alloc_unbound, pack("<HHI", abi.DOMID_SELF, two.domid, 0)) == 0
    port_one = unpack("<I", read(vcpu_one, DATA + 4, 4))[0]
    assert op(vcpu_two, abi.EVTCHNOP_bind_interdomain, pack("<HHII", one.domid, 0, port_one, 0)) == 0
    port_two = unpack("<I", read(vcpu_two, DATA + 8, 4))[0]
    assert pending(two, port_two), "the binder looks once, for it may have missed something"
    assert op(vcpu_two, abi.EVTCHNOP_send, pack("<I", port_two)) == 0
    assert not pending(one, port_one), "only the receiver's own thread may set its bits"
    events.drain(one)
    assert pending(one, port_one)

    assert op(vcpu_one, abi.EVTCHNOP_close, pack("<I", port_one)) == 0
    assert not pending(one, port_one)
    assert op(vcpu_two, abi.EVTCHNOP_send, pack("<I", port_two)) == 0, "unbound: dropped"
    assert op(vcpu_two, abi.EVTCHNOP_status, pack("<HHIII8x", abi.DOMID_SELF, 0, port_two, 9, 9)) == 0
    assert unpack("<IIH", read(vcpu_two, DATA + 8, 10)) == (abi.EVTCHNSTAT_unbound, 0, one.domid)


def test_a_posted_port_that_was_closed_meanwhile_stays_clear(machine: BareMachine) -> None:
    domain = machine.domain()
    port = domain.events.bind_ipi(0)
    events.post(domain, port)
    domain.events.close(port)
    events.drain(domain)
    assert not pending(domain, port)


def test_a_flood_of_events_leaves_one_entry_to_drain(machine: BareMachine) -> None:
    domain = machine.domain()
    port = domain.events.alloc_unbound(0)
    sender = machine.dom0.bind_interdomain(domain.domid, port)
    for _ in range(1000):
        machine.dom0.send(sender)
    assert len(domain.posted) == 1


def test_a_flood_of_writes_to_a_domains_frames_leaves_one_entry_a_frame_to_drain(machine: BareMachine) -> None:
    """As many as others copy into its grants while it is paused."""
    domain = machine.domain()
    looked_at: list[int] = []
    domain.executable_mapped = looked_at.append
    for number in range(1000):
        events.post_code_written(domain, 5 + number % 2)
    assert len(domain.posted) == 2
    events.drain(domain)
    assert sorted(looked_at) == [5, 6]
    events.post_code_written(domain, 5)
    events.drain(domain)
    assert looked_at[2:] == [5], "written again since"


def test_dom0_gets_its_events_by_handler_even_those_that_came_first(machine: BareMachine) -> None:
    domain = machine.domain()
    seen: list[int] = []
    unbound = domain.events.alloc_unbound(0)
    port = machine.dom0.bind_interdomain(domain.domid, unbound)
    domain.events.send(unbound)
    machine.dom0.set_handler(port, seen.append)
    assert seen == [port]
    domain.events.send(unbound)
    assert seen == [port, port]
    machine.dom0.close(port)
    domain.events.send(unbound)
    assert seen == [port, port]


def test_a_handler_of_dom0_that_fails_does_not_reach_the_guest(machine: BareMachine) -> None:
    domain = machine.domain()
    unbound = domain.events.alloc_unbound(0)
    port = machine.dom0.bind_interdomain(domain.domid, unbound)

    def broken(_: int) -> None:
        raise RuntimeError("broken back-end")

    machine.dom0.set_handler(port, lambda _: None)
    machine.dom0.set_handler(port, broken)
    assert domain.events.send(unbound) == 0
    assert "broken back-end" in machine.hypervisor.log_text


def test_bindings_that_are_refused(machine: BareMachine) -> None:
    domain, other = machine.domain(vcpus=2), machine.domain()
    vcpu = domain.vcpus[0]
    reserved = other.events.alloc_unbound(77)
    cases = [
        (abi.EVTCHNOP_alloc_unbound, pack("<HHI", 4000, 0, 0), -ESRCH),
        (abi.EVTCHNOP_alloc_unbound, pack("<HHI", other.domid, 0, 0), -EPERM),
        (abi.EVTCHNOP_bind_interdomain, pack("<HHII", 4000, 0, 1, 0), -ESRCH),
        (abi.EVTCHNOP_bind_interdomain, pack("<HHII", other.domid, 0, reserved, 0), -EINVAL),
        (abi.EVTCHNOP_bind_interdomain, pack("<HHII", other.domid, 0, 0xFFFFFFFF, 0), -EINVAL),
        (abi.EVTCHNOP_bind_virq, pack("<III", abi.NR_VIRQS, 0, 0), -EINVAL),
        (abi.EVTCHNOP_bind_virq, pack("<III", abi.VIRQ_CONSOLE, 1, 0), -EINVAL),
        (abi.EVTCHNOP_bind_virq, pack("<III", abi.VIRQ_TIMER, 2, 0), -ENOENT),
        (abi.EVTCHNOP_bind_virq, pack("<III", abi.VIRQ_TIMER, 1, 0), 0),
        (abi.EVTCHNOP_bind_virq, pack("<III", abi.VIRQ_TIMER, 1, 0), -EEXIST),
        (abi.EVTCHNOP_bind_ipi, pack("<II", 0xFFFFFFFF, 0), -ENOENT),
        (abi.EVTCHNOP_bind_pirq, pack("<III", 1, 0, 0), -EPERM),
        (abi.EVTCHNOP_close, pack("<I", 0), -EINVAL),
        (abi.EVTCHNOP_close, pack("<I", 50), -EINVAL),
        (abi.EVTCHNOP_send, pack("<I", 1 << 31), -EINVAL),
        (abi.EVTCHNOP_send, pack("<I", 1), -EINVAL),  # the VIRQ_TIMER bound above
        (abi.EVTCHNOP_unmask, pack("<I", 5000), -EINVAL),
        (abi.EVTCHNOP_bind_vcpu, pack("<II", 1, 0), -EINVAL),
        (abi.EVTCHNOP_bind_vcpu, pack("<II", 1, 2), -ENOENT),
        (abi.EVTCHNOP_status, pack("<HHI16x", other.domid, 0, reserved), -EPERM),
        (abi.EVTCHNOP_reset, pack("<H", other.domid), -EPERM),
        (abi.EVTCHNOP_init_control, bytes(32), -EINVAL),
        (abi.EVTCHNOP_expand_array, bytes(32), -EOPNOTSUPP),
        (abi.EVTCHNOP_set_priority, bytes(32), -ENOSYS),
        (99, bytes(32), -ENOSYS),
    ]
    assert [(cmd, op(vcpu, cmd, argument)) for cmd, argument, _ in cases] == [
        (cmd, expected) for cmd, _, expected in cases
    ]
    assert do_event_channel_op(vcpu, abi.EVTCHNOP_send, 0x7000) == -EFAULT
    assert do_event_channel_op(vcpu, abi.EVTCHNOP_close, 0xFFFF_8000_0000_0000) == -EFAULT


def test_a_domain_gets_no_more_ports_than_its_limit(machine: BareMachine) -> None:
    domain = machine.domain()
    ports = [domain.events.alloc_unbound(0) for _ in range(1024)]
    assert ports[:1023] == list(range(1, 1024))
    assert ports[1023] == -ENOSPC
    domain.events.close(500)
    assert domain.events.alloc_unbound(0) == 500


def test_reset_closes_everything_and_lets_virqs_be_bound_again(machine: BareMachine) -> None:
    domain = machine.domain()
    port = domain.events.bind_virq(abi.VIRQ_TIMER, 0)
    domain.events.bind_ipi(0)
    assert op(domain.vcpus[0], abi.EVTCHNOP_reset, pack("<H", abi.DOMID_SELF)) == 0
    assert domain.events.bind_virq(abi.VIRQ_TIMER, 0) == port


def test_the_old_form_of_the_hypercall_takes_the_command_from_memory(machine: BareMachine) -> None:
    domain = machine.domain()
    vcpu = domain.vcpus[0]
    write(vcpu, DATA, pack("<III", abi.EVTCHNOP_bind_ipi, 0, 0) + bytes(16))
    assert do_event_channel_op_compat(vcpu, DATA) == 0
    assert unpack("<I", read(vcpu, DATA + 8, 4))[0] == 1
    write(vcpu, DATA, pack("<I", abi.EVTCHNOP_reset))
    assert do_event_channel_op_compat(vcpu, DATA) == -ENOSYS


def consistent(domains: list[Domain]) -> bool:
    """Every interdomain port has a peer that names it, every VIRQ port is the one its vCPU knows."""
    for domain in domains:
        channels = domain.events
        for port in range(channels.max_port + 1):
            if channels.state[port] == events.INTERDOMAIN:
                remote = channels.remote[port]
                assert remote is not None
                theirs = remote.events
                assert theirs.state[channels.remote_port[port]] == events.INTERDOMAIN
                assert theirs.remote[channels.remote_port[port]] is domain
                assert theirs.remote_port[channels.remote_port[port]] == port
            else:
                assert channels.remote[port] is None
        for vcpu in domain.vcpus:
            for virq, port in enumerate(vcpu.virq_port):
                assert not port or (channels.state[port] == events.VIRQ and channels.virq[port] == virq)
    return True


WORDS = st.integers(0, 12) | st.sampled_from([0x7FF0, 0xFFFF, 0xFFFFFFFF])
CALLS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 15), st.lists(WORDS, min_size=6, max_size=6)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(CALLS)
def test_no_sequence_of_operations_breaks_a_binding(calls: list[tuple[int, int, list[int]]]) -> None:
    machine = BareMachine()
    domains = [machine.domain(), machine.domain(vcpus=2)]
    for who, cmd, words in calls:
        vcpu = domains[who].vcpus[0]
        halves = pack("<HH5I", words[0] & 0xFFFF, words[1] & 0xFFFF, *words[1:])
        whole = pack("<6I", *words)
        result = op(vcpu, cmd, halves if cmd in (0, 5, 6, 10) else whole)
        assert -100 < result <= 0
        events.drain(domains[0])
        events.drain(domains[1])
    assert consistent(domains)


def test_native_code_knows_the_eventfd_of_a_port_of_dom0s_while_the_two_are_bound(machine: BareMachine) -> None:
    domain = machine.domain()
    unbound = domain.events.alloc_unbound(0)
    ends: list[Callable[[int], object]] = [machine.dom0.close, lambda _: domain.events.close(unbound)]
    for end in ends:
        port = machine.dom0.bind_interdomain(domain.domid, unbound)
        assert domain.events.bells[unbound] == -1
        machine.dom0.set_handler(port, lambda _: None, 77)
        assert domain.events.bells[unbound] == 77
        end(port)
        assert domain.events.bells[unbound] == -1
    machine.dom0.set_handler(port, lambda _: None, 77)
    assert 77 not in domain.events.bells
