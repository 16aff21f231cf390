"""One client's conversation with the store: bytes in, bytes out, whatever carries them.

:class:`Connection` cuts the byte stream into messages, runs each request on :class:`Xenstored` and queues the answer.
Guest rings and tool sockets differ only in how bytes travel (:mod:`ring`, :mod:`socket_client`).

A client harms nobody but itself. A header that announces more than 4096 bytes leaves no way to find the next message,
so the connection is given up (``failure`` is set) and holds neither watches nor transactions any more. A client which
does not fetch its answers is not listened to; events it does not fetch are kept once each (an event that already waits
is not queued again, as in Xen 4.17) and up to :attr:`Quota.unread_bytes`. Sources: docs/misc/xenstore.txt; answers to
malformed requests as recorded from Xen 4.17.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xenolith.abi.hypercalls import DOMID_SELF
from xenolith.abi.xs_wire import HEADER, PAYLOAD_MAX, RING_SIZE, Op, RingError
from xenolith.dom0.xenstore import paths, permissions
from xenolith.dom0.xenstore.caller import Caller
from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.store import View
from xenolith.dom0.xenstore.watches import Watch
from xenolith.dom0.xenstore.xenstored import Xenstored

_OK: Final = b"OK\0"


@dataclass(frozen=True)
class ConnectionState:
    """A conversation that goes on elsewhere: what waits in either direction, watches, open transactions."""

    failure: int
    input: bytes
    output: tuple[bytes, ...]
    sent_of_first: int
    watches: tuple[tuple[bytes, bytes], ...]
    transactions: tuple[int, ...]
    next_transaction: int
    former_domids: frozenset[int]


def _by_age(watch: Watch) -> tuple[int, int]:
    return watch.order


def _is_message(message: bytes) -> bool:
    return len(message) >= HEADER.size and HEADER.unpack_from(message)[3] == len(message) - HEADER.size <= PAYLOAD_MAX


class Connection(Caller):
    """A client that speaks the wire protocol."""

    def __init__(self, daemon: Xenstored, domid: int, wake: Callable[[Connection], None]) -> None:
        """``wake(connection)`` is called when output appears while none was waiting; it must only note the fact."""
        super().__init__(domid, daemon.caller_number())
        self.daemon: Final = daemon
        self.failure = RingError.NONE
        self._wake: Final = wake
        self._input: Final = bytearray()
        self._output: Final[deque[bytes]] = deque()
        self._output_bytes = 0
        self._processing = False
        self._sent_of_first = 0
        self._answers = 0
        """How many of the waiting messages answer requests; the others are events."""
        self._waiting_events: Final[set[bytes]] = set()

    # --- bytes in

    def feed(self, data: bytes) -> None:
        """Take bytes from the client; :meth:`process` runs what they amount to."""
        if not self.failure:
            self._input.extend(data)

    @property
    def wants_input(self) -> bool:
        """Whether the client is listened to: not while a whole message waits or too many answers do."""
        return not self.failure and not self.has_request and self.listening

    @property
    def has_request(self) -> bool:
        """Whether a complete message (or a header that can never become one) waits."""
        buffered = len(self._input)
        if buffered < HEADER.size:
            return False
        length: int = HEADER.unpack_from(self._input)[3]
        return length > PAYLOAD_MAX or buffered >= HEADER.size + length

    @property
    def listening(self) -> bool:
        """Whether the client fetches its answers, so that requests are run for it."""
        return self._answers < self.daemon.quota.outstanding

    def process(self, limit: int) -> None:
        """Run at most ``limit`` waiting requests, fewer if the client does not fetch its answers.

        Whoever calls this sends the output afterwards, so the client is not woken for it.
        """
        self._processing = True
        self._process(limit)
        self._processing = False

    def _process(self, limit: int) -> None:
        while limit and not self.failure and self.listening:
            buffered = self._input
            if len(buffered) < HEADER.size:
                return
            kind, req_id, tx_id, length = HEADER.unpack_from(buffered)
            if length > PAYLOAD_MAX:
                self.fail(RingError.PROTO)
                return
            end = HEADER.size + length
            if len(buffered) < end:
                return
            payload = bytes(buffered[HEADER.size : end])
            del buffered[:end]
            self._handle(kind, req_id, tx_id, payload)
            limit -= 1

    def fail(self, reason: RingError) -> None:
        """Stop talking: the client broke the protocol. Whatever it held is given back."""
        self.failure = reason
        self.daemon.reset(self)
        self.forget_stream()

    def forget_stream(self) -> None:
        """Drop all bytes in either direction."""
        self._input.clear()
        self._output.clear()
        self._waiting_events.clear()
        self._output_bytes = self._sent_of_first = self._answers = 0

    # --- travelling

    def state(self) -> ConnectionState:
        """All that the client could miss of this conversation if it went on elsewhere."""
        return ConnectionState(
            failure=int(self.failure),
            input=bytes(self._input),
            output=tuple(self._output),
            sent_of_first=self._sent_of_first,
            watches=tuple((watch.name, watch.token) for watch in sorted(self.watches.values(), key=_by_age)),
            transactions=tuple(self.transactions),
            next_transaction=self.next_transaction,
            former_domids=self.former_domids | {self.domid},
        )

    def go_on(self, state: ConnectionState) -> None:
        """Go on with a conversation that was begun elsewhere. Raises XsError where there can be no such."""
        quota, messages = self.daemon.quota, state.output
        if len(state.input) > HEADER.size + PAYLOAD_MAX + RING_SIZE or len(state.transactions) > quota.transactions:
            raise XsError("E2BIG", "more requests than a client can have sent")
        if sum(map(len, messages)) > quota.unread_bytes or not all(_is_message(message) for message in messages):
            raise XsError("EINVAL", "answers that are none")
        if state.sent_of_first and not (messages and state.sent_of_first < len(messages[0])):
            raise XsError("EINVAL", "more of an answer fetched than there was")
        self.former_domids = state.former_domids
        self.failure = RingError(state.failure)
        self._input.extend(state.input)
        self._output.extend(messages)
        self._output_bytes = sum(map(len, messages)) - state.sent_of_first
        self._sent_of_first = state.sent_of_first
        self._answers = sum(message[0] != Op.WATCH_EVENT for message in messages)
        self._waiting_events.update(messages[bool(state.sent_of_first) :])
        self.next_transaction = state.next_transaction
        for number in state.transactions:
            self.daemon.resume_transaction(self, number)
        for name, token in state.watches:
            self.daemon.watch(self, self._absolute(name), token, name)

    # --- bytes out

    @property
    def unfetched(self) -> tuple[int, int]:
        return self._answers, self._output_bytes

    @property
    def output_waiting(self) -> bool:
        """Whether bytes wait to be fetched."""
        return bool(self._output)

    def output(self, limit: int) -> bytes:
        """Up to ``limit`` waiting bytes; they stay until :meth:`sent`."""
        skipped = self._sent_of_first
        chunks, room = [], limit
        for message in self._output:
            chunks.append(message[skipped : skipped + room])
            room -= len(chunks[-1])
            skipped = 0
            if room <= 0:
                break
        return b"".join(chunks)

    def sent(self, count: int) -> None:
        """``count`` bytes of the output have reached the client."""
        self._output_bytes -= count
        count += self._sent_of_first
        while self._output and count >= len(self._output[0]):
            message = self._output.popleft()
            count -= len(message)
            if message[0] == Op.WATCH_EVENT:
                self._waiting_events.discard(message)
            else:
                self._answers -= 1
        self._sent_of_first = count
        if count:
            # Half of it is out, so an equal event from now on is a new one.
            self._waiting_events.discard(self._output[0])

    def deliver_event(self, path: bytes, token: bytes) -> None:
        self._queue_event(path, token)

    def _event(self, path: bytes, token: bytes) -> bytes:
        """The message that says so; empty if none can: Xen drops an event too long, too."""
        payload = path + b"\0" + token + b"\0"
        if self.failure or len(payload) > PAYLOAD_MAX:
            return b""
        return HEADER.pack(Op.WATCH_EVENT, 0, 0, len(payload)) + payload

    def _queue_event(self, path: bytes, token: bytes) -> None:
        message = self._event(path, token)
        if message and message not in self._waiting_events:
            self._waiting_events.add(message)
            self._queue(message)

    def _queue(self, message: bytes) -> None:
        self._output.append(message)
        self._output_bytes += len(message)
        if self._output_bytes > self.daemon.quota.unread_bytes:
            self.fail(RingError.COMM)
        if not self._processing and (len(self._output) == 1 or self.failure):
            self._wake(self)

    # --- requests

    def _handle(self, kind: int, req_id: int, tx_id: int, payload: bytes) -> None:
        try:
            request = _REQUESTS.get(kind)
            if request is None:
                raise XsError("ENOSYS", f"message type {kind}")
            if kind in _FOR_TOOLS and not self.privileged:
                raise XsError("EACCES", f"{Op(kind).name} is for dom0")
            view = self.daemon.store if kind in _OUTSIDE_TRANSACTIONS else self.daemon.view(self, tx_id)
            answer = request(self, view, tx_id, payload)
            if len(answer) > PAYLOAD_MAX:
                raise XsError("E2BIG", f"an answer of {len(answer)} bytes")
        except XsError as error:
            kind, answer = Op.ERROR, error.name.encode() + b"\0"
        if self.failure:
            return  # its own request flooded it with events
        self._answers += 1
        self._queue(HEADER.pack(kind, req_id, tx_id, len(answer)) + answer)
        if kind == Op.WATCH:
            name, token = payload.split(b"\0")[:2]
            self._queue_event(name, token)

    def _absolute(self, name: bytes) -> bytes:
        return paths.renumbered(paths.absolute(name, self.home), self.former_domids, self.domid)

    def _directory(self, view: View, tx_id: int, payload: bytes) -> bytes:
        children = self.daemon.directory(self, view, self._absolute(_one_string(payload)))
        return b"".join([name + b"\0" for name in children])

    def _directory_part(self, view: View, tx_id: int, payload: bytes) -> bytes:
        """``path|offset|``: the node's generation, then as many whole names as fit; an empty name ends the list."""
        name, offset = _strings(payload, 2)
        children = self.daemon.directory(self, view, self._absolute(name))
        generation = b"%d\0" % self.daemon.generation(self, view, self._absolute(name))
        names = b"".join([child + b"\0" for child in children])
        start = _c_number(offset) & 0xFFFFFFFF
        if start >= len(names):
            return generation + b"\0"
        room = PAYLOAD_MAX - len(generation) - 1
        rest = names[start:]
        if len(rest) <= room:
            return generation + rest + b"\0"
        return generation + rest[: rest.rindex(b"\0", 0, room) + 1]

    def _read(self, view: View, tx_id: int, payload: bytes) -> bytes:
        return self.daemon.read(self, view, self._absolute(_one_string(payload)))

    def _write(self, view: View, tx_id: int, payload: bytes) -> bytes:
        name, separator, data = payload.partition(b"\0")
        if not separator:
            raise XsError("EINVAL", "WRITE needs a NUL after the path")
        self.daemon.write(self, view, self._absolute(name), data)
        return _OK

    def _mkdir(self, view: View, tx_id: int, payload: bytes) -> bytes:
        self.daemon.mkdir(self, view, self._absolute(_one_string(payload)))
        return _OK

    def _rm(self, view: View, tx_id: int, payload: bytes) -> bytes:
        self.daemon.remove(self, view, self._absolute(_one_string(payload)))
        return _OK

    def _get_perms(self, view: View, tx_id: int, payload: bytes) -> bytes:
        entries = self.daemon.get_permissions(self, view, self._absolute(_one_string(payload)))
        return permissions.format_list(entries)

    def _set_perms(self, view: View, tx_id: int, payload: bytes) -> bytes:
        strings = payload.split(b"\0")[:-1]
        if len(strings) < 2:
            raise XsError("EINVAL", "SET_PERMS needs a path and permissions")
        wanted = tuple([permissions.parse(text) for text in strings[1:]])
        self.daemon.set_permissions(self, view, self._absolute(strings[0]), wanted)
        return _OK

    def _watch(self, view: View, tx_id: int, payload: bytes) -> bytes:
        name, token = _strings(payload, 2)
        path = self._absolute(name)
        self.daemon.watch(self, path, token, name)
        return _OK

    def _unwatch(self, view: View, tx_id: int, payload: bytes) -> bytes:
        name, token = _strings(payload, 2)
        self.daemon.unwatch(self, self._absolute(name), token)
        return _OK

    def _reset_watches(self, view: View, tx_id: int, payload: bytes) -> bytes:
        self.daemon.reset(self)
        return _OK

    def _transaction_start(self, view: View, tx_id: int, payload: bytes) -> bytes:
        if tx_id:
            raise XsError("EBUSY", "a transaction in a transaction")
        return b"%d\0" % self.daemon.start_transaction(self)

    def _transaction_end(self, view: View, tx_id: int, payload: bytes) -> bytes:
        if payload not in (b"T\0", b"F\0"):
            raise XsError("EINVAL", f"{payload[:8]!r} is neither T nor F")
        self.daemon.end_transaction(self, tx_id, commit=payload == b"T\0")
        return _OK

    def _get_domain_path(self, view: View, tx_id: int, payload: bytes) -> bytes:
        return paths.home(_c_number(_one_string(payload)) & 0xFFFFFFFF) + b"\0"

    def _is_domain_introduced(self, view: View, tx_id: int, payload: bytes) -> bytes:
        domid = _c_number(_one_string(payload))
        return b"T\0" if domid in (0, DOMID_SELF) or domid in self.daemon.domains else b"F\0"

    def _introduce(self, view: View, tx_id: int, payload: bytes) -> bytes:
        strings = payload.split(b"\0")[:-1]
        if len(strings) < 3:
            raise XsError("EINVAL", "INTRODUCE needs domid, mfn and port")
        domid, mfn, port = (_c_number(text) for text in strings[:3])
        if port <= 0:
            raise XsError("EINVAL", f"event channel {port}")
        self.daemon.introduce_request(domid, mfn, port)
        return _OK

    def _release(self, view: View, tx_id: int, payload: bytes) -> bytes:
        self.daemon.release_request(self._connected_domain(_one_string(payload)))
        return _OK

    def _resume(self, view: View, tx_id: int, payload: bytes) -> bytes:
        """The domain's shutdown is no longer news: it was noted for ``@releaseDomain`` only, which dom0 fires."""
        self._connected_domain(_one_string(payload))
        return _OK

    def _set_target(self, view: View, tx_id: int, payload: bytes) -> bytes:
        strings = payload.split(b"\0")[:-1]
        if len(strings) < 2:
            raise XsError("EINVAL", "SET_TARGET needs two domids")
        domid, target = (self._connected_domain(text) for text in strings[:2])
        self.daemon.domains[domid].target = target
        return _OK

    def _connected_domain(self, text: bytes) -> int:
        domid = _c_number(text)
        if domid == 0:
            raise XsError("EINVAL", f"{text!r} is no guest")
        if domid not in self.daemon.domains:
            raise XsError("ENOENT", f"domain {domid} is not introduced")
        return domid

    def _control(self, view: View, tx_id: int, payload: bytes) -> bytes:
        return self.daemon.control(payload)


def _one_string(payload: bytes) -> bytes:
    """The payload's only string; its NUL must be the last byte."""
    if not payload or payload.find(b"\0") != len(payload) - 1:
        raise XsError("EINVAL", "one string ended by NUL is needed")
    return payload[:-1]


def _strings(payload: bytes, count: int) -> list[bytes]:
    """Exactly ``count`` strings; bytes after the last NUL do not count."""
    strings = payload.split(b"\0")[:-1]
    if len(strings) != count:
        raise XsError("EINVAL", f"{count} strings ended by NUL are needed")
    return strings


def _c_number(text: bytes) -> int:
    """C's atoi: leading blanks, a sign, digits; 0 when there are none."""
    text = text.lstrip(b" \t\n\v\f\r")
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    end = 0
    while end < len(digits) and digits[end : end + 1].isdigit():
        end += 1
    value = int(digits[: min(end, 20)] or b"0")
    return -value if text[:1] == b"-" else value


_REQUESTS: Final[dict[int, Callable[[Connection, View, int, bytes], bytes]]] = {
    Op.CONTROL: Connection._control,
    Op.DIRECTORY: Connection._directory,
    Op.READ: Connection._read,
    Op.GET_PERMS: Connection._get_perms,
    Op.WATCH: Connection._watch,
    Op.UNWATCH: Connection._unwatch,
    Op.TRANSACTION_START: Connection._transaction_start,
    Op.TRANSACTION_END: Connection._transaction_end,
    Op.INTRODUCE: Connection._introduce,
    Op.RELEASE: Connection._release,
    Op.GET_DOMAIN_PATH: Connection._get_domain_path,
    Op.WRITE: Connection._write,
    Op.MKDIR: Connection._mkdir,
    Op.RM: Connection._rm,
    Op.SET_PERMS: Connection._set_perms,
    Op.IS_DOMAIN_INTRODUCED: Connection._is_domain_introduced,
    Op.RESUME: Connection._resume,
    Op.SET_TARGET: Connection._set_target,
    Op.RESET_WATCHES: Connection._reset_watches,
    Op.DIRECTORY_PART: Connection._directory_part,
}
_FOR_TOOLS: Final = frozenset({Op.CONTROL, Op.INTRODUCE, Op.RELEASE, Op.IS_DOMAIN_INTRODUCED, Op.RESUME, Op.SET_TARGET})
_OUTSIDE_TRANSACTIONS: Final = frozenset({Op.WATCH, Op.UNWATCH})
