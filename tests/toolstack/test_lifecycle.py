"""What becomes of a domain that has ended, for every reason and every configured action."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.toolstack.config.domain import Action, DomainConfig
from xenolith.toolstack.lifecycle import Lifecycle, ShutdownReason, State, Step, action_for, corpse_name, on_shutdown

NOON = datetime(2026, 3, 4, 12, 5, 59, tzinfo=UTC)

KEYS = {
    ShutdownReason.POWEROFF: "on_poweroff",
    ShutdownReason.REBOOT: "on_reboot",
    ShutdownReason.CRASH: "on_crash",
    ShutdownReason.WATCHDOG: "on_watchdog",
    ShutdownReason.SOFT_RESET: "on_soft_reset",
}

actions = st.sampled_from(list(Action))
reasons = st.integers(0, 300)


def configured(**actions_by_key: Action) -> DomainConfig:
    config = DomainConfig("web")
    for key, action in actions_by_key.items():
        setattr(config, key, action)
    return config


def test_a_domain_without_any_setting_restarts_on_reboot_and_is_destroyed_otherwise() -> None:
    config = DomainConfig("web")
    assert {reason: action_for(config, reason) for reason in KEYS} == {
        ShutdownReason.POWEROFF: Action.DESTROY,
        ShutdownReason.REBOOT: Action.RESTART,
        ShutdownReason.CRASH: Action.DESTROY,
        ShutdownReason.WATCHDOG: Action.DESTROY,
        ShutdownReason.SOFT_RESET: Action.SOFT_RESET,
    }


@given(st.sampled_from(list(KEYS)), actions)
def test_each_reason_obeys_its_own_key_only(reason: ShutdownReason, action: Action) -> None:
    config = configured(**dict.fromkeys(KEYS.values(), Action.PRESERVE))
    setattr(config, KEYS[reason], action)
    assert action_for(config, reason) is action
    assert all(action_for(config, other) is Action.PRESERVE for other in KEYS if other is not reason)


@given(reasons, actions)
def test_a_domain_is_never_both_rebuilt_and_left_under_its_name(reason: int, action: Action) -> None:
    """A new domain of the same name needs the old one destroyed or renamed first."""
    steps = on_shutdown(configured(**dict.fromkeys(KEYS.values(), action)), 5, reason).steps
    if Step.REBUILD in steps:
        before = steps[: steps.index(Step.REBUILD)]
        assert (Step.DESTROY in before) != (Step.RENAME in before)
        assert before[-1] is Step.PAUSE


@given(reasons, actions)
def test_a_core_is_dumped_before_anything_else_happens_to_the_domain(reason: int, action: Action) -> None:
    steps = on_shutdown(configured(**dict.fromkeys(KEYS.values(), action)), 5, reason).steps
    assert Step.DUMP_CORE not in steps[1:]
    if reason in KEYS:
        assert (Step.DUMP_CORE in steps) == action.startswith("coredump")


@given(st.integers(6, 255))
def test_a_reason_that_xen_does_not_define_destroys_the_domain(reason: int) -> None:
    plan = on_shutdown(configured(**dict.fromkeys(KEYS.values(), Action.PRESERVE)), 13, reason)
    assert plan.steps == (Step.DESTROY,)
    assert plan.messages == (
        f"Domain 13 has shut down, reason code {reason} {reason:#x}",
        f"Unknown shutdown reason code {reason}. Destroying domain.",
        f"Action for shutdown reason code {reason} is destroy",
    )


def test_the_messages_of_a_crash_are_those_of_xl() -> None:
    plan = on_shutdown(configured(on_crash=Action.RENAME_RESTART), 2, 3)
    assert plan.messages == (
        "Domain 2 has shut down, reason code 3 0x3",
        "Action for shutdown reason code 3 is rename-restart",
    )


def test_a_suspended_domain_is_left_alone_and_not_watched_any_more() -> None:
    life = Lifecycle(DomainConfig("web"), 11)
    plan = life.shut_down(ShutdownReason.SUSPEND, NOON, ())
    assert plan.steps == ()
    assert plan.messages[-1] == "Domain has suspended."
    assert life.state is State.GONE


def test_a_corpse_is_named_after_the_minute_in_utc() -> None:
    assert corpse_name("rr", NOON) == "rr-20260304T1205Z"
    assert corpse_name("rr", NOON.astimezone(timezone(timedelta(hours=5)))) == "rr-20260304T1205Z"


def test_a_second_corpse_within_a_minute_ends_the_restarts_and_leaves_the_domain() -> None:
    life = Lifecycle(configured(on_crash=Action.RENAME_RESTART), 2)
    assert life.shut_down(3, NOON, {"web"}).steps == (Step.RENAME, Step.PAUSE, Step.REBUILD)
    life.rebuilt(3)
    plan = life.shut_down(3, NOON, {"web", "web-20260304T1205Z"})
    assert plan.steps == ()
    assert life.state is State.GONE
    assert "web-20260304T1205Z" in plan.messages[-1]


def test_a_reboot_gives_the_domain_a_new_life_after_a_pause() -> None:
    life = Lifecycle(DomainConfig("web"), 7)
    assert life.shut_down(1, NOON, {"web"}).steps == (Step.DESTROY, Step.PAUSE, Step.REBUILD)
    assert life.state is State.WAITING
    life.rebuilt(8)
    assert (life.state, life.domid, life.lives) == (State.RUNNING, 8, 2)


def test_a_domain_that_somebody_destroys_while_it_waits_is_not_rebuilt() -> None:
    life = Lifecycle(DomainConfig("web"), 7)
    life.shut_down(1, NOON, {"web"})
    life.destroyed()
    assert not life.pause_over()
    with pytest.raises(ValueError, match="web"):
        life.rebuilt(8)


def test_a_soft_reset_keeps_the_domain_running_under_its_number() -> None:
    life = Lifecycle(DomainConfig("web"), 7)
    assert life.shut_down(5, NOON, {"web"}).steps == (Step.SOFT_RESET,)
    assert (life.state, life.domid, life.lives) == (State.RUNNING, 7, 2)


events = st.one_of(reasons, st.sampled_from(["destroyed", "pause over"]))


@given(st.lists(st.sampled_from(list(Action)), min_size=5, max_size=5), st.lists(events, max_size=30))
def test_whatever_happens_there_is_one_watched_domain_at_most(chosen: list[Action], story: list[int | str]) -> None:
    """A model of the host: the set of domains with their names, which the steps of each plan change."""
    config = configured(**dict(zip(KEYS.values(), chosen, strict=True)))
    life = Lifecycle(config, 1)
    domains = {1: config.name}
    for minute, event in enumerate(story):
        if event == "destroyed":
            domains.pop(life.domid, None)
            life.destroyed()
        elif event == "pause over":
            if life.pause_over():
                fresh = max(domains, default=life.domid) + 1
                domains[fresh] = config.name
                life.rebuilt(fresh)
        elif isinstance(event, int):
            plan = life.shut_down(event, NOON + timedelta(minutes=minute), domains.values())
            if Step.DESTROY in plan.steps:
                del domains[life.domid]
            if Step.RENAME in plan.steps:
                domains[life.domid] = life.corpses[-1]
        assert list(domains.values()).count(config.name) <= 1
        assert len(set(domains.values())) == len(domains)
        if life.state is State.RUNNING:
            assert domains[life.domid] == config.name
