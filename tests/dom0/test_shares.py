"""Shared folders: what passes between a guest's 9P client and a folder's server, and how far that server reaches."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenolith.abi import p9
from xenolith.dom0.shares import ShareError, server
from xenolith.dom0.shares.relay import (
    MAX_FIDS,
    MAX_IN_FLIGHT,
    MAX_MSIZE,
    NewSession,
    ProtocolError,
    Relay,
    ServerError,
)

from .ninep import NOFID, Client, attach, message, needs_diod, text, u32, version, walk

FUZZED = 100_000


def relay(*, writable: bool = True, owner: tuple[int, int] | None = None) -> Relay:
    made = Relay(b"/share", writable=writable, owner=owner)
    assert made.request(version())[1]
    made.request(message(p9.TATTACH, 1, attach(0)))
    made.response(message(p9.TATTACH + 1, 1, bytes(13)))
    return made


def refusal(made: Relay, kind: int, body: bytes) -> int:
    """The error that a request is answered with, without the server."""
    forward, answer = made.request(message(kind, 7, body))
    assert not forward, f"{forward!r} would reach the server"
    assert answer[4] == p9.RLERROR
    return int(struct.unpack_from("<I", answer, 7)[0])


def forwarded(made: Relay, kind: int, body: bytes, answer: bytes | None = None) -> bytes:
    """The body that the server gets, which then answers with success and `answer`."""
    forward, told = made.request(message(kind, 7, body))
    assert forward and not told
    made.response(message(forward[4] + 1, 7, answer if answer is not None else bytes(200)))
    return forward[7:]


# --- messages -------------------------------------------------------------------------------------------------


def test_a_session_begins_with_a_size_that_both_can_have() -> None:
    for asked, given in ((1 << 20, MAX_MSIZE), (8192, 8192)):
        made = Relay(b"/share", writable=True, owner=None)
        _, answer = made.request(version(asked))
        assert answer == message(p9.TVERSION + 1, p9.NOTAG, u32(given) + text(p9.VERSION))
        assert made.msize == given
    made = Relay(b"/share", writable=True, owner=None)
    assert made.request(message(p9.TVERSION, p9.NOTAG, u32(8192) + text("9P2000.u")))[1][11:] == text("unknown")
    assert refusal(made, p9.TATTACH, attach()) == errno.EINVAL


def test_the_tree_is_ours_whatever_the_client_names() -> None:
    made = relay()
    body = forwarded(made, p9.TATTACH, attach(5, uid=7, tree="/etc"))
    assert body == u32(5, NOFID) + text("") + text("/share") + u32(7)
    body = forwarded(relay(owner=(1000, 1001)), p9.TATTACH, attach(5, uid=0, tree="../.."))
    assert body.endswith(text("/share") + u32(1000))


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc/passwd", "a\0b", "x" * 256])
def test_a_name_that_is_a_path_reaches_no_server(name: str) -> None:
    made = relay()
    assert refusal(made, p9.TWALK, walk(0, 1, name)) in (errno.ENOENT, errno.ENAMETOOLONG)
    for kind, body in {
        p9.TLCREATE: u32(0) + text(name) + u32(0, 0o644, 0),
        p9.TSYMLINK: u32(0) + text(name) + text("x") + u32(0),
        p9.TMKDIR: u32(0) + text(name) + u32(0o755, 0),
        p9.TMKNOD: u32(0) + text(name) + u32(stat.S_IFREG, 0, 0, 0),
        p9.TLINK: u32(0, 0) + text(name),
        p9.TRENAME: u32(0, 0) + text(name),
        p9.TRENAMEAT: u32(0) + text("a") + u32(0) + text(name),
        p9.TUNLINKAT: u32(0) + text(name) + u32(0),
    }.items():
        assert refusal(made, kind, body) in (errno.ENOENT, errno.ENAMETOOLONG)


def test_nothing_that_writes_reaches_the_server_of_a_read_only_folder() -> None:
    made = relay(writable=False)
    forwarded(made, p9.TWALK, walk(0, 1, "f"), struct.pack("<H", 1) + bytes(13))
    for kind, body in {
        p9.TLCREATE: u32(0) + text("x") + u32(0, 0o644, 0),
        p9.TSYMLINK: u32(0) + text("x") + text("y") + u32(0),
        p9.TMKNOD: u32(0) + text("x") + u32(stat.S_IFREG, 0, 0, 0),
        p9.TRENAME: u32(1, 0) + text("x"),
        p9.TSETATTR: u32(1) + bytes(56),
        p9.TXATTRCREATE: u32(1) + text("user.x") + bytes(12),
        p9.TLINK: u32(0, 1) + text("x"),
        p9.TMKDIR: u32(0) + text("x") + u32(0o755, 0),
        p9.TRENAMEAT: u32(0) + text("x") + u32(0) + text("y"),
        p9.TUNLINKAT: u32(0) + text("x") + u32(0),
        p9.TWRITE: u32(1) + bytes(8) + u32(1) + b"x",
    }.items():
        assert refusal(made, kind, body) == errno.EROFS
    for flags in (1, 2, p9.P9_DOTL_TRUNC, p9.P9_DOTL_APPEND):
        assert refusal(made, p9.TLOPEN, u32(1, flags)) == errno.EROFS
    forward, _ = made.request(message(p9.TREMOVE, 7, u32(1)))
    assert forward == message(p9.TCLUNK, 7, u32(1)), "the fid goes, the file stays"
    assert made.response(message(p9.TCLUNK + 1, 7)) == message(p9.RLERROR, 7, u32(errno.EROFS))


def test_a_lock_on_a_read_only_folder_holds_up_nobody_on_the_host() -> None:
    made = relay(writable=False)
    body = u32(0) + b"\1" + u32(0) + bytes(16) + u32(9) + text("me")
    assert made.request(message(p9.TLOCK, 7, body)) == (b"", message(p9.TLOCK + 1, 7, bytes([p9.P9_LOCK_SUCCESS])))
    body = u32(0) + b"\1" + bytes(16) + u32(9) + text("me")
    _, answer = made.request(message(p9.TGETLOCK, 7, body))
    assert answer == message(p9.TGETLOCK + 1, 7, bytes([p9.P9_LOCK_TYPE_UNLCK]) + body[5:])


def test_no_file_gets_rights_on_the_host() -> None:
    """No set-user-ID, no device, no capability: it would have them for the host's users, too."""
    made = relay()
    assert forwarded(made, p9.TMKDIR, u32(0) + text("d") + u32(0o7755, 3)).endswith(u32(0o1755, 3))
    assert forwarded(made, p9.TLCREATE, u32(0) + text("f") + u32(1, 0o6777, 3)).endswith(u32(0o777, 3))
    valid_mode = u32(0, 1, 0o4755) + bytes(48)
    assert forwarded(made, p9.TSETATTR, valid_mode)[8:12] == u32(0o755)
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        assert refusal(made, p9.TMKNOD, u32(0) + text("n") + u32(kind | 0o666, 1, 3, 0)) == errno.EPERM
    assert refusal(made, p9.TXATTRCREATE, u32(0) + text("security.capability") + bytes(12)) == 95
    assert refusal(made, p9.TXATTRWALK, u32(0, 9) + text("trusted.x")) == errno.ENODATA


def test_who_can_be_one_user_only_is_root_to_the_guest() -> None:
    made = relay(owner=(1000, 1001))
    assert forwarded(made, p9.TLCREATE, u32(0) + text("f") + u32(1, 0o644, 55)).endswith(u32(0o644, 1001))
    assert forwarded(made, p9.TSETATTR, u32(0, 6, 0, 0, 0) + bytes(40))[12:20] == u32(1000, 1001)
    forward, _ = made.request(message(p9.TGETATTR, 7, u32(0) + bytes(8)))
    assert forward
    theirs = bytes(25) + u32(1000, 1001) + bytes(100)
    assert made.response(message(p9.TGETATTR + 1, 7, theirs))[7:] == bytes(25) + u32(0, 0) + bytes(100)
    others = bytes(25) + u32(5, 6) + bytes(100)
    made.request(message(p9.TGETATTR, 7, u32(0) + bytes(8)))
    assert made.response(message(p9.TGETATTR + 1, 7, others))[7:] == others


def test_only_fids_that_exist_are_used_and_only_so_many() -> None:
    made = relay()
    assert refusal(made, p9.TGETATTR, u32(1) + bytes(8)) == errno.EBADF
    assert refusal(made, p9.TWALK, walk(1, 2)) == errno.EBADF
    assert refusal(made, p9.TATTACH, attach(0)) == errno.EBADF
    forwarded(made, p9.TWALK, walk(0, 1, "a", "b"), struct.pack("<H", 1) + bytes(13))
    assert made.fids == {0}, "a walk that went half way makes no fid"
    forwarded(made, p9.TWALK, walk(0, 1, "a", "b"), struct.pack("<H", 2) + bytes(26))
    assert made.fids == {0, 1}
    forwarded(made, p9.TCLUNK, u32(1))
    assert made.fids == {0}
    for fid in range(1, MAX_FIDS):
        forwarded(made, p9.TWALK, walk(0, fid), struct.pack("<H", 0))
    assert refusal(made, p9.TWALK, walk(0, MAX_FIDS)) == errno.ENFILE


def test_a_flushed_walk_may_have_made_its_fid() -> None:
    made = relay()
    made.request(message(p9.TWALK, 3, walk(0, 1, "a")))
    made.request(message(p9.TFLUSH, 4, struct.pack("<H", 3)))
    assert refusal(made, p9.TWALK, walk(0, 1)) == errno.EBADF
    made.response(message(p9.TFLUSH + 1, 4))
    assert made.fids == {0, 1} and made.in_flight == 0
    with pytest.raises(ServerError):
        made.response(message(p9.TWALK + 1, 3, struct.pack("<H", 1) + bytes(13)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x06\0\0\0\x64\xff",
        message(p9.TCLUNK, 9, u32(0))[:-1],
        message(p9.TCLUNK, 9, u32(0)) + b"x",
        message(p9.TCLUNK, p9.NOTAG, u32(0)),
        message(p9.TVERSION, 1, u32(8192) + text(p9.VERSION)),
        message(p9.TWRITE, 9, u32(0) + bytes(MAX_MSIZE)),
    ],
    ids=range(7),
)
def test_what_breaks_the_framing_ends_the_connection(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        relay().request(data)


def test_a_tag_is_one_requests_and_there_are_only_so_many() -> None:
    made = relay()
    made.request(message(p9.TGETATTR, 1, u32(0) + bytes(8)))
    with pytest.raises(ProtocolError):
        made.request(message(p9.TCLUNK, 1, u32(0)))
    for tag in range(2, MAX_IN_FLIGHT + 1):
        made.request(message(p9.TGETATTR, tag, u32(0) + bytes(8)))
    assert made.in_flight == MAX_IN_FLIGHT
    with pytest.raises(ProtocolError):
        made.request(message(p9.TGETATTR, 999, u32(0) + bytes(8)))


def test_a_second_session_takes_a_server_that_is_as_new() -> None:
    with pytest.raises(NewSession):
        relay().request(version())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (p9.TWALK, walk(0, 1, *["a"] * 17)),
        (p9.TWALK, walk(0, 1, "a") + b"x"),
        (p9.TREAD, u32(0)),
        (p9.TWRITE, u32(0) + bytes(8) + u32(500) + b"short"),
        (p9.TLOPEN, u32(0, 3)),
        (p9.TSYMLINK, u32(0) + text("x") + text("a\0b") + u32(0)),
        (p9.TMKDIR, u32(0) + struct.pack("<H", 60000) + b"x"),
    ],
)
def test_a_request_that_makes_no_sense_is_an_error(kind: int, body: bytes) -> None:
    assert refusal(relay(), kind, body) == errno.EINVAL


@pytest.mark.parametrize("kind", [0, 6, 7, 9, 101, 102, 106, 112, 114, 124, 126, 255])
def test_other_requests_are_not_supported(kind: int) -> None:
    assert refusal(relay(), kind, bytes(20)) == 95


def test_a_read_is_no_longer_than_its_answer_may_be() -> None:
    made = relay()
    for kind in (p9.TREAD, p9.TREADDIR):
        assert forwarded(made, kind, u32(0) + bytes(8) + u32(1 << 31)).endswith(u32(made.msize - p9.IOHDRSZ))


def test_flags_for_open_are_those_of_files() -> None:
    made = relay()
    flags = struct.unpack("<I", forwarded(made, p9.TLOPEN, u32(0, 0xFFFFFFFC | 2))[4:])[0]
    assert flags & p9.P9_DOTL_NOFOLLOW and flags & p9.P9_DOTL_NONBLOCK
    assert not flags & (p9.P9_DOTL_CREATE | p9.P9_DOTL_EXCL) and not flags & 0o20000000, "O_TMPFILE"


def any_message(dice: random.Random, made: Relay, broken: float = 0.002) -> bytes:
    """Often almost a request, with a few bytes that are not."""
    kind = dice.choice([*p9.FIELDS, dice.randrange(256)])
    tag = p9.NOTAG if kind == p9.TVERSION and dice.random() < 0.9 else dice.randrange(40)
    fids = [*made.fids, 1, 2, 3, NOFID]
    body = b""
    for field in p9.FIELDS.get(kind, "fid fid").split():
        name, _, form = field.partition(":")
        if name in ("fid", "dfid", "newfid"):
            body += u32(dice.choice(fids) if dice.random() < 0.95 else dice.getrandbits(32))
        elif name == "names":
            count = dice.choice((0, 0, 1, 2, 16, 17))
            body += struct.pack("<H", count) + b"".join(text(some_name(dice)) for _ in range(count))
        elif name == "data":
            data = dice.randbytes(dice.choice((0, 5, 300)))
            body += u32(len(data)) + data
        elif name.endswith("name") or form == "s":
            body += text(some_name(dice))
        else:
            body += dice.randbytes(int(form or "4"))
    if dice.random() < 0.1 and body:
        at = dice.randrange(len(body))
        body = body[:at] + dice.randbytes(dice.randrange(4)) + body[at + dice.randrange(3) :]
    whole = message(kind, tag, body)
    if dice.random() < broken:
        whole = whole[:4] + whole[5:]
    return whole


def some_name(dice: random.Random) -> bytes:
    return dice.choice([b"a", b"b", b"..", b".", b"", b"x/y", b"/", b"\0", b"n" * 300, b"user.n", dice.randbytes(4)])


@pytest.mark.parametrize(("writable", "owner"), [(True, None), (False, None), (True, (1000, 1000)), (False, (7, 7))])
def test_whatever_a_guest_sends_the_server_gets_requests_about_names_and_known_fids(
    writable: bool, owner: tuple[int, int] | None
) -> None:
    dice = random.Random(f"9p {writable} {owner}")
    made = relay(writable=writable, owner=owner)
    in_flight: dict[int, bytes] = {}
    endings = reached = 0
    for _ in range(FUZZED // 4):
        while in_flight and (len(in_flight) >= MAX_IN_FLIGHT or dice.random() < 0.5):
            tag = dice.choice(list(in_flight))
            request = in_flight.pop(tag)
            if request[4] == p9.TFLUSH:
                in_flight.pop(struct.unpack_from("<H", request, 7)[0], None)
            body = struct.pack("<H", dice.randrange(3)) + bytes(200)
            failed = dice.random() < 0.3
            made.response(message(p9.RLERROR, tag, u32(2)) if failed else message(request[4] + 1, tag, body))
        known = set(made.fids)
        sent = any_message(dice, made)
        try:
            forward, answer = made.request(sent)
        except (ProtocolError, NewSession):
            endings += 1
            made, in_flight = relay(writable=writable, owner=owner), {}
            continue
        assert bool(forward) != bool(answer)
        if forward:
            reached += 1
            check_request(forward, known, writable)
            in_flight[struct.unpack_from("<H", forward, 5)[0]] = forward
        assert len(made.fids) <= MAX_FIDS and made.in_flight == len(in_flight) <= MAX_IN_FLIGHT
    assert reached > 1000 and endings > 10


def check_request(request: bytes, known: set[int], writable: bool) -> None:
    """An own, strict reading of what the server is told."""
    size, kind, _ = p9.HEADER.unpack_from(request)
    assert size == len(request) <= MAX_MSIZE and kind != p9.TVERSION
    at = 7

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        assert at <= len(request)
        return request[at - count : at]

    def string() -> bytes:
        return take(struct.unpack("<H", take(2))[0])

    def check_name(name: bytes) -> None:
        assert 0 < len(name) < 256 and name not in (b".", b"..") and not set(name) & {0, 47}

    values: dict[str, bytes] = {}
    for field in p9.FIELDS[kind].split():
        name, _, form = field.partition(":")
        if name == "names":
            for _ in range(struct.unpack("<H", take(2))[0]):
                check_name(string())
        elif name == "data":
            take(struct.unpack("<I", take(4))[0])
        elif name.endswith("name"):
            check_name(string())
        elif form == "s":
            values[name] = string()
        else:
            values[name] = take(int(form or "4"))
    assert at == len(request)
    for name in ("fid", "dfid"):
        assert name not in values or struct.unpack("<I", values[name])[0] in known
    assert kind != p9.TATTACH or values["tree"] == b"/share"
    if not writable:
        assert kind in (
            *(p9.TSTATFS, p9.TLOPEN, p9.TREADLINK, p9.TGETATTR, p9.TXATTRWALK, p9.TREADDIR, p9.TFSYNC),
            *(p9.TATTACH, p9.TFLUSH, p9.TWALK, p9.TREAD, p9.TCLUNK),
        )
        assert kind != p9.TLOPEN or not struct.unpack("<I", values["flags"])[0] & 0o3003


# --- the server -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "shared"
    (made / "sub").mkdir(parents=True)
    (made / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    return made


@pytest.fixture
def client(folder: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    made = Client(folder, writable=getattr(request, "param", True))
    yield made
    made.close()


def read(client: Client, fid: int, *names: str) -> bytes | int:
    """The beginning of a file, or the first error on the way to it."""
    for kind, body in (
        (p9.TWALK, walk(0, fid, *names)),
        (p9.TLOPEN, u32(fid, 0)),
        (p9.TREAD, u32(fid) + bytes(8) + u32(100)),
    ):
        answer = client.ask(kind, body)
        if isinstance(answer, int):
            return answer
    return answer[4:]


@needs_diod
def test_a_file_is_read_and_written(client: Client, folder: Path) -> None:
    assert read(client, 1, "file") == b"inside"
    client.ask(p9.TWALK, walk(0, 2))
    assert isinstance(client.ask(p9.TLCREATE, u32(2) + text("new") + u32(1, 0o6755, 0)), bytes)
    assert client.ask(p9.TWRITE, u32(2) + bytes(8) + u32(4) + b"data") == u32(4)
    client.ask(p9.TCLUNK, u32(2))
    assert (folder / "new").read_text() == "data"
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o755


@needs_diod
@pytest.mark.parametrize(
    "target", ["../secret", "{outside}", "/etc/passwd", "/usr/bin/env", "file", "/proc/self/environ"]
)
def test_a_link_is_told_and_never_followed(client: Client, folder: Path, tmp_path: Path, target: str) -> None:
    target = target.format(outside=tmp_path / "secret")
    (folder / "link").symlink_to(target)
    client.ask(p9.TWALK, walk(0, 1, "link"))
    assert client.ask(p9.TREADLINK, u32(1)) == text(target)
    assert read(client, 2, "link") == errno.ELOOP
    (folder / "up").symlink_to(os.path.dirname(target) or ".")
    assert isinstance(read(client, 3, "up", os.path.basename(target)), int)
    client.ask(p9.TWALK, walk(0, 4, "up"))
    assert isinstance(client.ask(p9.TWALK, walk(4, 5, os.path.basename(target))), int)


@needs_diod
def test_a_link_where_a_directory_was_leads_nowhere(client: Client, folder: Path, tmp_path: Path) -> None:
    """The server's fids are paths: one is walked to, then what it names is exchanged."""
    (folder / "sub/secret").write_text("inside, too")
    assert isinstance(client.ask(p9.TWALK, walk(0, 1, "sub")), bytes)
    client.ask(p9.TWALK, walk(0, 9, "sub"))
    assert isinstance(client.ask(p9.TRENAME, u32(9, 0) + text("moved")), bytes)
    for target in ("..", str(tmp_path), "/"):
        (folder / "sub").unlink(missing_ok=True)
        assert isinstance(client.ask(p9.TSYMLINK, u32(0) + text("sub") + text(target) + u32(0)), bytes)
        for fid, name in ((2, "secret"), (3, "etc"), (4, "usr")):
            assert isinstance(client.ask(p9.TWALK, walk(1, fid, name)), int)
        answer = client.ask(p9.TLCREATE, u32(1) + text("planted") + u32(1, 0o644, 0))
        assert isinstance(answer, int) and not (tmp_path / "planted").exists()


@needs_diod
@pytest.mark.skipif(os.getuid() != 0, reason="only root makes devices")
def test_a_device_and_a_fifo_in_the_folder_are_no_way_out(client: Client, folder: Path) -> None:
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mkfifo(folder / "fifo")
    assert read(client, 1, "null") == errno.EACCES
    assert read(client, 2, "fifo") == errno.ESPIPE, "the server does not wait for somebody to write to it"
    assert read(client, 3, "file") == b"inside"


@needs_diod
@pytest.mark.parametrize("client", [False], indirect=True)
def test_a_read_only_folder_cannot_be_written_by_the_server_either(client: Client, folder: Path) -> None:
    mounts = Path(f"/proc/{client.server.pid}/mounts").read_text().splitlines()
    [share] = [line.split() for line in mounts if line.split()[1] == "/share"]
    assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= set(share[3].split(","))
    assert {line.split()[1] for line in mounts} <= {"/", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/share"}
    assert read(client, 1, "file") == b"inside"


@needs_diod
def test_a_server_has_few_rights_and_no_network(client: Client) -> None:
    status = Path(f"/proc/{client.server.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    [effective] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff")]
    assert effective & ~0xDF == 0
    for namespace in ("user", "mnt", "net", "ipc"):
        assert os.readlink(f"/proc/{client.server.pid}/ns/{namespace}") != os.readlink(f"/proc/self/ns/{namespace}")


@needs_diod
def test_what_cannot_be_shared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShareError, match="no folder"):
        server.Server(tmp_path / "absent", True)
    monkeypatch.setattr(server.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ShareError, match="apt install diod"):
        server.Server(tmp_path, True)
