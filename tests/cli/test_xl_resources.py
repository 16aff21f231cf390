"""`xl sched-*`, `vcpu-set`, `mem-set` and `mem-max` on a machine in this process, with a guest that has not begun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import xenolith
from xenolith.cli.xl import XlGroup
from xenolith.cli.xl_command import Toolstack
from xenolith.toolstack.config.domain import SchedulerParameters

from .test_xl import Answer

GUESTS = Path(__file__).parents[2] / "guests/prebuilt"

Xl = Callable[..., Answer]


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[xenolith.Machine]:
    scheduler = getattr(request, "param", "credit2")
    with xenolith.power_on(96, engine="unicorn", pcpus=2, scheduler=scheduler) as machine:
        yield machine


@pytest.fixture
def xl(machine: xenolith.Machine) -> Xl:
    def run(*arguments: str) -> Answer:
        toolstack = Toolstack(machine.client, machine.supervision)
        result = CliRunner().invoke(XlGroup(lambda: toolstack), list(arguments), prog_name="xl")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


def guest(machine: xenolith.Machine, name: str = "web", **settings: object) -> xenolith.Domain:
    kernel = str(GUESTS / "hello.elf")
    sizes: dict[str, object] = {"target_memory_kib": 32 << 10, "vcpus": 2, "max_vcpus": 4}
    return machine.create(xenolith.DomainConfig(name, kernel=kernel, **{**sizes, **settings}))  # type: ignore[arg-type]


HEADING = f"{'Name':<33} {'ID':>4} {'Weight':>6} {'Cap':>4}\n"


def test_credit2s_parameters_are_set_listed_and_refused(machine: xenolith.Machine, xl: Xl) -> None:
    guest(machine, scheduler=SchedulerParameters(weight=512))
    assert xl("sched-credit2", "-d", "web") == Answer(0, HEADING + f"{'web':<33} {1:4} {512:6} {0:4}\n", "")
    assert xl("sched-credit2", "-d", "web", "-w", "128", "-c", "150") == Answer(0, "", "")
    listed = f"Cpupool Pool-0: ratelimit=0us\n{HEADING}" + f"{'web':<33} {1:4} {128:6} {150:4}\n"
    assert xl("sched-credit2") == xl("sched-credit2", "-p", "Pool-0") == Answer(0, listed, "")
    assert xl("sched-credit2", "-s").out == "Cpupool Pool-0: ratelimit=0us\n"
    for wrong, why in {
        ("-d", "web", "-w", "0"): "weight out of range, valid values are from 1 to 65535",
        ("-d", "web", "-c", "401"): "cap out of range, valid values are from 0 to 400",
        ("-w", "1"): "Must specify a domain.",
        ("-d", "web", "-p", "Pool-0"): "Specifying a cpupool is not allowed with other options.",
        ("-p", "Pool-1"): "unknown cpupool 'Pool-1'",
        ("-d", "web", "-w", "heavy"): "`heavy' is no number.",
        ("-d", "0"): "Domain-0 is this toolstack's own domain",
    }.items():
        answer = xl("sched-credit2", *wrong)
        assert (answer.status, answer.out) == (1, "") and why in answer.err
    assert machine.domain("web").scheduling() == {"weight": 128, "cap": 150}


def test_another_scheduler_than_the_one_in_use_says_so(machine: xenolith.Machine, xl: Xl) -> None:
    guest(machine)
    refused = Answer(1, "", "libxl_domain_sched_params_get returned credit2 not bvt.\n")
    assert xl("sched-bvt", "-d", "web") == refused == xl("sched-bvt", "-d", "web", "-w", "3")
    assert xl("sched-sfs") == Answer(0, "", "No cpupool uses the scheduler sfs; Pool-0 uses credit2.\n")


@pytest.mark.parametrize("machine", ["bvt"], indirect=True)
def test_bvts_parameters(machine: xenolith.Machine, xl: Xl) -> None:
    guest(machine)
    assert xl("sched-bvt", "-d", "web", "-w", "3", "-b", "100", "-l", "50", "-u", "2000").status == 0
    assert xl("sched-bvt").out.splitlines() == [
        "Cpupool Pool-0: sched=bvt",
        f"{'Name':<33} {'ID':>4} {'Weight':>6} {'Warp':>8} {'Limit':>8} {'Unwarp':>8}",
        f"{'web':<33} {1:4} {3:6} {100:8} {50:8} {2000:8}",
    ]


@pytest.mark.parametrize("machine", ["sfs"], indirect=True)
def test_sfs_has_weights_and_no_caps(machine: xenolith.Machine, xl: Xl, caplog: pytest.LogCaptureFixture) -> None:
    guest(machine, scheduler=SchedulerParameters(weight=300, cap=50))
    assert caplog.messages == ["web: cap has no effect: the scheduler in use has no caps"]
    assert xl("sched-sfs", "-d", "web").out.splitlines()[1] == f"{'web':<33} {1:4} {300:6}"


def test_a_domain_whose_weight_is_out_of_range_is_not_made(machine: xenolith.Machine) -> None:
    with pytest.raises(xenolith.ToolstackError, match="weight out of range"):
        guest(machine, scheduler=SchedulerParameters(weight=70000))
    assert [domain.domid for domain in machine.client.domains()] == [0]


def test_vcpu_set_tells_the_guest(machine: xenolith.Machine, xl: Xl) -> None:
    guest(machine)
    home = "/local/domain/1/cpu"

    def available() -> list[str]:
        return [machine.xenstore.read(f"{home}/{number}/availability") for number in range(4)]

    assert available() == ["online", "online", "offline", "offline"]
    assert xl("vcpu-set", "web", "1") == Answer(0, "", "")
    assert available() == ["online", "offline", "offline", "offline"]
    assert "You have 2 physical CPUs and want 3 vCPUs!" in xl("vcpu-set", "web", "3").err
    assert xl("vcpu-set", "-i", "web", "3") == Answer(0, "", "")
    assert available() == ["online", "online", "online", "offline"]
    assert xl("vcpu-set", "-i", "web", "5").err == "Requested 5 VCPUs, however maxcpus is 4.\n"
    assert xl("vcpu-set", "web", "0").status == 1
    assert xl("vcpu-set", "web", "all") == Answer(1, "", "Error: Invalid argument.\n")


def test_mem_set_and_mem_max(machine: xenolith.Machine, xl: Xl) -> None:
    domain = guest(machine, max_memory_kib=48 << 10)

    def target_and_limit() -> tuple[int, int]:
        target = int(machine.xenstore.read("/local/domain/1/memory/target"))
        return target >> 10, domain.info.max_memory_kib >> 10

    assert target_and_limit() == (32, 48)
    assert xl("mem-set", "web", "20") == Answer(0, "", "")
    assert target_and_limit() == (20, 20)
    assert xl("mem-max", "web", "40960k") == Answer(0, "", "")
    assert target_and_limit() == (20, 40)
    assert xl("mem-set", "web", "48m") == Answer(0, "", "")
    assert target_and_limit() == (48, 48)
    for verb, size, why in (
        ("mem-set", "49", "cannot set domid 1 dynamic max memory to : 49"),
        ("mem-set", "0", "cannot set domid 1 dynamic max memory to : 0"),
        ("mem-max", "49", "domain 1 can have 1 to 12288 pages"),
        ("mem-max", "47", "less than the domain's target"),
        ("mem-max", "much", "invalid memory size: much"),
    ):
        answer = xl(verb, "web", size)
        assert answer.status != 0 and why in answer.err, answer
    assert target_and_limit() == (48, 48)
