"""The `xl` command on a machine in memory: what it prints, where, and with which status it ends.

Outputs marked "recorded" are those of xl 4.17 for the same state of the machine.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolstack.fake import UNREADABLE, FakeClient
from xenolith.cli.xl import NOT_YET, SUBCOMMANDS, XlGroup, usage
from xenolith.cli.xl_command import Session, Toolstack
from xenolith.toolstack.client import ShutdownRequest
from xenolith.toolstack.config.domain import Action, DomainConfig
from xenolith.toolstack.supervisor import Supervisor


@dataclass
class Answer:
    status: int
    out: str
    err: str


class Xl:
    """Runs `xl` against a fake machine."""

    def __init__(self, directory: Path) -> None:
        self.machine = FakeClient()
        self.supervisor = Supervisor(self.machine, directory / "dump")
        self.supervisor.pause_between_lives = lambda seconds: False
        self.connected = 0

    def connect(self) -> Toolstack:
        self.connected += 1
        return Toolstack(self.machine, self.supervisor)

    def __call__(self, *arguments: str, stdin: str | None = None) -> Answer:
        result = CliRunner().invoke(XlGroup(self.connect), list(arguments), input=stdin, prog_name="xl")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return Answer(result.exit_code, result.stdout, result.stderr)

    def add(self, name: str, **settings: object) -> int:
        return self.machine.create(DomainConfig(name, **settings))  # type: ignore[arg-type]


@pytest.fixture
def xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Xl]:
    monkeypatch.chdir(tmp_path)
    Path("a.cfg").write_text('name="a"\nkernel="vmlinuz"\nmemory=32\nvcpus=2\n\n')
    runner = Xl(tmp_path)
    yield runner
    runner.supervisor.close()
    runner.machine.close()


NOPE = "NOPE is an invalid domain identifier (rc=-6)\n"


# --- the frame -------------------------------------------------------------------------------------------------


def test_a_bare_xl_prints_every_subcommand_and_fails(xl: Xl) -> None:
    answer = xl()
    assert (answer.status, answer.err) == (1, "")
    assert answer.out == usage()
    for name in SUBCOMMANDS:
        assert re.search(rf"^ {name:<19} \S", answer.out, re.M)
    assert all(name in answer.out for name in NOT_YET)
    assert xl.connected == 0


def test_an_unknown_subcommand_is_not_implemented(xl: Xl) -> None:
    assert xl("foo") == Answer(1, "", "command not implemented\n")


def test_an_abbreviation_counts_if_only_one_subcommand_begins_so(xl: Xl) -> None:
    assert xl("domi", "Domain-0").out == "0\n"
    assert xl("c") == Answer(1, "", "command not implemented\n")
    assert xl("cre").err == "Config file not specified and none in save file\n"


def test_what_is_missing_says_so_whatever_its_arguments(xl: Xl) -> None:
    for name in sorted(NOT_YET):
        answer = xl(name)
        assert answer == Answer(1, "", f"xl: {name}: xenolith does not implement this subcommand of Xen yet.\n")
        assert xl(name, "a", "--foo", "-x") == answer


def test_an_unknown_global_option_is_refused(xl: Xl) -> None:
    assert xl("-z", "list") == Answer(1, "", "xl: invalid option -- 'z'\nunknown global option\n")


def test_a_dry_run_is_refused_by_commands_that_cannot_do_one(xl: Xl) -> None:
    assert xl("-N", "list") == Answer(1, "", "command does not implement -N (dryrun) option\n")


def test_help_of_a_subcommand_goes_to_stdout(xl: Xl) -> None:
    answer = xl("help", "sysrq")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith("Usage: xl [-vtTf] sysrq <Domain> <letter>\n\n")
    assert xl("sysrq", "-h") == answer
    assert xl("help").out == usage()
    assert xl("help", "foo") == Answer(0, 'command "foo" not implemented\n', "")


def test_missing_operands_are_counted_and_the_usage_printed(xl: Xl) -> None:
    answer = xl("rename", "a")
    assert (answer.status, answer.err) == (2, "'xl rename' requires at least 2 arguments.\n\n")
    assert answer.out.startswith("Usage: xl [-vtTf] rename <Domain> <NewDomainName>\n")
    assert xl("pause").err == "'xl pause' requires at least 1 argument.\n\n"


def test_an_unknown_option_is_not_supported(xl: Xl) -> None:
    assert xl("list", "-x") == Answer(2, "", "option `x' not supported.\n")
    assert xl("create", "a.cfg", "--foo") == Answer(2, "", "option `--foo' not supported.\n")
    assert xl("create", "-f") == Answer(2, "", "option `f' not supported.\n")


def test_every_subcommand_of_the_usage_list_has_a_usage(xl: Xl) -> None:
    for name in SUBCOMMANDS:
        assert f" {name} " in xl(name, "-h").out.splitlines()[0] + " "


# --- listing ---------------------------------------------------------------------------------------------------

HEADING = "Name                                        ID   Mem VCPUs\tState\tTime(s)"
DOM0_ROW = "Domain-0                                     0   384     2     r-----      65.1"


def test_list_prints_the_columns_of_xl(xl: Xl) -> None:
    """Recorded."""
    xl.add("g1", target_memory_kib=128 * 1024)
    xl.add("a", target_memory_kib=32 * 1024)
    xl.machine.end(1, 0)
    xl.machine.guests[1].info = replace(xl.machine.guests[1].info, paused=False, cpu_time_ns=1_700_000_000)
    assert xl("list") == Answer(
        0,
        f"{HEADING}\n{DOM0_ROW}\n"
        "g1                                           1   128     1     ---s--       1.7\n"
        "a                                            2    32     1     --p---       0.0\n",
        "",
    )


def test_list_shows_one_domain_by_name_or_number(xl: Xl) -> None:
    xl.add("a")
    assert xl("list", "a") == xl("list", "1")
    assert xl("list", "a").out.splitlines()[1].split()[:2] == ["a", "1"]


def test_list_shows_why_a_domain_has_shut_down(xl: Xl) -> None:
    letters = {}
    for reason in (0, 1, 2, 3, 4, 5, 9):
        domid = xl.add(f"g{reason}")
        xl.machine.unpause(domid)
        xl.machine.end(domid, reason)
        letters[reason] = xl("list", f"g{reason}").out.splitlines()[1].split()[4]
    assert letters == {
        0: "---s--", 1: "---sr-", 2: "---ss-", 3: "---sc-", 4: "---sw-", 5: "---sS-", 9: "---s?-",
    }  # fmt: skip


def test_list_verbose_adds_uuid_reason_and_label(xl: Xl) -> None:
    """Recorded."""
    domid = xl.add("a")
    xl.machine.end(domid, 3)
    lines = xl("list", "-v").out.splitlines()
    assert lines[0] == HEADING + "   UUID                            Reason-Code\tSecurity Label"
    assert lines[1] == f"{DOM0_ROW} 00000000-0000-0000-0000-000000000000        -                -"
    assert lines[2].endswith(f" {xl.machine.guests[1].config.uuid}        3                -")


def test_list_adds_pools_nodes_and_labels_in_the_order_of_xl(xl: Xl) -> None:
    """Recorded."""
    assert xl("list", "-c").out == f"{HEADING}         Cpupool\n{DOM0_ROW}          Pool-0\n"
    assert xl("list", "-n").out == f"{HEADING} NODE Affinity\n{DOM0_ROW} all\n"
    assert xl("list", "-Z").out == f"{HEADING}   Security Label\n{DOM0_ROW}                -\n"


def test_list_of_unknown_domains_fails(xl: Xl) -> None:
    assert xl("list", "NOPE") == Answer(1, "", NOPE)
    assert xl("list", "99") == Answer(1, "", "Error: Domain '99' does not exist.\n")
    assert xl("list", "a", "b").status == 1


def test_list_long_prints_configurations_as_json(xl: Xl) -> None:
    """Recorded: the fields and their order."""
    xl.add("a", kernel="/k", vcpus=2, max_vcpus=2, target_memory_kib=32768, max_memory_kib=32768)
    answer = xl("list", "-l")
    assert answer.out.endswith("]\n\n")
    dom0, guest = json.loads(answer.out)
    assert dom0["config"]["c_info"] == {"type": "pv", "name": "Domain-0"}
    assert list(dom0["config"]["b_info"]) == [
        "max_memkb", "target_memkb", "sched_params", "type.pv", "arch_arm", "arch_x86",
    ]  # fmt: skip
    assert guest["domid"] == 1
    assert list(guest["config"]["c_info"]) == ["type", "name", "domid", "uuid", "run_hotplug_scripts"]
    assert guest["config"]["b_info"] == {
        "max_vcpus": 2,
        "avail_vcpus": [0, 1],
        "max_memkb": 32768,
        "target_memkb": 32768,
        "video_memkb": 0,
        "sched_params": {"sched": "credit", "weight": 256, "cap": 0},
        "claim_mode": "True",
        "kernel": "/k",
        "cmdline": "",
        "type.pv": {},
        "arch_arm": {},
        "arch_x86": {"msr_relaxed": "False"},
    }


def test_vcpu_list_shows_where_vcpus_may_run(xl: Xl) -> None:
    """Recorded, but for the affinities."""
    xl.add("a", vcpus=1, max_vcpus=2, hard_affinity=[frozenset({0, 1, 3})])
    assert xl("vcpu-list") == Answer(
        0,
        "Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)\n"
        "Domain-0                             0     0    1   r--      38.1  all / all\n"
        "a                                    1     0    0   ---       0.0  0-1,3 / all\n"
        "a                                    1     1    -   --p       0.0  all / all\n",
        "",
    )
    assert xl("vcpu-list", "a").out.count("\n") == 3
    assert xl("vcpu-list", "NOPE").err == NOPE


def test_vm_list_and_claims(xl: Xl) -> None:
    """Recorded."""
    assert xl("vm-list").out == (
        "UUID                                  ID    name\n"
        "00000000-0000-0000-0000-000000000000  0    Domain-0                      \n"
    )
    assert xl("claims").out == f"{HEADING}  Claimed\n{DOM0_ROW}     0\n"


def test_info_prints_all_keys_or_those_that_begin_with_a_word(xl: Xl) -> None:
    lines = xl("info").out.splitlines()
    assert "virt_caps              : pv gnttab-v1" in lines
    assert "hw_caps                : 1fcbf3fd:f6d8320b:ec500800:00000077:00000005:01884329:0000020c:00000000" in lines
    assert "cpu_mhz                : 2445.431" in lines
    assert "xen_version            : 4.17.0-xenolith" in lines
    assert "platform_params        : virt_start=0xffff800000000000" in lines
    assert xl("info", "free_memory").out == "212\n"
    assert xl("info", "xen_caps").out == "xen-3.0-x86_64 \n"
    assert xl("info", "engine").out == "fake\n"
    assert xl("info", "xenstore_socket").out == "/run/fake/xenstore\n"
    assert xl("info", "nope") == Answer(0, "", "")
    assert xl("info", "xen_m").out == "4\n17\n"


def test_info_with_numa_adds_the_topology(xl: Xl) -> None:
    answer = xl("info", "-n").out
    assert "cpu:    core    socket     node\n  0:       0        0        0\n" in answer
    assert "   0:       767        212      10\nxen_major" in answer


def test_domid_and_domname_convert(xl: Xl) -> None:
    """Recorded."""
    xl.add("a")
    assert xl("domid", "a") == Answer(0, "1\n", "")
    assert xl("domname", "1") == Answer(0, "a\n", "")
    missing = "maybe this domain does not exist.\n"
    assert xl("domid", "NOPE") == Answer(1, "", f"Can't get domid of domain name 'NOPE', {missing}")
    assert xl("domid", "1").status == 1
    assert xl("domname", "99") == Answer(1, "", f"Can't get domain name of domain id '99', {missing}")
    assert xl("domname", "a") == Answer(1, "", "Invalid domain id.\n\n")


def test_uptime_in_long_and_short_form(xl: Xl, monkeypatch: pytest.MonkeyPatch) -> None:
    xl.add("a")
    monkeypatch.setattr("time.time", lambda: xl.machine.now + 86400 + 3725)
    lines = xl("uptime").out.splitlines()
    assert lines[0] == "Name                                ID Uptime"
    assert lines[2] == "a                                    1 1 day,  1:02:05"
    assert re.fullmatch(r" \d\d:\d\d:\d\d up 1 day,  1:02, a \(1\)", xl("uptime", "-s", "a").out.rstrip("\n"))
    assert xl("uptime", "NOPE").err == NOPE


def test_dmesg_prints_the_log_and_clears_it_when_asked(xl: Xl) -> None:
    assert xl("dmesg", "-c").out == "(XEN) first line\n(XEN) second line\n"
    assert xl("dmesg") == Answer(0, "", "")


# --- create ----------------------------------------------------------------------------------------------------


def test_create_starts_a_domain_and_returns(xl: Xl) -> None:
    assert xl("create", "a.cfg") == Answer(0, "", "Parsing config from a.cfg\n")
    assert xl.machine.calls == [("create", "a"), ("unpause", 1)]
    assert xl.machine.guests[1].config.kernel == str(Path("vmlinuz").absolute())


def test_create_quiet_and_paused(xl: Xl) -> None:
    assert xl("create", "-q", "-p", "a.cfg") == Answer(0, "", "")
    assert xl.machine.guests[1].info.paused


def test_create_takes_settings_from_the_command_line(xl: Xl) -> None:
    assert xl("create", "-q", "a.cfg", "memory=64", 'name="b"').status == 0
    assert xl.machine.guests[1].info.name == "b"
    assert xl.machine.guests[1].info.memory_kib == 65536


def test_create_reports_errors_on_the_line_that_an_added_setting_has(xl: Xl) -> None:
    """Recorded."""
    error = "a.cfg:6: config parsing error near <newline>: syntax error, unexpected NEWLINE, "
    assert xl("create", "-q", "a.cfg", "memory=") == Answer(
        1, "", f"{error}expecting STRING or NUMBER or '['\nFailed to parse config: Invalid argument\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [("create", "-n", "a.cfg"), ("-N", "create", "a.cfg"), ("create", "--dryrun", "-f", "a.cfg"),
     ("create", "--dry", "--defconfig=a.cfg")],
)  # fmt: skip
def test_a_dry_run_prints_json_and_needs_no_machine(xl: Xl, arguments: tuple[str, ...]) -> None:
    answer = xl(*arguments)
    assert (answer.status, answer.err) == (0, "Parsing config from a.cfg\n")
    assert json.loads(answer.out)["b_info"]["max_memkb"] == 32768
    assert xl.connected == 0


def test_debug_prints_the_configuration_to_stderr_and_creates(xl: Xl) -> None:
    answer = xl("create", "-q", "-d", "a.cfg")
    assert answer.out == ""
    assert json.loads(answer.err)["c_info"]["name"] == "a"
    assert set(xl.machine.guests) == {1}


def test_a_configuration_may_come_from_the_command_line_only(xl: Xl) -> None:
    assert xl("create", "-q", "/dev/null", 'name="x"', 'kernel="/k"').status == 0
    assert xl.machine.guests[1].config.kernel == "/k"


def test_create_without_a_file_or_with_two(xl: Xl) -> None:
    """Recorded."""
    assert xl("create") == Answer(6, "", "Config file not specified and none in save file\n")
    assert xl("create", "name=5").status == 6
    assert xl("create", "/nope") == Answer(3, "", "Failed to read config file: /nope: No such file or directory\n")
    answer = xl("create", "a.cfg", "b.cfg")
    assert (answer.status, answer.err) == (2, "")
    assert answer.out.startswith("Usage: xl [-vtTfN] create <ConfigFile> [options] [vars]\n")


def test_create_fails_with_status_3_when_the_machine_refuses(xl: Xl) -> None:
    xl.add("a")
    assert xl("create", "-q", "a.cfg") == Answer(3, "", 'Domain with name "a" already exists.\n')
    answer = xl("create", "-q", "a.cfg", 'name="b"', f'kernel="{UNREADABLE}"')
    assert answer == Answer(3, "", "failed to open file '/nope': No such file or directory\n")


def ends_when_it_runs(xl: Xl, *reasons: int) -> None:
    """Let the guests end by themselves, as soon as they are unpaused, one after the other."""
    waiting = list(reasons)
    unpause = xl.machine.unpause

    def unpause_and_end(domid: int) -> None:
        unpause(domid)
        xl.machine.end(domid, waiting.pop(0))

    xl.machine.unpause = unpause_and_end  # type: ignore[method-assign]


def test_create_in_the_foreground_follows_the_domain_to_its_end(xl: Xl) -> None:
    """Recorded."""
    ends_when_it_runs(xl, 1, 0)
    answer = xl("create", "-F", "-q", "a.cfg")
    assert answer.status == 0
    assert re.sub(r"pid \d+", "pid N", answer.err).splitlines() == [
        "Waiting for domain a (domid 1) to die [pid N]",
        "Domain 1 has shut down, reason code 1 0x1",
        "Action for shutdown reason code 1 is restart",
        "Domain 1 needs to be cleaned up: destroying the domain",
        "Done. Rebooting now",
        "Waiting for domain a (domid 2) to die [pid N]",
        "Domain 2 has shut down, reason code 0 0x0",
        "Action for shutdown reason code 0 is destroy",
        "Domain 2 needs to be cleaned up: destroying the domain",
        "Done. Exiting now",
    ]


def test_create_without_supervision_leaves_a_domain_that_ends(xl: Xl) -> None:
    ends_when_it_runs(xl, 1)
    assert xl("create", "-e", "-q", "a.cfg").status == 0
    assert xl.machine.guests[1].info.shutdown


def test_config_update_stores_what_a_reboot_will_use(xl: Xl) -> None:
    """Recorded."""
    xl.add("a")
    warning = (
        "WARNING: xl now has better capability to manage domain configuration, avoid using this command when possible\n"
    )
    assert xl("config-update", "a", "a.cfg", "memory=64") == Answer(0, "", warning + "setting dom1 configuration\n")
    assert xl.machine.guests[1].config.memory_kib == 65536
    assert xl("config-update", "a") == Answer(1, "", warning + "Config file not specified\n")
    assert xl("config-update", "NOPE", "a.cfg") == Answer(1, "", warning + NOPE)
    assert xl("config-update", "a", "/nope").status == 253
    dry = xl("-N", "config-update", "a", "a.cfg")
    assert json.loads(dry.out)["domid"] is None
    assert dry.err == warning
    assert xl("config-update").err == "xl config-update requires a domain argument\n"


# --- acting on domains -----------------------------------------------------------------------------------------


def test_pause_unpause_and_destroy(xl: Xl) -> None:
    xl.add("a")
    for command in ("unpause", "pause", "destroy"):
        assert xl(command, "a") == Answer(0, "", "")
    assert xl.machine.calls[1:] == [("unpause", 1), ("pause", 1), ("destroy", 1)]


@pytest.mark.parametrize("command", ["pause", "unpause", "destroy", "shutdown", "reboot", "console"])
def test_commands_for_a_domain_that_does_not_exist_fail(xl: Xl, command: str) -> None:
    assert xl(command, "NOPE") == Answer(1, "", NOPE)
    by_number = xl(command, "99")
    assert by_number.status == 1
    assert "Domain 99 does not exist." in by_number.err


def test_destroy_says_with_which_error_it_failed_and_spares_dom0(xl: Xl) -> None:
    assert xl("destroy", "99").err.splitlines()[-1] == "destroy failed (rc=-21)"
    assert xl("destroy", "0").err.splitlines()[0] == "Not destroying domain 0; use -f to force."


def test_a_numeric_word_is_a_domid_and_never_a_name(xl: Xl) -> None:
    xl.add("9")
    assert xl("destroy", "9").status == 1
    assert set(xl.machine.guests) == {1}


def test_shutdown_needs_to_be_told_what(xl: Xl) -> None:
    assert xl("shutdown") == Answer(1, "", "You must specify -a or a domain id.\n\n")


def test_shutdown_asks_the_guest_and_can_wait_for_its_end(xl: Xl) -> None:
    xl.add("a")
    assert xl("shutdown", "-w", "a") == Answer(
        0, "", "Shutting down domain 1\nWaiting for 1 domains\nDomain 1 has been shut down, reason code 0\n"
    )
    xl.machine.destroy(1)
    xl.add("b")
    assert xl("reboot", "b") == Answer(0, "", "Rebooting domain 2\n")
    assert xl.machine.calls[-1] == ("request_shutdown", 2, "reboot")


def test_shutdown_of_all_domains_waits_for_each(xl: Xl) -> None:
    for name in "abc":
        xl.add(name)
    lines = xl("shutdown", "-a", "--wait").err.splitlines()
    assert lines[:4] == [
        "Shutting down domain 1", "Shutting down domain 2", "Shutting down domain 3", "Waiting for 3 domains",
    ]  # fmt: skip
    assert sorted(lines[4:]) == [f"Domain {domid} has been shut down, reason code 0" for domid in (1, 2, 3)]


def test_a_guest_that_does_not_listen_makes_shutdown_fail(xl: Xl) -> None:
    """Recorded: the error number."""
    xl.add("a")
    xl.machine.guests[1].acknowledges = False
    answer = xl("shutdown", "a")
    assert answer.status == 1
    assert answer.err.splitlines()[-1] == "shutdown failed (rc=-9)"


def test_rename_keeps_names_unique(xl: Xl) -> None:
    xl.add("a")
    xl.add("b")
    assert xl("rename", "a", "c") == Answer(0, "", "")
    assert xl("rename", "c", "b") == Answer(1, "", "Domain with name \"b\" already exists.\nCan't rename domain 'c'.\n")
    assert xl("rename", "NOPE", "x") == Answer(1, "", NOPE)


def test_sysrq_takes_one_key(xl: Xl) -> None:
    xl.add("a")
    assert xl("sysrq", "a", "h") == Answer(0, "", "")
    answer = xl("sysrq", "a", "hh")
    assert (answer.status, answer.err) == (1, "Invalid sysrq.\n\n")
    assert answer.out.startswith("Usage: xl [-vtTf] sysrq")
    assert xl.machine.calls[-1] == ("sysrq", 1, "h")


def test_trigger_sends_what_exists(xl: Xl) -> None:
    xl.add("a", max_vcpus=2)
    assert xl("trigger", "a", "nmi", "1").status == 0
    assert xl("trigger", "a", "nmi", "x") == Answer(0, "", "Invalid vcpuid, using default vcpuid=0.\n\n")
    assert xl.machine.calls[1:] == [("trigger", 1, "nmi", 1), ("trigger", 1, "nmi", 0)]
    assert xl("trigger", "a", "zz") == Answer(1, "", 'Invalid trigger "zz"\n')
    assert xl("trigger", "a", "power").status == 1


def test_dump_core_names_the_file_for_somebody_who_works_elsewhere(xl: Xl) -> None:
    xl.add("a")
    assert xl("dump-core", "a", "core") == Answer(0, "", "")
    assert xl.machine.calls[-1] == ("dump_core", 1, str(Path("core").absolute()))
    assert xl("dump-core", "a", "/nope/x").err.splitlines()[-1] == "core dump failed (rc=-3)"


def test_console_knows_pv_consoles_only(xl: Xl) -> None:
    xl.add("a")
    assert xl("console", "-t", "zz", "a") == Answer(1, "", "console type supported are: pv, serial, vuart\n")
    assert xl("console", "-t", "serial", "a").status == 1
    assert xl("console", "-n", "3", "a").err == "Domain 1 has no console 3.\n"


def test_waiting_ends_when_the_domain_is_destroyed_instead(xl: Xl) -> None:
    xl.add("a")
    xl.machine.request_shutdown = lambda domid, request: threading.Thread(  # type: ignore[method-assign]
        target=xl.machine.destroy, args=(domid,)
    ).start()
    assert xl("shutdown", "-w", "a").err.splitlines()[-1] == "Domain 1 has been destroyed"


# --- completion ------------------------------------------------------------------------------------------------


def completions(xl: Xl, words: list[str], incomplete: str) -> list[str]:
    from click.shell_completion import ShellComplete

    group = XlGroup(xl.connect)
    complete = ShellComplete(group, {"obj": Session(xl.connect)}, "xl", "_XL_COMPLETE")
    return [item.value for item in complete.get_completions(words, incomplete)]


def test_the_shell_completes_subcommands_options_and_domains(xl: Xl) -> None:
    xl.add("web")
    xl.add("db")
    assert completions(xl, [], "dom") == ["domid", "domname"]
    assert completions(xl, ["list"], "--v") == ["--verbose"]
    assert completions(xl, ["destroy"], "w") == ["web"]
    assert completions(xl, ["pause"], "") == ["Domain-0", "db", "web"]
    assert completions(xl, ["rename"], "d") == ["db"]
    assert completions(xl, ["rename", "db"], "w") == []  # a new name is anybody's guess
    assert completions(xl, ["domname"], "") == []
    assert completions(xl, ["vcpu-list", "db", "web"], "w") == ["web"]


def test_the_shell_completes_files_where_the_synopsis_names_one(xl: Xl) -> None:
    from click.shell_completion import ShellComplete

    xl.add("web")
    complete = ShellComplete(XlGroup(xl.connect), {"obj": Session(xl.connect)}, "xl", "_XL_COMPLETE")
    for words in (["create"], ["dump-core", "web"], ["config-update", "web"]):
        assert [item.type for item in complete.get_completions(words, "x")] == ["file"]


WITHOUT_EFFECT = {
    "cpu_weight": "512", "cap": "50",
    "channel": '["name=a,connection=pty"]',
    "cpuid": '"host,rdcl-no=1"', "tsc_mode": '"always_emulate"', "max_grant_version": "1",
    "seclabel": '"a:b:c"', "passthrough": '"enabled"',
    "driver_domain": "1", "e820_host": "1", "vpmu": "1", "period": "10",
}  # fmt: skip


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_that_does_nothing_here_is_named_and_the_domain_made(xl: Xl, key: str) -> None:
    answer = xl("create", "-q", "a.cfg", f"{key}={WITHOUT_EFFECT[key]}")
    assert answer.status == 0
    warnings = [line for line in answer.err.splitlines() if "has no effect" in line]
    of_label = "init_seclabel" if key == "seclabel" else key  # which xl takes it for
    assert len(warnings) == 1 and warnings[0].startswith(f"WARNING: a.cfg: {of_label} has no effect: ")
    assert len(xl.machine.guests) == 1
    assert "has no effect" not in xl("create", "-n", "-q", "a.cfg", f"{key}={WITHOUT_EFFECT[key]}").err


def test_keys_that_ask_for_what_every_domain_gets_are_no_surprise(xl: Xl) -> None:
    usual = ['cpus="all"', "cpu_weight=256", "cap=0", 'pool="Pool-0"', "max_event_channels=1023", 'tsc_mode="native"']
    assert "has no effect" not in xl("create", "-q", "a.cfg", *usual, "localtime=0", 'passthrough="disabled"').err


def test_a_domain_that_has_shut_down_already_is_not_waited_for(xl: Xl) -> None:
    xl.machine.end(xl.add("kept"), 3)
    assert xl("shutdown", "-w", "kept") == Answer(
        0,
        "",
        "Domain 1 has shut down already\nWaiting for 1 domains\nDomain 1 has been shut down, reason code 3\n",
    )
    answer = xl("reboot", "kept")
    assert answer.status == 1
    assert answer.err.splitlines()[-2:] == [
        "Domain 1 has shut down already and cannot be asked to reboot.",
        "reboot failed (rc=-6)",
    ]


def test_all_domains_are_asked_side_by_side_and_one_that_does_not_answer_stops_none(xl: Xl) -> None:
    for name in ("a", "deaf", "c", "d"):
        xl.add(name)
    all_asked = threading.Barrier(4, timeout=20)
    ask = xl.machine.request_shutdown

    def together(domid: int, request: ShutdownRequest) -> None:
        all_asked.wait()
        ask(domid, request)

    xl.machine.guests[2].acknowledges = False
    xl.machine.request_shutdown = together  # type: ignore[method-assign]
    answer = xl("shutdown", "-a", "-w")
    lines = answer.err.splitlines()
    assert answer.status == 1
    assert lines[:4] == [f"Shutting down domain {domid}" for domid in (1, 2, 3, 4)]
    assert lines[4:6] == ["Domain 2: the guest did not acknowledge the control request", "shutdown failed (rc=-9)"]
    assert lines[6:] == ["Waiting for 3 domains"] + [
        f"Domain {domid} has been shut down, reason code 0" for domid in (1, 3, 4)
    ]


@pytest.mark.parametrize("verb", ["destroy", "shutdown"])
def test_a_domain_between_two_lives_can_be_ended_by_its_name(xl: Xl, verb: str) -> None:
    between, go_on = threading.Event(), threading.Event()

    def pause(seconds: float) -> bool:
        between.set()
        go_on.wait()
        return False

    xl.supervisor.pause_between_lives = pause
    domid = xl.add("web", on_reboot=Action.RESTART)
    xl.supervisor.supervise(domid)
    xl.machine.end(domid, 1)
    assert between.wait(20)
    assert xl(verb, "web") == Answer(0, "", "")
    go_on.set()
    xl.supervisor.close()
    assert xl.machine.guests == {}
    assert xl(verb, "web") == Answer(1, "", "web is an invalid domain identifier (rc=-6)\n")


def test_a_new_domain_goes_again_when_the_command_is_interrupted_before_it_runs(xl: Xl) -> None:
    def interrupted(domid: int) -> None:
        raise KeyboardInterrupt

    xl.machine.unpause = interrupted  # type: ignore[method-assign]
    result = CliRunner().invoke(XlGroup(xl.connect), ["create", "-q", "a.cfg"])
    assert result.exit_code != 0
    assert xl.machine.guests == {}


def test_the_console_of_a_domain_that_has_just_gone_can_still_be_read(xl: Xl) -> None:
    domid = xl.add("short")
    info = xl.machine.guests[domid].info
    console = xl.machine.guests[domid].console
    console.print(b"its last words")
    xl.machine.destroy(domid)
    xl.machine.gone.append(info)
    xl.machine.open_console = lambda domid, number=0: console  # type: ignore[method-assign]
    assert xl("domid", "short").status == 1
    attached: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xenolith.cli.terminal.attach", lambda stream, escape: attached.append(stream))
        assert xl("console", "short").status == 0
    assert attached == [console]


HOSTILE = "a\x1b]0;title\x07\nb\udc80\u202e"
SHOWN = "a\\x1b]0;title\\x07\\nb\\udc80\\u202e"


def test_no_name_commands_the_terminal(xl: Xl) -> None:
    xl.add(HOSTILE)
    xl.machine.log = "(d1) \x1b[2J\n"
    for words in (["list"], ["list", "-v"], ["vm-list"], ["vcpu-list"], ["uptime"], ["uptime", "-s"], ["domname", "1"]):
        answer = xl(*words)
        assert answer.status == 0
        assert SHOWN in answer.out, words
    xl.add("csi\x9b2J", kernel="\x9b\x7f")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", xl("list", "-l").out)
    assert [each["config"]["c_info"]["name"] for each in json.loads(xl("list", "-l").out)][-1] == "csi\x9b2J"
    assert xl("dmesg").out == "(d1) \\x1b[2J\n"
    assert xl("top", "-b", "-i", "1", "-d", "0.1").out.count("\x1b") == 0
    assert "\x1b" not in xl("list", "\x1b[2J").err


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_no_failure(xl: Xl, word: str) -> None:
    assert xl(word) == Answer(0, usage(), "")
    assert xl("help").out == usage()


def test_the_version_is_told(xl: Xl) -> None:
    assert re.fullmatch(r"xl of xenolith [\d.]+\n", xl("--version").out)


def test_the_list_of_subcommands_is_what_debians_completion_takes_from_it(xl: Xl) -> None:
    """It takes the first word of every line that begins with one space."""
    words = [line.split()[0] for line in usage().splitlines() if re.match(r" \S", line)]
    assert words == list(SUBCOMMANDS)


def test_an_empty_machine_at_a_chosen_place_is_told_of_unless_domains_are_made(xl: Xl) -> None:
    def connect() -> Toolstack:
        return Toolstack(xl.machine, xl.supervisor, surprise="nobody was there")

    def err(*words: str) -> str:
        return CliRunner().invoke(XlGroup(connect), list(words)).stderr

    assert err("list") == "nobody was there\n"
    assert err("create", "-q", "a.cfg") == ""


def test_events_of_other_domains_do_not_disturb_a_wait(xl: Xl) -> None:
    xl.add("a")
    other = xl.add("b")

    def end_both(domid: int, request: object) -> None:
        xl.machine.end(other, 3)
        xl.machine.end(domid, 0)

    xl.machine.request_shutdown = end_both  # type: ignore[method-assign]
    lines = xl("shutdown", "-w", "a").err.splitlines()
    assert lines[-1] == "Domain 1 has been shut down, reason code 0"
    assert len(lines) == 3
