"""The store against a dictionary: any interleaving of requests, transactions and watches of several clients.

The model keeps a plain dict and knows nothing of trees or generations. A transaction is right if it could have happened
in one instant: its commit succeeds exactly when asking all its requests again, one after the other, of the store as it
was just before the commit gives the same answers, or when it changed nothing; a failed or abandoned one must leave no
trace. (So says oxenstored, which Debian starts.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from xenolith.abi.xs_wire import Op
from xenolith.dom0.xenstore.xenstored import Xenstored

from .wire import Client

Answer = tuple[str, bytes]
OK = b"OK\0"

names = st.sampled_from([b"a", b"b", b"c"])
node_paths = st.lists(names, min_size=1, max_size=4).map(lambda parts: b"/m/" + b"/".join(parts))
values = st.sampled_from([b"", b"1", b"22"])


class Model:
    """Nodes below /m: path -> (value, permissions), in order of creation as children are listed."""

    def __init__(self, nodes: dict[bytes, tuple[bytes, bytes]]) -> None:
        self.nodes = dict(nodes)
        self.events: dict[bytes, bool] = {}
        """Path -> whether only watches on exactly it are told."""

    def ask(self, op: Op, payload: bytes) -> Answer:
        path, _, rest = payload.partition(b"\0")
        answer = self.REQUESTS[op](self, path, rest)
        return ("ERROR", b"ENOENT\0") if answer is None else (op.name, answer)

    def read(self, path: bytes, rest: bytes) -> bytes | None:
        return self.nodes[path][0] if path in self.nodes else None

    def directory(self, path: bytes, rest: bytes) -> bytes | None:
        if path not in self.nodes:
            return None
        return b"".join(node[len(path) + 1 :] + b"\0" for node in self.nodes if parent(node) == path)

    def get_perms(self, path: bytes, rest: bytes) -> bytes | None:
        return self.nodes[path][1] if path in self.nodes else None

    def write(self, path: bytes, rest: bytes) -> bytes | None:
        self.make(path)
        self.nodes[path] = (rest, self.nodes[path][1])
        self.events[path] = False
        return OK

    def mkdir(self, path: bytes, rest: bytes) -> bytes | None:
        if path not in self.nodes:
            self.make(path)
            self.events[path] = False
        return OK

    def make(self, path: bytes) -> None:
        if path not in self.nodes:
            self.make(parent(path))
            self.nodes[path] = (b"", self.nodes[parent(path)][1])

    def rm(self, path: bytes, rest: bytes) -> bytes | None:
        if path not in self.nodes:
            return OK if parent(path) in self.nodes else None
        for node in [node for node in self.nodes if node == path or node.startswith(path + b"/")]:
            del self.nodes[node]
            self.events[node] = True
        self.events[path] = False
        return OK

    def set_perms(self, path: bytes, rest: bytes) -> bytes | None:
        if path not in self.nodes:
            return None
        self.nodes[path] = (self.nodes[path][0], rest)
        self.events[path] = False
        return OK

    REQUESTS: ClassVar[dict[Op, Callable[[Model, bytes, bytes], bytes | None]]] = {
        Op.READ: read,
        Op.DIRECTORY: directory,
        Op.GET_PERMS: get_perms,
        Op.WRITE: write,
        Op.MKDIR: mkdir,
        Op.RM: rm,
        Op.SET_PERMS: set_perms,
    }

    def take_events(self, watch: bytes) -> set[bytes]:
        """The paths that a watch on ``watch`` is told of."""
        return {
            path
            for path, exact in self.events.items()
            if path == watch or (not exact and (path.startswith(watch + b"/") or watch == b"/"))
        }


def parent(path: bytes) -> bytes:
    return path[: path.rindex(b"/")]


@dataclass
class OpenTransaction:
    client: Client
    number: int
    model: Model
    changed: bool = False
    asked: list[tuple[Op, bytes, Answer]] = field(default_factory=list)


def requests() -> st.SearchStrategy[tuple[Op, bytes]]:
    """A request and its payload."""
    return st.one_of(
        st.tuples(
            st.sampled_from([Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM]),
            node_paths.map(lambda path: path + b"\0"),
        ),
        st.tuples(st.just(Op.WRITE), st.tuples(node_paths, values).map(b"\0".join)),
        st.tuples(
            st.just(Op.SET_PERMS), st.tuples(node_paths, st.sampled_from([b"n0\0", b"n0\0r3\0"])).map(b"\0".join)
        ),
    )


class StoreAndModel(RuleBasedStateMachine):
    transactions: Bundle[OpenTransaction] = Bundle("transactions")

    def __init__(self) -> None:
        super().__init__()
        self.daemon = Xenstored()
        self.clients = [Client(self.daemon), Client(self.daemon)]
        self.watcher = Client(self.daemon)
        self.watched: set[bytes] = set()
        self.clients[0].ok(Op.MKDIR, b"/m\0")
        self.model = Model({b"/m": (b"", b"n0\0")})

    @rule(request=requests(), which=st.integers(0, 1))
    def ask(self, request: tuple[Op, bytes], which: int) -> None:
        op, payload = request
        assert self.clients[which].ask(op, payload) == self.model.ask(op, payload)
        self.expect_events(self.model)

    @rule(target=transactions, which=st.integers(0, 1))
    def start(self, which: int) -> OpenTransaction:
        client = self.clients[which]
        number = int(client.ok(Op.TRANSACTION_START, b"\0")[:-1])
        return OpenTransaction(client, number, Model(self.model.nodes))

    @rule(transaction=transactions, request=requests())
    def ask_in_transaction(self, transaction: OpenTransaction, request: tuple[Op, bytes]) -> None:
        op, payload = request
        before = dict(transaction.model.nodes)
        answer = transaction.client.ask(op, payload, transaction.number)
        assert answer == transaction.model.ask(op, payload), "a transaction sees the store as it began, and itself"
        transaction.asked.append((op, payload, answer))
        written = op in (Op.WRITE, Op.SET_PERMS) and answer == (op.name, OK)
        transaction.changed |= written or before != transaction.model.nodes

    @rule(transaction=consumes(transactions))
    def commit(self, transaction: OpenTransaction) -> None:
        kind, data = transaction.client.ask(Op.TRANSACTION_END, b"T\0", transaction.number)
        if kind == "ERROR":
            assert data == b"EAGAIN\0"
        now = Model(self.model.nodes)
        one_instant = all(now.ask(op, payload) == answer for op, payload, answer in transaction.asked)
        if kind == "ERROR":
            assert transaction.changed, "it happened when it began"
            assert not one_instant, "the commit could have been one instant"
        elif transaction.changed:
            assert one_instant, "the transaction was not one instant"
            self.model = now
            self.expect_events(now)

    @rule(transaction=consumes(transactions))
    def abandon(self, transaction: OpenTransaction) -> None:
        transaction.client.ok(Op.TRANSACTION_END, b"F\0", transaction.number)

    @rule(path=st.one_of(node_paths, st.just(b"/"), st.just(b"/m")))
    def watch(self, path: bytes) -> None:
        if path in self.watched:
            assert self.watcher.error(Op.WATCH, path + b"\0t" + path + b"\0") == "EEXIST"
            return
        self.watcher.ok(Op.WATCH, path + b"\0t" + path + b"\0")
        assert self.watcher.take_events() == [(path, b"t" + path)], "a watch fires once when it is set"
        self.watched.add(path)

    @rule()
    def unwatch(self) -> None:
        if self.watched:
            path = min(self.watched)
            self.watcher.ok(Op.UNWATCH, path + b"\0t" + path + b"\0")
            self.watched.remove(path)

    def expect_events(self, changed: Model) -> None:
        expected = {(path, b"t" + watch) for watch in self.watched for path in changed.take_events(watch)}
        changed.events.clear()
        self.model.events.clear()
        got = self.watcher.take_events()
        assert set(got) == expected
        assert len(got) == len(expected), "no event comes twice"

    @invariant()
    def the_trees_agree(self) -> None:
        client = self.clients[0]
        for path, (value, perms) in self.model.nodes.items():
            assert client.ok(Op.READ, path + b"\0") == value
            assert client.ok(Op.GET_PERMS, path + b"\0") == perms
            assert client.ask(Op.DIRECTORY, path + b"\0") == self.model.ask(Op.DIRECTORY, path + b"\0")
        assert self.daemon.store.owned_by(0) == len(self.model.nodes) + 3, "the nodes owned are the nodes there are"


TestStoreAndModel = StoreAndModel.TestCase
TestStoreAndModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
