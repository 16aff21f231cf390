"""Which engine runs a domain: KVM where it works, Unicorn everywhere else (design decision 8).

Whether KVM works is not read off a device file or a processor flag: a few instructions are run on it (kvm/host.py).
Where it works but traps are dear, KVM alone would boot a kernel more slowly than Unicorn does: there `auto` takes both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from xenolith.machine.engines.protocol import Engine, EngineError
from xenolith.machine.memory import MachineMemory

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.traits import HostTraits

_log = logging.getLogger(__name__)
DEAR_EXIT_NS: Final = 15_000  # a trap on KVM that costs more is worth avoiding: Python's own share is some 10 us
ENGINES: Final = ("auto", "unicorn", "kvm", "adaptive")


class Choice(NamedTuple):
    """An engine and what makes it for a domain; for people, what it is, why it was taken, and its kind on this host."""

    name: str
    factory: Callable[[MachineMemory], Engine]
    title: str
    why: str
    kind: str = ""

    @property
    def reason(self) -> str:
        """What was taken and why, in a line."""
        return f"{self.title}, {self.why}{self.kind and ': '}{self.kind}"


def choose(name: str = "auto") -> Choice:
    """The engine to use for a name of ENGINES.

    The reason is logged as well: as a warning where `auto` has to do without KVM, else for `-v`.
    Raises EngineError where the engine that was asked for cannot run here, and ValueError for an unknown name.
    """
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; the engines are {', '.join(ENGINES)}")
    if name == "unicorn":
        return _chosen(Choice(name, _unicorn(), "Unicorn", "as asked for"), logging.INFO)
    try:
        traits = _host_traits()
    except EngineError as error:
        if name != "auto":
            raise EngineError(f"the {name} engine cannot run here: {error}") from error
        choice = Choice("unicorn", _unicorn(), "Unicorn", f"because KVM cannot be used: {error}")
        return _chosen(choice, logging.WARNING)
    why = "which works here" if name == "auto" else "as asked for"
    if name == "adaptive" or (name == "auto" and traits.exit_cost_ns > DEAR_EXIT_NS and traits.counts_as_host):
        kind = f"{traits.kind}, {traits.exit_cost_ns / 1000:.0f} us a trap"
        return _chosen(Choice("adaptive", _adaptive, "KVM and Unicorn in turns", why, kind), logging.INFO)
    kind = traits.kind
    if traits.shortcomings:
        instead = "which Unicorn makes up for" if traits.counts_as_host else "which guests may notice"
        kind += f"; {', '.join(traits.shortcomings)}, {instead}"
    return _chosen(Choice("kvm", _kvm, "KVM", why, kind), logging.INFO)


def _chosen(choice: Choice, level: int) -> Choice:
    _log.log(level, "engine: %s", choice.reason)
    return choice


def _host_traits() -> HostTraits:
    from xenolith.machine.engines.kvm import host

    return host.host_traits()


def _kvm(memory: MachineMemory) -> Engine:
    """KVM, with Unicorn at its side where this host's KVM gets some states of a guest wrong."""
    from xenolith.machine.engines.kvm.engine import KvmEngine

    traits = _host_traits()
    if traits.is_exact or not traits.counts_as_host:
        return KvmEngine(memory, traits)
    from xenolith.machine.engines.adaptive.engine import POLICY_KVM, AdaptiveEngine

    return AdaptiveEngine(memory, "kvm", POLICY_KVM)


def _adaptive(memory: MachineMemory) -> Engine:
    from xenolith.machine.engines.adaptive.engine import AdaptiveEngine

    return AdaptiveEngine(memory)


def _unicorn() -> Callable[[MachineMemory], Engine]:
    from xenolith.machine.engines.unicorn.engine import UnicornEngine
    from xenolith.machine.engines.unicorn.user import host

    return partial(UnicornEngine, native_user=host.setting())
