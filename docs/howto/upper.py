"""A back-end of your own: a device that turns text into capitals.

A split device has a front-end in the guest and a back-end in dom0, which find each other by xenstore (`xenbus`, which
does all of that), and share a ring of requests and responses (`rings`, which check the indices).  What is left is this
file: what the device offers, and what it does with a request.

Here a request is an id, a length and up to 48 bytes of text; the response has the same id and the text in capitals.

    dom0.xenbus.plug(domid, 0, UpperBackend(dom0.domain, domid), {}, {})
"""

from collections.abc import Mapping
from contextlib import ExitStack
from struct import Struct
from typing import ClassVar, Final

from xenolith.dom0.bell import Bell
from xenolith.dom0.rings import RequestReader, ResponseWriter, RingError, SharedRing
from xenolith.dom0.xenbus import Backend, FrontendError, FrontendNodes
from xenolith.hypervisor.python_domain import HypercallError, PythonDomain

MESSAGE: Final = Struct("<QB48s7x")  # id, length, text: of requests and responses
LIMIT: Final = 1 << 32


class UpperBackend(Backend):
    """One device. All of these methods are called on the device's own thread."""

    kind: ClassVar[str] = "upper"

    def __init__(self, dom0: PythonDomain, domid: int) -> None:
        self._dom0, self._domid = dom0, domid
        self._undo = ExitStack()

    def offer(self) -> Mapping[str, str]:
        return {"most-text": "48"}

    def connect(self, nodes: FrontendNodes, bell: Bell) -> None:
        """The nodes are the guest's: `number` checks them; the hypervisor checks the grant and the port."""
        try:
            grant = self._dom0.map_grant(self._domid, nodes.number("ring-ref", LIMIT))
            self._undo.callback(self._dom0.unmap_grant, grant)
            self._port = self._dom0.bind_interdomain(self._domid, nodes.number("event-channel", LIMIT))
            self._undo.callback(self._dom0.close, self._port)
        except HypercallError as error:
            raise FrontendError(f"its ring cannot be reached: {error}") from error
        shared = SharedRing(grant.view, MESSAGE.size)
        self._responses = ResponseWriter(shared)
        self._requests = RequestReader(shared)
        self._dom0.set_handler(self._port, lambda _: bell.ring(), bell.descriptor)

    def describe(self) -> Mapping[str, str]:
        return {}

    def serve(self) -> bool:
        """`take` gives copies, which the guest cannot change any more; each is checked before it is used."""
        try:
            requests = self._requests.take()
        except RingError as error:
            raise FrontendError(str(error)) from error
        for request in requests:
            number, length, text = MESSAGE.unpack(request)
            self._responses.put(MESSAGE.pack(number, min(length, 48), text[: min(length, 48)].upper()))
        if self._responses.push():
            self._dom0.send(self._port)
        return self._requests.rearm()

    def disconnect(self) -> None:
        self._undo.close()

    def close(self) -> None:
        pass
