"""Event channels in a domain's record: what each port is bound to, and the queues of the FIFO ABI."""

from __future__ import annotations

from xenolith.abi.event_fifo import EVENT_ARRAY_PAGES, EVTCHN_FIFO_MAX_QUEUES
from xenolith.abi.hypercalls import DOMID_INVALID, DOMID_SELF, EVTCHN_2L_NR_CHANNELS, NR_VIRQS
from xenolith.hypervisor import event_fifo, events
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.domain_record.kinds import (
    FLAG,
    U16,
    U64,
    Array,
    Listing,
    Number,
    Octets,
    Optional,
    Plain,
    Record,
    RecordError,
)
from xenolith.hypervisor.events import EventChannels, binding_lock


def ports_state(channels: EventChannels) -> list[Plain]:
    """Every port in use: what it is bound to as seen from where the domain arrives."""
    ports: list[Plain] = []
    domain = channels.domain
    with binding_lock:
        for port in range(1, channels.valid_ports):
            kind = channels.state[port]
            entry = {"port": port, "vcpu": channels.vcpu_id[port]}
            if kind == events.UNBOUND:
                ports.append(entry | {"unbound": _numbered(channels.remote_domid[port], domain)})
            elif kind == events.INTERDOMAIN and channels.remote[port] is domain:
                ports.append(entry | {"local": channels.remote_port[port]})
            elif kind == events.INTERDOMAIN:
                if channels.remote_domid[port]:
                    raise RecordError(f"its event channel {port} leads to domain {channels.remote_domid[port]}")
                ports.append(entry | {"unbound": 0})
            elif kind == events.VIRQ:
                ports.append(entry | {"virq": channels.virq[port]})
            elif kind == events.IPI:
                ports.append(entry | {"ipi": True})
    return ports


def _numbered(domid: int, domain: Domain) -> int:
    """A domain's number as it goes into a record: only dom0 and the domain itself are the same elsewhere."""
    if domid in (domain.domid, DOMID_SELF):
        return DOMID_SELF
    return 0 if domid == 0 else DOMID_INVALID


def load_ports(domain: Domain, record: Record) -> None:
    """Bind the ports. Raises RecordError."""
    channels = domain.events
    vcpu_id = Number(len(domain.vcpus))
    for entry in record.records("ports", 0, channels.max_port):
        port = entry.get("port", Number(channels.max_port + 1))
        if not port or channels.state[port] != events.FREE:
            raise RecordError(f"{entry.where} is in use twice")
        channels.vcpu_id[port] = entry.get("vcpu", vcpu_id)
        _load_port(channels, port, entry)
        channels.make_valid(port)
    for port in range(1, channels.valid_ports):
        if channels.state[port] == events.INTERDOMAIN:
            other = channels.remote_port[port]
            if channels.state[other] != events.INTERDOMAIN or channels.remote_port[other] != port:
                raise RecordError(f"event channel {port} leads nowhere")


def _load_port(channels: EventChannels, port: int, entry: Record) -> None:
    domain = channels.domain
    if entry.has("unbound"):
        remote = entry.get("unbound", U16)
        channels.state[port] = events.UNBOUND
        channels.remote_domid[port] = domain.domid if remote == DOMID_SELF else 0 if remote == 0 else DOMID_INVALID
    elif entry.has("local"):
        channels.state[port] = events.INTERDOMAIN
        channels.remote[port], channels.remote_domid[port] = domain, domain.domid
        channels.remote_port[port] = entry.get("local", Number(channels.max_port + 1))
    elif entry.has("virq"):
        virq = entry.get("virq", Number(NR_VIRQS))
        vcpu = domain.vcpus[channels.vcpu_id[port] if virq in events.PER_VCPU_VIRQS else 0]
        if vcpu.virq_port[virq]:
            raise RecordError(f"{entry.where}: VIRQ {virq} is bound twice")
        channels.state[port], channels.virq[port] = events.VIRQ, virq
        vcpu.virq_port[virq] = port
    else:
        entry.get("ipi", FLAG)
        channels.state[port] = events.IPI


def load_fifo(domain: Domain, record: Record) -> None:
    """The FIFO ABI as `event_fifo.state` wrote it, if the domain uses it. Raises RecordError."""
    if not record.has("fifo") or record.any("fifo") is None:
        if domain.events.valid_ports > EVTCHN_2L_NR_CHANNELS:
            raise RecordError(f"it has an event channel beyond its bitmaps of {EVTCHN_2L_NR_CHANNELS}")
        return
    fifo = record.record("fifo")
    ports = len(domain.port_queues) // event_fifo.QUEUE_BYTES
    queues = fifo.get("queues", Octets(0, len(domain.port_queues)))
    domain.port_queues[: len(queues)] = queues
    limits = EVTCHN_FIFO_MAX_QUEUES, EVTCHN_FIFO_MAX_QUEUES, len(domain.vcpus), 2
    if any(value >= limits[at % event_fifo.QUEUE_BYTES] for at, value in enumerate(queues)):
        raise RecordError(f"{fifo.where}: a port is in a queue that there is not")
    controls = fifo.get("controls", Array(Optional(Array(U64, 2)), len(domain.vcpus)))
    tails = fifo.get("tails", Array(Array(Number(ports), EVTCHN_FIFO_MAX_QUEUES), len(domain.vcpus)))
    for vcpu, control, last in zip(domain.vcpus, controls, tails, strict=True):
        vcpu.queue_tails[:] = last
        if control is not None:
            mfn, offset = control
            if event_fifo.init_control(domain, vcpu, mfn, offset, 0):
                raise RecordError(f"{fifo.where}: {vcpu!r} has its control block where it cannot be")
    if not domain.fifo:
        raise RecordError(f"{fifo.where}: no vCPU has a control block")
    for mfn in fifo.get("pages", Listing(U64, EVENT_ARRAY_PAGES)):
        if event_fifo.expand_array(domain, mfn):
            raise RecordError(f"{fifo.where}: frame {mfn:#x} cannot have event words")
