"""The scheduling algorithms by name. A new one is a file beside these and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xenolith.hypervisor.sched.bvt import BorrowedVirtualTime
from xenolith.hypervisor.sched.communication import CommunicationAware
from xenolith.hypervisor.sched.credit2 import Credit2
from xenolith.hypervisor.sched.fair import Fair
from xenolith.hypervisor.sched.policy import MakePolicy
from xenolith.hypervisor.sched.sfs import SurplusFair

DEFAULT: Final = Fair.name
ALGORITHMS: Final[Mapping[str, MakePolicy]] = {
    policy.name: policy for policy in (Credit2, BorrowedVirtualTime, SurplusFair, CommunicationAware, Fair)
}
