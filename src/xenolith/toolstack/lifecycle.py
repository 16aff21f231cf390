"""What becomes of a domain that has shut down: the policy of on_poweroff, on_reboot, on_crash and their like.

A domain ends by itself with a reason (SCHEDOP_shutdown, or a crash that the hypervisor finds). Then its frames, vCPUs
and devices still exist, and the toolstack decides: destroy it, build it again, rename the corpse and build it again,
keep it, write a core first. This module is that decision and nothing else: `on_shutdown` is a function from a reason
and the configured actions to a `Plan`, a list of steps in order; `Lifecycle` follows one domain through its lives.

Two habits of xl guard the host against a domain that dies as soon as it starts. Between two lives there are two seconds
(`RESTART_PAUSE_S`), so a restart loop cannot take the host over. And a renamed corpse gets a name with a time in whole
minutes: if a domain needs a second corpse within the same minute, the name is taken, the domain is left as it is and
not built again, so that corpses cannot fill the memory.

Source: xl.cfg(5), "EVENT ACTIONS"; the steps, their order and messages as observed of xl 4.17 in the foreground.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum

from xenolith.toolstack.config.domain import Action, DomainConfig

RESTART_PAUSE_S = 2


class ShutdownReason(IntEnum):
    """SHUTDOWN_* of Xen's public/sched.h."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class Step(StrEnum):
    """What the toolstack does about a domain that has shut down, one thing at a time."""

    DUMP_CORE = "dump core"
    DESTROY = "destroy"
    RENAME = "rename"  # the corpse keeps existing under another name
    SOFT_RESET = "soft reset"  # the same domain starts over
    PAUSE = "pause"  # RESTART_PAUSE_S
    REBUILD = "rebuild"  # a new domain from the same configuration


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps for one shutdown, and what to tell the person who watches."""

    steps: tuple[Step, ...]
    messages: tuple[str, ...] = ()

    @property
    def ends(self) -> bool:
        """Whether nobody needs to watch the domain any more."""
        return Step.REBUILD not in self.steps and Step.SOFT_RESET not in self.steps


_STEPS: dict[Action, tuple[Step, ...]] = {
    Action.DESTROY: (Step.DESTROY,),
    Action.RESTART: (Step.DESTROY, Step.PAUSE, Step.REBUILD),
    Action.RENAME_RESTART: (Step.RENAME, Step.PAUSE, Step.REBUILD),
    Action.PRESERVE: (),
    Action.COREDUMP_DESTROY: (Step.DUMP_CORE, Step.DESTROY),
    Action.COREDUMP_RESTART: (Step.DUMP_CORE, Step.DESTROY, Step.PAUSE, Step.REBUILD),
    Action.SOFT_RESET: (Step.SOFT_RESET,),
}


def action_for(config: DomainConfig, reason: int) -> Action:
    """The action configured for a shutdown reason; a reason that Xen does not define gets the domain destroyed."""
    actions: dict[int, Action] = {
        ShutdownReason.POWEROFF: config.on_poweroff,
        ShutdownReason.REBOOT: config.on_reboot,
        ShutdownReason.CRASH: config.on_crash,
        ShutdownReason.WATCHDOG: config.on_watchdog,
        ShutdownReason.SOFT_RESET: config.on_soft_reset,
    }
    return actions.get(reason, Action.DESTROY)


def on_shutdown(config: DomainConfig, domid: int, reason: int) -> Plan:
    """What to do about the domain `domid` that has shut down."""
    heading = f"Domain {domid} has shut down, reason code {reason} {reason:#x}"
    if reason == ShutdownReason.SUSPEND:
        return Plan((), (heading, "Domain has suspended."))
    action = action_for(config, reason)
    messages = [heading]
    if reason not in ShutdownReason.__members__.values():
        messages.append(f"Unknown shutdown reason code {reason}. Destroying domain.")
    messages.append(f"Action for shutdown reason code {reason} is {action}")
    return Plan(_STEPS[action], tuple(messages))


def corpse_name(name: str, now: datetime) -> str:
    """The name that rename-restart gives to the domain that has ended; `now` has a time zone."""
    return name + now.astimezone(UTC).strftime("-%Y%m%dT%H%MZ")


class State(StrEnum):
    """Where a watched domain stands."""

    RUNNING = "running"
    WAITING = "waiting"  # for the end of the pause between two lives
    GONE = "gone"  # nobody watches any more: destroyed, preserved, suspended or given up


@dataclass(slots=True)
class Lifecycle:
    """One configured domain through its lives. Its methods say what to do now; the caller does it.

    The caller reports what happens: `shut_down` when the domain has ended, `destroyed` when somebody destroyed it,
    `pause_over` when RESTART_PAUSE_S have passed, `rebuilt` with the new domid.
    """

    config: DomainConfig
    domid: int
    state: State = State.RUNNING
    lives: int = 1
    corpses: list[str] = field(default_factory=list)

    def shut_down(self, reason: int, now: datetime, names_taken: Collection[str]) -> Plan:
        """The domain has shut down. Asked for anything but RUNNING, there is nothing to do."""
        if self.state is not State.RUNNING:
            return Plan(())
        plan = on_shutdown(self.config, self.domid, reason)
        if Step.RENAME in plan.steps:
            plan = self._bury(plan, corpse_name(self.config.name, now), names_taken)
        if Step.SOFT_RESET in plan.steps:
            self.lives += 1
        elif plan.ends:
            self.state = State.GONE
        else:
            self.state = State.WAITING
        return plan

    def _bury(self, plan: Plan, corpse: str, names_taken: Collection[str]) -> Plan:
        """Rename-restart, unless the corpse's name is taken: then the domain is left as it is."""
        if corpse in names_taken:
            complaint = f'Domain with name "{corpse}" already exists: leaving domain {self.domid} as it is'
            return Plan((), (*plan.messages, complaint))
        self.corpses.append(corpse)
        suffix = corpse.removeprefix(self.config.name)
        preserving = f"Preserving domain {self.domid} {self.config.name} with suffix{suffix}"
        return Plan(plan.steps, (*plan.messages, preserving))

    def destroyed(self) -> None:
        """Somebody destroyed the domain, or the rebuild that was due failed."""
        self.state = State.GONE

    def pause_over(self) -> bool:
        """Whether it is time to build the domain again."""
        return self.state is State.WAITING

    def rebuilt(self, domid: int) -> None:
        """The domain lives again, as `domid`."""
        if self.state is not State.WAITING:
            raise ValueError(f"domain {self.config.name} was not waiting for a rebuild but {self.state}")
        self.domid = domid
        self.lives += 1
        self.state = State.RUNNING
