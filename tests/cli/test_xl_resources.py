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
    assert xl("sched-credit2", "-s", "-r", "1500") == Answer(0, "", "")
    assert xl("sched-credit2", "-s", "-p", "0").out == "Cpupool Pool-0: ratelimit=1500us\n"
    for wrong, why in {
        ("-d", "web", "-w", "0"): "weight out of range, valid values are from 1 to 65535",
        ("-d", "web", "-c", "401"): "cap out of range, valid values are from 0 to 400",
        ("-w", "1"): "Must specify a domain.",
        ("-d", "web", "-p", "Pool-0"): "Specifying a cpupool is not allowed with other options.",
        ("-p", "Pool-1"): "unknown cpupool 'Pool-1'",
        ("-d", "web", "-w", "heavy"): "`heavy' is no number.",
        ("-r", "5"): "Must specify schedparam",
        ("-s", "-r", "99999999"): "ratelimit out of range",
        ("-s", "-p", "Pool-1"): "unknown cpupool 'Pool-1'",
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
        "Cpupool Pool-0: allowance=5000us",
        f"{'Name':<33} {'ID':>4} {'Weight':>6} {'Warp':>8} {'Limit':>8} {'Unwarp':>8}",
        f"{'web':<33} {1:4} {3:6} {100:8} {50:8} {2000:8}",
    ]


@pytest.mark.parametrize("machine", ["sfs"], indirect=True)
def test_sfs_has_weights_and_no_caps(machine: xenolith.Machine, xl: Xl, caplog: pytest.LogCaptureFixture) -> None:
    guest(machine, scheduler=SchedulerParameters(weight=300, cap=50))
    assert xl("sched-sfs").out.startswith("Cpupool Pool-0: sched=sfs\n")
    assert "web: cap has no effect: the scheduler in use has no caps" in caplog.messages
    assert xl("sched-sfs", "-d", "web").out.splitlines()[1] == f"{'web':<33} {1:4} {300:6}"


def test_a_domain_whose_weight_is_out_of_range_is_not_made(machine: xenolith.Machine) -> None:
    with pytest.raises(xenolith.ToolstackError, match="weight out of range"):
        guest(machine, scheduler=SchedulerParameters(weight=70000))
    assert [domain.domid for domain in machine.client.domains()] == [0]


AFFINITY = f"{'Name':<32} {'ID':>5} {'VCPU':>5} {'CPU':>5} {'State':>5} {'Time(s)':>9} Affinity (Hard / Soft)\n"


def test_vcpu_pin_sets_hard_and_soft_affinity(machine: xenolith.Machine, xl: Xl) -> None:
    domain = guest(machine, hard_affinity=[frozenset({1})], soft_affinity=[frozenset({0, 1}), frozenset({0})])

    def affinities() -> list[str]:
        answer = xl("vcpu-list", "web")
        assert answer.out.startswith(AFFINITY)
        return [row[67:] for row in answer.out.splitlines()[1:]]

    assert affinities() == ["1 / all", "all / 0", "all / all", "all / all"]
    assert xl("vcpu-pin", "web", "0", "all", "1") == Answer(0, "", "")
    assert xl("vcpu-pin", "web", "1", "-", "1") == Answer(0, "", "")
    assert xl("vcpu-pin", "web", "2", "0-1,^1") == Answer(0, "", "")
    assert affinities() == ["all / 1", "all / 1", "0 / all", "all / all"]
    assert xl("vcpu-pin", "web", "all", "1") == Answer(0, "", "")
    assert affinities() == ["1 / 1", "1 / 1", "1 / all", "1 / all"]
    assert machine.client.config(domain.domid).hard_affinity == [frozenset({1})] * 4, "as it is built again"
    assert xl("-N", "vcpu-pin", "web", "0", "0", "all") == Answer(0, "cpumap: 0 all\n", "")
    for words, why in {
        ("web", "0", "5"): "has none of these pCPUs.\nCould not set affinity for vcpu `0'.",
        ("web", "4", "0"): "has no vCPU 4",
        ("web", "x", "0"): "Error: Invalid argument x as VCPU.",
        ("web", "0", "x"): "Invalid pcpu range: x.",
        ("-f", "web", "all", "0"): "Error: --force and 'all' as VCPU not allowed.",
        ("0", "0", "0"): "Domain-0 is this toolstack's own domain",
    }.items():
        answer = xl("vcpu-pin", *words)
        assert (answer.status, answer.out) == (1, "") and why in answer.err, answer


def test_a_domain_pinned_to_a_pcpu_that_there_is_not_is_not_made(machine: xenolith.Machine) -> None:
    with pytest.raises(xenolith.ToolstackError, match="has none of these pCPUs"):
        guest(machine, hard_affinity=[frozenset({6})])
    with pytest.raises(xenolith.ToolstackError, match="there is no cpupool lake"):
        guest(machine, pool="lake")
    assert [domain.domid for domain in machine.client.domains()] == [0]


POOLS = f"{'Name':<19}CPUs   Sched     Active   Domain count\n"


def test_cpupools(machine: xenolith.Machine, xl: Xl, tmp_path: Path) -> None:
    assert xl("cpupool-list").out == POOLS + f"{'Pool-0':<19}  2   credit2       y          1\n"
    assert xl("cpupool-create", 'name="apart"', 'cpus=["1"]').err == "cpu 1 illegal or not free\n"
    assert xl("cpupool-cpu-remove", "Pool-0", "1") == Answer(0, "", "")
    assert xl("info", "free_cpus").out == "1\n"
    (tmp_path / "apart").write_text('sched = "bvt"\ncpus = "1"\n')
    said = f'Using config file "{tmp_path / "apart"}"\ncpupool name:   apart\nscheduler:      bvt\nnumber of cpus: 1\n'
    assert xl("cpupool-create", "-n", str(tmp_path / "apart")) == Answer(0, said, "")
    assert xl("cpupool-create", str(tmp_path / "apart")) == Answer(0, said, "")
    guest(machine, pool="apart", scheduler=SchedulerParameters(weight=300))
    assert xl("cpupool-list", "apart").out == POOLS + f"{'apart':<19}  1       bvt       y          1\n"
    assert xl("cpupool-list", "-c").out == f"{'Name':<19}CPU list\n{'Pool-0':<19}0\n{'apart':<19}1\n"
    assert xl("list", "-c", "web").out.splitlines()[1].endswith(f"{'apart':>16}")
    assert xl("sched-bvt", "-d", "web", "-b", "100").status == 0
    assert xl("sched-bvt").out.splitlines()[0] == "Cpupool apart: allowance=5000us"
    assert xl("sched-bvt", "-s", "-p", "apart", "-a", "2000").status == 0
    assert xl("sched-bvt", "-s", "-p", "apart").out == "Cpupool apart: allowance=2000us\n"
    assert xl("cpupool-rename", "apart", "away") == Answer(0, "", "")
    assert xl("vcpu-pin", "web", "0", "1") == Answer(0, "", "")
    assert xl("cpupool-migrate", "web", "Pool-0") == Answer(0, "", "")
    assert xl("vcpu-list", "web").out.splitlines()[1][67:] == "all / all"
    assert machine.domain("web").scheduling() == {"weight": 300, "cap": 0}
    assert xl("cpupool-destroy", "away") == Answer(0, "", "")
    assert xl("cpupool-cpu-add", "Pool-0", "1") == Answer(0, "", "")
    assert xl("cpupool-list", "-c").out == f"{'Name':<19}CPU list\n{'Pool-0':<19}0,1\n"


def test_what_cpupools_refuse(machine: xenolith.Machine, xl: Xl) -> None:
    guest(machine)
    assert xl("cpupool-cpu-remove", "Pool-0", "1").status == 0
    assert xl("cpupool-create", 'name="apart"', 'sched="sfs"').status == 0
    for words, why in {
        ("cpupool-list", "lake"): "Pool 'lake' does not exist",
        ("cpupool-create", 'sched="sfs"'): "Missing cpupool name!",
        ("cpupool-create", 'name="apart"'): 'Pool name "apart" already exists',
        ("cpupool-create", 'name="b"', 'sched="null"'): "Unknown scheduler",
        ("cpupool-create", 'name="b"', 'cpus="0"'): "cpu 0 illegal or not free",
        ("cpupool-create", 'name="b'): "Failed to parse config file: Invalid argument",
        ("cpupool-create", "/nowhere"): "Failed to read config file: /nowhere: No such file or directory",
        ("cpupool-destroy", "lake"): "unknown cpupool 'lake'",
        ("cpupool-destroy", "Pool-0"): "Can't destroy cpupool 'Pool-0'",
        ("cpupool-rename", "apart", "Pool-0"): "Can't rename cpupool 'apart'",
        ("cpupool-cpu-add", "apart", "0"): "some cpus may not have been added to apart",
        ("cpupool-cpu-remove", "Pool-0", "0"): "needs a pCPU",
        ("cpupool-migrate", "web", "apart"): "has no pCPU",
        ("cpupool-migrate", "0", "Pool-0"): "Domain-0 is this toolstack's own domain",
        ("cpupool-numa-split",): "splitting not possible, already cpupools in use",
    }.items():
        answer = xl(*words)
        assert answer.status == 1 and why in answer.err, (words, answer)
    assert xl("cpupool-destroy", "apart").status == 0
    assert "one NUMA node" in xl("cpupool-numa-split").err


def test_a_machine_pinned_to_cpus_that_the_host_has_not_is_refused() -> None:
    with pytest.raises(xenolith.ToolstackError, match="2 pCPUs are pinned to one CPU each of"):
        xenolith.power_on(16, engine="unicorn", pcpus=2, host_cpus=[0])


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
