"""Templates: domains that were booted and warmed up once, and of which clones stand ready.

A template is a domain frozen at the moment when its guest's agent answered (and a command of the user's had run).  The
domain itself is gone; what it held is the image that its clones share.  For each template a few clones are kept ready:
told who they are, warmed up by a program that does nothing, and paused, which costs no CPU and little memory.  Running
a command takes one of them, lets it run and destroys it when the command has ended: nothing of one run is left for the
next.  A thread makes new ones, and destroys used ones, when nobody has asked for a clone for a moment, or when there
are none left.

Templates are this machine's: they go with it.  What one was made of is fixed, so it is never stale.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from xenolith.dom0.disks import DiskError
from xenolith.toolstack.agent.running import finish, printable
from xenolith.toolstack.client import (
    Client,
    Execution,
    InvalidRequest,
    OnProgress,
    Outcome,
    ProcessEnd,
    ProcessOutput,
    ProcessStream,
    Progress,
    TemplateInfo,
    ToolstackError,
)

if TYPE_CHECKING:
    from xenolith.toolstack.clone_disks import CloneDisks
    from xenolith.toolstack.clones import Parent
    from xenolith.toolstack.config.domain import DomainConfig
    from xenolith.toolstack.embedded.building import Builder

MOST_READY: Final = 1000
QUIET_S: Final = 0.05  # without a request, before the next clone is made


@dataclass
class _Template:
    name: str
    parent: Parent
    wanted: int  # clones ready
    made: float = field(default_factory=time.time)
    number: int = 0  # of the clone that was made last
    runs: int = 0
    ready: deque[int] = field(default_factory=deque)
    problem: str = ""  # why the last clone could not be made


class Templates:
    """The templates of a toolstack. Methods may be called by any thread."""

    def __init__(self, toolstack: Client, builder: Builder, disks: CloneDisks) -> None:
        self._toolstack = toolstack
        self._builder = builder
        self._disks = disks
        self._changed = threading.Condition()  # of all below
        self._templates: dict[str, _Template] = {}
        self._making: set[str] = set()
        self._used: deque[int] = deque()  # clones to destroy
        self._last_request = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def create(
        self, name: str, config: DomainConfig, warm_up: Execution | None, ready: int, progress: OnProgress
    ) -> None:
        """Boot a domain, let it warm up, freeze it. Raises ToolstackError."""
        if not name or not name.isprintable() or "/" in name or not 0 <= ready <= MOST_READY:
            raise InvalidRequest(f"A template needs a name, and 0 to {MOST_READY} clones ready.")
        if any(nic.publish for nic in config.nics):
            raise InvalidRequest("A template has no published ports: each of its clones would have the same.")
        with self._changed:
            if name in self._templates or name in self._making:
                raise InvalidRequest(f'There is a template "{name}" already.')
            self._making.add(name)
        try:
            config = copy.deepcopy(config)
            config.name, config.uuid = f"template-{name}", uuid4()
            parent = self._parent(config, warm_up, progress)
            with self._changed:
                self._templates[name] = _Template(name, parent, ready)
                self._begin()
        finally:
            with self._changed:
                self._making.discard(name)

    def _parent(self, config: DomainConfig, warm_up: Execution | None, progress: OnProgress) -> Parent:
        toolstack = self._toolstack
        domid = 0
        try:
            self._disks.overlay_all(config)
            domid = toolstack.create(config, progress)
            toolstack.unpause(domid)
            progress(Progress("booting the guest", 0, 1))
            _run(toolstack.execute(domid, warm_up or Execution(command=("true",), directory="/")))
            progress(Progress("booting the guest", 1, 1))
            return self._builder.frozen(domid)
        except (DiskError, OSError) as error:
            raise ToolstackError(f"The template's disks cannot be made: {error}.") from error
        finally:
            with suppress(ToolstackError):
                if domid:
                    toolstack.destroy(domid)
            self._disks.remove(config)

    def infos(self) -> list[TemplateInfo]:
        with self._changed:
            return [
                TemplateInfo(
                    name=each.name,
                    memory_kib=each.parent.config.memory_kib,
                    vcpus=each.parent.config.vcpus_online,
                    kernel=each.parent.config.kernel or "",
                    made=each.made,
                    ready=len(each.ready),
                    wanted=each.wanted,
                    runs=each.runs,
                    problem=each.problem,
                )
                for each in self._templates.values()
            ]

    def remove(self, name: str) -> None:
        """Forget a template; clones that run go on."""
        with self._changed:
            template = self._templates.pop(name, None)
            if template is None:
                raise InvalidRequest(f'There is no template "{name}".')
            self._used += template.ready
            template.parent.close()
            self._changed.notify_all()

    def run(self, name: str, execution: Execution) -> ProcessStream:
        """Run a command in a clone of its own, which is gone when the command has ended."""
        domid = self._take(name)
        try:
            self._toolstack.unpause(domid)
            return _InClone(self._toolstack.execute(domid, execution), lambda: self._give_back(domid))
        except BaseException:
            self._give_back(domid)
            raise

    def _take(self, name: str) -> int:
        with self._changed:
            self._last_request = time.monotonic()
            template = self._templates.get(name)
            if template is None:
                raise InvalidRequest(f'There is no template "{name}".')
            template.runs += 1
            self._changed.notify_all()
            if template.ready:
                return template.ready.popleft()
        return self._make(template)

    def _make(self, template: _Template) -> int:
        with self._changed:
            if template.name not in self._templates:
                raise InvalidRequest(f'There is no template "{template.name}" any more.')
            template.number += 1
            number = template.number
        name = f"{template.name}-{number}"
        return self._builder.cloned(template.parent, name, number)

    def _give_back(self, domid: int) -> None:
        with self._changed:
            self._used.append(domid)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for template in self._templates.values():
            template.parent.close()

    # --- on the thread -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="templates", daemon=True)
            self._thread.start()

    def _keep(self) -> None:
        while (work := self._next()) is not None:
            work()

    def _next(self) -> Callable[[], None] | None:
        """Wait for something to do; None: no more."""
        with self._changed:
            while not self._closed:
                lacking = [each for each in self._templates.values() if len(each.ready) < each.wanted]
                lacking = [each for each in lacking if not each.problem or self._used]
                quiet = self._last_request + QUIET_S - time.monotonic()
                empty = [each for each in lacking if not each.ready and each.runs]
                if self._used and (quiet <= 0 or not empty):
                    domid = self._used.popleft()
                    return lambda: self._destroy(domid)
                if empty or (lacking and quiet <= 0):
                    template = (empty or lacking)[0]
                    return lambda: self._refill(template)
                self._changed.wait(max(quiet, 0.001) if lacking else None)
        return None

    def _destroy(self, domid: int) -> None:
        with suppress(ToolstackError):
            self._toolstack.destroy(domid)

    def _refill(self, template: _Template) -> None:
        try:
            domid = self._make(template)
            self._warm_up(domid)
        except ToolstackError as error:
            with self._changed:
                template.problem = str(error)
            return
        with self._changed:
            template.problem = ""
            if template.name in self._templates:
                template.ready.append(domid)
            else:
                self._used.append(domid)

    def _warm_up(self, domid: int) -> None:
        """Let it run until it has heard who it is and has run a program, which costs most of a short run's time."""
        try:
            self._toolstack.unpause(domid)
            _run(self._toolstack.execute(domid, Execution(command=("true",), directory="/")))
            self._toolstack.pause(domid)
        except ToolstackError:
            self._give_back(domid)
            raise


def _run(process: ProcessStream) -> None:
    """To its end. Raises ToolstackError where that is not a good one."""
    done, outcome = finish(process)
    if outcome is not Outcome.EXITED or done.exit_status:
        said = done.message or printable(done.output[-400:]).strip() or f"status {done.exit_status}"
        raise ToolstackError(f"The command that warms the template up has failed: {said}.")


class _InClone:
    """A process in a clone, whose end is the clone's."""

    def __init__(self, process: ProcessStream, ended: Callable[[], None]) -> None:
        self._process = process
        self._ended = ended
        self._lock = threading.Lock()
        self._gone = False

    def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd | None:
        return self._process.read(timeout)

    def write(self, data: bytes) -> None:
        self._process.write(data)

    def end_input(self) -> None:
        self._process.end_input()

    def signal(self, number: int) -> None:
        self._process.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        self._process.resize(rows, columns)

    def close(self) -> None:
        with self._lock:
            gone, self._gone = self._gone, True
        if not gone:
            self._process.close()
            self._ended()
