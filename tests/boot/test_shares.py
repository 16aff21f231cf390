"""Shared folders in the stock Debian kernel: its own 9p and 9pnet_xen on our back-end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import xenolith
from dom0.ninep import needs_diod
from xenolith.toolstack.config.devices import P9Share
from xenolith.toolstack.guests import debian

from .conftest import DEADLINE_SECONDS, Run

pytestmark = [pytest.mark.slow, needs_diod]

INSIDE = """
cd /shared
cat given
mkdir -p made/deep && echo written >made/deep/file && chmod 4755 made/deep/file && mv made/deep made/moved
dd if=/dev/urandom of=large bs=1M count=4 2>/dev/null && sha256sum <large && cp large copy
cat up && echo ESCAPED
ln -s ../../secret own; ln -sfn .. folder; cat own folder/secret && echo ESCAPED
echo x >/fixed/new || echo refused; rm /fixed/given || echo refused; cat /fixed/given
mknod device c 1 3 || echo refused
cd / && umount /shared && mount -t 9p -o trans=xen,version=9p2000.L volume0 /shared && cat /shared/made/moved/file
exit 17
"""


def test_a_guest_reads_and_writes_a_folder_and_nothing_else(xenolith_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "given").write_text("from the host\n")
    (tmp_path / "secret").write_text("SECRET\n")
    (folder / "up").symlink_to(tmp_path / "secret")
    volumes = ["--volume", f"{folder}:/shared", "--volume", f"{folder}:/fixed:ro"]
    done = xenolith_run(*volumes, "--", "sh", "-c", INSIDE)
    assert done.returncode == 17
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "from the host" and lines[-1] == "written"
    assert lines.count("refused") == 3 and lines.count("from the host") == 2
    assert b"SECRET" not in done.stdout and b"ESCAPED" not in done.stdout
    assert (folder / "made/moved/file").read_text() == "written\n"
    assert stat.S_IMODE((folder / "made/moved/file").stat().st_mode) == 0o755
    assert (folder / "made/moved/file").stat().st_uid == os.getuid()
    assert (folder / "copy").read_bytes() == (folder / "large").read_bytes() and (
        folder / "large"
    ).stat().st_size == 4 << 20
    assert not (folder / "new").exists()


def test_a_domain_of_a_configuration_mounts_its_folder_by_tag_and_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host\n")
    guest = debian(devices=True)
    config = xenolith.DomainConfig(
        "shares",
        kernel=str(guest.elf),
        ramdisk=str(guest.initramfs),
        cmdline=guest.arguments,
        target_memory_kib=200 << 10,
    )
    config.p9_shares.append(P9Share("data", str(tmp_path), "none"))
    with xenolith.power_on(memory_mib=256) as machine:
        domain = machine.create(config)
        domain.unpause()
        mount = "mkdir -p /d && mount -t 9p -o trans=xen,version=9p2000.L data /d && cat /d/given && echo back >/d/new"
        assert domain.run(mount, timeout=DEADLINE_SECONDS).output == b"from the host\n"
        assert (tmp_path / "new").read_text() == "back\n"
        with pytest.raises(xenolith.ToolstackError, match="shared folder"):
            machine.client.save(domain.domid, tmp_path / "saved")
        assert domain.run("cat /d/new", timeout=60).output == b"back\n", "it goes on"
