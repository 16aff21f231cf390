"""Where a vCPU that may run on KVM or on Unicorn should run: the adaptive engine's policy.

On Unicorn what a stay costs is known: nearly all of the time is code, which KVM would execute SLOWDOWN times as fast,
at the price of an exit a trap.  On KVM the code's time is lost in the cost of exits; known is only whether traps
are so dense that Unicorn may be better.

So time lost where the vCPU is adds up as *regret* (never below 0), and when that reaches the *patience* with this
engine, the vCPU moves.  What a move may lose is bounded by that, and a phase of the guest's is noticed once it has cost
as much.  A stay that did not even pay for its two moves was a mistake: patience with the other engine
doubles; one that paid brings it back.  A mistake on Unicorn is sure, so it also ends patience with Unicorn.
"""

from __future__ import annotations

from typing import Final

SLOWDOWN: Final = 8  # Unicorn's time for the same code, typically
HANDLER_NS: Final = 7_000  # Python's share of a trap, on either engine
NATIVE_NS: Final = 700  # that of native code
SYSCALL_NS: Final = 30_000  # what a system call and the return from it cost more on KVM, by its fast path
DENSE: Final = 3  # times the cost of a trap between two: Unicorn is probably better
SPARSE: Final = 8  # likewise: KVM certainly is
CURIOSITY: Final = 16  # in between, this part of the time counts as lost, so that Unicorn is tried sometimes
INVESTMENT: Final = 4  # this part of the time that Unicorn translates counts as lost: it is for later visits, too
WARM_UP: Final = 20  # at most so many times as patient with KVM as with Unicorn, where visits must last to be worth it
MOVES_NS: Final = 400_000  # there and back
LEAST_PATIENCE: Final = 400_000  # ns of regret
MOST_PATIENCE: Final = 32_000_000


class Placement:
    """Says when to move. `exit_cost_ns`: of a trap on this host's KVM; `on_kvm`: the least patience with KVM."""

    def __init__(self, exit_cost_ns: int, on_kvm: int = LEAST_PATIENCE) -> None:
        self._exit_cost = exit_cost_ns
        self._least = {"kvm": on_kvm, "unicorn": LEAST_PATIENCE}
        self.patience = dict(self._least)
        self._regret = 0
        self._lost = 0  # over the whole stay; less than 0: it was worth it

    def spent(
        self, engine: str, traps: int, elapsed_ns: int, syscalls: int = 0, native: int = 0, translation_ns: int = 0
    ) -> bool:
        """Account for CPU time on the engine where the vCPU is, with that many traps. True: it should move.

        `syscalls`: how many system calls there were, which KVM's fast path carries out without a trap, on Unicorn with
        two.  0 without a fast path.  `native`: how many of the traps native code has handled.  `translation_ns`: what
        Unicorn needed of the time for code that it had not met.
        """
        handlers = native * NATIVE_NS + (traps - native) * HANDLER_NS
        if engine == "kvm":
            lost = self._lost_on_kvm(traps, syscalls, elapsed_ns, handlers)
        else:
            lost = self._lost_on_unicorn(traps, syscalls, elapsed_ns - translation_ns, handlers)
            lost += translation_ns // INVESTMENT
        self._lost += lost
        self._regret = max(self._regret + lost, 0)
        return self._regret >= self.patience[engine]

    def left(self, engine: str) -> None:
        """The vCPU leaves this engine. Where that was not the policy's advice, a short stay was no mistake."""
        other = "unicorn" if engine == "kvm" else "kvm"
        if self._lost < -MOVES_NS:
            self.patience[other] = self._least[other]
        elif self._regret >= self.patience[engine]:
            self.patience[other] = min(2 * self.patience[other], MOST_PATIENCE)
            if engine == "unicorn":
                self.patience[engine] = max(self._least[engine], self.patience[other] // WARM_UP)
        self._regret = self._lost = 0

    def _lost_on_unicorn(self, traps: int, syscalls: int, elapsed_ns: int, handlers_ns: int) -> int:
        code = max(elapsed_ns - handlers_ns, 0)
        exits = max(traps - 2 * syscalls, 0)
        return code - code // SLOWDOWN - exits * self._exit_cost - syscalls * SYSCALL_NS

    def _lost_on_kvm(self, traps: int, syscalls: int, elapsed_ns: int, handlers_ns: int) -> int:
        switching = traps * self._exit_cost + syscalls * SYSCALL_NS
        least = switching + handlers_ns
        if elapsed_ns < DENSE * least:
            return switching
        if elapsed_ns < SPARSE * least:
            return elapsed_ns // CURIOSITY
        return switching - (SLOWDOWN - 1) * (elapsed_ns - least)
