"""Extent-mapped disks: sectors are where the table says, also after it has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.dom0.disks import DiskError, DiskFormat, DiskSource
from xenolith.dom0.disks.extents import Extent, ExtentDisk, read_table
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.raw import RawDisk


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of 64 sectors; sector n of file f holds the bytes f*64+n."""
    paths = [tmp_path / f"{number}.img" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(bytes([number * 64 + sector]) * 512 for sector in range(64)))
    return paths


def sectors(disk: ExtentDisk, first: int, count: int) -> list[int]:
    """The byte each of these sectors is full of."""
    data = memoryview(bytearray(count * 512))
    disk.read(first * 512, [data[: count * 256], data[count * 256 :]])
    assert all(len(set(data[at : at + 512])) == 1 for at in range(0, len(data), 512))
    return list(data[::512])


def test_a_disk_of_parts_of_several_files(files: list[Path]) -> None:
    disk = ExtentDisk([Extent(4, files[1], 10), Extent(2, files[0], 0), Extent(3, files[1], 60)])
    assert disk.sectors == 9
    assert sectors(disk, 0, 9) == [74, 75, 76, 77, 0, 1, 124, 125, 126]
    disk.write(3 * 512, [memoryview(b"\xff" * 2048)])
    disk.flush()
    assert sectors(disk, 0, 9) == [74, 75, 76, 255, 255, 255, 255, 125, 126]
    assert files[0].read_bytes()[:1536] == b"\xff" * 1024 + b"\x02" * 512
    disk.close()


def test_two_disks_share_a_file_as_long_as_their_extents_do_not_overlap(files: list[Path]) -> None:
    one = ExtentDisk([Extent(8, files[0], 0)])
    other = ExtentDisk([Extent(8, files[0], 8)])
    with pytest.raises(DiskError, match="in use"):
        ExtentDisk([Extent(2, files[0], 15)])
    with pytest.raises(DiskError, match="in use"):
        RawDisk(files[0])
    one.close()
    other.close()
    RawDisk(files[0]).close()


def test_the_table_of_a_disk_in_use_changes(files: list[Path]) -> None:
    disk = ExtentDisk([Extent(4, files[0], 0), Extent(4, files[1], 0)])
    disk.remap([Extent(4, files[0], 0), Extent(4, files[2], 8), Extent(4, files[0], 20)])
    assert sectors(disk, 2, 10) == [2, 3, 136, 137, 138, 139, 20, 21, 22, 23]
    ExtentDisk([Extent(64, files[1], 0)]).close()  # nobody uses it any more
    with pytest.raises(DiskError, match="in use"):
        ExtentDisk([Extent(1, files[0], 1)])
    disk.close()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([(4, 0, 0), (4, 0, 2)], "share sector 2"),
        ([(4, 0, 62)], "has 64 sectors"),
        ([], "makes no disk"),
    ],
)
def test_a_table_that_is_refused_changes_nothing(
    files: list[Path], table: list[tuple[int, int, int]], message: str
) -> None:
    disk = ExtentDisk([Extent(4, files[0], 0), Extent(1, files[0], 40)])
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match=message):
        disk.remap(
            [Extent(1, files[1], 0), *(Extent(count, files[which], first) for count, which, first in table)][
                0 if table else 1 :
            ]
        )
    assert sectors(disk, 0, 5) == [0, 1, 2, 3, 40]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(DiskError, match="in use"):
        ExtentDisk([Extent(1, files[0], 40)])
    ExtentDisk([Extent(64, files[1], 0)]).close()
    disk.close()


def test_a_table_is_read_from_a_file(files: list[Path], tmp_path: Path) -> None:
    spaced = tmp_path / "with a blank.img"
    spaced.write_bytes(files[2].read_bytes())
    table = tmp_path / "disk.extents"
    table.write_text(f"# two parts\n4 0.img 8\n\n 2 {spaced}   3 # of another\n2 with a blank.img 10\n")
    disk = open_disk(DiskSource(path=table, format=DiskFormat.EXTENTS))
    assert isinstance(disk, ExtentDisk)
    assert sectors(disk, 0, 8) == [8, 9, 10, 11, 131, 132, 138, 139]
    disk.close()


@pytest.mark.parametrize("line", ["4 x", "4", "x a 0", "0 a 0", "-1 a 0", "1 a -1", "1  0", "٣ a 0"])
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    table = tmp_path / "t"
    table.write_text(f"# first\n{line}\n")
    with pytest.raises(DiskError, match="t:2"):
        read_table(table)


EXTENTS = st.tuples(st.integers(1, 16), st.integers(0, 2), st.integers(0, 48))


@given(st.lists(EXTENTS, min_size=1, max_size=6), st.data())
def test_every_range_is_what_the_table_says(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("extents")
    contents = [os.urandom(64 * 512) for _ in range(3)]
    for number, content in enumerate(contents):
        (directory / str(number)).write_bytes(content)
    try:
        disk = ExtentDisk([Extent(count, directory / str(which), first) for count, which, first in table])
    except DiskError as error:
        assert "share" in str(error)
        return
    whole = b"".join(contents[which][first * 512 : (first + count) * 512] for count, which, first in table)
    start = data.draw(st.integers(0, disk.sectors - 1))
    end = data.draw(st.integers(start + 1, disk.sectors))
    got = memoryview(bytearray((end - start) * 512))
    split = data.draw(st.integers(0, len(got)))
    disk.read(start * 512, [got[:split], got[split:]])
    assert got == whole[start * 512 : end * 512]
    disk.close()
