"""A guest whose checkpoints are taken while it works goes on from any of them, its disk as it was then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from machines import Machine
from relocating import WITH_A_DISK, check, counting, follow, said
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.dom0.disks.overlay import create_overlay
from xenolith.dom0.migration.checkpoint import Checkpointer
from xenolith.dom0.migration.restore import Receiver
from xenolith.dom0.migration.series import Series, join, new_ident

pytestmark = pytest.mark.slow


def overlay_of(kept: str) -> Path:
    """What goes on from a disk as it was."""
    path = Path(kept + ".again")
    create_overlay(path, DiskSource(path=Path(kept), format=DiskFormat.OVERLAY), 2048)
    return path


def go_on_from_any_checkpoint(engine_name: str, tmp_path: Path, vcpus: int) -> None:
    create_overlay(tmp_path / "disk", None, 2048)
    source = DiskSource(path=tmp_path / "disk", format=DiskFormat.OVERLAY)
    spec = counting(vcpus, script=WITH_A_DISK, disks=[VbdSpec(number=51712, name="xvda", source=source)])
    machine = Machine(300, engine_name)
    taken: list[Series] = []
    with machine.dom0 as dom0:
        domain = dom0.create(spec)
        dom0.start(domain)
        follow(domain.console, "d 5")
        checkpointer = Checkpointer(dom0, domain)
        for number in range(1, 4):
            last = taken[-1] if taken else None
            base = (f"{last.number}.checkpoint", last.ident) if last else ("", "")
            series = Series(number, 0, new_ident(), *base, disks=((51712, str(tmp_path / f"disk.{number}")),))
            with (tmp_path / f"{number}.checkpoint").open("wb") as out:
                print(checkpointer.take(out, series, None), out.tell())
            taken.append(series)
            goal = said(domain.console.scrollback.decode(), "d")[-1] + 5
            follow(domain.console, f"d {goal}")
        check(follow(domain.console, f"d {goal + 1}").partition("\n")[2], "ad", first=None)
        checkpointer.close()
        dom0.destroy(domain)
        machine.check_invariants()
        sizes = [(tmp_path / f"{number}.checkpoint").stat().st_size for number in range(1, 4)]
        assert max(sizes[1:]) < sizes[0] / 2, "only what has changed"

        path = tmp_path / "2.checkpoint"
        with path.open("rb", buffering=0) as file, (tmp_path / "whole").open("wb") as out:
            join(file, out, lambda name: path.with_name(name).open("rb", buffering=0))
        (tmp_path / "whole").replace(path)
        (tmp_path / "1.checkpoint").unlink()
        for number in (3, 2):
            kept = overlay_of(taken[number - 1].disks[0][1])
            with (tmp_path / f"{number}.checkpoint").open("rb", buffering=0) as stream:
                receiver = Receiver(dom0.control, stream, lambda name: (tmp_path / name).open("rb", buffering=0))
                disk = replace(spec.disks[0], source=replace(source, path=kept))
                again = dom0.restore(replace(spec, image=None, disks=(disk,)), receiver.receive())
            machine.check_invariants()
            dom0.control.unpause(again.domid)
            goal = said(again.console.scrollback.decode(), "d")[-1] + 10
            check(follow(again.console, f"d {goal}").partition("\n")[2], "ad", first=None)
            dom0.destroy(again)


def test_a_guest_goes_on_from_any_checkpoint(engine_name: str, tmp_path: Path) -> None:
    go_on_from_any_checkpoint(engine_name, tmp_path, 2)
