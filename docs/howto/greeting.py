"""Your first hypercall: a guest asks for a greeting, and gets it in its own memory.

Number 48 is the first of those that public/xen.h leaves to each architecture and Xen does not use.  A real one has its
function in the file of its family in xenolith/hypervisor/hypercalls/ and a line in table.py; nothing else is needed,
for both hypercall conventions and for multicalls.
"""

from typing import Final

from xenolith.abi.errno import EFAULT, EINVAL
from xenolith.hypervisor.domain import Domain, Vcpu
from xenolith.hypervisor.guest_memory import copy_to_guest

HYPERVISOR_greet: Final = 48
MOST: Final = 64  # bytes that a guest may ask for


def do_greet(vcpu: Vcpu, va: int, size: int) -> int:
    """Write at most `size` bytes of a greeting at `va`; how many, or -EINVAL, -EFAULT.

    What a guest says is checked before it is used: its numbers here, its address by `copy_to_guest`, which walks the
    guest's own page tables with the guest's own rights.  The caller holds the domain's lock.
    """
    if not 0 < size <= MOST:
        return -EINVAL
    text = f"hello d{vcpu.domain.domid}v{vcpu.vcpu_id}".encode()[:size]
    return len(text) if copy_to_guest(vcpu, va, text) else -EFAULT


def install(domain: Domain) -> None:
    """Give one domain the hypercall. (For all of them: the line in table.py.)"""
    domain.hypercalls = [*domain.hypercalls]
    domain.hypercalls[HYPERVISOR_greet] = do_greet, 2  # the function, and how many arguments it takes
