"""Xen's own xenstored was asked these questions; ours must give the same answers and events, in the same order."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xenolith.abi.xs_wire import Op
from xenolith.dom0.xenstore.xenstored import Xenstored

from .wire import Client

HERE: Final = Path(__file__).parent
_REQUEST: Final = re.compile(r"(\w+) (\w+) (\d+) (b.+) -> (\w+) (b.+)")
_EVENTS: Final = re.compile(r"(\w+) events (\[.*\])")


@dataclass
class Scene:
    """Clients by the name they have in the record."""

    daemon: Xenstored = field(default_factory=Xenstored)
    clients: dict[str, Client] = field(default_factory=dict)
    events: dict[str, list[bytes]] = field(default_factory=dict)

    def introduce(self, domid: int, mfn: int, port: int) -> None:
        self.clients[f"dom{domid}"] = Client(self.daemon, domid)

    def client(self, name: str) -> Client:
        if name not in self.clients:
            self.clients[name] = Client(self.daemon)
        return self.clients[name]

    def ask(self, name: str, op: Op, payload: bytes, tx: int) -> tuple[str, bytes]:
        answer = self.client(name).ask(op, payload, tx)
        for whose, client in self.clients.items():
            self.events.setdefault(whose, []).extend(
                path + b"\0" + token + b"\0" for path, token in client.take_events()
            )
        return answer


def play(record: Path, scene: Scene) -> int:
    """Ask every question of the record and compare; returns how many there were."""
    scene.daemon.introduce_request = scene.introduce
    asked = 0
    for number, line in enumerate(record.read_text().splitlines(), 1):
        where = f"{record.name}:{number}: {line}"
        if request := _REQUEST.fullmatch(line):
            name, op, tx, payload, kind, data = request.groups()
            answer = scene.ask(name, Op[op], unsqueeze(payload), int(tx))
            assert answer == (kind, unsqueeze(data)), where
            asked += 1
        elif events := _EVENTS.fullmatch(line):
            assert scene.events.pop(events[1], []) == ast.literal_eval(events[2]), where
        else:
            assert line.startswith("#"), where
    return asked


def unsqueeze(literal: str) -> bytes:
    """A bytes literal in which ``{x*9}`` stands for nine x."""
    long = re.sub(r"\{(.)\*(\d+)\}", lambda run: run[1] * int(run[2]), literal)
    value = ast.literal_eval(long)
    assert isinstance(value, bytes)
    return value


def test_dom0_gets_the_answers_that_xen_gives() -> None:
    scene = Scene()
    tool = scene.client("earlier")
    for path in (b"/a", b"/local", b"/py"):
        tool.ok(Op.MKDIR, path + b"\0")
    assert play(HERE / "answers_to_dom0.txt", scene) == 98


def test_guests_get_the_answers_that_xen_gives() -> None:
    scene = Scene()
    scene.client("observer")
    assert play(HERE / "answers_to_guests.txt", scene) == 140
