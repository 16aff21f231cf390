"""The Python API for asyncio: `docs/api.md`'s machines, domains, consoles and events, to be awaited.

Everything is as in `xenolith.toolstack.api`, whose objects do the work. What waits for the machine runs on threads
that are no business of the program's: a call on asyncio's own, a stream (a console, events) on one that ends with it. A
read that is cancelled loses nothing; a call that is cancelled goes on, and its result is dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

from xenolith.toolstack import api
from xenolith.toolstack.agent.files import Files as BlockingFiles
from xenolith.toolstack.agent.running import Finished
from xenolith.toolstack.api import State, Timeout
from xenolith.toolstack.client import DiskInfo, DomainEvent, DomainInfo, DomainStatistics, HostInfo
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.errors import ToolstackError
from xenolith.toolstack.host import DEFAULT_SCHEDULER

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_AHEAD = 64  # what a stream reads before somebody asks


def _awaited(method: Callable[Concatenate[api.Domain, P], R]) -> Callable[Concatenate[Domain, P], Awaitable[R]]:
    """A method of api.Domain, on another thread."""

    def call(domain: Domain, /, *values: P.args, **named: P.kwargs) -> Awaitable[R]:
        return asyncio.to_thread(method, domain.domain, *values, **named)

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class Domain:
    """One domain of a machine."""

    def __init__(self, domain: api.Domain) -> None:
        self.domain = domain
        self.domid = domain.domid

    pause = _awaited(api.Domain.pause)
    unpause = _awaited(api.Domain.unpause)
    shutdown = _awaited(api.Domain.shutdown)
    reboot = _awaited(api.Domain.reboot)
    destroy = _awaited(api.Domain.destroy)
    rename = _awaited(api.Domain.rename)
    sysrq = _awaited(api.Domain.sysrq)
    trigger = _awaited(api.Domain.trigger)
    supervise = _awaited(api.Domain.supervise)
    dump_core = _awaited(api.Domain.dump_core)
    start = _awaited(api.Domain.start)
    attach_disk = _awaited(api.Domain.attach_disk)
    detach_disk = _awaited(api.Domain.detach_disk)
    measure_disk = _awaited(api.Domain.measure_disk)
    change_medium = _awaited(api.Domain.change_medium)
    snapshot_disk = _awaited(api.Domain.snapshot_disk)

    async def run(
        self,
        command: str | Sequence[str],
        *,
        input: bytes = b"",
        env: Mapping[str, str] | None = None,
        workdir: str = "/root",
        user: str = "",
        timeout: float | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Finished:
        """Run a command in the guest to its end, as `api.Domain.run`. Cancelled, it has the guest end the command."""
        options = {"env": env, "workdir": workdir, "user": user, "timeout": timeout, "limits": limits}
        process = await asyncio.to_thread(self.domain.start, command, **options)  # type: ignore[arg-type]
        try:
            return await asyncio.to_thread(api.finished, process, input, timeout)
        except asyncio.CancelledError:
            await asyncio.to_thread(process.close)
            raise

    @property
    def files(self) -> Files:
        """The guest's files."""
        return Files(self.domain.files)

    async def info(self) -> DomainInfo:
        """A snapshot. Raises DomainNotFound when the domain is gone."""
        return await asyncio.to_thread(lambda: self.domain.info)

    async def disks(self) -> list[DiskInfo]:
        """Its virtual block devices, by number, and what each did. Raises DomainNotFound."""
        return await asyncio.to_thread(lambda: self.domain.disks)

    async def state(self) -> State:
        return await asyncio.to_thread(lambda: self.domain.state)

    async def statistics(self) -> DomainStatistics:
        return await asyncio.to_thread(lambda: self.domain.statistics)

    async def wait(self, state: State = State.SHUTDOWN, timeout: float | None = None) -> State:
        """Wait until it has shut down or is gone; the state it is in. Raises Timeout. May be cancelled."""
        if state not in (State.SHUTDOWN, State.GONE):
            raise ToolstackError(f"a domain comes into the state {state} by pause and unpause only; wait for an end")
        async with await self.events() as events:
            now = await self.state()
            try:
                async with asyncio.timeout(timeout):
                    while now not in (state, State.GONE):
                        event = await events.get()
                        now = await self.state()
                        if event is None and now is not State.GONE:
                            raise ToolstackError(f"Nothing more is heard of domain {self.domid}, which is {now}.")
            except TimeoutError:
                raise Timeout(f"Domain {self.domid} is {now} and not {state} after {timeout} seconds.") from None
            return now

    async def events(self) -> Events:
        """What happens to it from now on, up to its end."""
        return Events(await asyncio.to_thread(self.domain.events))

    async def console(self) -> Console:
        """Attach to its console; what was printed recently comes first."""
        return Console(await asyncio.to_thread(self.domain.console))

    def __repr__(self) -> str:
        return repr(self.domain)


class Files:
    """The files of a guest, as `agent.files.Files`."""

    def __init__(self, files: BlockingFiles) -> None:
        self._files = files

    async def read(self, path: str) -> bytes:
        return await asyncio.to_thread(self._files.read, path)

    async def write(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        await asyncio.to_thread(self._files.write, path, data, mode)

    async def put(self, source: str | Path, path: str) -> None:
        await asyncio.to_thread(self._files.put, source, path)

    async def get(self, path: str, target: str | Path) -> None:
        await asyncio.to_thread(self._files.get, path, target)


class _Stream(Generic[T]):
    """What a blocking stream gives, one after the other; a thread reads a little ahead."""

    def __init__(self, read: Callable[[], T | None], close: Callable[[], None], name: str) -> None:
        self._close = close
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | ToolstackError | None] = asyncio.Queue(_AHEAD)
        self._ended = False
        self._thread = threading.Thread(target=self._pump, args=(read,), name=name, daemon=True)
        self._thread.start()

    def _pump(self, read: Callable[[], T | None]) -> None:
        item: T | ToolstackError | None
        with suppress(RuntimeError, asyncio.CancelledError):  # the loop has ended, or nobody wants more
            while True:
                try:
                    item = read()
                except ToolstackError as error:
                    item = error
                asyncio.run_coroutine_threadsafe(self._items.put(item), self._loop).result()
                if not item or isinstance(item, ToolstackError):
                    return

    async def next(self) -> T | None:
        """The next item; None at the end."""
        if self._ended:
            return None
        item = await self._items.get()
        if isinstance(item, ToolstackError):
            self._ended = True
            raise item
        self._ended = not item
        return item or None

    async def close(self) -> None:
        self._ended = True
        await asyncio.to_thread(self._close)
        while self._thread.is_alive():  # it may want to put what it has read
            while not self._items.empty():
                self._items.get_nowait()
            await asyncio.to_thread(self._thread.join, 0.01)


class Events:
    """What happens to domains, or to one up to its end. To iterate over with `async for`."""

    def __init__(self, events: api.Events) -> None:
        self._stream = _Stream(events.get, events.close, "events")

    async def get(self) -> DomainEvent | None:
        """The next event; None when there will be none."""
        return await self._stream.next()

    async def close(self) -> None:
        await self._stream.close()

    async def __aiter__(self) -> AsyncIterator[DomainEvent]:
        while (event := await self.get()) is not None:
            yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Console:
    """An attachment to a domain's console. Iterating with `async for` gives the output."""

    def __init__(self, console: api.Console) -> None:
        self._console = console
        self._stream = _Stream(console.read, console.close, "console")
        self._unread = b""

    async def read(self) -> bytes:
        """The next output; b"" when the console has ended."""
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        return await self._stream.next() or b""

    async def expect(self, wanted: str | bytes, timeout: float | None = None) -> bytes:
        """Read on until `wanted` comes; all up to its end. Raises Timeout, and ToolstackError if the console ends.

        What came in vain, also when this is cancelled, can be read again.
        """
        words = wanted.encode() if isinstance(wanted, str) else wanted
        seen = b""
        try:
            async with asyncio.timeout(timeout):
                while words not in seen:
                    data = await self.read()
                    if not data:
                        raise ToolstackError(f"The console ended before {words!r} came.")
                    seen += data
        except TimeoutError:
            self._unread = seen
            raise Timeout(f"{words!r} did not come in {timeout} seconds.") from None
        except BaseException:
            self._unread = seen
            raise
        end = seen.index(words) + len(words)
        self._unread = seen[end:]
        return seen[:end]

    async def write(self, data: str | bytes) -> None:
        """Type on the console."""
        await asyncio.to_thread(self._console.write, data)

    async def close(self) -> None:
        await self._stream.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Machine:
    """A machine that runs domains. As an asynchronous context manager it is closed in the end."""

    def __init__(self, machine: api.Machine) -> None:
        """Made by `power_on` and `connect`."""
        self.machine = machine

    async def host(self) -> HostInfo:
        return await asyncio.to_thread(lambda: self.machine.host)

    async def create(self, config: DomainConfig | str | Path) -> Domain:
        """Make a domain of a configuration, or of an xl.cfg file by its path; it is paused."""
        return Domain(await asyncio.to_thread(self.machine.create, config))

    async def domains(self) -> list[Domain]:
        """All guests, by domid."""
        return [Domain(domain) for domain in await asyncio.to_thread(self.machine.domains)]

    async def domain(self, name: str | int) -> Domain:
        """The guest with this name, or this domid. Raises ToolstackError."""
        return Domain(await asyncio.to_thread(self.machine.domain, name))

    async def events(self) -> Events:
        """What happens to all domains from now on."""
        return Events(await asyncio.to_thread(self.machine.events))

    async def call(self, function: Callable[P, R], /, *values: P.args, **named: P.kwargs) -> R:
        """Anything else of the machine's, such as `call(machine.machine.xenstore.read, path)`."""
        return await asyncio.to_thread(function, *values, **named)

    async def close(self) -> None:
        """End the connection; a machine in this process ends with all its domains."""
        await asyncio.to_thread(self.machine.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def power_on(
    memory_mib: int = 1024, engine: str = "auto", pcpus: int = 2, scheduler: str = DEFAULT_SCHEDULER
) -> Machine:
    """Switch a machine on in this process. Raises EngineUnavailable where the engine cannot run here."""
    return Machine(await asyncio.to_thread(api.power_on, memory_mib, engine, pcpus, scheduler))


async def connect(socket: str | Path | None = None) -> Machine:
    """The daemon's machine at `socket`, by default this user's; it is started if none runs. Raises ToolstackError."""
    return Machine(await asyncio.to_thread(api.connect, socket))


__all__ = ["Console", "Domain", "Events", "Machine", "connect", "power_on"]
