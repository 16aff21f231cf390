"""The Python API does what its page shows, and costs nothing until it is used."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import xenolith
import xenolith.aio
from people import GUESTS, person_in
from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.reader import parse_domain_config
from xenolith.toolstack.config.vif import Nic
from xenolith.toolstack.daemon.codec import decode, encode
from xenolith.toolstack.devices import shared_folder

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_examples_of_the_page_run_in_their_order(tmp_path: Path) -> None:
    for guest in ("hello.elf", "crash.elf"):
        (tmp_path / guest).write_bytes((GUESTS / guest).read_bytes())
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    with person_in(tmp_path) as person:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | person.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    assert "There is no guest with the name 'nobody'." in done.stdout
    assert (tmp_path / "crash.core").read_bytes()[:4] == b"\x7fELF"


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys, xenolith; print([name for name in sys.modules if name.startswith(('xenolith.', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_exists() -> None:
    for name in xenolith.__all__:
        assert getattr(xenolith, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(xenolith, "nonsense")  # noqa: B009


def test_waiting_ends_when_the_time_is_up_and_when_the_domain_goes() -> None:
    with xenolith.power_on(64, engine="unicorn") as machine:
        config = xenolith.DomainConfig("a", kernel=str(GUESTS / "hello.elf"), target_memory_kib=32 << 10)
        domain = machine.create(config)
        with pytest.raises(xenolith.Timeout, match="is paused"):
            domain.wait(timeout=0)
        domain.destroy()
        assert domain.wait(timeout=0) is xenolith.State.GONE


def test_every_error_is_a_toolstack_error(tmp_path: Path) -> None:
    (tmp_path / "bad.cfg").write_text("name = [\n")
    (tmp_path / "nameless.cfg").write_text('kernel = "x"\n')
    for words, what in {
        "cannot read": lambda: xenolith.load_config(tmp_path / "missing.cfg"),
        "config parsing error": lambda: xenolith.load_config(tmp_path / "bad.cfg"),
        "name must be specified": lambda: xenolith.load_config(tmp_path / "nameless.cfg"),
        "no engine 'steam'": lambda: xenolith.power_on(64, engine="steam"),
        "needs memory": lambda: xenolith.power_on(0),
        "no scheduler 'lottery'": lambda: xenolith.power_on(64, engine="unicorn", scheduler="lottery"),
        "cannot be used": lambda: xenolith.connect("/proc/nowhere/x.sock"),
        "cannot connect": lambda: xenolith.connect("nul\0byte"),
        "no socket": lambda: xenolith.connect(tmp_path / "bad.cfg"),
    }.items():
        with pytest.raises(xenolith.ToolstackError, match=words):
            what()


def test_memory_may_be_given_in_mebibytes() -> None:
    config = xenolith.DomainConfig("a", memory_mib=64)
    assert config.memory_kib == 64 << 10
    assert replace(config, name="b").memory_kib == 64 << 10
    assert decode(xenolith.DomainConfig, encode(config)) == config


@pytest.fixture
def machine() -> Iterator[xenolith.Machine]:
    with xenolith.power_on(64, engine="unicorn") as machine:
        yield machine


def hello(name: str = "hello") -> xenolith.DomainConfig:
    return xenolith.DomainConfig(name, kernel=str(GUESTS / "hello.elf"), memory_mib=16)


def test_a_console_is_read_until_words_come_and_loses_none(machine: xenolith.Machine) -> None:
    domain = machine.create(hello())
    with domain.console() as console:
        with pytest.raises(xenolith.Timeout, match="did not come"):
            console.expect("PV guest", timeout=0)
        domain.unpause()
        first = console.expect("PV", timeout=60)
        assert first.endswith(b"PV") and console.expect(b"guest", timeout=60) == b" guest"
        with pytest.raises(xenolith.ToolstackError, match="console ended before"):
            console.expect("never said", timeout=60)
        assert b"command line" in b"".join(console)


def test_events_of_one_domain_end_with_it(machine: xenolith.Machine) -> None:
    first, second = machine.create(hello("first")), machine.create(hello("second"))
    events = first.events()
    for domain in (second, first):
        domain.unpause()
        domain.wait(timeout=60)
        domain.destroy()
    assert [(event.kind, event.domid) for event in events] == [("shutdown", first.domid), ("destroyed", first.domid)]


def test_a_domain_is_renamed_and_found_by_name_and_by_number(machine: xenolith.Machine) -> None:
    domain = machine.create(hello())
    domain.rename("other")
    assert machine.domain("other").domid == machine.domain(domain.domid).domid == domain.domid
    with pytest.raises(xenolith.DomainNotFound):
        machine.domain(77)
    domain.sysrq("h")


def test_the_rules_of_all_interfaces_are_at_one_place(machine: xenolith.Machine) -> None:
    config = hello("web")
    config.nics = [Nic(0, rules="deny out; allow in tcp/80")]
    web = machine.create(config)
    machine.create(hello("alone"))
    assert {name: [str(rule.text) for rule in rules[0]] for name, rules in machine.network.rules.items()} == {
        "web": ["deny out", "allow in tcp/80"]
    }
    web.set_network_rules(0, "allow out")
    assert [rule.text for rule in machine.network.rules["web"][0]] == ["allow out"]
    assert machine.network.joined == []
    assert list(machine.network.nets) == ["web"]


def test_a_shared_folder_of_a_configuration_may_be_read_only() -> None:
    shares = '"tag=T,path=/p,security_model=none,ro=1", "tag=U,path=/p,security_model=none"'
    text = f'name="a"\nkernel="/k"\np9=[{shares}]\n'
    config, _ = parse_domain_config(text, "a.cfg", HostTopology.of_this_machine())
    assert [shared_folder(share, 0).writable for share in config.p9_shares] == [False, True]
    with pytest.raises(xenolith.ToolstackError, match="ro=yes is neither 0 nor 1"):
        parse_domain_config(text.replace("ro=1", "ro=yes"), "a.cfg", HostTopology.of_this_machine())


def test_asyncio_waits_for_many_domains_and_may_be_cancelled() -> None:
    async def life(machine: xenolith.aio.Machine, name: str) -> bytes:
        domain = await machine.create(hello(name))
        async with await domain.console() as console:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await console.read()  # it says nothing yet
            with pytest.raises(xenolith.Timeout):
                await domain.wait(timeout=0)
            await domain.unpause()
            said = await console.expect("PV guest", timeout=60)
            assert await domain.wait(timeout=60) is xenolith.State.SHUTDOWN
            said += b"".join([output async for output in console])
        await domain.destroy()
        assert await domain.wait() is xenolith.State.GONE
        return said

    async def main() -> None:
        async with await xenolith.aio.power_on(64, engine="unicorn") as machine:
            async with await machine.events() as events, asyncio.TaskGroup() as group:
                tasks = [group.create_task(life(machine, name)) for name in ("a", "b")]
            assert all(task.result().startswith(b"hello from a PV guest") for task in tasks)
            del events
        with pytest.raises(xenolith.Closed):
            await machine.domains()

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == before


def test_debian_is_a_function_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import xenolith.debian.packages
    from xenolith.toolstack import guests

    files = guests.PreparedGuest("linux", "6", "", Path("k"), Path("/elf"), Path("b"), Path("/cpio"), "quiet")
    monkeypatch.setattr(guests, "debian", lambda kernel, *, devices: files)
    config = xenolith.debian("web", memory_mib=64, vcpus=2, arguments="a=b")
    assert (config.name, config.kernel, config.ramdisk, config.cmdline) == ("web", "/elf", "/cpio", "quiet a=b")
    assert (config.memory_kib, config.vcpus) == (64 << 10, 2)
