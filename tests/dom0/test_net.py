"""The network back-end against front-ends that the test plays, good ones and hostile ones."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from xenolith.abi import netif
from xenolith.abi.io_ring import REQ_PROD, RSP_PROD
from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.backends.net import CONTENDED_SLOTS, Rate
from xenolith.dom0.network import fair
from xenolith.dom0.network.frame import TCP_ACK, TCP_PSH
from xenolith.dom0.network.network import Network
from xenolith.dom0.xenstore import XenstoreService

from .frontends import running_store
from .netfront import TX_DATA, NetFrontend, checksums_are_right, pseudo_header, stop_all, tcp_segment

Plug = Callable[..., NetFrontend]
OKAY, ERROR, NULL = netif.NETIF_RSP_OKAY, netif.NETIF_RSP_ERROR, netif.NETIF_RSP_NULL


@pytest.fixture
def store() -> Iterator[XenstoreService]:
    with running_store() as made:
        yield made


@pytest.fixture
def plug(store: XenstoreService) -> Iterator[Plug]:
    """Plug an interface in; the first is domain 1's."""
    network = Network(lambda _: None)
    fronts: list[NetFrontend] = []

    def make(**options: object) -> NetFrontend:
        front = NetFrontend(store, network, domid=len(fronts) + 1, **options)  # type: ignore[arg-type]
        fronts.append(front)
        if options.get("connect", True):
            front.sees(S.CONNECTED)
        return front

    yield make
    stop_all(fronts)
    assert not network.router.vifs
    assert not len(network.router.flows)
    network.close()


def blank_tcp(front: NetFrontend, to: NetFrontend, payload: bytes) -> bytes:
    """A TCP packet whose checksum is left to others, as Linux sends it."""
    frame = bytearray(front.frame(tcp_segment((front.address, 40000), (to.address, 80), TCP_ACK | TCP_PSH, payload)))
    total = sum(
        int.from_bytes(pair, "big")
        for pair in zip(*[iter(pseudo_header(front.address, to.address, 6, len(frame) - 34))] * 2, strict=True)
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    frame[50:52] = total.to_bytes(2, "big")
    return bytes(frame)


def test_what_the_interface_offers_and_is(plug: Plug) -> None:
    front = plug(mtu=1400, rate=(1000, 50_000))
    directory = front.device.directory
    back = {name: front.store.read(f"{directory}/{name}") for name in front.store.directory(directory)}
    assert back["feature-rx-copy"] == back["feature-sg"] == back["feature-gso-tcpv4"] == "1"
    assert back["feature-split-event-channels"] == "1"
    assert back["mac"] == front.store.read(f"{front.device.frontend}/mac") == front.mac_node
    assert back["mtu"] == "1400"
    assert back["rate"] == "1000,50000"


def test_a_packet_goes_to_the_domain_whose_address_it_has(plug: Plug) -> None:
    one, two, three = plug(), plug(), plug()
    one.send(one.datagram(two, b"to two"))
    assert one.responses(1) == [OKAY]
    data, flags, gso = two.receive()
    assert data[-6:] == b"to two"
    assert data[0:6] == two.mac
    assert (flags, gso) == (0, 0)
    assert three.received() == 0
    assert (one.vif.statistics.tx_packets, two.vif.statistics.rx_packets) == (1, 1)


def test_a_packet_in_several_slots(plug: Plug) -> None:
    one, two = plug(), plug()
    payload = random.Random(1).randbytes(1400)
    one.send(one.datagram(two, payload), slot_size=100)
    assert one.responses(15) == [OKAY] * 15
    assert two.receive()[0][-1400:] == payload


def test_a_great_packet_goes_whole_to_who_can_take_it(plug: Plug) -> None:
    one, two = plug(), plug()
    payload = random.Random(2).randbytes(60_000)
    sent = blank_tcp(one, two, payload)
    one.send(sent, flags=netif.NETTXF_csum_blank | netif.NETTXF_data_validated, gso_size=1448)
    assert one.responses(16) == [OKAY, NULL] + [OKAY] * 14
    data, flags, gso = two.receive()
    assert data[12:] == sent[12:]
    assert flags == netif.NETRXF_csum_blank | netif.NETRXF_data_validated
    assert gso == 1448


@pytest.mark.parametrize("lacking", ["feature-sg", "feature-gso-tcpv4"])
def test_a_great_packet_is_cut_up_for_who_cannot(plug: Plug, lacking: str) -> None:
    one, two = plug(), plug(nodes={lacking: "0", "feature-no-csum-offload": "1"})
    payload = random.Random(3).randbytes(10_000)
    one.send(blank_tcp(one, two, payload), flags=netif.NETTXF_csum_blank, gso_size=1448)
    got = b""
    sequence = 1
    while len(got) < len(payload):
        data, flags, gso = two.receive()
        assert (flags, gso) == (0, 0)
        assert checksums_are_right(data)
        assert int.from_bytes(data[38:42], "big") == sequence
        assert len(data) - 54 <= 1448
        assert bool(data[47] & TCP_PSH) == (len(got) + len(data) - 54 == len(payload)), "only the last is pushed"
        sequence += len(data) - 54
        got += data[54:]
    assert got == payload


def test_a_blank_checksum_is_filled_in_for_who_wants_it(plug: Plug) -> None:
    one, two = plug(), plug(nodes={"feature-no-csum-offload": "1"})
    one.send(blank_tcp(one, two, b"odd"), flags=netif.NETTXF_csum_blank)
    data, flags, _ = two.receive()
    assert flags == 0
    assert checksums_are_right(data)


def test_one_event_channel_serves_both_rings(plug: Plug, store: XenstoreService) -> None:
    one = plug()
    two = plug(connect=False)
    del two.nodes["event-channel-tx"], two.nodes["event-channel-rx"]
    two.nodes["event-channel"] = "5"
    two.connect()
    two.sees(S.CONNECTED)
    one.send(one.datagram(two))
    assert two.receive()[0].endswith(b"payload")
    two.send(two.datagram(one, b"back"))
    assert one.receive()[0].endswith(b"back")


def test_packets_wait_for_buffers_and_not_without_end(plug: Plug) -> None:
    one, two = plug(), plug()
    for at in range(2000):
        one.send(one.datagram(two, at.to_bytes(2, "big")))
        assert one.responses(1) == [OKAY]
    assert two.vif.statistics.rx_dropped >= 2000 - 256 - 1024 - 1, "one ring full, and as many as may wait"
    first = [int.from_bytes(two.receive()[0][-2:], "big") for _ in range(256)]
    assert first == list(range(256))
    two.offer_buffers(256)
    assert int.from_bytes(two.receive()[0][-2:], "big") == 256, "in order"


def test_a_buffer_that_was_not_granted_costs_its_packet_alone(plug: Plug) -> None:
    one, two = plug(), plug()
    del two.dom0.frames[500]
    one.send(one.datagram(two, b"lost"))
    assert netif.RX_RESPONSE.unpack(two._response())[3] == ERROR
    one.send(one.datagram(two, b"found"))
    assert two.receive()[0].endswith(b"found")
    assert two.vif.statistics.rx_dropped == 1


def test_data_that_was_not_granted_costs_its_packet_alone(plug: Plug) -> None:
    one, two = plug(), plug()
    one.put(netif.TX_REQUEST.pack(77, 0, 0, 1, 100))
    one.push()
    assert one.responses(1) == [ERROR]
    one.send(one.datagram(two))
    assert one.responses(1) == [OKAY]
    assert one.vif.drops["not granted"] == 1


def test_going_away_and_coming_back(plug: Plug) -> None:
    one, two = plug(), plug()
    two.says(S.CLOSING)
    two.sees(S.CLOSING)
    two.says(S.CLOSED)
    two.sees(S.CLOSED)
    assert two.dom0.mapped == {}
    two.says(S.INITIALISING)
    two.sees(S.INIT_WAIT)
    two.connect()
    two.sees(S.CONNECTED)
    one.send(one.datagram(two, b"again"))
    while not (data := two.receive()[0]).endswith(b"again"):
        assert data
    assert two.device.failure is None


def request(ref: int = TX_DATA, offset: int = 0, flags: int = 0, size: int = 100) -> bytes:
    return netif.TX_REQUEST.pack(ref, offset, flags, 1, size)


MORE, EXTRA = netif.NETTXF_more_data, netif.NETTXF_extra_info
LIES = {
    "beyond its page": [request(offset=4000, size=97)],
    "offset beyond its page": [request(offset=5000, size=1)],
    "more that does not come": [request(flags=MORE)],
    "extra information that does not come": [request(flags=EXTRA)],
    "extra information without end": [request(flags=EXTRA)] + [netif.EXTRA_GSO.pack(1, 1, 1448, 1, 0, 0)] * 6,
    "a GSO type that was not offered": [request(flags=EXTRA), netif.EXTRA_GSO.pack(1, 0, 1448, 2, 0, 0)],
    "a GSO size of nothing": [request(flags=EXTRA), netif.EXTRA_GSO.pack(1, 0, 0, 1, 0, 0)],
    "an unknown kind of extra information": [request(flags=EXTRA), netif.EXTRA_GSO.pack(9, 0, 1448, 1, 0, 0)],
    "parts larger than the whole": [request(flags=MORE), request(size=101)],
    "an empty part": [request(flags=MORE), request(size=0)],
    "too many parts": [request(flags=MORE, size=300)] + [request(flags=MORE, size=1)] * 30 + [request(size=1)],
}


@pytest.mark.parametrize("lie", LIES)
def test_what_no_front_end_would_write_closes_the_device(plug: Plug, lie: str) -> None:
    one, two, three = plug(), plug(), plug()
    one.dom0.grant(TX_DATA)
    for entry in LIES[lie]:
        one.put(entry)
    one.push()
    one.sees(S.CLOSING)
    assert one.device.failure is not None
    assert "broke the protocol" in one.device.failure
    assert one.dom0.mapped == {}
    two.send(two.datagram(three))
    assert three.receive()[0].endswith(b"payload"), "the others go on"


@pytest.mark.parametrize("ring", ["tx", "rx"])
def test_a_producer_that_lies_closes_the_device(plug: Plug, ring: str) -> None:
    one, two = plug(), plug()
    (one.tx if ring == "tx" else one.rx).words[REQ_PROD] = 1 << 30
    if ring == "rx":
        two.send(two.datagram(one))
    one.dom0.event()
    one.sees(S.CLOSING)
    assert one.dom0.mapped == {}


@pytest.mark.parametrize(
    ("node", "value"),
    [
        ("tx-ring-ref", "99"),
        ("tx-ring-ref", "x" * 1000),
        ("rx-ring-ref", "-1"),
        ("rx-ring-ref", "4294967296"),
        ("request-rx-copy", "0"),
        ("event-channel-tx", "77"),
        ("event-channel-rx", ""),
        ("feature-sg", "yes"),
    ],
)
def test_nodes_that_make_no_sense(plug: Plug, node: str, value: str) -> None:
    front = plug(connect=False)
    front.nodes[node] = value
    front.connect()
    front.sees(S.CLOSING)
    assert front.device.failure is not None
    assert "broke the protocol" in front.device.failure


@pytest.mark.parametrize("seed", range(4))
def test_random_entries(plug: Plug, seed: int) -> None:
    """25,000 that were answered, most nearly right. A device that fails is replaced; the others never notice."""
    chance = random.Random(seed)
    two, three, one = plug(), plug(), plug()
    entries = failures = 0
    while entries < 25_000:
        if one.device.failure is not None:
            assert "broke the protocol" in one.device.failure
            one.stop()
            assert one.dom0.mapped == {}
            one = plug()
            failures += 1
        sent = one.datagram(two)
        for ref in range(TX_DATA, TX_DATA + 4):
            one.dom0.grant(ref, sent if chance.random() < 0.7 else chance.randbytes(4096))
        count = chance.randrange(1, 250)
        for _ in range(count):
            if chance.random() < 0.003:
                one.put(chance.randbytes(netif.TX_ENTRY_SIZE))
                continue
            size = chance.choice([len(sent), 0, 13, 14, 60, chance.randrange(3000)])
            flags = chance.choice([0, 0, 0, 1, 2, 3, chance.randrange(4)])
            ref = TX_DATA + chance.randrange(5)
            one.put(netif.TX_REQUEST.pack(ref, chance.randrange(1000), flags, chance.randrange(65536), size))
        one.push()
        one.settle()
        entries += one.tx.words[RSP_PROD] - one.tx_consumed
        one.tx_consumed = one.tx_produced
    waiting = two.received()
    two.rx_consumed += waiting
    two.offer_buffers(waiting)
    three.send(three.datagram(two, b"alive"))
    while not two.receive()[0].endswith(b"alive"):
        two.offer_buffers(1)
    assert failures > 10


def test_requests_and_grants_that_change_while_they_are_served(plug: Plug) -> None:
    """Somebody writes into the ring and takes grants away all the while, as another vCPU of the guest could."""
    two, three, one = plug(), plug(), plug()
    stop = threading.Event()
    victim = [one]

    def meddle() -> None:
        chance = random.Random(7)
        while not stop.is_set():
            front = victim[0]
            at = chance.randrange(64, 4096)
            front.tx.bytes[at] = chance.randrange(256)
            front.rx.bytes[at] = chance.randrange(256)
            front.dom0.frames.pop(TX_DATA + chance.randrange(8), None)

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        entries = 0
        while entries < 20_000:
            if one.device.failure is not None:
                assert "broke the protocol" in one.device.failure, one.dom0.lines
                one.stop()
                victim[0] = one = plug()
            sent = one.datagram(two)
            for ref in range(TX_DATA, TX_DATA + 8):
                one.dom0.grant(ref, sent)
            for at in range(200):
                one.put(netif.TX_REQUEST.pack(TX_DATA + at % 8, 0, 0, at, len(sent)))
            one.push()
            one.settle()
            entries += one.tx.words[RSP_PROD] - one.tx_consumed
            one.tx_consumed = one.tx_produced
            two.send(two.datagram(one))
            two.responses(1)
    finally:
        stop.set()
        meddler.join()
    three.send(three.datagram(two, b"alive"))
    seen = two.received()
    two.rx_consumed += seen
    two.offer_buffers(seen)  # which may be filled at once
    three.send(three.datagram(two, b"alive"))
    while not two.receive()[0].endswith(b"alive"):  # the others' packets come first, and fill the queue
        two.offer_buffers(1)
        three.send(three.datagram(two, b"alive"))


def test_a_rate_is_kept() -> None:
    now = 0.0
    rate = Rate(1000, 50_000, lambda: now)
    assert rate.wait() == 0.0
    rate.spend(1500)
    assert rate.wait() == pytest.approx(0.05)
    now = 0.05
    assert rate.wait() == 0.0, "500 are left"
    rate.spend(600)
    assert rate.wait() == pytest.approx(0.05)
    now = 0.1
    assert rate.wait() == 0.0
    sent = 0
    while now < 10.0:
        if delay := rate.wait():
            now += delay
        else:
            rate.spend(400)
            sent += 400
    assert sent == pytest.approx(9.9 * 20_000, rel=0.01)


def test_a_limited_interface_sends_all_the_same(plug: Plug) -> None:
    one, two = plug(rate=(2000, 1000)), plug()
    for at in range(50):
        one.send(one.datagram(two, at.to_bytes(2, "big") * 300))
    assert [two.receive()[0][-2:] for _ in range(50)] == [at.to_bytes(2, "big") for at in range(50)]


def test_a_flood_waits_in_the_queue_and_not_in_the_ring(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "CONTENDED_SECONDS", 1e9)
    flooder, other, two = plug(), plug(), plug()
    other.send(other.datagram(two, b"first"))
    other.responses(1)
    two.receive()
    for _ in range(150):
        flooder.send(flooder.datagram(two))
    flooder.responses(150)
    two.device.ask(lambda: None)
    assert two.received() <= CONTENDED_SLOTS
    other.send(other.datagram(two, b"late"))
    other.responses(1)
    waited = 0
    while two.receive()[0][-4:] != b"late":
        two.offer_buffers(1)
        waited += 1
    assert waited < CONTENDED_SLOTS + 2 * fair.QUANTUM // fair.FRAME_BYTES
    for _ in range(150 - waited):
        two.offer_buffers(1)
        two.receive()


def test_nobody_is_kept_from_the_ring_who_is_alone(plug: Plug) -> None:
    one, two = plug(), plug()
    for _ in range(150):
        one.send(one.datagram(two))
    one.responses(150)
    two.device.ask(lambda: None)
    assert two.received() == 150
