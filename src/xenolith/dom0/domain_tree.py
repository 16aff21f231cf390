"""What xenstore says about a domain from its birth: the nodes libxl writes for a PV guest (observed on Xen 4.17).

A guest may read its own directory, /local/domain/<domid>, and change only the nodes in it that are there for its
answers; those of the console's back-end are dom0's.
"""

from __future__ import annotations

import uuid as uuids
from dataclasses import dataclass
from typing import Final

from xenolith.dom0.builder import BuiltDomain
from xenolith.dom0.xenstore import HostRequests

CONSOLE_LIMIT: Final = 1048576  # bytes of output that real xenconsoled buffers; guests do not read it

_GUESTS_OWN: Final = (
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "device/suspend/event-channel",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
)
"""Nodes of the domain's directory that the guest may write."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is to be said of a domain."""

    name: str
    uuid: uuids.UUID
    memory_kib: int
    max_memory_kib: int
    vcpus: int
    max_vcpus: int
    kernel: str  # where it came from, for people
    start_time: int  # seconds since 1970


def home(domid: int) -> str:
    """The domain's directory."""
    return f"/local/domain/{domid}"


def write(store: HostRequests, built: BuiltDomain, what: Description) -> None:
    """Write a new domain's nodes."""
    domid, directory = built.domid, home(built.domid)
    vm = f"/vm/{what.uuid}"
    readable, own = ["n0", f"r{domid}"], [f"n{domid}"]
    store.mkdir(directory, readable)
    store.mkdir(vm, readable)
    for path, value in {
        f"{vm}/name": what.name,
        f"{vm}/uuid": str(what.uuid),
        f"{vm}/image/ostype": "linux",
        f"{vm}/image/kernel": what.kernel,
        f"{vm}/start_time": f"{what.start_time}.00",
        f"{directory}/vm": vm,
        f"{directory}/name": what.name,
        f"{directory}/domid": str(domid),
        f"{directory}/memory/static-max": str(what.max_memory_kib),
        f"{directory}/memory/target": str(what.memory_kib),
        f"{directory}/memory/videoram": "0",
        f"{directory}/control/platform-feature-multiprocessor-suspend": "1",
        f"{directory}/control/platform-feature-xs_reset_watches": "1",
        f"{directory}/store/port": str(built.store_port),
        f"{directory}/store/ring-ref": str(built.store_mfn),
    }.items():
        store.write(path, value, readable)
    for number in range(what.max_vcpus):
        availability = "online" if number < what.vcpus else "offline"
        store.write(f"{directory}/cpu/{number}/availability", availability, readable)
    for path in _GUESTS_OWN:
        store.write(f"{directory}/{path}", "", own)
    _write_console(store, built)


def move(store: HostRequests, built: BuiltDomain, name: str, uuid: uuids.UUID) -> None:
    """Write what is different in the nodes of a domain that came from elsewhere, where it has another number."""
    directory, readable = home(built.domid), ["n0", f"r{built.domid}"]
    for path, value in {
        f"{directory}/vm": f"/vm/{uuid}",
        f"{directory}/name": name,
        f"{directory}/domid": str(built.domid),
        f"/vm/{uuid}/name": name,
        f"/vm/{uuid}/uuid": str(uuid),
    }.items():
        store.write(path, value, readable)
    _write_console(store, built)


def _write_console(store: HostRequests, built: BuiltDomain) -> None:
    """The primary console, which is no device of the front-end kind: its ring and port are in start_info."""
    domid = built.domid
    frontend, backend = f"{home(domid)}/console", f"/local/domain/0/backend/console/{domid}/0"
    readable = ["n0", f"r{domid}"]
    store.mkdir(frontend, readable)
    store.mkdir(backend, readable)
    for path, value in {
        f"{frontend}/backend": backend,
        f"{frontend}/backend-id": "0",
        f"{frontend}/limit": str(CONSOLE_LIMIT),
        f"{frontend}/type": "xenconsoled",
        f"{frontend}/output": "pty",
        f"{frontend}/tty": "",
        f"{frontend}/port": str(built.console_port),
        f"{frontend}/ring-ref": str(built.console_mfn),
        f"{backend}/frontend": frontend,
        f"{backend}/frontend-id": str(domid),
        f"{backend}/online": "1",
        f"{backend}/state": "1",
        f"{backend}/protocol": "vt100",
    }.items():
        store.write(path, value, readable)


def remove(store: HostRequests, domid: int, uuid: uuids.UUID) -> None:
    """Remove all that `write` wrote, and what back-ends and the guest put there."""
    for kind in store.directory("/local/domain/0/backend") if store.exists("/local/domain/0/backend") else []:
        store.rm(f"/local/domain/0/backend/{kind}/{domid}")
    store.rm(home(domid))
    store.rm(f"/vm/{uuid}")
