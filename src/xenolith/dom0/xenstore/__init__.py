"""xenstored: the store which domains and tools configure devices through (Xen: docs/misc/xenstore.txt).

The rooms, from the inside out: :mod:`tree` (nodes as a persistent tree), :mod:`store` (the store and transactions),
:mod:`xenstored` (what each request does and may), :mod:`connection` (the wire protocol), :mod:`ring`,
:mod:`socket_client` and :mod:`host` (guests', tools' and our own way in), :mod:`service` (the running thing).
"""

from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.host import HostRequests, HostStore, HostWatch
from xenolith.dom0.xenstore.quota import Quota
from xenolith.dom0.xenstore.ring import RingConnection
from xenolith.dom0.xenstore.service import XenstoreService

__all__ = ["HostRequests", "HostStore", "HostWatch", "Quota", "RingConnection", "XenstoreService", "XsError"]
